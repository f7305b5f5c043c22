"""Searching memory for patterns, and names in a column: the same as bytes.find and a dictionary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.errors import InvalidArgumentError
from engine.formats import search
from engine.formats.name_column import NameColumn
from engine.formats.search import find_all
from engine.memory_map import MappedMemory, MapRange, MemoryMap

PIECE = 1 << 20


def places(data: bytes, pattern: bytes) -> list[int]:
    found, at = [], data.find(pattern)
    while at >= 0:
        found.append(at)
        at = data.find(pattern, at + 1)
    return found


@given(
    data=st.lists(st.sampled_from([b"abcd", b"ab", b"a", b"\0", b"abcdabcde"]), max_size=200).map(b"".join),
    patterns=st.lists(st.sampled_from([b"abcd", b"abcda", b"dabc", b"\0\0\0\0", b"abcdeab"]), min_size=1, max_size=3),
    alignment=st.sampled_from([1, 2, 4, 8]),
    start=st.integers(0, 50),
    length=st.integers(0, 400),
)
def test_patterns_are_found_where_bytes_find_finds_them(data, patterns, alignment, start, length):
    stop = min(len(data), start + length)
    wanted = {at for pattern in patterns for at in places(data[:stop], pattern) if at >= start and at % alignment == 0}
    found = list(find_all(BytesMemory(data), patterns, start, start + length, alignment=alignment))
    assert found == sorted(wanted)


@pytest.mark.parametrize("at", [PIECE - 3, PIECE - 1, PIECE, 2 * PIECE - 4, 3 * PIECE - 8])
def test_a_pattern_across_two_pieces_is_found_once(at):
    data = bytearray(3 * PIECE)
    data[at : at + 8] = b"patterns"
    assert list(find_all(BytesMemory(bytes(data)), [b"patterns"])) == [at]


def test_holes_cost_nothing_and_hide_nothing():
    flat = BytesMemory(bytes(5000) + b"needle" + bytes(5000))
    memory = MappedMemory(flat, MemoryMap([MapRange(1 << 30, 10_000, 0), MapRange(1 << 50, 10_000, 0)]))
    assert list(find_all(memory, [b"needle"])) == [(1 << 30) + 5000, (1 << 50) + 5000]


def test_no_more_than_the_limit_are_found():
    memory = BytesMemory(b"word" * 1000)
    assert list(find_all(memory, [b"word"], limit=3)) == [0, 4, 8]


def test_a_short_pattern_is_refused():
    with pytest.raises(InvalidArgumentError, match="four bytes"):
        list(find_all(BytesMemory(bytes(9)), [b"abc"]))


def test_a_search_takes_no_more_than_one_piece_at_a_time():
    sizes = [size for _, _, size, _ in search.chunks(BytesMemory(bytes(5 * PIECE)), 0, None, 7)]
    assert max(sizes) == PIECE + 7


@given(st.lists(st.text(st.sampled_from("ab\x7f"), max_size=20), min_size=1, max_size=60))
def test_names_are_found_as_in_a_dictionary(names):
    block, starts, rows = b"", [], {}
    for row, name in enumerate(names):
        starts.append(len(block))
        block += name.encode() + b"\0"
        rows.setdefault(name, []).append(row)
    column = NameColumn(block, np.array(starts))
    assert [column[row] for row in range(len(column))] == names
    assert {name: column.find(name.encode()) for name in rows} == rows
    for absent in ("c", "ab" * 20, "a\0b"):
        assert column.find(absent.encode()) == []


def test_a_name_outside_of_the_block_is_empty_and_never_found():
    column = NameColumn(b"one\0two\0", np.array([0, 4, 8, 99, 1 << 40]))
    assert [column[row] for row in range(5)] == ["one", "two", "", "", ""]
    assert column.find(b"two") == [1]
    assert column.find(b"") == []
