"""x86's modes against entries written by hand after the manuals, and as kernels wrote them."""

from __future__ import annotations

import struct

import pytest

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, FaultKind
from engine.translate.linux_rows import X86_PROT_NONE, with_prot_none
from engine.translate.mmu import MmuSpec, Translation, Walker
from engine.translate.x86 import EPT, NPT, X86, X86_64, X86_64_LA57, X86_PAE
from engine.types import PageFlags, Rights

R, W, X, U, UX = Rights.READ, Rights.WRITE, Rights.EXECUTE, Rights.USER, Rights.USER_EXECUTE
G, A, D = PageFlags.GLOBAL, PageFlags.ACCESSED, PageFlags.DIRTY
NX = 1 << 63


def tables(spec: MmuSpec, entries: dict[tuple[int, int], int]) -> Walker:
    """A walk over entries at (physical table, index); the top table is at 0x1000."""
    data = bytearray(0x10000)
    for (table, index), entry in entries.items():
        struct.pack_into("<Q" if spec.entry_size == 8 else "<I", data, table + index * spec.entry_size, entry)
    return Walker(BytesMemory(data), spec, 0x1000)


def only(spec: MmuSpec, *entries: int, address: int = 0) -> Translation:
    """The walk of `address` (index 0 on all levels) through one entry for each level."""
    return tables(spec, {(0x1000 * (level + 1), 0): entry for level, entry in enumerate(entries)}).walk(address)


# Intel SDM vol. 3A figure 4-4: P, R/W, U/S, A, D, G; CR4.PSE's 4-MByte pages.
def test_a_4k_page_of_32_bit_paging():
    found = only(X86, 0x2067, 0x0DEA_D167)
    assert (found.physical, found.page_bits) == (0x0DEA_D000, 12)
    assert (found.rights, found.flags) == (R | W | U | X | UX, G | A | D)


def test_bit_7_of_a_4k_entry_is_pat_and_no_size():
    assert only(X86, 0x2067, 0x0DEA_D0E7).page_bits == 12


# Table 4-4: bits 31:22 in place, bits 20:13 are bits 39:32, bit 12 is PAT.
def test_a_4m_page_has_bits_39_to_32_of_its_address_in_20_to_13():
    found = only(X86, 0x0040_0000 | 0xA5 << 13 | 1 << 12 | 0xE3, address=0x1234)
    assert found.physical == 0xA5_0040_1234
    assert found.page_bits == 22
    assert found.rights == R | W | X


def test_pae_tables_carry_no_rights_at_the_top_and_their_register_is_aligned_to_32_bytes():
    walker = tables(X86_PAE, {(0x1000, 3): 0x2001, (0x2000, 0): 0x3063, (0x3000, 0): NX | 0x4_DEAD_0063})
    found = walker.walk(0xC000_0000)
    assert (found.physical, found.rights, found.flags) == (0x4_DEAD_0000, R | W, A | D)
    assert X86_PAE.dtb(0x0BF6_2F2E0) == 0xBF62F2E0


# Figure 4-11; the entries of the self-map of a Windows 10 guest's top table are of the shape 0x0a00000235500863.
def test_a_self_reference_maps_the_tables_themselves():
    top = 0x0A00_0000_0000_1863
    walker = tables(X86_64, {(0x1000, 0x1E8): top})
    address = 0xFFFF << 48 | 0x1E8 << 39 | 0x1E8 << 30 | 0x1E8 << 21 | 0x1E8 << 12
    found = walker.walk(address | 0x1E8 * 8)
    assert found.physical == 0x1000 + 0x1E8 * 8
    assert found.rights == R | W | X
    assert found.flags == A | D


def test_bit_12_of_a_2m_and_a_1g_page_is_pat():
    assert only(X86_64, 0x2067, 0x3067, 0x40_10E7).physical == 0x40_0000
    assert only(X86_64, 0x2067, 0xC000_10E7).physical == 0xC000_0000
    assert only(X86_64, 0x2067, 0xC000_10E7).page_bits == 30


