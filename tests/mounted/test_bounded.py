"""Walks, cut files and killed daemons: memory stays bounded, and clients get errors, no signals."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dead_filesystem import abort, guarded
from mounting import is_mounted, mounted, require_fuse

LIMIT = 80

WIDE_TREE = """
import signal, stat, sys
from cloudfs import mount, pruning, resting
from cloudfs.node import Attributes, Directory, File

class Leaf(File):
    __slots__ = ("number",)
    def __init__(self, number): self.number = number
    @property
    def identity(self): return ("leaf", self.number)
    def attributes(self): return Attributes(stat.S_IFREG | 0o444, 1)
    def open(self, flags): raise PermissionError

class Wide(Directory):
    __slots__ = ("number",)
    def __init__(self, number): self.number = number
    @property
    def identity(self): return ("wide", self.number)
    def children(self):
        for index in range(int(sys.argv[2]) if self.number is None else 1000):
            yield str(index), Wide(index) if self.number is None else Leaf((self.number, index))

class Rest(resting.Rest):
    async def _rest(self):
        await super()._rest()
        print("rested", len(self._operations.inodes), flush=True)

def report(number, frame):
    made[0].inodes.check()
    print("inodes", len(made[0].inodes), flush=True)

class Operations(mount.TreeOperations):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        made.append(self)

made = []
signal.signal(signal.SIGUSR1, report)
mount.TreeOperations = Operations
pruning.ROUND = float(sys.argv[5])
mount.Rest = Rest
options = mount.MountOptions(self_check=True, rest_after=float(sys.argv[3]), stall_limit=float(sys.argv[4]))
mount.mount(Wide(None), sys.argv[1], options, ready=lambda: print("ready", flush=True))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory to mount on."""
    require_fuse()
    top = Path(tempfile.mkdtemp(prefix="cloudfs-test-"))
    with guarded(LIMIT, top):
        yield top
        if is_mounted(top):
            abort(top)
    top.rmdir()


def resident(pid: int, name: str = "VmRSS") -> int:
    """MiB."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) >> 10


