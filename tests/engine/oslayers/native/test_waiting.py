"""What may have to be waited for is known before it is read."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time

import pytest
from native_program import PAGE
from support import require

from engine.errors import FaultError
from engine.oslayers.native import looks, storage
from engine.oslayers.native import memory as native_memory
from engine.oslayers.native.looks import LOOKS
from engine.oslayers.native.procfs import ProcDirectory
from engine.types import Extent

MAPPER = """
import ctypes, mmap, os, subprocess, sys
{before}
descriptor = os.open({path!r}, os.O_RDWR)
mapping = mmap.mmap(descriptor, 0)
{after}
print(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), flush=True)
sys.stdin.read()
"""


MOUNT = """
subprocess.run(["mount", "-t", "tmpfs", "x", "{place}"], check=True)
open("{place}/f", "wb").write(b"1" * 99)
"""


@contextlib.contextmanager
def mapper(path, before: str = "", after: str = "", *, own_mounts: bool = False):
    """A program that maps a file: (its PID, the address)."""
    command = [sys.executable, "-c", MAPPER.format(path=str(path), before=before, after=after)]
    process = subprocess.Popen(
        ["unshare", "-m", *command] if own_mounts else command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process.pid, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def looked_at(process):
    """Its memory, after a look at its mappings."""
    LOOKS.look(process.directory)
    return process.memory


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"in a file" + bytes(PAGE))
    return path


def test_a_process_on_local_files_alone_does_not_wait(layer, target):
    assert looked_at(layer.process(target.pid)).may_block is False


def test_a_page_of_a_file_that_is_not_present_is_not_read_in_the_loop(layer, file):
    with mapper(file) as (pid, address):
        memory = looked_at(layer.process(pid))
        buffer = memoryview(bytearray(9))
        assert memory.readinto_nowait(address, buffer) is False
        memory.readinto(address, buffer)
        assert buffer == b"in a file"
        buffer[:] = bytes(9)
        assert memory.readinto_nowait(address, buffer) is True
        assert buffer == b"in a file"


def test_a_large_read_in_the_loop_stops_at_a_page_of_a_file_too(layer, tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20))
    with mapper(path, after="mapping[:500 << 10]") as (pid, address):
        memory = looked_at(layer.process(pid))
        buffer = memoryview(bytearray(1 << 20))
        assert memory.readinto_nowait(address, buffer) is False
        assert memory.readinto_nowait(address, buffer[:400000]) is True
        assert buffer[:400000] == path.read_bytes()[:400000]
        memory.readinto(address, buffer)
        assert memory.readinto_nowait(address, buffer) is True
        assert buffer == path.read_bytes()


def test_anonymous_memory_is_read_in_the_loop_touched_or_not(layer, target):
    memory = looked_at(layer.process(target.pid))
    buffer = memoryview(bytearray(8 * PAGE))
    assert memory.readinto_nowait(target.sparse, buffer) is True
    assert memory.readinto_nowait(target.reserve, buffer) is True
    assert not any(buffer)


def test_shared_memory_that_was_not_touched_is_not_read_in_the_loop(layer, target):
    memory = looked_at(layer.process(target.pid))
    assert memory.readinto_nowait(target.shared + PAGE, memoryview(bytearray(8))) is False
    assert memory.readinto_nowait(target.shared, memoryview(bytearray(8))) is True


def test_mappings_without_a_disk_do_not_wait(layer):
    """Shared memory, memfd, and the kernel's rings and objects, which stand in no mount table."""
    code = """
import ctypes, mmap, os, platform, sys
shared = mmap.mmap(-1, 4096)
descriptor = os.memfd_create("x")
os.ftruncate(descriptor, 4096)
named = mmap.mmap(descriptor, 0)
ring = ctypes.c_ulong(0)
if platform.machine() == "x86_64":
    ctypes.CDLL(None).syscall(206, 1, ctypes.byref(ring))
print(open("/proc/self/maps").read().count("[aio]"), flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        assert looked_at(layer.process(process.pid)).may_block is False
    finally:
        process.communicate()


def test_the_process_that_asks_itself_is_answered(layer):
    shared = mmap.mmap(-1, PAGE)
    shared[:6] = b"myself"
    assert looked_at(layer.process(os.getpid())).may_block is False
    shared.close()


def test_a_file_system_of_another_mount_namespace_is_known_by_the_process_own_table(layer, tmp_path):
    require(os.geteuid() == 0, "only root mounts")
    place = tmp_path / "place"
    place.mkdir()
    before = MOUNT.format(place=place)
    with mapper(place / "f", before, own_mounts=True) as (pid, address):
        process = layer.process(pid)
        device = next(region.device for region in process.regions() if region.start == address)
        assert device not in storage.MOUNTS.filesystems()
        assert looked_at(process).may_block is False
        assert process.memory.read(address, 99) == b"1" * 99


def test_a_file_system_that_stands_in_no_table_may_be_waited_for(layer, tmp_path):
    require(os.geteuid() == 0, "only root mounts")
    place = tmp_path / "place"
    place.mkdir()
    before = MOUNT.format(place=place)
    after = f"subprocess.run(['umount', '-l', {str(place)!r}], check=True)"
    with mapper(place / "f", before, after, own_mounts=True) as (pid, address):
        memory = looked_at(layer.process(pid))
        assert memory.may_block is True
        assert memory.readinto_nowait(address, memoryview(bytearray(8))) is False
        assert memory.read(address, 8) == b"1" * 8


def test_holes_of_a_file_in_memory_are_read_without_filling_them(layer, tmp_path):
    require(os.geteuid() == 0, "the file behind a mapping needs CAP_SYS_ADMIN")
    require(os.path.isdir("/dev/shm"), "there is no /dev/shm")
    path = f"/dev/shm/cloudfs-test-{os.getpid()}"
    try:
        with open(path, "wb") as file:
            file.truncate(64 << 20)
            file.seek(32 << 20)
            file.write(b"in the middle")
        used = os.stat(path).st_blocks
        with mapper(path) as (pid, address):
            memory = layer.process(pid).memory
            data = memory.read(address, 64 << 20)
            assert data == bytes(32 << 20) + b"in the middle" + bytes((32 << 20) - 13)
            assert list(memory.extents(address, address + (64 << 20))) == [Extent(address + (32 << 20), PAGE)]
        assert os.stat(path).st_blocks == used
    finally:
        os.unlink(path)


def test_the_answer_is_looked_up_again_when_it_is_older_than_a_second(layer, target, monkeypatch):
    memory = layer.process(target.pid).memory
    clock = [time.monotonic() + 1000.0]
    start = clock[0]
    monkeypatch.setattr(looks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(looks, "may_wait", lambda devices, table: clock[0] > start + 0.5)
    assert memory.may_block is True, "nobody has looked yet"
    memory.read(target.in_heap, 8)
    assert memory.may_block is False
    clock[0] = start + 0.9
    assert memory.may_block is False
    clock[0] = start + 1.1
    assert memory.may_block is True
    monkeypatch.setattr(looks, "may_wait", lambda devices, table: False)
    memory.u64(target.in_heap)
    assert memory.may_block is False


def test_to_ask_whether_it_waits_opens_nothing(layer, target, monkeypatch):
    def opened(self, name):
        raise AssertionError(f"{name} was opened")

    process = layer.process(target.pid)
    LOOKS.forget(process.directory)
    memory = process.memory
    monkeypatch.setattr(ProcDirectory, "open", opened)
    monkeypatch.setattr(native_memory, "open_descriptors", opened)
    assert memory.may_block is True
    assert memory.readinto_nowait(target.in_heap, memoryview(bytearray(8))) is False


def test_all_who_read_a_process_share_one_look(layer, target):
    looked_at(layer.process(target.pid))
    assert layer.process(target.pid).memory.readinto_nowait(target.in_heap, memoryview(bytearray(8))) is True


def test_a_process_that_runs_another_program_is_looked_at_again(layer, file):
    """The new program may map what the old one did not."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import os\nprint(flush=True)\nos.read(0, 1)\nos.execvp('cat', ['cat'])"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        process.stdout.readline()
        memory = looked_at(layer.process(process.pid))
        address = next(region.start for region in layer.process(process.pid).regions())
        memory.read(address, 8)
        process.stdin.write("xx\n")
        process.stdin.flush()
        process.stdout.readline()
        buffer = memoryview(bytearray(8))
        assert memory.readinto_nowait(address, buffer) is False
        with contextlib.suppress(FaultError):
            memory.readinto(address, buffer)
        assert memory.may_block is True, "the look was at the program before"
    finally:
        process.kill()
        process.communicate()


