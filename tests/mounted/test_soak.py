"""Many clients at once for a while: nothing grows, nothing sticks, not one wrong byte.

CLOUDFS_TEST_SOAK_SECONDS says for how long (20 where it is not set).
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mounting import Mount, mounted

SECONDS = float(os.environ.get("CLOUDFS_TEST_SOAK_SECONDS", "20"))
PATTERN = bytes(range(256)) * 4096

TARGET = """
import ctypes, os, sys
pattern = ctypes.create_string_buffer(bytes(range(256)) * 4096, 1 << 20)
scratch = ctypes.create_string_buffer(64 * 4096)
print(ctypes.addressof(pattern), ctypes.addressof(scratch), flush=True)
sys.stdin.read()
"""

CLIENT = """
import errno, os, random, subprocess, sys
folder, kind, number, pid, pattern, scratch, image, seed = sys.argv[1:]
number, pattern, scratch = int(number), int(pattern), int(scratch)
chance = random.Random(int(seed))
want = bytes(range(256)) * 4096
allowed = {errno.ENOENT, errno.ESRCH, errno.EIO, errno.ENODEV, errno.EACCES, errno.EBUSY, errno.EPERM,
    errno.EINVAL, errno.EOPNOTSUPP, errno.ENXIO}

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
    descriptor = os.open(f"{folder}/os/native/processes/{pid}/mem", os.O_RDONLY)
    try:
        for _ in range(20):
            offset, size = chance.randrange(1 << 19), chance.choice((1, 8, 4096, 1 << 19))
            assert os.pread(descriptor, size, pattern + offset) == want[offset : offset + size], "a wrong byte"
    finally:
        os.close(descriptor)

def write():
    descriptor = os.open(f"{folder}/os/native/processes/{pid}/mem", os.O_RDWR)
    try:
        for _ in range(20):
            data = os.urandom(chance.choice((1, 8, 1000)))
            at = scratch + number * 4096 + chance.randrange(3000)
            assert os.pwrite(descriptor, data, at) == len(data)
            assert os.pread(descriptor, len(data), at) == data, "a wrong byte"
    finally:
        os.close(descriptor)

def instances():
    name = f"i{number}"
    if os.path.exists(f"{folder}/connector/{name}"):  # of a client that was killed
        os.rmdir(f"{folder}/connector/{name}")
    with open(f"{folder}/connector/new", "w") as new:
        new.write(f"{name} raw:{image}\\n")
    with open(f"{folder}/connector/{name}/phys_mem", "rb", buffering=0) as memory:
        assert memory.read(1 << 20) == want, "a wrong byte"
    os.rmdir(f"{folder}/connector/{name}")

def churn():
    child = subprocess.Popen(["sleep", "5"])
    try:
        for name in ("maps", "info", "status", "cmdline"):
            with open(f"{folder}/os/native/processes/{child.pid}/{name}", "rb") as file:
                file.read()
    finally:
        child.kill()
        child.wait()

act = {"walk": walk, "read": read, "write": write, "instances": instances, "churn": churn}[kind]
while True:
    try:
        act()
    except OSError as error:
        if error.errno not in allowed:
            raise
    os.write(1, b".")
"""
KINDS = ("walk", "read", "write", "instances", "churn", "walk", "read", "walk")


def anonymous(pid: int) -> int:
    """RssAnon in kB."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


class Clients:
    """Some of each kind. One that is killed is started again; `rest` gives what else ended them."""

    def __init__(self, mount: Mount, *words: object, seed: int) -> None:
        self.mount, self.words = mount, words
        self.chance = random.Random(seed)
        self.running: dict[int, tuple[subprocess.Popen[bytes], Path, float]] = {}
        for number in range(len(KINDS)):
            self.start(number)

    def start(self, number: int) -> None:
        log = self.mount.folder.parent / f"client-{number}-{self.chance.randrange(1 << 40)}"
        words = (self.mount.folder, KINDS[number], number, *self.words, self.chance.randrange(1 << 30))
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", CLIENT, *map(str, words)], stdout=output, stderr=subprocess.STDOUT
            )
        self.running[number] = (process, log, time.monotonic())

    def check(self) -> None:
        for number, (process, log, _) in self.running.items():
            assert process.poll() is None, f"the client {KINDS[number]} ended: {log.read_text()[-2000:]}"

    def kill_one(self) -> None:
        number = self.chance.randrange(len(KINDS))
        process, log, began = self.running[number]
        if time.monotonic() - began > 2:
            assert log.stat().st_size, f"the client {KINDS[number]} did nothing in {time.monotonic() - began:.1f} s"
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        self.start(number)

    def end(self) -> None:
        for process, _, _ in self.running.values():
            process.kill()
        for process, _, _ in self.running.values():
            process.wait(20)


@pytest.mark.slow
def test_many_clients_for_a_while_leave_the_daemon_as_it_was(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(PATTERN)
    target = subprocess.Popen([sys.executable, "-c", TARGET], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert target.stdout is not None
        pattern, scratch = target.stdout.readline().split()
        with mounted("--writable", "--self-check", limit=SECONDS * 1.5 + 90) as mount:
            curve = soak(mount, target.pid, pattern, scratch, image)
        print("\n".join(f"{at:6.1f} s  RssAnon {rss:6} kB  {files:3} descriptors" for at, rss, files in curve))
        # The first half is warm-up: caches, threads and arenas fill.
        half = len(curve) // 2
        early, late = (max(rss for _, rss, _ in part) for part in (curve[:half], curve[half:]))
        assert late < 1.1 * early + 2048, curve
        assert curve[-1][2] <= curve[0][2] + 8, "descriptors are left when everyone is gone"
    finally:
        target.kill()
        target.communicate(timeout=10)


def soak(mount: Mount, *words: object) -> list[tuple[float, int, int]]:
    """(seconds, RssAnon in kB, descriptors) over time; the first before, the last after all clients."""
    began = time.monotonic()
    curve = [(0.0, anonymous(mount.daemon.pid), descriptors(mount.daemon.pid))]
    clients = Clients(mount, *words, seed=1)
    try:
        while time.monotonic() - began < SECONDS:
            time.sleep(min(1.0, SECONDS / 20))
            clients.check()
            clients.kill_one()
            curve.append((time.monotonic() - began, anonymous(mount.daemon.pid), descriptors(mount.daemon.pid)))
    finally:
        clients.end()
    deadline = time.monotonic() + 20
    while descriptors(mount.daemon.pid) > curve[0][2] + 8 and time.monotonic() < deadline:
        os.listdir(mount.folder / "os/native/processes/1")  # what was kept is let go of when something else is kept
        time.sleep(0.5)
    curve.append((time.monotonic() - began, anonymous(mount.daemon.pid), descriptors(mount.daemon.pid)))
    return curve
