"""Reading a process's memory: the bytes, the faults, and that the process does not notice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from native_program import PAGE, PATTERN, figures, without
from support import as_nobody, require

from engine.errors import FaultError, ProcessExitedError, SourceFaultError
from engine.memory import NO_FAULTS
from engine.oslayers.native import NativeProcess
from engine.testing import Truth, check_memory
from engine.types import Extent

STAMPED = 0x200000000000
"""Where the program's `breed` puts 64 pages of stamps."""
UNTOUCHED = [("reserve", 1 << 40), ("shared_reserve", 1 << 36)]
"""Mappings of the program that nobody has ever touched, with their size."""


@pytest.fixture
def memory(layer, target):
    return layer.process(target.pid).memory


def test_a_process_holds_the_contract_of_a_memory_on_every_kernel(layer, target, kernel):
    """
    pattern | 4 MiB of data |       island | data | data | hole | data |
    """
    truth = Truth(
        known=[
            (target.pattern, PATTERN[:300000]),
            (target.pattern + 5, PATTERN[5:5000]),
            (target.island, PATTERN[: 2 * PAGE]),
        ],
        holes=[Extent(target.island + 2 * PAGE, PAGE), Extent(0, PAGE), Extent(1 << 63, PAGE)],
    )
    process = layer.process(target.pid)
    check_memory(lambda: process.memory, truth)


def test_heap_stack_and_data_hold_what_the_program_put_there(memory, target):
    assert memory.cstring(target.in_heap) == b"secret in the heap"
    assert memory.cstring(target.in_stack) == b"secret on the stack"
    assert memory.cstring(target.in_data) == b"secret in .data"
    assert memory.cstring(target.in_rodata) == b"secret in .rodata"
    assert memory.u64(target.counter) == 1234567890123456789


def test_every_size_gives_the_right_bytes_at_any_alignment(memory, target, kernel):
    buffer = memoryview(bytearray(3 << 20))
    for size in (1, 8, 4095, 4096, 4097, 65535, 65536, 65537, 128 << 10, 256 << 10, 257 << 10, 1 << 20, 3 << 20):
        for offset in (0, 1, 4095, 4096 * 7 + 3):
            memory.readinto(target.pattern + offset, buffer[:size])
            assert buffer[:size] == PATTERN[offset : offset + size]


@pytest.mark.parametrize("size", [64, PAGE, 2 * PAGE])
def test_a_hole_faults_at_its_first_byte_and_the_bytes_before_it_are_there(memory, target, kernel, size):
    buffer = memoryview(bytearray(size + 2 * PAGE))
    with pytest.raises(FaultError) as caught:
        memory.readinto(target.island + 2 * PAGE - size, buffer)
    assert caught.value.address == target.island + 2 * PAGE
    assert buffer[:size] == PATTERN[2 * PAGE - size : 2 * PAGE]


def test_a_large_read_up_to_a_hole_is_as_exact_as_a_small_one(layer, start, kernel):
    target = start()
    memory = layer.process(target.pid).memory
    regions = layer.process(target.pid).regions()
    stop = next(region.stop for region in regions if region.start <= target.pattern < region.stop)
    buffer = memoryview(bytearray(stop - target.pattern + (1 << 20)))
    try:
        memory.readinto(target.pattern, buffer)
        address = None
    except FaultError as error:
        address = error.address
    assert address == _first_unreadable(target.pid, target.pattern, len(buffer))
    assert buffer[: len(PATTERN)] == PATTERN


