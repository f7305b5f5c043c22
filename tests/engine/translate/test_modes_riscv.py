"""RISC-V's modes against entries written by hand after the privileged architecture manual."""

from __future__ import annotations

import struct

import pytest

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, FaultKind
from engine.translate.linux_rows import RISCV_PROT_NONE, with_prot_none
from engine.translate.mmu import MmuSpec, Translation, Walker
from engine.translate.riscv import SV32, SV39, SV48, SV57
from engine.types import PageFlags, Rights

R, W, X, U, UX = Rights.READ, Rights.WRITE, Rights.EXECUTE, Rights.USER, Rights.USER_EXECUTE
G, A, D = PageFlags.GLOBAL, PageFlags.ACCESSED, PageFlags.DIRTY
TO = {2: 0x801, 3: 0xC01, 4: 0x1001, 5: 0x1401}
"""Entries that lead to the table at 0x2000, 0x3000 …: the page number stands in bits 53:10."""


def only(spec: MmuSpec, *entries: int, address: int = 0) -> Translation:
    """The walk of `address` (index 0 on all levels but the last) through one entry for each level."""
    data = bytearray(0x8000)
    for level, entry in enumerate(entries):
        place = 0x1000 * (level + 1)
        if level == len(spec.levels) - 1:
            place += (address >> 12 & (1 << spec.levels[-1].bits) - 1) * spec.entry_size
        struct.pack_into("<Q" if spec.entry_size == 8 else "<I", data, place, entry)
    return Walker(BytesMemory(data), spec, 0x1000).walk(address)


def page(number: int, low: int) -> int:
    return number << 10 | low


# 4.4.1, figure of the Sv39 entry: V R W X U G A D in bits 0 to 7, page number in 53:10.
def test_a_page_of_a_user_of_sv39():
    found = only(SV39, TO[2], TO[3], page(0x8_1234, 0xD7), address=0xABC)
    assert (found.physical, found.page_bits, found.rights, found.flags) == (0x8123_4ABC, 12, R | W | U, A | D)


def test_the_address_has_56_bits():
    assert only(SV39, TO[2], TO[3], page((1 << 44) - 1, 0xD7)).physical == (1 << 56) - 0x1000


@pytest.mark.parametrize(
    ("low", "rights"),
    [(0x3, R), (0x7, R | W), (0xB, R | X), (0xF, R | W | X), (0x9, X), (0x1B, R | U | UX), (0x19, U | UX)],
)
def test_rights_are_the_bits_of_the_leaf_and_supervisors_never_execute_pages_of_users(low, rights):
    assert only(SV39, TO[2], TO[3], page(7, low)).rights == rights


@pytest.mark.parametrize("low", [0x5, 0xD, 0x15])
def test_write_without_read_is_reserved(low):
    with pytest.raises(FaultError) as caught:
        only(SV39, TO[2], TO[3], page(7, low))
    assert caught.value.kind is FaultKind.MALFORMED


def test_the_last_level_leads_to_no_table():
    with pytest.raises(FaultError) as caught:
        only(SV39, TO[2], TO[3], page(7, 1))
    assert caught.value.kind is FaultKind.MALFORMED


def test_a_superpage_stands_on_any_level_and_must_be_aligned():
    assert only(SV39, TO[2], page(0x200, 0xCF)).page_bits == 21
    assert only(SV39, page(1 << 18, 0xCF)).physical == 1 << 30
    assert only(SV48, page(1 << 27, 0xCF)).page_bits == 39
    assert only(SV57, page(1 << 36, 0xCF)).page_bits == 48
    for number in (0x201, 0x100, 1):
        with pytest.raises(FaultError):
            only(SV39, TO[2], page(number, 0xCF))


@pytest.mark.parametrize("bit", [4, 6, 7, 54, 60, 61, 62, 63])
def test_a_table_with_reserved_bits_is_a_fault(bit):
    with pytest.raises(FaultError):
        only(SV39, TO[2] | 1 << bit, TO[3], page(7, 3))


def test_software_bits_of_a_table_and_global_say_nothing():
    assert only(SV39, TO[2] | 0x320, TO[3], page(7, 3)).flags == PageFlags.NONE


# Svnapot: N = 1 and the low four bits of the page number 1000: 64 KiB; other encodings are reserved.
def test_sixteen_entries_with_n_are_one_page_of_64_kib():
    found = only(SV39, TO[2], TO[3], 1 << 63 | page(0x1238, 0xD7), address=0xABCD)
    assert (found.physical, found.page_bits) == (0x123_ABCD, 16)
    for number in (0x1230, 0x1234, 0x123C, 0x1239):
        with pytest.raises(FaultError):
            only(SV39, TO[2], TO[3], 1 << 63 | page(number, 0xD7), address=0xABCD)


def test_n_on_a_superpage_is_reserved():
    with pytest.raises(FaultError):
        only(SV39, TO[2], 1 << 63 | page(0x200, 0xCF))


# Svpbmt: bits 62:61.
@pytest.mark.parametrize("memory_type", [1, 2])
def test_the_memory_type_is_no_part_of_the_address(memory_type):
    assert only(SV39, TO[2], TO[3], memory_type << 61 | page(7, 0xD7)).physical == 0x7000


# 4.3: Sv32 has 34-bit physical addresses: 22 bits of page number in 31:10.
def test_sv32_has_34_bits_of_address():
    assert only(SV32, TO[2], 0xFFFF_FCD7).physical == 0x3_FFFF_F000
    found = only(SV32, page(0x3_FFC00, 0xCF), address=0x3F_FFFF)
    assert (found.physical, found.page_bits) == (0x3_FFFF_FFFF, 22)
    with pytest.raises(FaultError):
        only(SV32, page(0x3_FFC01, 0xCF))


# 4.1.11: satp has the page number in 43:0, of 32-bit machines in 21:0, ASID and mode above.
def test_satp_names_a_page():
    assert SV57.dtb(10 << 60 | 0xABCD << 44 | 0x8_1F00) == 0x81F0_0000
    assert SV32.dtb(1 << 31 | 0x1FF << 22 | 0x8_1F00) == 0x81F0_0000


def test_both_ends_of_the_address_space_are_translated():
    for spec, bits in ((SV39, 38), (SV48, 47), (SV57, 56)):
        assert [extent.size for extent in spec.extents()] == [1 << bits] * 2


# arch/riscv/include/asm/pgtable-bits.h: _PAGE_PROT_NONE is bit 5 with bit 0 clear.
def test_linux_keeps_the_frame_of_a_prot_none_page():
    found = only(with_prot_none(SV39, RISCV_PROT_NONE), TO[2], TO[3], page(0x8_1234, 0xE2))
    assert (found.physical, found.rights) == (0x8123_4000, Rights.NONE)
    assert found.flags == PageFlags.INACCESSIBLE | A | D
