"""A real mount of a tree that is made up, in a process of its own; every mount has a time limit."""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import made_up_tree
import pytest
from made_up_tree import BUGS, GOOD_NAMES, MEMORY_SIZE, pattern
from mounting import require_unmounting_helper
from support import require, require_abort

from cloudfs.mountpoint import (
    MNT_DETACH,
    MNT_FORCE,
    detach,
    find_mount,
    is_dead,
    is_mounted,
    prepare,
    umount2,
    unmount,
)
from engine.errors import EngineError, TargetBusyError

LIMIT = 60
"""Seconds after which a mount is aborted from outside."""


class Mounted:
    """The daemon and its mount point. `path / name` is a file of the mount."""

    def __init__(self, path: Path, *words: str) -> None:
        self.path = path
        self.log = path.with_name(path.name + ".log")
        with self.log.open("w") as log:
            self.daemon = subprocess.Popen(
                [sys.executable, made_up_tree.__file__, str(path), *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._guard = threading.Timer(LIMIT, self._abort)
        self._guard.daemon = True
        self._guard.start()
        assert self.daemon.stdout is not None
        self.ready = self.daemon.stdout.readline() == "ready\n"

    def _abort(self) -> None:
        for flags in (MNT_FORCE, MNT_DETACH):
            with contextlib.suppress(OSError):
                umount2(str(self.path), flags)
        self.daemon.kill()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def end(self) -> None:
        """Stop the daemon and see that nothing is left."""
        self.daemon.terminate()
        try:
            self.daemon.wait(20)
        except subprocess.TimeoutExpired:
            self._abort()
            self.daemon.wait(20)
            raise
        finally:
            self._guard.cancel()
            if self.daemon.stdout is not None:
                self.daemon.stdout.close()
            if is_mounted(self.path):
                with contextlib.suppress(OSError, EngineError):
                    detach(str(self.path))

    def said(self) -> str:
        return self.log.read_text()

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.pid}/task"))

    def inodes(self) -> int:
        """How many inodes the daemon says that the kernel knows."""
        assert self.daemon.stdout is not None
        self.daemon.send_signal(signal.SIGUSR1)
        (self.path / "text").read_text()  # a signal is seen with the next request
        return int(self.daemon.stdout.readline().removeprefix("inodes "))


Mounter = Callable[..., Mounted]


@pytest.fixture
def mounter() -> Iterator[Mounter]:
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse cannot be used here")
    top = Path(tempfile.mkdtemp(prefix="cloudfs-test-"))
    made: list[Mounted] = []

    def make(*words: str, name: str = "mount") -> Mounted:
        with contextlib.suppress(OSError):  # there already, maybe as a dead mount
            (top / name).mkdir()
        made.append(Mounted(top / name, *words))
        return made[-1]

    try:
        yield make
    finally:
        for mounted in reversed(made):
            mounted.end()
            assert not is_mounted(mounted.path)
        shutil.rmtree(top)


@pytest.fixture(scope="module")
def shared() -> Iterator[Mounted]:
    """One mount for all tests that change nothing; it must end well."""
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse cannot be used here")
    top = Path(tempfile.mkdtemp(prefix="cloudfs-test-"))
    (top / "mount").mkdir()
    mounted = Mounted(top / "mount", "files=3000", "timeout=20")
    try:
        assert mounted.ready, mounted.said()
        yield mounted
        assert (mounted / "text").read_text() == "hello\n"
        mounted.end()
        assert mounted.daemon.returncode == 0
        assert "ERROR:pyfuse3" not in mounted.said()
    finally:
        mounted.end()
        shutil.rmtree(top)


def shell(command: str, mounted: Mounted, limit: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], cwd=mounted.path, capture_output=True, text=True, timeout=limit, check=False
    )


def errno_of(call: Callable[[], object]) -> int:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno or 0


def until(condition: Callable[[], bool], limit: float = 10) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


# -- what tools see ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["cat {}", "dd if={} bs=64K status=none", "tail -c +1 {}", "xxd -r <(xxd {})"])
def test_tools_read_the_bytes_of_the_memory(shared: Mounted, command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command.format("memory")], cwd=shared.path, capture_output=True, timeout=60, check=True
    )
    assert done.stdout == pattern(MEMORY_SIZE)