def _first_unreadable(pid: int, start: int, size: int) -> int | None:
    """By the kernel's own word: what is mapped may be unreadable all the same, as [vvar] or behind a file's end."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
        for address in [start, *range((start // PAGE + 1) * PAGE, start + size, PAGE)]:
            try:
                os.pread(file.fileno(), 1, address)
            except OSError:
                return address
    return None


def test_a_page_between_data_that_was_never_touched_reads_as_zeros(memory, target, kernel):
    expected = PATTERN[:PAGE] + bytes(6 * PAGE) + PATTERN[:PAGE]
    assert memory.read(target.sparse, 8 * PAGE) == expected


def test_pages_without_the_right_to_read_are_read(memory, target, kernel):
    assert memory.read(target.forbidden, PAGE) == PATTERN[:PAGE]
    assert memory.read(target.forbidden + PAGE, PAGE) == bytes(PAGE)


def test_a_guard_page_faults(memory, target, kernel):
    require("guarded" in target.addresses, "this kernel has no guard pages (Linux 6.13)")
    buffer = memoryview(bytearray(3 * PAGE))
    with pytest.raises(FaultError) as caught:
        memory.readinto(target.guarded, buffer)
    assert caught.value.address == target.guarded + PAGE
    assert buffer[:PAGE] == PATTERN[:PAGE]
    assert memory.read(target.guarded + 2 * PAGE, PAGE) == PATTERN[2 * PAGE : 3 * PAGE]


def test_shared_memory_that_another_process_wrote_is_read(memory, target, kernel):
    expected = PATTERN[:PAGE] + bytes(4 * PAGE) + PATTERN[:PAGE] + bytes(10 * PAGE)
    assert memory.read(target.shared, 16 * PAGE) == expected


def test_behind_the_end_of_a_mapped_file_its_last_page_is_zeros_and_the_next_one_faults(memory, target):
    text = b"secret in .rodata\0"
    buffer = memoryview(bytearray(b"\xaa" * PAGE))
    memory.readinto(target.of_memfd, buffer)
    assert buffer == text + bytes(PAGE - len(text))
    with pytest.raises(SourceFaultError) as caught:
        memory.read(target.of_memfd + 100, PAGE)
    assert caught.value.address == target.of_memfd + PAGE


def test_vvar_and_vsyscall_fault_and_vdso_is_an_elf_image(layer, memory, target, kernel):
    for region in layer.process(target.pid).regions():
        if region.path.startswith("[vvar") or region.path == "[vsyscall]":
            with pytest.raises(FaultError) as caught:
                memory.read(region.start, 8)
            assert caught.value.address == region.start
        if region.path == "[vdso]":
            assert memory.read(region.start, 4) == b"\x7fELF"
            assert len(memory.read(region.start, region.size)) == region.size


def test_all_that_can_be_read_is_what_proc_pid_mem_gives(layer, memory, target):
    """Every region but the untouched ones, whole, against the kernel's own file."""
    with open(f"/proc/{target.pid}/mem", "rb", buffering=0) as mem:
        for region in layer.process(target.pid).regions():
            if region.size > 64 << 20 or region.start >= 1 << 63 or target.addresses.get("huge") == region.start:
                continue
            try:
                ours = memory.read(region.start, region.size)
            except FaultError as error:
                ours = memory.read(region.start, error.address - region.start)
                with pytest.raises(OSError, match="Input/output error"):
                    os.pread(mem.fileno(), 1, error.address)
            assert ours == os.pread(mem.fileno(), len(ours), region.start), region


