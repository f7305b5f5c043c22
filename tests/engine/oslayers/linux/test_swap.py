"""Entries of pages that Linux took away: the kind of fault says where the page is."""

from __future__ import annotations

import pytest
from hand_made_tables import DTB, USER, image, put

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, FaultKind, PagedOutError
from engine.oslayers.linux.swap import absent_hook, special_types, swap_entries
from engine.translate.virtual import VirtualMemory
from engine.translate.x86 import X86_64

TABLE = 0x4000
"""Of USER's pages; its entries from 10 on are free."""
RELEASE = 6, 1
SPECIAL = special_types(RELEASE, devices=True, poison=True)
INVERTED = ((1 << 50) - 1) << 9
"""Bits of the offset: stored inverted."""


def entry(kind: int, offset: int = 0x1234) -> int:
    return (kind << 59 | offset << 9) ^ INVERTED


def memory(value: int, hook=None) -> VirtualMemory:
    data = image()
    put(data, TABLE, 10, value)
    hook = hook or absent_hook(swap_entries("x86_64", RELEASE, SPECIAL))
    return VirtualMemory(BytesMemory(bytes(data)), [(X86_64, DTB)], hook)


@pytest.mark.parametrize("kind", [0, 1, 22, 27])
def test_a_page_in_swap_or_on_a_device_is_said_to_be_paged_out(kind):
    with pytest.raises(PagedOutError) as caught:
        memory(entry(kind)).read(USER + 10 * 4096, 8)
    assert caught.value.address == USER + 10 * 4096


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (entry(24), FaultKind.MIGRATING),
        (entry(26), FaultKind.MIGRATING),
        (entry(23), FaultKind.SOURCE),
        (entry(31, 1), FaultKind.ABSENT),
        (entry(31, 2), FaultKind.GUARD),
        (entry(31, 4), FaultKind.GUARD),
    ],
)
def test_pages_on_the_move_poisoned_ones_and_marks_are_told_apart(value, fault):
    with pytest.raises(FaultError) as caught:
        memory(value).u64(USER + 10 * 4096)
    assert caught.value.kind is fault


def test_columns_say_the_same():
    found = memory(entry(3))
    _, faults = found.words([USER + page * 4096 for page in range(12)] * 2, "<u8")
    kinds = {(row % 12, FaultKind(kind)) for row, kind in zip(faults.rows.tolist(), faults.kinds.tolist(), strict=True)}
    assert kinds == {(8, FaultKind.ABSENT), (10, FaultKind.PAGED_OUT), (11, FaultKind.ABSENT)}


def test_a_page_that_was_never_there_is_absent():
    with pytest.raises(FaultError) as caught:
        memory(0).u64(USER + 10 * 4096)
    assert caught.value.kind is FaultKind.ABSENT


def test_entries_of_unknown_formats_count_as_paged_out():
    with pytest.raises(PagedOutError):
        memory(entry(31), absent_hook(None)).u64(USER + 10 * 4096)


# The numbers that stand in include/linux/swap.h of each release, for the kernel configurations named.
@pytest.mark.parametrize(
    ("release", "devices", "poison", "expected"),
    [
        ((5, 10), False, False, {30: "migration", 31: "migration"}),
        ((5, 10), True, True, {27: "poison", 28: "migration", 29: "migration", 30: "device", 31: "device"}),
        ((5, 15), True, True, {25: "poison", 26: "migration", 27: "migration",
                               **dict.fromkeys(range(28, 32), "device")}),
        ((6, 1), False, False, {28: "migration", 29: "migration", 30: "migration", 31: "mark"}),
        ((6, 1), True, True, {23: "poison", **dict.fromkeys(range(24, 27), "migration"),
                              **dict.fromkeys(range(27, 31), "device"), 31: "mark"}),
    ],
)  # fmt: skip
def test_special_types_are_counted_from_above(release, devices, poison, expected):
    assert special_types(release, devices=devices, poison=poison) == expected


@pytest.mark.parametrize(
    ("machine", "release", "value"),
    [
        ("x86_64", (6, 1), entry(3, 0x1234)),
        ("aarch64", (5, 10), 3 << 2 | 0x1234 << 8),
        ("aarch64", (6, 1), 3 << 3 | 0x1234 << 8),
        ("aarch64", (6, 12), 3 << 6 | 0x1234 << 12),
        ("riscv64", (6, 1), 3 << 6 | 0x1234 << 11),
        ("riscv64", (6, 12), 3 << 7 | 0x1234 << 12),
    ],
)
def test_type_and_offset_stand_where_the_architecture_puts_them(machine, release, value):
    assert swap_entries(machine, release, {}).parts(value) == (3, 0x1234)


def test_of_other_machines_no_format_is_known():
    assert swap_entries("s390x", (6, 1), {}) is None
