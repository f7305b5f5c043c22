"""Where a process's memory holds data."""

from __future__ import annotations

import os
import time
from itertools import pairwise

import pytest
from native_program import PAGE, figures
from support import require

from engine.errors import FaultError
from engine.types import Extent


@pytest.fixture
def memory(layer, target):
    return layer.process(target.pid).memory


def covered(memory, address: int, pages: int) -> str:
    """A letter a page: `x` for one that holds data, `.` for the others."""
    marks = ["."] * pages
    for extent in memory.extents(address, address + pages * PAGE):
        for page in range((extent.start - address) // PAGE, -((address - extent.stop) // PAGE)):
            marks[page] = "x"
    return "".join(marks)


def test_pages_that_were_written_hold_data_and_the_others_do_not(memory, target, kernel):
    if kernel == "without pagemap":  # then nobody can tell
        assert covered(memory, target.sparse, 8) == "xxxxxxxx"
        return
    assert covered(memory, target.sparse, 8) == "x......x"
    assert covered(memory, target.forbidden, 2) == "x."


def test_no_extent_lies_in_a_hole(memory, target, kernel):
    assert covered(memory, target.island, 4) == "xx.x"


def test_shared_memory_holds_what_any_process_wrote(memory, target):
    require(os.geteuid() == 0, "the file behind shared memory needs CAP_SYS_ADMIN")
    assert covered(memory, target.shared, 16) == "x....x.........."


def test_extents_begin_and_stop_at_the_bytes_that_were_asked_for(memory, target, kernel):
    assert list(memory.extents(target.pattern + 5, target.pattern + 9)) == [Extent(target.pattern + 5, 4)]
    assert list(memory.extents(target.pattern + 5, target.pattern + 5)) == []
    assert list(memory.extents(target.pattern + 9, target.pattern + 5)) == []


def test_extents_of_all_of_it_ascend_and_never_touch(memory, kernel):
    found = list(memory.extents())
    assert all(before.stop < after.start for before, after in pairwise(found))
    assert all(extent.size > 0 for extent in found)


def test_what_lies_outside_of_all_extents_is_zeros_or_a_fault(layer, memory):
    pid = memory._directory.pid
    for region in layer.process(pid).regions():
        if region.size > 64 << 20:
            continue
        inside = {a for e in memory.extents(region.start, region.stop) for a in range(e.start, e.stop, PAGE)}
        for address in range(region.start, region.stop, PAGE):
            if address not in inside:
                try:
                    assert not any(memory.read(address, PAGE))
                except FaultError:
                    assert region.path.startswith(("[v", "/memfd"))


def test_a_tebibyte_that_was_never_touched_is_searched_at_once_and_untouched(memory, target):
    before = figures(target.pid)
    began = time.process_time()
    assert list(memory.extents(target.reserve, target.reserve + (1 << 40))) == []
    shared = list(memory.extents(target.shared_reserve, target.shared_reserve + (1 << 36)))
    # What shared memory holds is told to CAP_SYS_ADMIN; without it the whole of it may be data.
    assert shared == ([] if os.geteuid() == 0 else [Extent(target.shared_reserve, 1 << 36)])
    assert time.process_time() - began < 1  # of CPU
    assert figures(target.pid) == before


def test_mappings_of_files_hold_data_whole(layer, memory, target):
    region = next(r for r in layer.process(target.pid).regions() if r.path.endswith("/target"))
    assert list(memory.extents(region.start, region.stop)) == [Extent(region.start, region.size)]