@pytest.mark.parametrize(("name", "size"), UNTOUCHED)
def test_reading_what_was_never_touched_gives_zeros_and_changes_nothing(layer, target, name, size, monkeypatch):
    require(os.geteuid() == 0, "shared memory can only be read untouched with CAP_SYS_ADMIN")
    memory, address = layer.process(target.pid).memory, target.addresses[name]
    before = figures(target.pid)
    buffer, dirty = memoryview(bytearray(8 << 20)), b"\xaa" * (8 << 20)
    rows = np.empty((2000, 8), np.uint8)
    addresses = np.random.default_rng(1).integers(address, address + size - 8, 2000).astype(np.uint64)
    for kernel in ("as it is", "without ioctls"):
        without(monkeypatch, kernel)
        memory.close()
        # Of shared memory, every read opens the file behind it.
        count = 100 if name == "shared_reserve" else 2000
        for offset in (*range(0, size, size // 64), size - len(buffer)):
            buffer[:] = dirty
            memory.readinto(address + offset, buffer)
            assert buffer.obj.count(0) == len(buffer)
            assert memory.u64(address + offset) == 0
        assert memory.gather(addresses[:count], rows[:count]) is NO_FAULTS
        assert not rows[:count].any()
    assert figures(target.pid) == before


def test_huge_pages_that_were_never_touched_are_zeros_and_none_is_taken(memory, target):
    require("huge" in target.addresses, "this kernel has no huge pages")
    before = figures(target.pid)
    assert memory.read(target.huge, 4 << 20) == bytes(4 << 20)
    assert figures(target.pid) == before


def test_the_gap_below_the_stack_faults_and_the_stack_does_not_grow(layer, memory, target):
    stack = next(r for r in layer.process(target.pid).regions() if r.path == "[stack]")
    for address in (stack.start - 1, stack.start - PAGE, stack.start - 16 * PAGE):
        with pytest.raises(FaultError):
            memory.read(address, 1)
    assert next(r for r in layer.process(target.pid).regions() if r.path == "[stack]").start == stack.start


def read_up_to_fault(memory, address: int, size: int) -> tuple[bytes, int | None]:
    """What can be read, and the first bad address."""
    buffer = memoryview(bytearray(size))
    try:
        memory.readinto(address, buffer)
    except FaultError as error:
        return bytes(buffer[: max(0, error.address - address)]), error.address
    return bytes(buffer), None


def test_gather_gives_what_a_loop_of_reads_gives(memory, target, kernel):
    generator = np.random.default_rng(3)
    interesting = [target.pattern, target.island, target.sparse, target.forbidden, target.shared, target.guarded
                   if "guarded" in target.addresses else target.island, target.of_memfd, 0, (1 << 64) - 20]
    for width in (1, 8, 24, 5000):
        addresses = np.array(
            [interesting[i % len(interesting)] + int(offset)
             for i, offset in enumerate(generator.integers(0, 6 * PAGE, 600))], dtype=object,
        )
        addresses = np.array([int(a) & (1 << 64) - 1 for a in addresses], np.uint64)
        out = np.full((len(addresses), width), 0xAA, np.uint8)
        faults = memory.gather(addresses, out)
        failed = {int(row): int(address) for row, address in zip(faults.rows, faults.addresses, strict=True)}
        assert faults.rows.tolist() == sorted(failed)
        for row, address in enumerate(addresses.tolist()):
            expected, bad = read_up_to_fault(memory, address, width)
            assert failed.get(row) == bad
            assert out[row].tobytes() == expected.ljust(width, b"\0")


def test_gather_takes_more_rows_than_one_call_can(memory, target):
    addresses = np.arange(40000, dtype=np.uint64) * np.uint64(104) + np.uint64(target.pattern)
    values, faults = memory.words(addresses, "<u4")
    assert not faults
    assert values.tobytes() == np.frombuffer(PATTERN, "<u4")[: 40000 * 26 : 26].tobytes()


def test_read_padded_crosses_what_cannot_be_read(memory, target, kernel):
    expected = PATTERN[: 2 * PAGE] + bytes(PAGE) + PATTERN[3 * PAGE : 4 * PAGE]
    assert memory.read_padded(target.island, 4 * PAGE) == expected


def test_addresses_beyond_every_process_fault(memory):
    buffer = memoryview(bytearray(64))
    for address in (1 << 63, (1 << 63) - 8, (1 << 64) - 8, 0xFFFFFFFFFF600000, 0xFFFF800000000000, 1 << 57):
        with pytest.raises(FaultError) as caught:
            memory.readinto(address, buffer)
        assert caught.value.address == address
        with pytest.raises(FaultError):
            memory.u64(address)


def test_many_threads_read_one_memory_at_once(layer, target):
    memory = layer.process(target.pid).memory
    wrong = []

    def work(seed):
        generator = np.random.default_rng(seed)
        buffer = memoryview(bytearray(1 << 20))
        for _ in range(150):
            size = int(2 ** generator.uniform(0, 20))
            offset = int(generator.integers(0, len(PATTERN) - size))
            memory.readinto(target.pattern + offset, buffer[:size])
            if buffer[:size] != PATTERN[offset : offset + size]:
                wrong.append(("read", offset, size))
            offsets = generator.integers(0, len(PATTERN) - 8, 64)
            values, faults = memory.words(offsets.astype(np.uint64) + np.uint64(target.pattern))
            if faults or values[0] != int.from_bytes(PATTERN[offsets[0] : offsets[0] + 8], "little"):
                wrong.append(("gather", offsets))
            if generator.integers(20) == 0:
                memory.close()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_descriptors_are_closed_when_the_memory_is_dropped_or_closed(layer, target):
    before = set(os.listdir("/proc/self/fd"))
    process = layer.process(target.pid)
    process.memory.u64(target.counter)
    assert len(os.listdir("/proc/self/fd")) > len(before)
    process.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert process.memory.u64(target.counter) == 1234567890123456789
    del process
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_user_without_rights_reads_own_processes_and_shared_memory_in_them():
    said = as_nobody(
        """
        from engine.oslayer import Base
        from engine.oslayers.native import NativeLayer
        ctypes = sys.modules["ctypes"]
        assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE: who gives up rights is not
        shared, private = (sys.modules["mmap"].mmap(-1, 1 << 20, flags) for flags in (0x21, 0x22))
        private[:6] = b"secret"
        shared_address, address = (ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (shared, private))
        receiver, sender = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(sender)
            os.read(receiver, 1)
            os._exit(0)
        memory = NativeLayer.open(Base(), {}).process(child).memory
        assert memory.read(address, 6) == b"secret"
        assert memory.read(address + 4096, 65536) == bytes(65536)
        assert memory.read(shared_address, 1 << 20) == bytes(1 << 20)
        assert list(memory.extents(shared_address, shared_address + 4096))
        os.close(sender)
        os.waitpid(child, 0)
        print("right")
        """
    )
    assert said == "right\n"


def test_reading_ends_with_the_process(layer, start):
    target = start()
    process = layer.process(target.pid)
    assert process.memory.u64(target.counter) == 1234567890123456789
    target.end()
    buffer = memoryview(bytearray(1 << 20))
    for act in (
        lambda: process.memory.u64(target.counter),
        lambda: process.memory.readinto(target.pattern, buffer),
        lambda: process.memory.gather(np.array([target.counter], np.uint64), np.empty((1, 8), np.uint8)),
        lambda: list(process.memory.extents()),
    ):
        with pytest.raises(ProcessExitedError):
            act()


def test_a_process_that_runs_another_program_is_read_as_that_program(layer, start, kernel):
    target = start()
    process = layer.process(target.pid)
    assert process.memory.cstring(target.in_heap) == b"secret in the heap"
    before = dict(target.addresses)
    target.tell("exec\n")
    target.follow()
    assert target.addresses != before
    assert process.memory.cstring(target.in_heap) == b"secret in the heap"
    assert process.memory.read(target.pattern, 1 << 20) == PATTERN[: 1 << 20]
    assert Extent(target.pattern, PAGE) in [
        Extent(extent.start, PAGE) for extent in process.memory.extents(target.pattern, target.pattern + PAGE)
    ]


def test_a_child_in_its_parents_memory_is_not_taken_for_its_parent_later(layer, start):
    """vfork(2): the child runs in the parent's memory until it starts its program; the parent's lives on."""
    target = start()
    target.tell("vfork\n")
    name, pid = target.said()
    assert name == "child"
    child = layer.process(pid)
    assert child.memory.u64(target.counter) == 1234567890123456789
    assert child.memory.read(target.pattern, 1 << 20) == PATTERN[: 1 << 20]
    target.tell("\n")
    assert target.said() == ("spawned", pid)
    try:
        with pytest.raises(FaultError):
            child.memory.u64(target.counter)
        with pytest.raises(FaultError):
            child.memory.read(target.pattern, 1 << 20)
        assert child.info.name == "sleep"
    finally:
        os.kill(pid, 9)


def test_a_zombie_and_a_kernel_thread_have_no_memory(layer):
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    kernel_threads = [p.pid for p in layer.processes() if p.info.kernel_thread]
    try:
        for pid in (child.pid, *kernel_threads[:1]):
            memory = layer.process(pid).memory
            with pytest.raises(FaultError) as caught:
                memory.read(0x400000, 16)
            assert caught.value.address == 0x400000
            assert list(memory.extents()) == []
    finally:
        child.wait()


def test_rows_of_a_process_without_memory_all_fault_and_are_zeros(layer, writable_layer):
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    kernel_threads = [p.pid for p in layer.processes() if p.info.kernel_thread]
    addresses = np.arange(0x400000, 0x400000 + 40 * 8, 8, dtype=np.uint64)
    try:
        for pid in (child.pid, *kernel_threads[:1]):
            memory = layer.process(pid).memory
            out = np.full((40, 8), 0xAA, np.uint8)
            faults = memory.gather(addresses, out)
            assert (faults.rows.tolist(), faults.addresses.tolist()) == (list(range(40)), addresses.tolist())
            assert not out.any()
            assert all(isinstance(found, FaultError) for found in memory.read_many([(int(at), 8) for at in addresses]))
            assert writable_layer.process(pid).memory.scatter(addresses, out).rows.tolist() == list(range(40))
    finally:
        child.wait()


def test_to_a_plain_user_too_a_zombie_and_a_kernel_thread_have_no_memory():
    """Their files in /proc belong to root: what looks like a lack of rights is none."""
    said = as_nobody(
        """
        from engine.errors import FaultError
        from engine.oslayer import Base
        from engine.oslayers.native import NativeLayer
        ctypes = sys.modules["ctypes"]
        assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE: who gives up rights is not
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        layer = NativeLayer.open(Base(), {})
        for pid in (child, *[p.pid for p in layer.processes() if p.info.kernel_thread][:1]):
            memory = layer.process(pid).memory
            try:
                memory.read(0x400000, 16)
            except FaultError as error:
                assert "has no memory" in str(error) or "is a kernel thread" in str(error), error
            assert list(memory.extents()) == []
        print("right")
        """
    )
    assert said == "right\n"


def test_a_pid_in_use_again_is_another_process(layer):
    """For real: in a PID namespace of our own the next PID can be chosen."""
    require(os.geteuid() == 0, "only root makes PID namespaces")
    code = """
import ctypes, os, sys, time
from engine.errors import ProcessExitedError
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer
page = ctypes.create_string_buffer(b"first", 1 << 20)
def child():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
    return pid
first = child()
layer = NativeLayer.open(Base(), {})
process = layer.process(first)
assert process.memory.read(ctypes.addressof(page), 5) == b"first"
os.kill(first, 9); os.waitpid(first, 0)
time.sleep(0.05)
page.value = b"another"
open("/proc/sys/kernel/ns_last_pid", "w").write(str(first - 1))
second = child()
assert second == first, (first, second)
def refused(act):
    try:
        act()
    except ProcessExitedError:
        return True
    return False
address = ctypes.addressof(page)
acts = [lambda: process.info, lambda: list(process.regions()), lambda: list(process.threads()), process.owner,
        lambda: process.memory.read(address, 5), lambda: process.memory.read(address, 1 << 20),
        lambda: process.read_proc("cmdline"), lambda: list(process.memory.extents())]
print([refused(act) for act in acts])
assert layer.process(second).memory.read(address, 7) == b"another"
os.kill(second, 9)
"""
    probe = subprocess.run(["unshare", "-pf", "--mount-proc", "true"], capture_output=True, timeout=10, check=False)
    require(probe.returncode == 0, "unshare(1) cannot make a PID namespace here")
    done = subprocess.run(
        ["unshare", "-pf", "--mount-proc", sys.executable, "-c", code], capture_output=True, text=True, timeout=30,
        check=False,
    )
    assert done.stdout == str([True] * 8) + "\n", done.stderr


def test_32_threads_reading_processes_that_come_and_go_never_see_another_ones_bytes(layer, program):
    """Each child stamps 64 pages with its PID and start time; what is read of it is its own stamp or an error."""
    breeder = subprocess.Popen([program, "breed", "20"], stdin=subprocess.PIPE)
    children = Path(f"/proc/{breeder.pid}/task/{breeder.pid}/children")
    wrong, counts = [], [0, 0]
    finish = time.monotonic() + 4

    def look(generator: np.random.Generator, process: NativeProcess) -> set[int]:
        kind = int(generator.integers(4))
        if kind == 0:
            return {process.memory.u64(STAMPED + PAGE)}
        if kind == 1:
            addresses = np.uint64(STAMPED) + np.arange(16, dtype=np.uint64) * np.uint64(16000)
            values, faults = process.memory.words(addresses)
            faults.raise_first()
            return set(values.tolist())
        data = process.memory.read(STAMPED, 8 * PAGE if kind == 2 else 64 * PAGE)
        return set(np.frombuffer(data, "<u8").tolist())

    def work(seed: int) -> None:
        generator = np.random.default_rng(seed)
        while time.monotonic() < finish:
            pids = children.read_text().split()
            if not pids:
                continue
            pid = int(generator.choice(pids))
            try:
                process = layer.process(pid)
                for _ in range(8):
                    stamps = look(generator, process)
                    counts[0] += 1
                    # Zeros: a child that has mapped the pages and not stamped all of them yet.
                    if stamps - {0, pid << 32 | process.start_ticks}:
                        wrong.append((pid, process.start_ticks, stamps))
            except (FaultError, ProcessExitedError):
                counts[1] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(32)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        breeder.communicate(timeout=20)
    assert not wrong
    assert counts[0] > 300
    assert counts[1] > 0
