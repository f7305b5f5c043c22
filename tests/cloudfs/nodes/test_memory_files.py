"""Files whose bytes are memory: exact and whole reading, edges, writing, what happens when the target goes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fake_os import KERNEL, Life, Pieces, fake_machine
from hypothesis import given
from hypothesis import strategies as st
from tree import SCRATCH, at, directory, names, open_at, read, read_all

from cloudfs.nodes.files.memory import Opened, OpenExact, Opening, OpenWhole
from cloudfs.nodes.root import build_root
from engine.bytes_memory import BytesMemory
from engine.chain import Spec
from engine.errors import ConnectorClosedError, FaultError, ProcessExitedError, ReadOnlyError
from engine.machine import Instance, Machine
from engine.padding import fill_holes
from engine.testing.fakes import SlowMemory
from engine.types import Extent, Region, Rights

PAGE = 4096
A, B, C = b"A" * PAGE, b"B" * PAGE, b"C" * PAGE

#  0x1000 0x2000 0x3000 0x4000 0x5000 0x6000
#  |AAAAAA|BBBBBB|      |CCCCCC|
PIECES = {0x1000: A + B, 0x4000: C}


@pytest.fixture
def fake(monkeypatch):
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[7] = Life(pieces=PIECES)
        yield build_root(machine), machine, layer


@pytest.fixture
def writable(monkeypatch):
    with fake_machine(monkeypatch, writable=True) as (machine, layer):
        layer.table[7] = Life(pieces=PIECES)
        yield build_root(machine), machine, layer


MEM = "os/fake/processes/7/mem"


# -- mem: exact -----------------------------------------------------------------------------------------


def test_the_offset_of_mem_is_an_address(fake):
    root, *_ = fake
    assert read(open_at(root, MEM), 0x1FF0, 32) == b"A" * 16 + b"B" * 16


def test_mem_says_size_0_and_is_direct(fake):
    root, *_ = fake
    assert at(root, MEM).attributes().size == 0
    file = open_at(root, MEM)
    assert file.direct_io
    assert not file.keep_cache


def test_bytes_before_a_hole_come_before_the_error(fake):
    root, *_ = fake
    file = open_at(root, MEM)
    assert read(file, 0x1000, 1 << 20) == A + B
    with pytest.raises(FaultError) as fault:
        read(file, 0x3000, 8)
    assert fault.value.address == 0x3000


@pytest.mark.parametrize("offset", [0, 0x3000, 0x5000, 1 << 47, (1 << 63) - 1])
def test_a_read_in_a_hole_is_a_fault_at_its_first_byte(fake, offset):
    root, *_ = fake
    with pytest.raises(FaultError) as fault:
        read(open_at(root, MEM), offset, 16)
    assert fault.value.address == offset


def test_reading_in_a_thread_gives_what_reading_inline_gives(fake):
    root, *_ = fake
    file = open_at(root, MEM)
    for offset, size in ((0x1000, 10), (0x1800, 0x2000), (0x4FFF, 5)):
        inline = bytes(file.read_nowait(offset, size, SCRATCH))
        assert bytes(file.read(offset, size, SCRATCH)) == inline
    with pytest.raises(FaultError):
        file.read(0x3000, 1, SCRATCH)


def test_what_may_wait_is_left_to_a_thread():
    memory = SlowMemory(BytesMemory(b"x" * 100))
    instance = Instance("oslayer", "slow", Spec("slow"), None)
    opening = Opening(instance, None, None)
    for kind in (OpenExact, OpenWhole):
        file = kind(opening, Opened(memory), writable=False)
        assert file.may_block
        assert file.read_nowait(0, 10, SCRATCH) is None
    assert not memory.waiting.is_set()


def test_an_open_file_holds_a_process_of_its_own_until_release(fake):
    root, _, layer = fake
    before = layer.table[7].opened
    file = open_at(root, MEM)
    held = layer.table[7].opened
    file.release()
    assert held - layer.table[7].opened == 1
    assert held >= before + 1


def test_a_process_that_ended_says_so_to_whoever_holds_its_memory_open(fake):
    root, _, layer = fake
    file = open_at(root, MEM)
    assert read(file, 0x1000, 1) == b"A"
    del layer.table[7]
    with pytest.raises(ProcessExitedError):
        read(file, 0x1000, 1)


def test_another_process_with_the_pid_is_not_read_through_an_old_file(fake):
    root, _, layer = fake
    file = open_at(root, MEM)
    layer.table[7] = Life(start=2, pieces={0x1000: C})
    with pytest.raises(ProcessExitedError):
        read(file, 0x1000, 1)


def test_an_open_file_of_a_removed_instance_is_closed_though_its_bytes_are_there(fake):
    root, *_ = fake
    files = [open_at(root, MEM), open_at(root, f"os/fake/processes/7/regions/{names(root, REGIONS)[0]}")]
    directory(root, "os").remove_child("fake")
    for file in files:
        for reader in (lambda f=file: read(f, 0, 1), lambda f=file: f.read(0, 1, SCRATCH)):
            with pytest.raises(ConnectorClosedError):
                reader()
        file.release()


def test_an_open_file_of_an_instance_opened_anew_is_closed(fake):
    root, machine, _ = fake
    file = open_at(root, MEM)
    machine.reopen(machine.default_os)
    with pytest.raises(ConnectorClosedError):
        read(file, 0x1000, 1)


def test_reads_and_faults_are_counted(fake):
    root, machine, _ = fake
    file = open_at(root, MEM)
    read(file, 0x1000, 100)
    read(file, 0x2F00, 0x200)
    with pytest.raises(FaultError):
        read(file, 0, 1)
    counters = machine.default_os.counters
    assert (counters.reads, counters.bytes_read, counters.faults) == (2, 100 + 0x100, 2)


# -- the kernel's mem ---------------------------------------------------------------------------------


def test_the_offset_of_a_kernels_mem_is_its_address_without_the_top_bit(fake):
    root, _, layer = fake
    layer.kernel = Pieces({KERNEL: A, KERNEL + PAGE: B})
    file = open_at(root, "os/fake/mem")
    offset = 0x7FFF_8880_0000_0000
    assert read(file, offset + PAGE - 1, 2) == b"AB"
    assert read(file, offset + PAGE, 1 << 20) == B
    with pytest.raises(FaultError) as fault:
        read(file, 0, 1)
    assert fault.value.address == 1 << 63


def test_without_kernel_memory_there_is_no_mem(fake):
    root, *_ = fake
    assert "mem" not in names(root, "os/fake")
    assert "mem" not in names(root, "os")


# -- regions: whole -----------------------------------------------------------------------------------

REGIONS = "os/fake/processes/7/regions"


def test_a_region_reads_as_a_whole_file_with_zeros_in_its_holes(fake):
    root, _, layer = fake
    layer.table[7].regions = [Region(0x1000, 0x5000, Rights.READ)]
    (name,) = names(root, REGIONS)
    node = at(root, f"{REGIONS}/{name}")
    assert node.attributes().size == 0x5000
    assert read_all(node) == A + B + bytes(PAGE) + C + bytes(PAGE)


def test_a_region_ends_where_it_ends_though_memory_goes_on(fake):
    root, _, layer = fake
    layer.table[7].regions = [Region(0x1000, 0x1000, Rights.READ)]
    (name,) = names(root, REGIONS)
    file = open_at(root, f"{REGIONS}/{name}")
    assert read(file, 0xFFF, 100) == b"A"
    assert read(file, 0x1000, 100) == b""
    assert bytes(file.read(0xFFF, 100, SCRATCH)) == b"A"
    assert bytes(file.read(1 << 40, 100, SCRATCH)) == b""


PATTERNS = st.lists(st.booleans(), min_size=1, max_size=12)


@given(PATTERNS, st.integers(0, 13 * PAGE), st.integers(1, 13 * PAGE))
def test_holes_of_any_pattern_read_as_zeros(pattern, start, size):
    pieces = {PAGE * index: bytes([65 + index]) * PAGE for index, there in enumerate(pattern) if there}
    memory = Pieces(pieces)
    truth = b"".join(pieces.get(PAGE * index, bytes(PAGE)) for index in range(len(pattern)))
    opening = Opening(Instance("oslayer", "x", Spec("x"), None), None, None)
    file = OpenWhole(opening, Opened(memory, 0, len(truth)), writable=False)
    expected = truth[start : start + size]
    assert bytes(file.read_nowait(start, size, SCRATCH)) == expected
    SCRATCH[:size] = b"\xee" * size
    assert bytes(file.read(start, size, SCRATCH)) == expected


class Lying(Pieces):
    """Says that it holds data where it faults: a live target between two questions."""

    def extents(self, start=0, stop=None):
        stop = self.size if stop is None else stop
        if start < stop:
            yield Extent(start, stop - start)


def test_data_that_goes_away_between_two_questions_is_zeros():
    memory = Lying(PIECES)
    buffer = memoryview(bytearray(b"\xee" * 0x6000))
    with pytest.raises(FaultError) as first:
        memory.readinto(0, buffer)
    faults = fill_holes(memory, 0, buffer, first.value, memory.readinto)
    assert bytes(buffer) == bytes(PAGE) + A + B + bytes(PAGE) + C + bytes(PAGE)
    assert faults == 3


@pytest.mark.parametrize("there", [lambda page: False, lambda page: page % 2, lambda page: page % 7 != 3])
def test_no_more_is_asked_for_than_a_few_times_the_buffer_however_many_pages_are_missing(there):
    count, asked = 1024, 0

    def readinto(address, buffer):
        nonlocal asked
        asked += len(buffer)
        for place in range(address, address + len(buffer), PAGE):
            if not there(place // PAGE):
                raise FaultError(place)
            buffer[place - address : place - address + PAGE] = bytes([place // PAGE % 251 + 1]) * PAGE

    buffer = memoryview(bytearray(count * PAGE))
    faults = fill_holes(Lying(PIECES), 0, buffer, FaultError(0), readinto)
    whole = [bytes([page % 251 + 1]) * PAGE if there(page) and page else bytes(PAGE) for page in range(count)]
    assert bytes(buffer) == b"".join(whole)
    runs = sum(not whole[page].strip(bytes(1)) and (not page or whole[page - 1].strip(bytes(1)) != b"")
               for page in range(count))  # fmt: skip
    assert faults == runs
    assert asked < 4 * len(buffer)


# -- phys_mem -----------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.raw"
    path.write_bytes(np.random.default_rng(1).bytes(3 * PAGE + 5))
    return path


def test_phys_mem_is_the_file_at_its_base_with_zeros_before_it(image):
    with Machine() as machine:
        machine.open("connector", Spec("raw", str(image), {"base": "0x1000"}))
        node = at(build_root(machine), "connector/raw/phys_mem")
        assert node.attributes().size == PAGE + 3 * PAGE + 5
        assert read_all(node) == bytes(PAGE) + image.read_bytes()
        assert read(node.open(0), 1 << 40, 10) == b""


def test_phys_mem_of_a_file_that_grows_grows(image):
    with Machine() as machine:
        machine.open("connector", Spec("raw", str(image)))
        node = at(build_root(machine), "connector/raw/phys_mem")
        file = node.open(0)
        with image.open("ab") as more:
            more.write(b"more")
        assert node.attributes().size == 3 * PAGE + 9
        assert read(file, 3 * PAGE + 5, 100) == b"more"


def test_what_cannot_change_may_be_cached_and_what_lives_may_not(image):
    with Machine() as machine:
        machine.open("connector", Spec("raw", str(image), {"live": "yes"}), name="live")
        machine.open("connector", Spec("raw", str(image), {"immutable": "yes"}), name="dump")
        root = build_root(machine)
        live, dump = open_at(root, "connector/live/phys_mem"), open_at(root, "connector/dump/phys_mem")
        assert (live.direct_io, live.keep_cache) == (True, False)
        assert (dump.direct_io, dump.keep_cache) == (False, True)
        assert at(root, "connector/dump/phys_mem").timeout >= 300


def test_a_large_read_of_mapped_memory_is_the_mapping_itself(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(range(256)) * 1024)
    memory = BytesMemory(path.read_bytes())
    opening = Opening(Instance("connector", "x", Spec("x"), None), None, None)
    for kind in (OpenExact, OpenWhole):
        got = kind(opening, Opened(memory), writable=False).read_nowait(0, 1 << 17, SCRATCH)
        assert isinstance(got, memoryview)
        assert got.obj is not SCRATCH.obj
        assert got.readonly
        assert bytes(got) == bytes(range(256)) * 512


# -- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
def test_without_leave_nothing_opens_for_writing_and_modes_say_so(fake, flags):
    root, *_ = fake
    for path in (MEM, f"{REGIONS}/{names(root, REGIONS)[0]}"):
        assert at(root, path).attributes().mode & 0o777 == 0o400
        with pytest.raises(ReadOnlyError):
            open_at(root, path, flags)


def test_with_leave_a_write_changes_the_process(writable):
    root, machine, layer = writable
    assert at(root, MEM).attributes().mode & 0o777 == 0o600
    file = open_at(root, MEM, os.O_RDWR)
    assert file.write(0x1FFE, b"1234") == 4
    assert read(file, 0x1FFC, 8) == b"AA1234BB"
    assert (machine.default_os.counters.writes, machine.default_os.counters.bytes_written) == (1, 4)
    assert bytes(layer.table[7].memory.data[0xFFE:0x1002]) == b"1234"


def test_a_descriptor_opened_for_reading_does_not_write(writable):
    root, *_ = writable
    with pytest.raises(ReadOnlyError):
        open_at(root, MEM).write(0x1000, b"x")


def test_a_write_stores_what_lies_before_a_hole_and_then_fails(writable):
    root, *_ = writable
    file = open_at(root, MEM, os.O_WRONLY)
    assert file.write(0x2FFE, b"1234") == 2
    with pytest.raises(FaultError) as fault:
        file.write(0x3000, b"34")
    assert fault.value.address == 0x3000


def test_a_write_to_a_region_stays_inside_of_it(writable):
    root, _, layer = writable
    layer.table[7].regions = [Region(0x1000, 0x1000, Rights.READ | Rights.WRITE)]
    (name,) = names(root, REGIONS)
    file = open_at(root, f"{REGIONS}/{name}", os.O_RDWR)
    assert file.write(0xFFE, b"1234") == 2
    with pytest.raises(FaultError):
        file.write(0x1000, b"x")
    assert read(open_at(root, MEM), 0x2000, 2) == b"BB"


@pytest.mark.parametrize("flag", [os.O_TRUNC, os.O_APPEND])
def test_habits_that_would_destroy_are_refused(writable, flag):
    root, *_ = writable
    with pytest.raises(PermissionError):
        open_at(root, MEM, os.O_WRONLY | flag)


def test_an_image_that_may_be_written_is_never_cached(image):
    with Machine(writable=True) as machine:
        machine.open("connector", Spec("raw", str(image), {"immutable": "yes"}))
        file = open_at(build_root(machine), "connector/raw/phys_mem", os.O_RDWR)
        assert file.direct_io
        assert not file.keep_cache
        assert file.write(10, b"changed") == 7
        assert image.read_bytes()[10:17] == b"changed"


def test_files_belong_to_whom_proc_says_and_else_to_the_mounting_user(fake):
    root, _, layer = fake
    assert at(root, MEM).attributes().uid is None
    layer.table[8] = Life(owner=(1000, 100))
    for path in ("os/fake/processes/8", "os/fake/processes/8/mem", "os/fake/processes/8/info"):
        found = at(root, path).attributes()
        assert (found.uid, found.gid) == (1000, 100)