def test_reads_at_any_offset_and_of_any_size_are_right(shared: Mounted) -> None:
    whole = pattern(MEMORY_SIZE)
    with (shared / "memory").open("rb", buffering=0) as file:
        for offset in (0, 1, 4095, 4096, 1 << 20, MEMORY_SIZE - 1, MEMORY_SIZE, MEMORY_SIZE + 4096, 1 << 62):
            for size in (1, 8, 4097, 1 << 20, 3 << 20):
                assert os.pread(file.fileno(), size, offset) == whole[offset : offset + size]


def test_a_hole_gives_what_comes_before_it_and_then_eio(shared: Mounted) -> None:
    with (shared / "holed").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 8192, 4000) == pattern(4096)[4000:]
        assert errno_of(lambda: os.pread(file.fileno(), 1, 4096)) == errno.EIO
        assert os.pread(file.fileno(), 4, 8192) == pattern(8196)[8192:]


def test_ls_lists_every_name_with_its_attributes(shared: Mounted) -> None:
    done = shell("ls -la many", shared)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 3000 + 3
    assert done.stdout.splitlines()[-1].split()[4:5] == ["5"]


def test_find_walks_the_tree_and_follows_nothing_twice(shared: Mounted) -> None:
    done = shell("find nested bugs many -type f | wc -l", shared)
    files = 1 + 3000 + len([name for name in os.listdir(shared / "bugs") if not name.startswith("link-")])
    assert int(done.stdout) in (files, files - 2)  # two of the bugs have no attributes to be told by


def test_names_that_can_be_are_listed_and_can_be_read(shared: Mounted) -> None:
    assert sorted(os.listdir(shared / "bad names")) == sorted(GOOD_NAMES)
    for name in GOOD_NAMES:
        assert (shared / "bad names" / name).read_text() == "good\n"


def test_a_broken_child_does_not_hide_the_others(shared: Mounted) -> None:
    done = shell("ls -l 'bad listing'", shared)
    assert done.returncode == 1
    assert [line.split()[-1] for line in done.stdout.splitlines()[1:]] == ["broken", "fault", "first", "last", "wrong"]
    assert (shared / "bad listing" / "last").read_text() == "9\n"


def test_a_link_leads_on(shared: Mounted) -> None:
    assert os.readlink(shared / "link") == "nested/deep"
    assert (shared / "link" / "text").read_text() == "deep\n"


def test_df_and_stat_work(shared: Mounted) -> None:
    done = shell("df . && stat -f . && stat text", shared)
    assert done.returncode == 0
    assert "cloudfs" in done.stdout
    found = (shared / "text").stat()
    assert (found.st_uid, found.st_gid, found.st_size, found.st_nlink) == (os.getuid(), os.getgid(), 6, 1)


@pytest.mark.parametrize("name", sorted(BUGS))
def test_a_bug_in_a_node_is_an_error_for_its_reader_alone(shared: Mounted, name: str) -> None:
    expected = errno.EOPNOTSUPP if name == "enosys" else errno.EIO
    path = shared / "bugs" / name
    assert errno_of(path.read_bytes) == expected
    with path.open("r+b", buffering=0) as file:
        assert errno_of(lambda: file.write(b"x")) == expected
    assert (shared / "text").read_text() == "hello\n"


@pytest.mark.parametrize("name", ["open-raises", "open-returns-str", "attributes-raise", "wrong-attributes"])
def test_a_bug_in_opening_is_eio(shared: Mounted, name: str) -> None:
    assert errno_of((shared / "bugs" / name).read_bytes) == errno.EIO


@pytest.mark.parametrize("name", ["link-nul", "link-empty", "link-long", "link-none"])
def test_a_bug_in_a_link_is_eio(shared: Mounted, name: str) -> None:
    assert errno_of(lambda: os.readlink(shared / "bugs" / name)) == errno.EIO


