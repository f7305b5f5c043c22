"""Lists of a kernel that are cut, bent or torn: what is met of them, and whether that is said."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.layout import DataType, Field, StructLayout, TypeKind, TypeSource
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.procstatus import bitmap_text, list_text
from engine.oslayers.linux.walks import settled_ring

START, STEP, HEAD = 0x1000, 0x40, 0x100
"""Where the first structure lies, how far they are apart, where the list's head lies."""
LINK = Field("link", 0x10, 16, DataType(TypeKind.STRUCT, 16))


class NoTypes(TypeSource):
    """A kernel of 64 bits whose types are not asked for."""

    pointer_size = 8
    order = "<"

    def struct(self, *names: str) -> StructLayout | None:
        return None

    def enum(self, name: str) -> dict[str, int] | None:
        return None


def ring(count: int) -> bytearray:
    """A list of that many structures, in the order of their addresses."""
    data = bytearray(START + STEP * (count + 1))
    nodes = [HEAD, *(START + STEP * index + LINK.offset for index in range(count))]
    for index, node in enumerate(nodes):
        struct.pack_into("<QQ", data, node, nodes[(index + 1) % len(nodes)], nodes[index - 1])
    return data


def members(count: int) -> list[int]:
    return [START + STEP * index for index in range(count)]


def walked(data: bytes | bytearray) -> tuple[list[int], bool, dict[str, int]]:
    objects = Objects(BytesMemory(bytes(data)), NoTypes(), 0x10)
    found, whole = settled_ring(objects, HEAD, LINK, 1000, kind="ring")
    return found, whole, dict(objects.skipped)


def test_a_sound_ring_is_walked_in_its_order():
    for count in (0, 1, 2, 50):
        assert walked(ring(count)) == (members(count), True, {})


def test_one_way_around_is_enough():
    data = ring(10)
    struct.pack_into("<Q", data, members(10)[4] + LINK.offset, 0)
    assert walked(data) == (members(10), True, {})


def test_a_cut_in_both_ways_loses_nobody_who_stands_beside_it():
    data = ring(10)
    struct.pack_into("<QQ", data, members(10)[4] + LINK.offset, 0, 0)
    found, whole, skipped = walked(data)
    assert sorted(found) == members(10)
    assert (whole, skipped) == (False, {"broken ring": 1})


def test_a_head_that_cannot_be_read_gives_nothing_and_is_counted():
    assert walked(b"\0" * 0x80) == ([], False, {"broken ring": 1})


@given(
    count=st.integers(0, 30),
    damage=st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from([0, 8]), st.integers(0, 1 << 64) | st.integers(0, 0x1800)),
        max_size=6,
    ),
)
def test_whatever_the_links_say_a_walk_ends_with_what_can_be_read(count, damage):
    data = ring(count)
    for index, direction, value in damage:
        node = HEAD if index == 0 or index > count else members(count)[index - 1] + LINK.offset
        struct.pack_into("<Q", data, node + direction, value % (1 << 64))
    found, whole, skipped = walked(data)
    assert len(found) == len(set(found)) <= len(data)
    assert all(-LINK.offset <= address < len(data) for address in found)
    assert whole == (not skipped)
    if not damage:
        assert found == members(count)


@given(st.lists(st.integers(0, 199), unique=True).map(sorted), st.integers(200, 300))
def test_sets_of_bits_are_printed_as_the_kernel_prints_them(bits, count):
    shown = bitmap_text(bits, count)
    assert int(shown.replace(",", ""), 16) == sum(1 << bit for bit in bits)
    assert len(shown.split(",")) == -(-count // 32)
    assert all(len(group) == 8 for group in shown.split(",")[1:])
    again = [
        bit for part in list_text(bits).split(",") if part
        for first, _, last in [part.partition("-")] for bit in range(int(first), int(last or first) + 1)
    ]  # fmt: skip
    assert again == bits


def test_a_set_is_as_wide_as_its_last_group_needs():
    assert bitmap_text([0], 1) == "1"
    assert bitmap_text([4], 5) == "10"
    assert bitmap_text([0, 63], 64) == "80000000,00000001"
    assert list_text([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
