"""`os/NAME/proc/` of a guest: tools that read /proc run on it and say what the guest said."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from guests.opened import opened
from guests.recording import Recording
from mounting import mounted
from support import require

from engine.oslayer import ProcFiles

SECONDS = 60


@pytest.fixture(scope="module")
def tree(guest) -> Iterator[tuple[Recording, Path]]:
    """The look-alike of one guest, mounted."""
    recording = guest("amd64-6.1-4level")
    with mounted(str(recording.image), limit=240) as mount:
        yield recording, mount.folder / "os/proc"


@contextlib.contextmanager
def proc_of(folder: Path) -> Iterator[None]:
    """psutil over a /proc of one's choice."""
    before, psutil.PROCFS_PATH = psutil.PROCFS_PATH, str(folder)
    try:
        yield
    finally:
        psutil.PROCFS_PATH = before


def field(recording: Recording, pid: int, number: int) -> str:
    """A field of the guest's own stat, counted as proc(5) does."""
    return recording.truth.text(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()[number - 3]


def test_psutil_finds_every_process_with_its_name_parent_and_times(tree):
    """What psutil asks the host's kernel instead (nice, affinity) is the host's."""
    recording, folder = tree
    layer = opened(recording)
    with proc_of(folder):
        found = {one.pid: one.info for one in psutil.process_iter(["name", "ppid", "cmdline", "uids", "num_threads",
                                                                   "create_time", "status"])}  # fmt: skip
    assert sorted(found) == layer.pids()
    for pid in recording.truth.pids:
        info = found[pid]
        truth = recording.truth
        assert info["ppid"] == int(field(recording, pid, 4))
        assert info["num_threads"] == int(field(recording, pid, 20))
        expected = [part.decode() for part in truth.get(f"/proc/{pid}/cmdline", b"").split(b"\0")[:-1]]
        assert (info["cmdline"] or []) == expected  # psutil gives None of a zombie
        uids = next(line for line in truth.text(f"/proc/{pid}/status").splitlines() if line.startswith("Uid:"))
        assert [*info["uids"]] == [int(part) for part in uids.split()[1:4]]
        assert info["create_time"] == pytest.approx(int(layer.info.boot_time) + int(field(recording, pid, 22)) / 100)


def test_psutil_reads_a_process_s_memory_files_and_maps(tree):
    recording, folder = tree
    keeper, truth = recording.truth.keeper, recording.truth
    with proc_of(folder):
        process = psutil.Process(keeper)
        pages = [int(part) for part in truth.text(f"/proc/{keeper}/statm").split()]
        assert process.memory_info()[:3] == tuple(page * truth.page_size for page in (pages[1], pages[0], pages[2]))
        assert process.cwd() == "/"
        assert len(process.threads()) == 3
        assert process.num_fds() == len(truth.text(f"/proc/{keeper}/fd").splitlines())
        assert process.environ()["KEEPER"] == "of secrets"


def test_psutil_tells_the_machine_s_memory_and_when_it_was_started(tree):
    recording, folder = tree
    with proc_of(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what memory does not tell
        assert psutil.boot_time() == int(opened(recording).info.boot_time)
        total = int(recording.truth.text("/proc/meminfo").split()[1]) << 10
        assert psutil.virtual_memory().total == total


def in_place_of_proc(folder: Path, *command: str) -> str:
    """What a command prints that sees the look-alike as /proc, and is itself a PID that the guest has."""
    require(os.geteuid() == 0, "only root may bind a mount in a namespace of its own")
    require(shutil.which("unshare") is not None and shutil.which(command[0]) is not None, f"no {command[0]} here")
    script = 'mount --bind "$0" /proc && exec "$@"'
    done = subprocess.run(
        ["unshare", "-mpf", "sh", "-c", script, str(folder), *command],
        capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ps_lists_what_the_guest_has(tree):
    recording, folder = tree
    lines = in_place_of_proc(folder, "ps", "-e", "-o", "pid=,ppid=,stat=,comm:40=").splitlines()
    found = {int(line.split()[0]): line.split(None, 3) for line in lines}
    assert sorted(found) == opened(recording).pids()
    moving = (1, recording.truth.keeper)  # they ran on after the guest had spoken
    for pid in recording.truth.pids:
        assert found[pid][1] == field(recording, pid, 4)
        assert pid in moving or found[pid][2][0] == field(recording, pid, 3)


def test_top_shows_the_guest_s_tasks(tree):
    recording, folder = tree
    shown = in_place_of_proc(folder, "top", "-b", "-n", "1", "-w", "200")
    assert f"Tasks: {len(opened(recording).pids()):3d} total" in shown


def test_every_file_of_the_look_alike_is_what_the_layer_tells(tree):
    recording, folder = tree
    layer, keeper = opened(recording), recording.truth.keeper
    files = layer.process(keeper).capability(ProcFiles)
    for name in files.names():
        assert (folder / str(keeper) / name).read_bytes() == files.read(name), name
    assert os.readlink(folder / str(keeper) / "exe") == recording.truth.text(f"/proc/{keeper}/exe").rstrip("\n")
    assert sorted(os.listdir(folder / str(keeper) / "fd")) == sorted(os.listdir(folder / str(keeper) / "fdinfo"))
    assert (folder / "sys/kernel/hostname").read_text() == recording.truth.text("/proc/sys/kernel/hostname")
    assert (folder / "version").read_text() == recording.truth.text("/proc/version")
    assert (folder / "kallsyms").read_bytes().count(b"\n") > 10_000


def test_the_whole_look_alike_can_be_walked(tree):
    _, folder = tree
    count = 0
    for where, folders, names in os.walk(folder):
        count += len(folders) + len(names)
        for name in names:
            path = os.path.join(where, name)
            if os.path.islink(path):
                with contextlib.suppress(OSError):  # of a kernel thread: as in /proc
                    os.readlink(path)
            elif name != "kallsyms":
                Path(path).read_bytes()
    assert count > 2000