# -- what cannot be done -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo hi > memory", "Operation not permitted"),
        ("echo hi >> memory", "Operation not permitted"),
        ("truncate -s 0 memory", "Operation not permitted"),
        ("truncate -s 99 read-only", "Read-only file system"),
        ("cp text memory", "Operation not permitted"),
        ("rm -f text", "Operation not permitted"),
        ("mv text other", "Operation not permitted"),
        ("mkdir new", "Operation not permitted"),
        ("touch new", "Operation not permitted"),
        ("echo x > new", "Operation not permitted"),
        ("ln -s text new", "Operation not permitted"),
        ("ln text new", "Operation not permitted"),
        ("mkfifo new", "Operation not permitted"),
        ("chmod 777 memory", "Operation not permitted"),
        ("chown 1 memory", "Operation not permitted"),
        ("touch memory", "Operation not permitted"),
        ("chmod 777 control", "Operation not permitted"),
        ("rmdir nested", "Operation not permitted"),
        ("rmdir instances/busy", "Device or resource busy"),
        ("rmdir nothing", "No such file"),
        ("dd if=text of=read-only conv=notrunc", "Read-only file system"),
        ("./text", "Permission denied"),
    ],
)
def test_what_is_refused_says_why(shared: Mounted, command: str, words: str) -> None:
    require(os.geteuid() == 0, "another user is refused by the modes already")
    done = shell(command, shared)
    assert done.returncode != 0
    assert words in done.stderr


def test_extended_attributes_are_not_there(shared: Mounted) -> None:
    assert errno_of(lambda: os.getxattr(shared / "text", "user.x")) == errno.EOPNOTSUPP
    assert errno_of(lambda: os.listxattr(shared / "text")) == errno.EOPNOTSUPP


# -- writing -------------------------------------------------------------------------------------------------


_numbers = itertools.count()


def made(mounted: Mounted, kind: str) -> Path:
    """A node of its own: `control`, `memory` or `instances`."""
    return mounted / "made" / f"{kind}{next(_numbers)}"


def test_writes_arrive_where_they_were_aimed(shared: Mounted) -> None:
    path = made(shared, "memory")
    assert shell(f"printf abc | dd of={path} bs=1 seek=5000 conv=notrunc status=none", shared).returncode == 0
    with path.open("r+b", buffering=0) as file:
        assert os.pread(file.fileno(), 5, 4999) == pattern(5000)[4999:] + b"abc" + pattern(5004)[5003:]
        assert os.pwrite(file.fileno(), b"y" * (2 << 20), 0) == 2 << 20
    whole = path.read_bytes()
    assert whole == b"y" * (2 << 20) + pattern(MEMORY_SIZE)[2 << 20 :]


def test_a_write_behind_the_end_is_eio(shared: Mounted) -> None:
    with made(shared, "memory").open("r+b", buffering=0) as file:
        assert errno_of(lambda: os.pwrite(file.fileno(), b"x", MEMORY_SIZE)) == errno.EIO


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("echo one > {}", "# one\n"),
        ("echo one >> {0}; echo two >> {0}", "# one\n# two\n"),
        ("printf 'one\\ntwo' > {}", "# one\n# two\n"),
        ("printf one > {}", "# one\n"),
        ("echo one | tee {} >/dev/null", "# one\n"),
        ("echo one | dd of={} status=none", "# one\n"),
        ("cp nested/deep/text {}", "# deep\n"),
        ("touch {0}; truncate -s 0 {0}; : > {0}", ""),
    ],
)
def test_commands_reach_a_control_file(shared: Mounted, command: str, lines: str) -> None:
    control = made(shared, "control")
    done = shell(command.format(control), shared)
    assert done.returncode == 0, done.stderr
    assert control.read_text() == lines


def test_a_refused_command_fails_the_write(shared: Mounted) -> None:
    done = shell(f"echo fail > {made(shared, 'control')}", shared)
    assert done.returncode == 1
    assert "File exists" in done.stderr


def test_a_refused_rest_fails_the_close(shared: Mounted) -> None:
    descriptor = os.open(made(shared, "control"), os.O_WRONLY)
    os.write(descriptor, b"fail")
    assert errno_of(lambda: os.close(descriptor)) == errno.EEXIST


def test_rmdir_removes_an_instance(shared: Mounted) -> None:
    instances = made(shared, "instances")
    assert os.listdir(instances) == ["idle", "busy"]
    os.rmdir(instances / "idle")
    assert os.listdir(instances) == ["busy"]
    assert not (instances / "idle").exists()


