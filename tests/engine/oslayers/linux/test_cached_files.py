"""Files of a page cache that is made by hand: pages, folios of both kinds, values, and what is not to be believed."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_memory import BASE, Ground, kernel_over

from engine.errors import FaultError, FaultKind, PagedOutError
from engine.oslayers.linux.cached_files import CachedFile, CachedPages

PAGE = 4096
FRAMES = 64
ARRAY = BASE + 0x20_0000
"""Where the array of page structures stands."""
UP_TO_DATE = 4


class File:
    """One file; its frames hold each its own number."""

    def __init__(self, size: int, file_system: str = "ext4", *, live: bool = False) -> None:
        self.ground = Ground()
        self.mapping, self.inode = self.ground.room(64), self.ground.room(64)
        self.ground.put(self.mapping, self.inode)
        self.ground.put(self.inode + 8, size)
        self.entries: dict[int, tuple[int, int]] = {}
        self.physical = b"".join(bytes([frame]) * PAGE for frame in range(FRAMES))
        self.file_system, self.live = file_system, live

    def structure(self, frame: int, index: int, *, mapping: int | None = None, flags: int = UP_TO_DATE) -> int:
        """The structure of a frame that says it is page `index` of the file."""
        at = ARRAY + 64 * frame
        self.ground.put(at, flags)
        self.ground.put(at + 24, self.mapping if mapping is None else mapping)
        self.ground.put(at + 32, index)
        return at

    def page(self, index: int, frame: int, order: int = 0, **fields: int) -> None:
        self.entries[index] = self.structure(frame, index, **fields), order

    @property
    def opened(self) -> CachedFile:
        self.ground.xarray(self.mapping + 8, self.entries)
        kernel = kernel_over(self.ground, self.physical, ARRAY, live=self.live)
        return CachedFile(CachedPages(kernel, self.mapping, self.file_system))


def frames_of(data: bytes) -> list[int]:
    """The frame of each page."""
    pages = np.frombuffer(data, np.uint8).reshape(-1, PAGE)
    assert (pages == pages[:, :1]).all()
    return pages[:, 0].tolist()


def test_pages_come_from_their_frames_and_the_file_ends_where_it_ends():
    file = File(2 * PAGE + 5)
    for index, frame in ((0, 9), (1, 3), (2, 4)):
        file.page(index, frame)
    opened = file.opened
    assert opened.size == 2 * PAGE + 5
    assert opened.read(0, opened.size) == bytes([9]) * PAGE + bytes([3]) * PAGE + bytes([4]) * 5
    assert opened.read(PAGE - 2, 4) == b"\x09\x09\x03\x03"
    with pytest.raises(FaultError, match="the file ends before it") as caught:
        opened.read(opened.size - 1, 2)
    assert caught.value.address == opened.size


def test_a_folio_in_one_entry_gives_the_frames_behind_its_first():
    file = File(64 * PAGE)
    file.page(16, 32, order=4)
    assert frames_of(file.opened.read(16 * PAGE, 16 * PAGE)) == list(range(32, 48))
    assert frames_of(file.opened.read(21 * PAGE, 3 * PAGE)) == [37, 38, 39]


def test_a_folio_whose_first_page_stands_in_every_entry_is_the_same():
    """As before 5.17."""
    file = File(64 * PAGE)
    head = file.structure(32, 8)
    file.entries = dict.fromkeys(range(8, 16), (head, 0))
    assert frames_of(file.opened.read(8 * PAGE, 8 * PAGE)) == list(range(32, 40))


def test_what_is_not_cached_of_a_disk_s_file_is_a_fault_and_of_memory_s_file_zeros():
    for file_system, hole in (("ext4", None), ("tmpfs", 0)):
        file = File(4 * PAGE, file_system)
        file.page(0, 5)
        file.page(3, 6)
        opened = file.opened
        if hole is None:
            with pytest.raises(FaultError, match="not in the page cache") as caught:
                opened.read(0, 4 * PAGE)
            assert caught.value.address == PAGE
            assert frames_of(opened.read_padded(0, 4 * PAGE)) == [5, 0, 0, 6]
        else:
            assert frames_of(opened.read(0, 4 * PAGE)) == [5, 0, 0, 6]
        assert [(extent.start, extent.size) for extent in opened.extents()] == [(0, PAGE), (3 * PAGE, PAGE)]


def test_a_value_is_a_page_in_swap_of_memory_s_file_and_a_trace_of_eviction_of_a_disk_s():
    for file_system, kind in (("tmpfs", FaultKind.PAGED_OUT), ("ext4", FaultKind.ABSENT)):
        file = File(2 * PAGE, file_system)
        file.entries[1] = ((3 << 58 | 0x77) << 1 | 1, 0)
        with pytest.raises(FaultError) as caught:
            file.opened.read(PAGE + 8, 8)
        assert (caught.value.address, caught.value.kind) == (PAGE + 8, kind)
        assert isinstance(caught.value, PagedOutError) == (file_system == "tmpfs")
        if file_system == "tmpfs":
            assert str(caught.value).endswith("in swap: 3 119")
        assert list(file.opened.extents()) == []


@pytest.mark.parametrize("fields", [{"mapping": BASE + 0x40}, {"index": 2}, {"index": 1 << 60}])
def test_a_page_that_does_not_name_this_file_and_its_place_is_not_believed(fields):
    file = File(2 * PAGE)
    mapping = fields.get("mapping")
    file.entries[1] = file.structure(7, fields.get("index", 1), mapping=mapping), 0
    with pytest.raises(FaultError) as caught:
        file.opened.read(PAGE, 1)
    assert caught.value.kind is FaultKind.MALFORMED
    assert file.ground.skipped["page of the page cache"]


def test_a_page_that_was_not_read_yet_is_not_cached():
    file = File(PAGE)
    file.page(0, 7, flags=1)
    with pytest.raises(FaultError, match="not in the page cache"):
        file.opened.read(0, 1)


def test_entries_that_are_no_page_structures_are_not_followed():
    file = File(3 * PAGE)
    file.entries[0] = ARRAY + 8, 0
    file.entries[1] = 0x1000, 0
    file.entries[2] = BASE + (1 << 40), 0
    opened = file.opened
    for index in range(3):
        with pytest.raises(FaultError):
            opened.read(index * PAGE, 1)


def test_an_impossible_size_is_none_and_a_huge_one_costs_nothing():
    assert File(1 << 63).opened.size == 0
    file = File(1 << 62)
    file.page(5, 7)
    file.page((1 << 50) - 1, 8)
    opened = file.opened
    assert opened.size == 1 << 62
    assert [extent.start for extent in opened.extents()] == [5 * PAGE, ((1 << 50) - 1) * PAGE]
    assert opened.read(((1 << 50) - 1) * PAGE, PAGE) == bytes([8]) * PAGE


def test_the_size_of_a_live_file_is_asked_anew():
    file = File(PAGE, live=True)
    file.page(0, 3)
    opened = file.opened
    file.ground.put(file.inode + 8, 100)
    assert opened.size == 100
    file.ground.put(file.mapping, BASE + (1 << 40))
    assert opened.size == 100
