"""What holds for paging modes whatever they are: how rows are read, checked, and asked about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, FaultKind, InvalidArgumentError, PagedOutError
from engine.testing import PageTableBuilder
from engine.translate.arm import arm_lpae, arm_short
from engine.translate.mmu import ALL_RIGHTS, EntryKind, Level, MmuSpec, Translation, Walker, covered, take_parts
from engine.translate.x86 import X86, X86_64, X86_64_LA57
from engine.types import Extent, PageFlags, Rights


def tiny(**changes: Any) -> MmuSpec:
    """Two levels of four entries of one byte: bit 0 valid, bit 1 large, bits 7:4 the address in steps of 16."""
    address = ((0xF0, 0),)
    values = {
        "name": "tiny", "source": "none", "entry_size": 1, "low_bits": 8, "address_bits": 8, "root": ((0xF0, 0),),
        "levels": (
            Level(6, 2, (EntryKind("table", 3, 1, address=address, rights=((Rights.WRITE, 4, 4),)),
                         EntryKind("64", 3, 3, 6, ((0xC0, 0),), ((Rights.READ, 0, 0), (Rights.WRITE, 4, 4))))),
            Level(4, 2, (EntryKind("16", 1, 1, 4, address, ((Rights.READ, 0, 0), (Rights.WRITE, 4, 4)),
                                   ((PageFlags.DIRTY, 8, 8),)),
                         EntryKind("swap", 3, 2, fault=FaultKind.PAGED_OUT))),
        ),
    }  # fmt: skip
    return MmuSpec(**{**values, **changes})


#      top at 0x10: table at 0x20 | 64 at 0x80 | 0 | 8 (no row)       0x20: 16 at 0x50, dirty | swap | 0 | 0x61
TINY = bytes(16) + bytes([0x25, 0x83, 0, 8]) + bytes(12) + bytes([0x5D, 0x32, 0, 0x61]) + bytes(12)


def walker(spec: MmuSpec | None = None, data: bytes = TINY, **options: Any) -> Walker:
    return Walker(BytesMemory(data), spec or tiny(), 0x10, **options)


def test_a_walk_says_all_that_its_entries_say():
    assert walker().walk(0x03) == Translation(
        0x03, 0x53, 4, Rights.READ | Rights.WRITE, PageFlags.DIRTY, 0x5D, 0x20, 1
    )


def test_a_leaf_above_the_last_level_is_a_large_page():
    assert walker().find(0x7F) == (0xBF, 6)
    assert walker().walk(0x7F).page_size == 64


def test_a_right_is_lost_where_any_level_denies_it():
    data = bytearray(TINY)
    data[0x10] &= ~4
    assert walker(data=bytes(data)).walk(0).rights == Rights.READ


def test_a_row_with_a_fault_says_why_the_page_is_absent():
    with pytest.raises(PagedOutError) as caught:
        walker().walk(0x12)
    assert caught.value.address == 0x12


@pytest.mark.parametrize("address", [0x20, 0x80, 0xC0])
def test_an_entry_that_is_zero_or_matches_no_row_is_absent(address):
    with pytest.raises(FaultError) as caught:
        walker().find(address)
    assert caught.value.kind is FaultKind.ABSENT


def test_a_table_outside_of_memory_is_a_fault_of_its_own_kind():
    with pytest.raises(FaultError, match="0x10 cannot be read") as caught:
        walker(data=bytes(4)).walk(0)
    assert caught.value.kind is FaultKind.TABLE


@pytest.mark.parametrize("address", [-1, 0x100, 1 << 80])
def test_an_address_that_the_mode_does_not_translate_is_absent(address):
    with pytest.raises(FaultError):
        walker().find(address)


def test_the_hook_is_asked_for_entries_that_match_no_row():
    asked = []

    def hook(address: int, entry: int, level: int) -> Translation | FaultKind:
        asked.append((address, entry, level))
        return FaultKind.COMPRESSED

    with pytest.raises(FaultError) as caught:
        walker(absent=hook).walk(0xC1)
    assert caught.value.kind is FaultKind.COMPRESSED
    assert asked == [(0xC1, 8, 0)]


@pytest.mark.parametrize("address", [0x12, 0x20, 0x80])
def test_the_hook_is_not_asked_for_zeros_nor_where_a_row_says_why(address):
    with pytest.raises(FaultError):
        walker(absent=lambda *_: pytest.fail("asked")).walk(address)


def test_what_the_hook_finds_is_the_translation():
    found = Translation(0xC1, 0x31, 4, Rights.READ, PageFlags.TRANSITION, 8, 0x13, 0)
    assert walker(absent=lambda *_: found).walk(0xC1) is found
    assert walker(absent=lambda *_: found).find(0xC1) == (0x31, 4)


def test_a_walker_that_keeps_tables_reads_the_last_entry_anew():
    data = bytearray(TINY)
    kept = Walker(BytesMemory(data), tiny(), 0x10, keep=True)
    assert kept.find(0) == (0x50, 4)
    data[0x10], data[0x20] = 0, 0x71
    assert kept.find(1) == (0x71, 4)
    with pytest.raises(FaultError):
        walker(data=bytes(data)).find(1)


def test_rows_may_be_added_but_not_overlap():
    there = tiny().with_kinds({1: (EntryKind("gone", 0xF, 4, fault=FaultKind.MIGRATING),)}, "more")
    assert there.name == "more"
    assert there.levels[1].kinds[-1].name == "gone"
    with pytest.raises(InvalidArgumentError, match="overlap"):
        tiny().with_kinds({1: (EntryKind("again", 1, 1, 4),)})


def test_bits_of_encryption_are_no_address():
    c_bit = 1 << 47
    spec = X86_64.without_bits(c_bit, "sme")
    builder = PageTableBuilder(X86_64, noise=False)
    builder.map(0x1000, 0x7000)
    for place in range(0, len(builder.data), 8):
        entry = int.from_bytes(builder.data[place : place + 8], "little")
        builder.data[place : place + 8] = (entry | c_bit if entry else 0).to_bytes(8, "little")
    assert spec.dtb(builder.dtb | c_bit) == builder.dtb
    assert Walker(builder.memory, spec, builder.dtb).find(0x1234) == (0x7234, 12)


def test_parts_of_an_address_move_both_ways():
    assert take_parts(((0xFF00, -8), (0xF, 12)), 0xAB5) == 0x500A


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": ()}, "no levels"),
        ({"entry_size": 3}, "entry size"),
        ({"low_bits": 9, "address_bits": 9}, "8 bits are indexed"),
        ({"low_bits": 0}, "translated"),
        ({"levels": (tiny().levels[0],) * 2}, "begins at 6"),
        ({"levels": (tiny().levels[0], Level(4, 2, (EntryKind("x", 1, 2, 4),)))}, "outside of its mask"),
        ({"levels": (tiny().levels[0], Level(4, 2, (EntryKind("x", 1 << 8, 0, 4),)))}, "outside of its mask"),
        ({"levels": (tiny().levels[0], Level(4, 2, (EntryKind("x", 1, 1),)))}, "to a table"),
        ({"levels": (tiny().levels[0], Level(4, 2, (EntryKind("x", 1, 1, 3),)))}, "less than"),
        ({"levels": (tiny().levels[0], Level(4, 2, (EntryKind("x", 1, 1, 4), EntryKind("y", 2, 2, 4))))}, "overlap"),
        ({"elsewhere": Extent(16, 16)}, "at no edge"),
        ({"elsewhere": Extent(0, 256)}, "is all"),
    ],
)
def test_a_mode_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        tiny(**changes)


def test_a_table_grants_what_it_does_not_list_and_a_leaf_denies_it():
    assert EntryKind("table", 1, 1).grants(1) == ALL_RIGHTS
    assert EntryKind("leaf", 1, 1, 4).grants(1) == Rights.NONE


def test_the_halves_of_the_address_space_are_what_is_translated():
    assert X86_64.extents() == (Extent(0, 1 << 47), Extent((1 << 64) - (1 << 47), 1 << 47))
    assert X86_64.canonical((1 << 47) - 1) == (1 << 47) - 1
    assert X86_64.canonical(1 << 47) is None
    assert X86_64.canonical((1 << 64) - (1 << 47) - 1) is None
    assert X86_64.canonical((1 << 64) - 1) == (1 << 64) - 1
    assert covered([(X86_64_LA57, 0)]) == 1 << 64
    assert covered([(X86, 0)]) == 1 << 32


def test_two_roots_may_share_4_gib_in_any_proportion():
    gib = 1 << 30
    assert arm_lpae(0, 2).extents() == (Extent(0, 3 * gib),)
    assert arm_lpae(0, 2, high=True).extents() == (Extent(3 * gib, gib),)
    assert arm_short(2).extents() == (Extent(0, gib),)
    assert arm_short(2, high=True).extents() == (Extent(gib, 3 * gib),)
    assert arm_lpae(0, 2).canonical(3 * gib) is None
    assert arm_lpae(0, 2).canonical(3 * gib - 1) == 3 * gib - 1


def test_a_walker_leaves_to_the_other_root_what_is_its_own():
    builder = PageTableBuilder(replace(arm_lpae(0, 2), elsewhere=None))
    builder.map(0xBFFF_F000, 0x1000)
    builder.map(0xC000_0000, 0x2000)
    found = Walker(builder.memory, arm_lpae(0, 2), builder.dtb)
    assert found.find(0xBFFF_F001) == (0x1001, 12)
    with pytest.raises(FaultError):
        found.find(0xC000_0001)


def test_the_builder_refuses_what_it_cannot_build():
    builder = PageTableBuilder(X86_64)
    builder.map(0x20_0000, 0, "2M")
    for address, physical, name in ((0x20_1000, 0, "4K"), (0x20_0000, 0, "2M"), (0x1001, 0, "4K"),
                                    (1 << 47, 0, "4K"), (0, 1 << 52, "4K"), (0, 0x1000, "2M")):  # fmt: skip
        with pytest.raises(InvalidArgumentError):
            builder.map(address, physical, name)
    with pytest.raises(InvalidArgumentError, match="only 1G, 2M, 4K"):
        builder.map(0, 0, "64K")
    assert builder.find(0x20_1234).physical == 0
    assert builder.find(0x40_0000) is None
