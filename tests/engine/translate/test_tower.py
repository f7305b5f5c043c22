"""Reads through all floors in one call of C: the same bytes, and nothing wherever anything is not usual."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
from every_mode import MODES, built
from support import require

from engine import accelerator
from engine.errors import TargetGoneError
from engine.file_memory import FileMemory
from engine.floors import Floor, Ground, Ranges, Through
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer
from engine.testing import PageTableBuilder
from engine.translate.modes import mode
from engine.translate.tower import space_on, tower_of
from engine.translate.virtual import VirtualMemory

PAGE = 4096
SIZE = 1 << 53
PAGES = 60
NARROW = sorted(name for name, spec in MODES.items() if spec.entry_size <= 8 and spec.address_bits <= 64)
ADDRESS, FRAME = 0x7F00_0000_0000, 0x20_0000


@pytest.fixture(autouse=True)
def compiler() -> None:
    require(accelerator.library(), "there is no C compiler")


@pytest.fixture
def file() -> Iterator[FileMemory]:
    """A file in memory that has room for every frame, and nothing in it."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as made:
        made.truncate(SIZE)
        yield FileMemory(made.name, writable=True)


class Floors(Memory):
    """A memory that stands on what a test says."""

    def __init__(self, floor: Floor | None) -> None:
        self._floor = floor

    @property
    def size(self) -> int:
        return SIZE

    def readinto(self, address: int, buffer: memoryview) -> None:
        raise AssertionError("it is not asked")

    def floor(self) -> Floor | None:
        return self._floor


def one_page(file: FileMemory) -> PageTableBuilder:
    """A tree with three pages that follow one another, two of them in memory, too; its tables in the file."""
    tree = PageTableBuilder(mode("x86-64"), noise=False)
    for page, frame in ((0, FRAME), (1, FRAME + PAGE), (2, FRAME + 7 * PAGE)):
        tree.map(ADDRESS + page * PAGE, frame)
        file.write(frame, bytes([page + 1]) * PAGE)
    file.write(tree.base, tree.data)
    return tree


@pytest.mark.parametrize("name", NARROW)
def test_a_word_is_the_one_that_stands_where_the_record_says(file, name):
    spec = MODES[name]
    tree = built(spec, 4, PAGES)
    file.write(tree.base, bytes(tree.data))
    tower = tower_of(VirtualMemory(file, [(spec, tree.dtb)]))
    for number, (address, page) in enumerate(tree.mappings.items()):
        inside = 8 * number % (1 << page.page_bits)
        place = page.physical + inside
        if tree.base - 8 < place < tree.base + len(tree.data) or place > SIZE - 8:
            continue
        file.write(place, number.to_bytes(8, "little"))
        assert tower.word(address + inside, 8) == number, hex(address)
        assert tower.word(address + inside, 1) == number & 0xFF
    absent = [address for address in range(0, 1 << 40, 0x37_0000_3000) if tree.find(address) is None]
    assert [tower.word(address, 8) for address in absent] == [None] * len(absent)


def test_bytes_over_pages_are_theirs_and_none_are_given_where_one_is_absent(file):
    tree = one_page(file)
    tower = tower_of(VirtualMemory(file, [(tree.spec, tree.dtb)]))
    for start, size in ((0, 3 * PAGE), (5, PAGE), (PAGE - 3, PAGE + 7), (2 * PAGE - 4, 8)):
        buffer = memoryview(bytearray(size))
        assert tower.readinto(ADDRESS + start, buffer)
        assert buffer == (bytes([1]) * PAGE + bytes([2]) * PAGE + bytes([3]) * PAGE)[start : start + size]
    assert not tower.readinto(ADDRESS, memoryview(bytearray(3 * PAGE + 1)))
    assert not tower.readinto(ADDRESS - 1, memoryview(bytearray(2)))


def test_rows_are_theirs_and_none_are_given_where_one_is_absent(file):
    tree = one_page(file)
    tower = tower_of(VirtualMemory(file, [(tree.spec, tree.dtb)]))
    out = np.zeros((4, 6), np.uint8)
    places = np.array([ADDRESS + 2 * PAGE, ADDRESS + PAGE - 3, ADDRESS, ADDRESS + PAGE], np.uint64)
    assert tower.gather(places, out)
    assert out.tolist() == [[3] * 6, [1] * 3 + [2] * 3, [1] * 6, [2] * 6]
    places[3] = ADDRESS + 3 * PAGE - 5
    assert not tower.gather(places, out)
    assert not tower.gather(places[:0], out[:0])