def test_no_more_looks_are_kept_than_there_is_room_for(layer, target, monkeypatch):
    monkeypatch.setattr(looks, "COUNT", 2)
    kept = looks.Looks()
    for pid in (target.pid, os.getpid(), os.getppid()):
        kept.look(layer.process(pid).directory)
    assert kept.answer(layer.process(target.pid).directory) is None
    assert kept.answer(layer.process(os.getppid()).directory) is not None


@pytest.mark.parametrize(
    ("filesystem", "waits"),
    [
        *((name, True) for name in ("fuse.cloudfs", "fuseblk", "nfs4", "9p", "virtiofs", "something new")),
        *((name, False) for name in ("ext4", "tmpfs", "overlay", "devtmpfs", "sysfs")),
    ],
)
def test_only_local_file_systems_are_not_waited_for(monkeypatch, filesystem, waits):
    monkeypatch.setattr(storage.MOUNTS, "filesystems", lambda: {(0, 99): filesystem})
    assert storage.may_wait({(0, 0): False, (0, 99): False}, lambda: b"") is waits
    own = b"36 35 0:77 / /mnt rw shared:1 master:2 - %s /dev/x rw\n" % filesystem.replace(" ", r"\040").encode()
    assert storage.may_wait({(0, 77): False}, lambda: own) is waits
    assert storage.may_wait({(0, 78): False}, lambda: own) is True
    assert storage.may_wait({(0, 78): False}, lambda: None) is True