# -- freshness -----------------------------------------------------------------------------------------------


def test_a_read_of_live_memory_is_never_stale_on_a_held_descriptor(shared: Mounted) -> None:
    path = made(shared, "memory")
    with path.open("rb", buffering=0) as reader, path.open("r+b", buffering=0) as writer:
        for letter in (b"a", b"b"):
            os.pwrite(writer.fileno(), letter, 100)
            assert os.pread(reader.fileno(), 1, 100) == letter


def test_immutable_files_can_be_mapped_and_live_ones_not_shared(shared: Mounted) -> None:
    with (shared / "cached").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[:] == (shared / "cached").read_bytes()
    with (shared / "memory").open("rb") as file:
        assert errno_of(lambda: mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) == errno.ENODEV


def test_a_file_cut_under_its_mapping_is_eio_and_the_mount_lives(mounter: Mounter, tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(pattern(1 << 20))
    mounted = mounter(f"backing={backing}")
    with (mounted / "mapped").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 100, 500_000) == pattern(500_100)[500_000:]
        os.truncate(backing, 4096)
        assert errno_of(lambda: os.pread(file.fileno(), 100, 500_000)) == errno.EIO
        assert os.pread(file.fileno(), 100, 0) == pattern(100)
    assert (mounted / "text").read_text() == "hello\n"


def test_a_name_that_became_something_else_is_seen_as_such(shared: Mounted) -> None:
    first = {name: (shared / "changing" / name).stat().st_ino for name in os.listdir(shared / "changing")}
    assert len(set(first.values())) == 3
    assert (shared / "changing" / "1" / "text").read_text() == "1\n"


# -- waiting -------------------------------------------------------------------------------------------------


def test_a_reader_that_waits_holds_up_no_other_and_ends_in_etimedout(mounter: Mounter) -> None:
    mounted = mounter("timeout=1.5")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(errno_of, (mounted / "blocking").read_bytes)
        began = time.monotonic()
        for _ in range(50):
            assert (mounted / "text").read_text() == "hello\n"
        assert time.monotonic() - began < 1.4
        assert not waiting.done()
        assert waiting.result(20) == errno.ETIMEDOUT


def test_a_slow_handler_in_the_loop_does_not_end_the_mount(shared: Mounted) -> None:
    assert (shared / "sleepy").read_bytes()[:6] == b"slept\n"


@pytest.mark.parametrize("loop", ["fast_loop=yes", "fast_loop=no", "spin=0.00005"])
def test_many_readers_at_once_read_right(mounter: Mounter, loop: str) -> None:
    mounted = mounter(loop)
    whole = pattern(MEMORY_SIZE)
    cached = (mounted / "cached").read_bytes()

    def read(number: int) -> None:
        with (mounted / ("memory" if number % 3 else "cached")).open("rb", buffering=0) as file:
            expected = whole if number % 3 else cached
            for turn in range(60):
                offset = (number * 7919 + turn * 104729) % (len(expected) - 1)
                size = (8, 4096, 100_000)[turn % 3]
                assert os.pread(file.fileno(), size, offset) == expected[offset : offset + size]
                if turn % 20 == 0:
                    assert len(os.listdir(mounted / "many")) == 10
                    assert not (mounted / "nothing").exists()

    with ThreadPoolExecutor(32) as pool:
        for result in [pool.submit(read, number) for number in range(32)]:
            result.result(50)
    if loop == "fast_loop=no":
        assert "stock loop" not in mounted.said()