@pytest.mark.parametrize(
    ("top", "leaf", "rights"),
    [
        (0x2007, 0x7007, R | W | U | X | UX),
        (0x2007, 0x7005, R | U | X | UX),
        (0x2005, 0x7007, R | U | X | UX),
        (0x2003, 0x7007, R | W | X),
        (NX | 0x2007, 0x7007, R | W | U),
        (0x2007, NX | 0x7007, R | W | U),
        (0x2001, NX | 0x7001, R),
    ],
)
def test_rights_are_and_ed_over_the_levels(top, leaf, rights):
    assert only(X86_64, top, 0x3007, 0x4007, leaf).rights == rights


def test_a_top_table_holds_no_pages():
    with pytest.raises(FaultError):
        only(X86_64, 0x2000 | 0xE7)


def test_five_levels_translate_57_bits():
    below = {(table, 0): table + 0x1000 | 0x67 for table in (0x2000, 0x3000, 0x4000, 0x5000)}
    walker = tables(X86_64_LA57, {(0x1000, 0xFF): 0x2067, **below})
    assert walker.walk(0xFF << 48 | 5).physical == 0x6005
    with pytest.raises(FaultError):
        walker.walk(0x1FF << 48)


def test_pcid_and_the_no_flush_bit_are_no_part_of_the_dtb():
    assert X86_64.dtb(1 << 63 | 0x235500002) == 0x235500000
    assert X86.dtb(0x0185A018) == 0x0185A000


# SDM 28.3.2, table 28-1; EPTP bits 5:3 and 6 are walk length and accessed/dirty.
def test_an_ept_page_may_be_executed_and_not_read():
    found = only(EPT, 0x2007, 0x3007, 0x4007, 0x7004)
    assert (found.rights, found.flags) == (X | U | UX, PageFlags.NONE)
    assert only(EPT, 0x2007, 0x3007, 0x4007, 0x7F33).flags == A | D
    assert EPT.dtb(0x1_2345_605E) == 0x1_2345_6000


def test_an_ept_table_that_denies_execution_denies_it_to_users_too():
    assert only(EPT, 0x2003, 0x3007, 0x4007, 0x7007).rights == R | W | U


@pytest.mark.parametrize("entry", [0x7002, 0x7006])
def test_an_ept_page_that_is_written_and_not_read_is_a_misconfiguration(entry):
    with pytest.raises(FaultError) as caught:
        only(EPT, 0x2007, 0x3007, 0x4007, entry)
    assert caught.value.kind is FaultKind.MALFORMED


def test_nested_paging_of_amd_translates_guest_physical_addresses_of_48_bits():
    assert only(NPT, 0x2007, 0x3007, 0x4007, 0x7007, address=0xABC).physical == 0x7ABC
    assert [extent.stop for extent in NPT.extents()] == [1 << 48]


# Linux: _PAGE_PROTNONE is bit 8, ACCESSED bit 5; frame numbers of such entries are inverted (pgtable-invert.h).
def test_linux_keeps_the_frame_of_a_prot_none_page_inverted():
    spec = with_prot_none(X86_64, X86_PROT_NONE)
    stored = ~0x1_2345_6000 & 0x000F_FFFF_FFFF_F000
    found = only(spec, 0x2067, 0x3067, 0x4067, NX | stored | 1 << 8 | 0x60)
    assert found.physical == 0x1_2345_6000
    assert found.rights == Rights.NONE
    assert found.flags == PageFlags.INACCESSIBLE | A | D
    large = ~0x4020_0000 & 0x000F_FFFF_FFE0_0000
    assert only(spec, 0x2067, 0x3067, large | 1 << 8 | 0x80).physical == 0x4020_0000


def test_linux_inverts_nothing_with_two_levels():
    spec = with_prot_none(X86, X86_PROT_NONE)
    assert only(spec, 0x2067, 0x0DEA_D120).physical == 0x0DEA_D000


def test_an_entry_of_swap_is_no_prot_none_page():
    with pytest.raises(FaultError):
        only(with_prot_none(X86_64, X86_PROT_NONE), 0x2067, 0x3067, 0x4067, 0x07FF_FFFF_FFFF_FC00)
