"""Many clients at once for a while: nothing grows, nothing sticks, not one wrong byte.

Sixteen clients walk at random, read, write, make and remove instances, start and end processes, and are killed in the
midst of it. CLOUDFS_TEST_SOAK_SECONDS says for how long (20 where it is not set):

    CLOUDFS_TEST_SOAK_SECONDS=1800 .venv/bin/python -m pytest --import-mode=importlib -s tests/mounted/test_soak.py
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounting import Mount, mounted

SECONDS = float(os.environ.get("CLOUDFS_TEST_SOAK_SECONDS", "20"))
PATTERN = bytes(range(256)) * 4096
STUCK = 60.0
"""Seconds without a step after which a client counts as stuck; the mount's own limit is 30."""
OWN = 4 * 4096
"""Bytes of the target's scratch memory that belong to one client."""
SETTLE = 30
"""Seconds for what was opened to be let go of."""

TARGET = f"""
import ctypes, os, sys
pattern = ctypes.create_string_buffer(bytes(range(256)) * 4096, 1 << 20)
scratch = ctypes.create_string_buffer(64 * {OWN})
print(ctypes.addressof(pattern), ctypes.addressof(scratch), flush=True)
sys.stdin.read()
"""

CLIENT = f"""
import errno, os, random, subprocess, sys
folder, kind, number, pid, pattern, scratch, image, seed = sys.argv[1:]
number, pattern = int(number), int(pattern)
own = int(scratch) + number * {OWN}
chance = random.Random(int(seed))
want = bytes(range(256)) * 4096
allowed = {{errno.ENOENT, errno.ESRCH, errno.EIO, errno.ENODEV, errno.EACCES, errno.EBUSY, errno.EPERM,
    errno.EINVAL, errno.EOPNOTSUPP, errno.ENXIO, errno.ESTALE}}

def walk():
    at = folder
    for _ in range(chance.randrange(2, 9)):
        with os.scandir(at) as found:
            names = [(entry.path, entry.is_dir(follow_symlinks=False)) for entry in found]
        if not names:
            return
        at, is_directory = chance.choice(names)
        if not is_directory:
            if not os.path.islink(at) and not at.endswith("new"):
                with open(at, "rb", buffering=0) as file:
                    file.read(chance.choice((1, 4096, 100_000)))
            return

def read():
    descriptor = os.open(f"{{folder}}/os/native/processes/{{pid}}/mem", os.O_RDONLY)
    try:
        for _ in range(20):
            offset, size = chance.randrange(1 << 19), chance.choice((1, 8, 4096, 1 << 19))
            assert os.pread(descriptor, size, pattern + offset) == want[offset : offset + size], "a wrong byte"
    finally:
        os.close(descriptor)

def regions():
    regions = f"{{folder}}/os/native/processes/{{pid}}/regions"
    for name in os.listdir(regions):
        start, stop = (int(word, 16) for word in name.split(".")[0].split("-"))
        if start <= pattern < stop:
            with open(f"{{regions}}/{{name}}", "rb", buffering=0) as file:
                assert os.pread(file.fileno(), 1 << 20, pattern - start) == want, "a wrong byte"

def tools():
    process = f"{{folder}}/os/native/processes/{{chance.choice((os.getpid(), pid))}}"
    command = chance.choice(("ls -lR {{}}", "find {{}}", "cat {{}}/maps {{}}/info", "grep -c x {{}}/maps",
        "head -c 100000 {{}}/regions/*stack*", "tar cf - {{}}/info {{}}/maps"))
    subprocess.run(command.replace("{{}}", process), shell=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, timeout=120)

kept = bytearray(os.urandom({OWN}))

def write():
    descriptor = os.open(f"{{folder}}/os/native/processes/{{pid}}/mem", os.O_RDWR)
    try:
        assert os.pwrite(descriptor, kept, own) == len(kept)
        for _ in range(20):
            data = os.urandom(chance.choice((1, 8, 1000, 5000)))
            at = chance.randrange(len(kept) - len(data))
            assert os.pwrite(descriptor, data, own + at) == len(data)
            kept[at : at + len(data)] = data
        assert os.pread(descriptor, len(kept), own) == kept, "a wrong byte"
    finally:
        os.close(descriptor)
    with open(f"/proc/{{pid}}/mem", "rb", buffering=0) as memory:  # what the host itself says
        assert os.pread(memory.fileno(), len(kept), own) == kept, "a byte that did not arrive"

def instances():
    name = f"i{{number}}"
    if os.path.exists(f"{{folder}}/connector/{{name}}"):  # of a client that was killed
        os.rmdir(f"{{folder}}/connector/{{name}}")
    with open(f"{{folder}}/connector/new", "w") as new:
        new.write(f"{{name}} raw:{{image}}\\n")
    with open(f"{{folder}}/connector/{{name}}/phys_mem", "rb", buffering=0) as memory:
        assert memory.read(1 << 20) == want, "a wrong byte"
    os.rmdir(f"{{folder}}/connector/{{name}}")

def churn():
    child = subprocess.Popen(["sleep", "5"])
    try:
        for name in ("maps", "info", "status", "cmdline"):
            with open(f"{{folder}}/os/native/processes/{{child.pid}}/{{name}}", "rb") as file:
                file.read()
    finally:
        child.kill()
        child.wait()

act = globals()[kind]
while True:
    try:
        act()
    except OSError as error:
        if error.errno not in allowed:
            raise
    os.write(1, b".")
"""
KINDS = (*["walk"] * 4, *["read"] * 2, *["write"] * 3, *["instances"] * 2, *["churn"] * 3, "regions", "tools")


