"""Where data and holes begin, of memory made up of pages; checked against what a sparse file on a disk says."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudfs.nodes.files import holes
from engine.memory import Memory
from engine.types import Extent

PAGE = 4096


class Extents(Memory):
    """Memory that holds data in some ranges, and counts how many of them it was asked for."""

    def __init__(self, ranges: list[tuple[int, int]], size: int = 1 << 64) -> None:
        self.ranges = ranges
        self.given = 0
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def readinto(self, address: int, buffer: memoryview) -> None:
        raise AssertionError("nothing is read to find holes")

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        stop = self.size if stop is None else stop
        for low, high in self.ranges:
            if max(low, start) < min(high, stop):
                self.given += 1
                yield Extent(max(low, start), min(high, stop) - max(low, start))


def or_none(ask: Callable[[], int | None]) -> int | None:
    """The answer, None for ENXIO."""
    try:
        return ask()
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def places(memory: Memory, stop: int) -> list[tuple[int, int]]:
    """(data, hole) as a program finds them that walks the file."""
    found = []
    at = 0
    while True:
        data = or_none(lambda start=at: holes.seek(memory, start, stop, os.SEEK_DATA))
        if data is None:
            return found
        at = holes.seek(memory, data, stop, os.SEEK_HOLE)
        found.append((data, at))


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 21 * PAGE))
def test_every_place_is_that_of_a_sparse_file(pattern, offset):
    stop = len(pattern) * PAGE
    file = os.memfd_create("sparse")
    try:
        os.truncate(file, stop)
        for index, there in enumerate(pattern):
            if there:
                os.pwrite(file, b"x" * PAGE, index * PAGE)
        memory = Extents([(index * PAGE, (index + 1) * PAGE) for index, there in enumerate(pattern) if there])
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            want = or_none(lambda how=whence: os.lseek(file, offset, how))
            for near in (False, True):
                assert or_none(lambda how=whence, n=near: holes.seek(memory, offset, stop, how, near=n)) == want
    finally:
        os.close(file)


def test_pages_at_the_ends_of_an_address_space_of_all_64_bits_are_found():
    ranges = [(0, PAGE), (1 << 47, (1 << 47) + PAGE), ((1 << 64) - PAGE, 1 << 64)]
    assert places(Extents(ranges), 1 << 64) == ranges


def test_data_over_many_windows_is_one_piece():
    ranges = [(PAGE, 5 * holes.WINDOW + PAGE)]
    assert places(Extents(ranges), 9 * holes.WINDOW) == ranges


def test_only_the_first_extent_is_asked_for():
    memory = Extents([(index * 2 * PAGE, index * 2 * PAGE + PAGE) for index in range(1000)])
    assert holes.seek(memory, 1, 2000 * PAGE, os.SEEK_DATA) == 1
    assert holes.seek(memory, 1, 2000 * PAGE, os.SEEK_HOLE) == PAGE
    assert memory.given <= 3


def test_what_lies_far_away_is_not_looked_for_when_near_is_wanted():
    memory = Extents([(holes.NEAR * 2, holes.NEAR * 3)])
    assert holes.seek(memory, 0, holes.NEAR * 4, os.SEEK_DATA, near=True) is None
    assert holes.seek(memory, 0, holes.NEAR * 4, os.SEEK_DATA) == holes.NEAR * 2


def test_a_search_that_takes_long_stops_where_it_is(monkeypatch):
    seconds = itertools.count(0.0, 2.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    found = holes.seek(Extents([]), 0, 1 << 62, os.SEEK_DATA)
    assert found is not None
    assert 0 < found <= 8 * holes.WINDOW


@pytest.mark.parametrize("start", [10, 11, 1 << 63])
def test_behind_the_end_is_nothing(start):
    with pytest.raises(OSError, match="No such device or address"):
        holes.seek(Extents([(0, 10)]), start, 10, os.SEEK_HOLE)
