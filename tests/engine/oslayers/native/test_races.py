"""What happens between two system calls, made to happen there; and pages in states this host cannot make."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import threading
from functools import partial

import numpy as np
import pytest
from native_program import PAGE, PATTERN
from support import require

from engine.errors import FaultError, ProcessExitedError
from engine.oslayers.native import descriptors, usual, vectors
from engine.oslayers.native.looks import LOOKS
from engine.oslayers.native.pagemap import PRESENT, Scanner, joined


@pytest.fixture
def target(start):
    return start()


def test_a_process_that_ends_while_it_is_read_by_pid_gives_no_bytes(layer, target, monkeypatch):
    """As if its PID had been given to another process right before process_vm_readv(2)."""
    memory = layer.process(target.pid).memory
    assert memory.read(target.pattern, 8) == PATTERN[:8]

    def read_another_one(pid, address, view):
        target.end()
        view[:] = b"?" * len(view)
        return len(view)

    monkeypatch.setattr(vectors, "read_span", read_another_one)
    monkeypatch.setattr(usual, "library", lambda: None)
    with pytest.raises(ProcessExitedError):
        memory.readinto(target.pattern, memoryview(bytearray(1 << 20)))


def test_what_c_reads_of_another_process_with_that_pid_or_of_memory_that_is_gone_does_not_count(layer, target, start):
    memory, other = layer.process(target.pid).memory, start()
    memory.u64(target.pattern)
    files, buffer = memory._files, memoryview(bytearray(1 << 17))
    require(usual.library(), "there is no C compiler")
    ended = os.pidfd_open(other.pid)
    gone = os.open(f"/proc/{other.pid}/pagemap", os.O_RDONLY)
    other.end()
    read = partial(usual.read, usual.library(), files, target.pattern, buffer, swapped=False)
    assert read()
    for name, stale in (("pidfd", ended), ("pagemap", gone)):
        real = getattr(files, name)
        setattr(files, name, stale)
        assert not read(), name
        setattr(files, name, real)
        os.close(stale)
    assert read()
    assert buffer[:8] == PATTERN[:8]


def test_a_process_that_ends_while_rows_are_read_by_pid_gives_no_bytes(layer, target, monkeypatch):
    memory = layer.process(target.pid).memory
    assert memory.read(target.pattern, 8) == PATTERN[:8]

    def read_another_one(pid, addresses, out):
        target.end()
        out[:] = 0x3F
        return out.nbytes

    monkeypatch.setattr(vectors, "read_rows", read_another_one)
    with pytest.raises(ProcessExitedError):
        memory.words(np.full(100, target.pattern, np.uint64))


def test_a_process_that_ended_is_not_written_by_pid(writable_layer, target, monkeypatch):
    memory = writable_layer.process(target.pid).memory
    memory.write(target.pattern, b"x")
    written = []
    original = descriptors.Descriptors.same

    def ended_right_before(files):
        target.end()
        return original(files)

    monkeypatch.setattr(descriptors.Descriptors, "same", ended_right_before)
    monkeypatch.setattr(vectors, "write_rows", lambda *all_of_it: written.append(all_of_it))
    with pytest.raises(ProcessExitedError):
        memory.scatter(np.full(3, target.pattern, np.uint64), np.zeros((3, 8), np.uint8))
    assert not written


def test_a_child_that_leaves_its_parents_memory_while_it_is_opened_is_opened_again(layer, target, monkeypatch):
    target.tell("vfork\n")
    _, pid = target.said()
    child = layer.process(pid)
    original, calls = descriptors._open_all, []

    def open_and_let_go(directory, *, writable):
        files = original(directory, writable=writable)
        if not calls:
            target.tell("\n")
            assert target.said() == ("spawned", pid)  # vfork(2) returns when the child runs its program
        calls.append(files)
        return files

    monkeypatch.setattr(descriptors, "_open_all", open_and_let_go)
    try:
        with pytest.raises(FaultError):
            child.memory.u64(target.counter)
        assert len(calls) == 2
    finally:
        os.kill(pid, 9)


def test_a_page_in_swap_is_read_but_not_in_the_loop(layer, target):
    """This host may have no swap: the entries of pagemap are made up, the memory is real."""
    memory = layer.process(target.pid).memory
    memory.u64(target.pattern)
    files = memory._files
    with tempfile.TemporaryFile() as made_up:
        first = target.pattern // PAGE
        for page, state in enumerate((1 << 63, 1 << 62, 1 << 63)):
            os.pwrite(made_up.fileno(), state.to_bytes(8, "little"), (first + page) * 8)
        real, files.pagemap = files.pagemap, made_up.fileno()
        try:
            buffer = memoryview(bytearray(3 * PAGE))
            LOOKS.look(memory._directory)
            assert memory.readinto_nowait(target.pattern, buffer) is False
            assert memory.readinto_nowait(target.pattern, buffer[:PAGE]) is True
            memory.readinto(target.pattern, buffer)
            assert buffer == PATTERN[: 3 * PAGE]
            assert memory.u64(target.pattern + PAGE) == int.from_bytes(PATTERN[PAGE : PAGE + 8], "little")
        finally:
            files.pagemap = real


@pytest.fixture
def own_pages():
    """1 MiB of this process, its address, and a Scanner."""
    pages = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    hold = ctypes.c_char.from_buffer(pages)
    address = ctypes.addressof(hold)
    descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    require(Scanner.works(descriptor), "this kernel has no PAGEMAP_SCAN (Linux 6.7)")
    yield pages, address, Scanner(descriptor)
    os.close(descriptor)


def test_a_scan_sees_what_was_given_back_since_the_last_one(own_pages):
    pages, address, scanner = own_pages
    pages[:] = b"x" * len(pages)
    assert scanner.covers(address, address + len(pages), PRESENT.categories)
    pages.madvise(mmap.MADV_DONTNEED)
    assert not scanner.covers(address, address + len(pages), PRESENT.categories)
    pages[: 100 * PAGE] = b"x" * (100 * PAGE)
    assert not scanner.covers(address, address + len(pages), PRESENT.categories)
    assert scanner.covers(address, address + 100 * PAGE, PRESENT.categories)


def test_a_scan_gives_more_runs_than_fit_into_one_answer(own_pages):
    pages, address, scanner = own_pages
    for page in range(0, 256, 2):
        pages[page * PAGE] = 1
    expected = [(address + page * PAGE, address + page * PAGE + PAGE) for page in range(0, 256, 2)]
    assert list(scanner.runs(address, address + len(pages), PRESENT.categories, skip_zero_page=False)) == expected


def test_a_scan_leaves_out_pages_that_were_only_read(own_pages):
    pages, address, scanner = own_pages
    assert pages[5 * PAGE] == 0
    assert pages[7 * PAGE] == 0
    pages[7 * PAGE] = 1
    found = list(scanner.runs(address, address + len(pages), PRESENT.categories, skip_zero_page=True))
    assert found == [(address + 7 * PAGE, address + 8 * PAGE)]


def test_runs_that_touch_or_overlap_are_joined():
    assert list(joined(iter([(0, 4), (4, 6), (8, 9), (8, 12), (10, 11), (20, 21)]))) == [(0, 6), (8, 12), (20, 21)]
    assert list(joined(iter([]))) == []


def test_pages_of_its_own_in_a_private_mapping_of_shared_memory_hold_data(layer):
    """
    memfd    | data | hole | hole | hole |
    mapping  | .    | .    | own  | .    |   private
    """
    descriptor = os.memfd_create("private")
    os.ftruncate(descriptor, 4 * PAGE)
    os.pwrite(descriptor, b"of the file", 0)
    mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    mapping[2 * PAGE] = 7  # which gives the file a page of zeros there: taken away again
    punch, offset, size = 1 | 2, ctypes.c_long(2 * PAGE), ctypes.c_long(PAGE)
    assert ctypes.CDLL(None).fallocate(descriptor, punch, offset, size) == 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    memory = layer.process(os.getpid()).memory
    pages = [(e.start - address) // PAGE for e in memory.extents(address, address + 4 * PAGE)]
    assert pages == ([0, 2] if os.geteuid() == 0 else [0])
    assert memory.read(address, 4 * PAGE) == b"of the file".ljust(2 * PAGE, b"\0") + b"\7".ljust(2 * PAGE, b"\0")
    os.close(descriptor)


def test_a_private_mapping_of_dev_zero_is_anonymous(layer):
    with open("/dev/zero", "r+b", buffering=0) as zero:
        mapping = mmap.mmap(zero.fileno(), 1 << 20, access=mmap.ACCESS_COPY)
    hold = ctypes.c_char.from_buffer(mapping)
    address = ctypes.addressof(hold)
    memory = layer.process(os.getpid()).memory
    buffer = memoryview(bytearray(b"\xaa" * (1 << 20)))
    LOOKS.look(memory._directory)
    assert memory.readinto_nowait(address, buffer) is True
    assert not any(buffer)
    assert list(memory.extents(address, address + (1 << 20))) == []


MONITORED = """
import ctypes, fcntl, mmap, os, platform, struct, sys
number = {"x86_64": 323, "aarch64": 282, "riscv64": 282}[platform.machine()]
monitor = ctypes.CDLL(None).syscall(number, os.O_CLOEXEC)
if monitor < 0:  # as a plain user, where vm.unprivileged_userfaultfd is 0
    print(0)
    sys.exit()
pages = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
try:
    fcntl.ioctl(monitor, 0xC018AA3F, bytearray(struct.pack("=3Q", 0xAA, 0, 0)))  # UFFDIO_API
    fcntl.ioctl(monitor, 0xC020AA00, bytearray(struct.pack("=4Q", address, 1 << 20, 1, 0)))  # UFFDIO_REGISTER, missing
except OSError:
    address = 0
print(address, flush=True)
sys.stdin.read()
"""


def test_a_page_that_a_monitor_would_have_to_fill_is_not_waited_for(layer):
    """userfaultfd(2): a read through mem would wait for the monitor, which is never coming."""
    process = subprocess.Popen(
        [sys.executable, "-c", MONITORED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        address = int(process.stdout.readline())
        require(address, "userfaultfd(2) is not to be had here")
        memory = layer.process(process.pid).memory
        done = threading.Event()

        def read() -> None:
            if memory.read(address, 1 << 20) == bytes(1 << 20) and memory.u64(address) == 0:
                done.set()

        threading.Thread(target=read, daemon=True).start()
        assert done.wait(10)
    finally:
        process.kill()
        process.communicate()