@dataclass
class Sample:
    """The daemon at one moment."""

    at: float
    """Seconds since the begin."""
    anonymous: int
    """RssAnon in kB."""
    descriptors: int
    steps: int
    """Of all clients."""
    killed: int


def anonymous(pid: int) -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class Client:
    """A process that acts on the mount, and writes a byte for each step."""

    def __init__(self, mount: Mount, number: int, words: tuple[object, ...], seed: int, life: int) -> None:
        self.kind = KINDS[number]
        self.log = mount.folder.parent / f"client-{number}-{life}"
        arguments = (mount.folder, self.kind, number, *words, seed)
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", CLIENT, *map(str, arguments)], stdout=output, stderr=subprocess.STDOUT
            )
        self.steps = 0
        self.since = time.monotonic()

    def check(self) -> None:
        """It runs, and has done something lately."""
        assert self.process.poll() is None, f"the client {self.kind} ended: {self.log.read_text()[-2000:]}"
        steps = self.log.stat().st_size
        if steps != self.steps:
            self.steps, self.since = steps, time.monotonic()
        stuck = time.monotonic() - self.since
        assert stuck < STUCK, f"the client {self.kind} has done nothing for {stuck:.0f} s after {steps} steps"

    def kill(self) -> int:
        """End it wherever it is; gives its steps."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(STUCK)  # in vain where it waits for an answer that never comes
        steps = self.log.stat().st_size
        self.log.unlink()
        return steps


class Clients:
    """Sixteen of them. One that is killed is started again."""

    def __init__(self, mount: Mount, *words: object, seed: int) -> None:
        self.mount, self.words = mount, words
        self.chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.killed = 0
        self.running = [self.new(number) for number in range(len(KINDS))]

    def new(self, number: int) -> Client:
        return Client(self.mount, number, self.words, self.chance.randrange(1 << 30), self.killed)

    def check(self) -> None:
        for client in self.running:
            client.check()

    def kill_one(self) -> None:
        number = self.chance.randrange(len(KINDS))
        self.done[KINDS[number]] += self.running[number].kill()
        self.killed += 1
        self.running[number] = self.new(number)

    def steps(self) -> int:
        return self.done.total() + sum(client.steps for client in self.running)

    def end(self) -> None:
        for client in self.running:
            client.process.kill()
        for client in self.running:
            self.done[client.kind] += client.kill()


@pytest.mark.slow
def test_many_clients_for_a_while_leave_the_daemon_as_it_was(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    target = subprocess.Popen([sys.executable, "-c", TARGET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert target.stdout is not None
        pattern, scratch = target.stdout.readline().split()
        # Not the allocator that -X dev brings: its blocks are larger, and it is not what users run.
        environment = {"PYTHONMALLOC": "pymalloc"}
        with mounted("--writable", "--self-check", limit=SECONDS * 1.5 + 240, environment=environment) as mount:
            curve = soak(mount, target.pid, pattern, scratch, image)
        # The first third is warm-up: what is imported, threads, arenas, the round in which directories are forgotten.
        warm = curve[len(curve) // 3 : -1]
        early, late = warm[: len(warm) // 2], warm[len(warm) // 2 :]
        slack = 0 if SECONDS >= 600 else 4096
        highest = max(sample.anonymous for sample in early)
        assert max(sample.anonymous for sample in late) < 1.1 * highest + slack, curve
        most = max(sample.descriptors for sample in early)
        assert max(sample.descriptors for sample in late) <= 1.1 * most + 16, curve
        assert curve[-1].descriptors <= curve[0].descriptors + 4, "descriptors are left when everyone is gone"
    finally:
        target.kill()
        target.communicate(timeout=10)


def soak(mount: Mount, *words: object) -> list[Sample]:
    """The daemon every second; the first before, the last after all clients. `--self-check` is made at the end."""
    began = last = time.monotonic()
    clients = Clients(mount, *words, seed=1)
    curve: list[Sample] = []

    def look(*, said: bool) -> None:
        pid = mount.daemon.pid
        curve.append(
            Sample(time.monotonic() - began, anonymous(pid), descriptors(pid), clients.steps(), clients.killed)
        )
        if said:
            print(curve[-1], flush=True)

    look(said=True)
    try:
        while time.monotonic() - began < SECONDS:
            time.sleep(min(1.0, SECONDS / 20))
            clients.check()
            clients.kill_one()
            due = time.monotonic() - last > max(1.0, SECONDS / 60)
            last = time.monotonic() if due else last
            look(said=due)
    finally:
        clients.end()
        print(dict(clients.done), flush=True)
    deadline = time.monotonic() + SETTLE
    while descriptors(mount.daemon.pid) > curve[0].descriptors + 4 and time.monotonic() < deadline:
        os.listdir(mount.folder / "os/native/processes/1")  # what was kept is let go of when something else is kept
        time.sleep(0.5)
    look(said=True)
    return curve