def test_an_idle_mount_does_nothing(mounter: Mounter) -> None:
    mounted = mounter("stall_limit=0.4")

    def switches() -> int:
        tasks = Path(f"/proc/{mounted.daemon.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[2]) for task in tasks.iterdir())

    (mounted / "text").read_text()
    time.sleep(1.0)  # the watchdog falls asleep
    before = switches()
    time.sleep(1.0)
    assert switches() == before


# -- inodes --------------------------------------------------------------------------------------------------


def test_the_kernel_forgets_what_it_used_least_when_there_is_too_much(mounter: Mounter) -> None:
    mounted = mounter("files=50", "inode_bound=100")
    for _ in range(3):
        shell("ls -lR nested many bugs instances changing >/dev/null", mounted)
    until(lambda: mounted.inodes() < 130)


def test_without_memory_pressure_the_kernel_keeps_what_it_knows(mounter: Mounter) -> None:
    mounted = mounter("files=500")
    shell("ls -l many >/dev/null", mounted)
    assert mounted.inodes() > 500


# -- the mount's life ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("loop", ["fast_loop=yes", "fast_loop=no"])
def test_a_signal_unmounts_even_with_a_file_open(mounter: Mounter, number: int, loop: str) -> None:
    mounted = mounter(loop)
    with (mounted / "memory").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1, 0)
        mounted.daemon.send_signal(number)
        assert mounted.daemon.wait(10) == 0
        assert not is_mounted(mounted.path)
        assert errno_of(lambda: os.pread(file.fileno(), 1, 0)) == errno.ENOTCONN
        with contextlib.suppress(OSError):
            file.close()


def test_a_signal_unmounts_even_while_a_request_waits(mounter: Mounter) -> None:
    mounted = mounter()
    before = mounted.threads()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(errno_of, (mounted / "blocking").read_bytes)
        until(lambda: mounted.threads() > before)
        began = time.monotonic()
        mounted.daemon.terminate()
        assert mounted.daemon.wait(10) == 0
        assert time.monotonic() - began < 5
        assert waiting.result(10) in (errno.ENOTCONN, errno.ECONNABORTED)


def test_unmount_ends_the_daemon(mounter: Mounter) -> None:
    mounted = mounter()
    unmount(mounted.path)
    assert mounted.daemon.wait(10) == 0
    assert not is_mounted(mounted.path)


def test_a_busy_mount_is_not_unmounted_and_says_who_uses_it(mounter: Mounter) -> None:
    mounted = mounter()
    with (mounted / "text").open("rb"):
        with pytest.raises(TargetBusyError, match=rf"is busy \(used by .*{os.getpid()} \("):
            unmount(mounted.path)
        assert (mounted / "text").read_text() == "hello\n"
    unmount(mounted.path)
    assert mounted.daemon.wait(10) == 0


def test_force_ends_a_busy_mount_and_frees_who_waits_for_it(mounter: Mounter) -> None:
    require_abort()
    mounted = mounter()
    before = mounted.threads()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(errno_of, (mounted / "blocking").read_bytes)
        until(lambda: mounted.threads() > before)
        unmount(mounted.path, force=True)
        assert waiting.result(10) in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    assert not is_mounted(mounted.path)
    assert mounted.daemon.wait(10) == 0


def test_a_killed_daemon_leaves_a_mount_that_unmount_clears_though_a_file_is_open(mounter: Mounter) -> None:
    mounted = mounter("auto_unmount=no")
    with (mounted / "text").open("rb", buffering=0) as file:
        mounted.daemon.kill()
        mounted.daemon.wait(10)
        assert is_mounted(mounted.path)
        assert is_dead(str(mounted.path))
        unmount(mounted.path)
        assert not is_mounted(mounted.path)
        with contextlib.suppress(OSError):
            file.close()


def test_a_dead_mount_is_cleared_by_the_next_one(mounter: Mounter) -> None:
    dead = mounter("auto_unmount=no")
    dead.daemon.kill()
    dead.daemon.wait(10)
    assert is_mounted(dead.path)
    alive = mounter()
    assert alive.ready, alive.said()
    assert (alive / "text").read_text() == "hello\n"


def test_a_killed_daemon_is_unmounted_by_the_helper(mounter: Mounter) -> None:
    require_unmounting_helper()
    mounted = mounter()
    mounted.daemon.kill()
    mounted.daemon.wait(10)
    until(lambda: not is_mounted(mounted.path))


def test_where_something_is_mounted_already_nothing_is_mounted(mounter: Mounter) -> None:
    mounted = mounter()
    second = mounter()
    assert not second.ready
    assert second.daemon.wait(10) == 1
    assert "cloudfs is mounted there already; unmount it with `cloudfs umount" in second.said()
    assert (mounted / "text").read_text() == "hello\n"
    assert prepare(mounted.path.parent, nonempty=True)