@contextlib.contextmanager
def wide_tree(
    folder: Path, directories: int, *, rest_after: float = 10, stall_limit: float = 10, each_round: float = 30
) -> Iterator[subprocess.Popen[str]]:
    """A mount of `directories` of 1000 files each.

    Its daemon prints «rested» or, at SIGUSR1, «inodes», and how many nodes it knows.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = map(str, (folder, directories, rest_after, stall_limit, each_round))
    daemon = subprocess.Popen(
        [sys.executable, "-c", WIDE_TREE, *words], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n"
        yield daemon
        daemon.terminate()
        assert daemon.wait(20) == 0
    finally:
        daemon.kill()
        daemon.communicate(timeout=10)


def said(daemon: subprocess.Popen[str], what: str) -> int:
    """The nodes that there are as the daemon says it; the guard ends a wait in vain."""
    assert daemon.stdout is not None
    word, number = daemon.stdout.readline().split()
    assert word == what
    return int(number)


def switches(daemon: subprocess.Popen[str]) -> int:
    """How often its threads were put on a CPU."""
    tasks = Path(f"/proc/{daemon.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[2]) for task in tasks)


@pytest.mark.parametrize("directories", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_walks_over_many_entries_are_bounded_and_afterwards_the_daemon_is_as_small_as_before(
    folder: Path, directories: int
) -> None:
    with wide_tree(folder, directories, rest_after=0.5) as daemon:
        os.listdir(folder)
        before, after = resident(daemon.pid), []
        for _ in range(2):
            found = subprocess.run(["find", str(folder)], capture_output=True, timeout=70, check=True)
            assert found.stdout.count(b"\n") == 1 + directories * 1001
            after.append(resident(daemon.pid))
        assert resident(daemon.pid, "VmHWM") < 300
        assert after[1] < 1.5 * after[0]
        assert said(daemon, "rested") == 1
        assert resident(daemon.pid) < 1.5 * before


def test_where_somebody_stands_and_what_is_open_keeps_its_name_when_all_else_is_forgotten(folder: Path) -> None:
    with wide_tree(folder, 20, rest_after=0.1, stall_limit=0.4) as daemon:
        standing = subprocess.Popen(
            [sys.executable, "-c", "import os; input(); print(os.getcwd())"],
            cwd=folder / "3", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        opened = os.open(folder / "4", os.O_RDONLY | os.O_DIRECTORY)
        try:
            subprocess.run(["find", str(folder)], capture_output=True, timeout=20, check=True)
            assert said(daemon, "rested") == 3
            assert os.readlink(f"/proc/self/fd/{opened}") == f"{folder}/4"
            assert standing.communicate("\n", timeout=10)[0] == f"{folder}/3\n"
            assert len(os.listdir(opened)) == 1000
            assert len(os.listdir(folder / "5")) == 1000
        finally:
            os.close(opened)
            standing.kill()
            standing.communicate(timeout=10)


def test_when_it_has_come_to_rest_the_daemon_does_nothing(folder: Path) -> None:
    with wide_tree(folder, 20, rest_after=0.1, stall_limit=0.4) as daemon:
        subprocess.run(["find", str(folder)], capture_output=True, timeout=20, check=True)
        assert said(daemon, "rested") == 1
        time.sleep(1.0)  # the FORGETs may have woken the watchdog
        before = switches(daemon)
        time.sleep(1.0)
        assert switches(daemon) == before


def test_while_others_work_what_nobody_uses_is_forgotten(folder: Path) -> None:
    with wide_tree(folder, 20, each_round=0.2) as daemon:
        subprocess.run(["find", str(folder)], capture_output=True, timeout=20, check=True)
        known, deadline = 20_000, time.monotonic() + 20
        while known > 5000 and time.monotonic() < deadline:
            time.sleep(0.05)
            daemon.send_signal(signal.SIGUSR1)
            assert len(os.listdir(folder / "7")) == 1000
            known = said(daemon, "inodes")
        assert known <= 5000


def test_a_file_cut_under_four_readers_gives_errors_and_no_signal(tmp_path: Path) -> None:
    image = tmp_path / "image"
    whole = os.urandom(4 << 20)
    image.write_bytes(whole)
    stop = threading.Event()
    wrong: list[object] = []
    reads = [0]

    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            while not stop.is_set():
                for offset in range(0, len(whole), 1 << 18):
                    try:
                        got = os.pread(file.fileno(), 1 << 18, offset)
                    except OSError as error:
                        if error.errno not in (errno.EIO, errno.EFAULT):
                            wrong.append(error)
                        continue
                    want = whole[offset : offset + len(got)]
                    if got != want and any(got[i] not in (0, want[i]) for i in range(0, len(got), 509)):
                        wrong.append(offset)
                    reads[0] += 1

    with mounted(f"raw:{image}", limit=LIMIT) as mount:
        path = mount.folder / "connector/raw/phys_mem"
        threads = [threading.Thread(target=read, args=(path,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        with image.open("r+b") as file:
            for _ in range(20):
                file.truncate(12345)
                time.sleep(0.02)
                file.seek(0)
                file.write(whole)
                file.flush()
                time.sleep(0.02)
        stop.set()
        for thread in threads:
            thread.join(20)
        assert not wrong
        assert reads[0]
        assert path.read_bytes() == whole


def start(folder: Path, image: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cloudfs", "mount", "-o", "noauto_unmount", f"raw:{image}", str(folder)]
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    until = time.monotonic() + 15
    while not (folder / "README").exists():
        assert daemon.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    return daemon


def test_a_daemon_killed_under_load_gives_errors_and_can_be_cleared_and_mounted_again(
    folder: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 << 20))
    daemon = start(folder, image)
    loop = f"while cat {folder}/connector/raw/phys_mem >/dev/null; do ls -lR {folder} >/dev/null; done"
    readers = [subprocess.Popen(["bash", "-c", loop], stderr=subprocess.DEVNULL) for _ in range(4)]
    try:
        time.sleep(0.5)
        assert all(reader.poll() is None for reader in readers)
        daemon.kill()
        daemon.wait(10)
        assert [reader.wait(10) for reader in readers]
        umount = [sys.executable, "-m", "cloudfs", "umount", str(folder)]
        assert subprocess.run(umount, timeout=20, check=False).returncode == 0
        assert not is_mounted(folder)
        daemon = start(folder, image)
        assert (folder / "connector/raw/phys_mem").read_bytes() == image.read_bytes()
        daemon.terminate()
        assert daemon.wait(15) == 0
    finally:
        for process in (daemon, *readers):
            process.kill()
            process.wait(10)
