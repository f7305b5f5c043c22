"""Walks of xarrays that are made by hand: what lies in them, in ranges, and what cannot be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from kernel_memory import BASE, SLOTS, Ground

from engine.oslayers.linux.walks import xarray


def disjoint(rows: list[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Index → (entry, order), aligned as an xarray wants it, none over another."""
    found: dict[int, tuple[int, int]] = {}
    taken: set[int] = set()
    for number, (index, order) in enumerate(rows):
        first = index >> order << order
        span = range(first, first + (1 << order))
        if taken.isdisjoint(span):
            taken.update(span)
            found[first] = BASE + 0x10_0000 + 64 * number, order
    return found


entries = st.lists(st.tuples(st.integers(0, 1 << 14), st.integers(0, 9)), max_size=12).map(disjoint)


@given(entries, st.integers(0, 1 << 14), st.integers(0, 1 << 14))
def test_a_walk_gives_every_entry_that_shares_an_index_with_the_range(made, first, last):
    ground = Ground(1 << 19)
    head = ground.room(16)
    ground.xarray(head, made)
    expected = [(index, entry, 1 << order) for index, (entry, order) in sorted(made.items())]
    assert list(xarray(ground.objects, head)) == expected
    within = [row for row in expected if row[0] <= last and row[0] + row[2] > first]
    assert list(xarray(ground.objects, head, first=first, last=last)) == within
    assert not ground.skipped


def test_a_single_entry_needs_no_node():
    ground = Ground(1 << 14)
    head = ground.room(16)
    ground.put(head + 8, BASE + 0x40)
    assert list(xarray(ground.objects, head)) == [(0, BASE + 0x40, 1)]
    assert list(xarray(ground.objects, head, first=1)) == []


def test_values_are_entries_and_marks_are_none():
    ground = Ground(1 << 14)
    head, node = ground.room(16), ground.room(8 + 8 * SLOTS)
    ground.put(head + 8, node | 2)
    ground.put(node + 8, 7 << 1 | 1)
    ground.put(node + 16, 256 << 2 | 2)  # a retry entry
    assert list(xarray(ground.objects, head)) == [(0, 15, 1)]


def test_a_node_that_leads_to_itself_ends_the_walk_there():
    ground = Ground(1 << 14)
    head, node = ground.room(16), ground.room(8 + 8 * SLOTS)
    ground.put(head + 8, node | 2)
    ground.put(node, 12, 1)
    for slot in range(SLOTS):
        ground.put(node + 8 + 8 * slot, node | 2)
    assert list(xarray(ground.objects, head)) == []
    assert ground.skipped["broken xarray"] == SLOTS


def test_a_node_outside_of_memory_and_an_absurd_shift_are_counted():
    ground = Ground(1 << 14)
    head, node = ground.room(16), ground.room(8 + 8 * SLOTS)
    ground.put(head + 8, BASE + (1 << 40) | 2)
    assert list(xarray(ground.objects, head)) == []
    ground.put(head + 8, node | 2)
    ground.put(node, 200, 1)
    ground.put(node + 8, BASE + 0x40)
    assert list(xarray(ground.objects, head)) == []
    assert ground.skipped["broken xarray"] == 2