def test_a_refusal_is_one_sentence(mounter: Mounter) -> None:
    full = mounter(name="full")
    full.end()
    (full.path / "x").write_text("x")
    again = mounter(name="full")
    assert again.daemon.wait(10) == 1
    assert again.said().count("\n") == 1
    assert again.said().startswith("error: ")
    assert "is not empty" in again.said()


def test_what_libfuse_says_stands_in_the_error(mounter: Mounter) -> None:
    require(os.geteuid() == 0, "needs root, to mount with what others may not")
    mounted = mounter("source=" + "x" * 5000)
    assert not mounted.ready
    assert mounted.daemon.wait(10) == 1
    assert mounted.said().startswith("error: ")
    assert "cannot be mounted on: " in mounted.said()
    assert mounted.said().count("\n") == 1


def test_a_source_cannot_smuggle_options_in(mounter: Mounter) -> None:
    mounted = mounter("source=/data/a,allow_other\\b c")
    entry = find_mount(mounted.path)
    assert entry is not None
    assert entry.source == "/data/a,allow_other\\b c"
    lines = [line for line in Path("/proc/mounts").read_text().splitlines() if str(mounted.path) in line]
    assert "allow_other" not in lines[0].split()[3]
    assert {"nosuid", "nodev", "noexec", "default_permissions"} <= set(lines[0].split()[3].split(","))


def test_read_ahead_is_a_mebibyte(shared: Mounted) -> None:
    require(os.geteuid() == 0, "setting the read-ahead needs root")
    entry = find_mount(shared.path)
    assert entry is not None
    path = Path("/sys/class/bdi/{}:{}/read_ahead_kb".format(*entry.device))
    require(path.exists(), "there is no bdi in /sys here")
    assert path.read_text().strip() == "1024"


# -- others --------------------------------------------------------------------------------------------------


def as_nobody(command: str) -> subprocess.CompletedProcess[str]:
    require(os.geteuid() == 0, "becoming another user needs root")
    return subprocess.run(
        ["bash", "-c", command], user=65534, group=65534, capture_output=True, text=True, timeout=30, check=False
    )


def test_others_are_kept_out(shared: Mounted) -> None:
    shared.path.parent.chmod(0o755)
    assert "Permission denied" in as_nobody(f"cat {shared.path}/text").stderr


def test_others_who_are_let_in_are_held_to_the_modes(mounter: Mounter) -> None:
    mounted = mounter("allow_other=yes")
    mounted.path.parent.chmod(0o755)
    assert as_nobody(f"cat {mounted.path}/text").stdout == "hello\n"
    assert "Permission denied" in as_nobody(f"cat {mounted.path}/memory").stderr
    assert "Permission denied" in as_nobody(f"echo x > {mounted.path}/control").stderr


# -- the watchdog --------------------------------------------------------------------------------------------

CLIENT = """
import ctypes, mmap, os, sys
top = sys.argv[1]
with open(top + "/cached", "rb") as file:
    mapping = mmap.mmap(file.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
memory = os.open(f"{top}/inline/{os.getpid()}", os.O_RDONLY)
print("ready", flush=True)
try:
    print(os.pread(memory, 16, address))
except OSError as error:
    print(error.errno)
"""


def test_a_page_that_only_the_stuck_loop_could_deliver_ends_the_mount_and_frees_all(mounter: Mounter) -> None:
    """The client maps `cached` and reads that page of itself through a file that is read in the loop.

        client: pread(inline/PID) ──> loop: pread(/proc/PID/mem) ──> page fault in the client's mapping
                                        ^                                        │
                                        └──────── READ of `cached` <─────────────┘
    """
    mounted = mounter("stall_limit=1.0", "auto_unmount=no")
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, str(mounted.path)], stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "ready\n"
        said = client.stdout.readline()
        assert int(said) in (errno.EIO, errno.ENOTCONN, errno.ECONNABORTED)
        assert client.wait(10) == 0
    assert mounted.daemon.wait(10) == 1
    assert not is_mounted(mounted.path)
    assert "was unmounted: one request had held up all others for 1 s" in mounted.said()
    assert "made_up_tree.py" in mounted.said()
    assert stat.S_ISDIR(mounted.path.stat().st_mode)