def test_a_view_for_one_operation_reads_as_deep_as_what_it_is_of(file):
    tree, host = one_page(file), PageTableBuilder(mode("ept"), base=1 << 40, noise=False)
    for page in range(2048):
        host.map(page * PAGE, page * PAGE)
    file.write(host.base, host.data)
    memory = VirtualMemory(VirtualMemory(file, [(host.spec, host.dtb)]), [(tree.spec, tree.dtb)])
    view, out = memory.cached(), np.zeros((2, 8), np.uint8)
    assert view.tower() is memory.tower() is not None
    assert view.u64(ADDRESS + PAGE) == 0x0202020202020202
    assert view.gather_down(np.array([ADDRESS, ADDRESS + 2 * PAGE], np.uint64), out)
    assert out.tolist() == [[1] * 8, [3] * 8]


def test_what_lies_in_two_ranges_is_put_together_and_nothing_is_given_between_them(file):
    tree = one_page(file)
    ranges = [MapRange(0, FRAME + PAGE + 16, 0), MapRange(FRAME + PAGE + 16, PAGE, FRAME + 7 * PAGE)]
    memory = VirtualMemory(MappedMemory(file, MemoryMap(ranges)), [(tree.spec, tree.dtb)])
    buffer = memoryview(bytearray(32))
    assert tower_of(memory).readinto(ADDRESS + PAGE, buffer)
    assert buffer == bytes([2]) * 16 + bytes([3]) * 16
    assert tower_of(memory).word(ADDRESS + 2 * PAGE, 8) is None


def test_a_process_that_is_not_the_same_afterwards_gives_nothing(file):
    tree = one_page(file)
    at = FRAME + 64 * PAGE
    file.write(at, (7).to_bytes(4, "little") + bytes(600) + (9).to_bytes(8, "little"))
    good = ((at, 4, 7), (at + 604, 8, 9))
    for words, given in ((good, 1), (((at, 4, 8),), None), ((*good, (at + 612, 8, 1)), None)):
        tower = tower_of(Floors(space_on(file, (tree.spec, tree.dtb), words)))
        assert tower.word(ADDRESS, 1) == given


def test_what_was_read_counts_only_where_every_floor_says_so(file):
    tree = one_page(file)

    def gone() -> bool:
        raise TargetGoneError("it has ended")

    for holds, given in ((lambda: True, 1), (lambda: False, None), (gone, None)):
        below = Floors(Through(file, holds))
        assert tower_of(VirtualMemory(below, [(tree.spec, tree.dtb)])).word(ADDRESS, 1) == given


def test_a_file_that_was_closed_is_read_no_more(file):
    tree = one_page(file)
    memory = VirtualMemory(file, [(tree.spec, tree.dtb)])
    assert memory.u8(ADDRESS) == 1
    tower = memory.tower()
    assert tower.stands()
    file.close()
    assert not tower.stands()
    assert memory.tower() is None


@pytest.mark.parametrize("below", [None, Floors(None), Ranges([], object())], ids=["nothing", "not now", "no memory"])
def test_there_is_none_where_a_floor_is_missing(below):
    floor = below if isinstance(below, Ranges) else Through(below)
    assert tower_of(Floors(floor)) is None


def test_floors_without_end_are_none():
    memory = Floors(None)
    memory._floor = Through(memory)
    assert tower_of(memory) is None


def test_a_page_that_a_process_never_touched_is_left_to_others_and_stays_so():
    own = mmap.mmap(-1, 16 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    own[:8] = b"12345678"
    start = ctypes.addressof(ctypes.c_char.from_buffer(own))
    process = NativeLayer.open(Base(live=True), {}).process(os.getpid())
    memory = process.memory
    assert memory.u64(start) == int.from_bytes(b"12345678", "little")
    assert isinstance(memory.floor(), Ground)
    tower = tower_of(memory)
    assert tower.word(start, 8) == int.from_bytes(b"12345678", "little")
    assert tower.word(start + 8 * PAGE, 8) is None
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek((start + 8 * PAGE) // PAGE * 8)
        assert not pagemap.read(8)[7] & 0xC0
    process.close()
    assert not tower.stands()
