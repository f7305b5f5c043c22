"""ARM's modes against entries written by hand after the manuals, and as Linux prints and writes them."""

from __future__ import annotations

import struct

import pytest

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, FaultKind, InvalidArgumentError
from engine.translate.arm import aarch64, arm_lpae, arm_short
from engine.translate.linux_rows import (
    ARM64_PRESENT_INVALID,
    ARM64_PROT_NONE,
    ARM_LPAE_PROT_NONE,
    with_prot_none,
)
from engine.translate.mmu import MmuSpec, Translation, Walker
from engine.types import PageFlags, Rights

R, W, X, U, UX = Rights.READ, Rights.WRITE, Rights.EXECUTE, Rights.USER, Rights.USER_EXECUTE
G, A, D = PageFlags.GLOBAL, PageFlags.ACCESSED, PageFlags.DIRTY
PAGE = {12: 1 << 12, 14: 1 << 14, 16: 1 << 16}


def only(spec: MmuSpec, *entries: int, address: int = 0, step: int | None = None) -> Translation:
    """The walk of `address` through one entry for each level; tables `step` bytes apart."""
    step = step or 1 << spec.page_bits
    data = bytearray(step * (len(entries) + 2))
    for number, (entry, level) in enumerate(zip(entries, spec.levels, strict=False)):
        place = step * (number + 1) + (address >> level.shift & (1 << level.bits) - 1) * spec.entry_size
        struct.pack_into("<Q" if spec.entry_size == 8 else "<I", data, place, entry)
    return Walker(BytesMemory(data), spec, step).walk(address)


K4 = aarch64(12, 39)
"""Three levels, with blocks on the first two."""
LINUX_USER_RW = 0x00E8_0000_41F3_9F43
"""As Linux prints it: dirty, UXN, PXN, DBM, nG, AF, inner shareable, AP = 01."""


# DDI 0487 D8.3.2, D8.4: AP[2:1] in bits 7:6, AF 10, nG 11, DBM 51, contiguous 52, PXN 53, UXN 54.
def test_a_writable_page_of_a_linux_process():
    found = only(K4, 0x2003, 0x3003, LINUX_USER_RW, address=0xABC)
    assert found.physical == 0x41F3_9ABC
    assert found.rights == R | W | U
    assert found.flags == A | D


def test_the_text_of_a_linux_process_is_read_and_executed_by_users_alone():
    found = only(K4, 0x2003, 0x3003, 0x0020_0000_41F3_9FC3)
    assert found.rights == R | U | UX
    assert found.flags == A


def test_the_text_of_the_kernel_is_global_and_the_contiguous_hint_says_nothing():
    found = only(K4, 0x2003, 0x0050_0000_4020_0781, address=0x12345)
    assert (found.physical, found.page_bits) == (0x4021_2345, 21)
    assert found.rights == R | X
    assert found.flags == G | A


def test_a_clean_page_that_may_be_written_is_writable_and_not_dirty():
    found = only(K4, 0x2003, 0x3003, 0x0068_0000_41F3_9FC3)
    assert found.rights == R | W | U
    assert found.flags == A


def test_what_users_may_write_the_kernel_never_executes():
    assert only(K4, 0x2003, 0x3003, 0x7443).rights == R | W | U | UX


def test_an_execute_only_page_of_users_is_executed_and_not_read_by_them():
    assert only(K4, 0x2003, 0x3003, 0x0020_0000_0000_7C83).rights == R | UX


def test_an_entry_without_access_flag_is_translated_and_not_accessed():
    found = only(K4, 0x2003, 0x3003, LINUX_USER_RW & ~(1 << 10))
    assert found.physical == 0x41F3_9000
    assert found.flags == D


# D8.4.2: hierarchical control, bits 59 to 62 of tables.
@pytest.mark.parametrize(
    ("bit", "lost"), [(59, X), (60, UX), (61, U), (62, W), (63, Rights.NONE)], ids="PXN UXN AP0 AP1 NS".split()
)
def test_a_table_takes_a_right_from_all_below(bit, lost):
    leaf = 0x7403  # AP = 00: read and written by the kernel, executed by both
    user = 0x7443
    assert only(K4, 1 << bit | 0x2003, 0x3003, leaf).rights == (R | W | X | UX) & ~lost
    assert only(K4, 0x2003, 1 << bit | 0x3003, user).rights == (R | W | U | UX) & ~lost


def test_with_hpd_a_table_takes_nothing():
    assert only(aarch64(12, 39, hierarchical=False), 0xF << 59 | 0x2003, 0x3003, 0x7403).rights == R | W | X | UX


@pytest.mark.parametrize("entry", [0x7401, 0x7441])
def test_a_last_level_entry_with_01_is_reserved(entry):
    with pytest.raises(FaultError) as caught:
        only(K4, 0x2003, 0x3003, entry)
    assert caught.value.kind is FaultKind.MALFORMED


@pytest.mark.parametrize("entry", [0x7400, 0x7402])
def test_an_entry_without_valid_bit_is_absent(entry):
    with pytest.raises(FaultError) as caught:
        only(K4, 0x2003, 0x3003, entry)
    assert caught.value.kind is FaultKind.ABSENT


# AArch64.BlockDescSupported: by granule, level and, for 4K and 16K, TCR.DS.
BLOCKS = {
    (12, False): {21, 30}, (12, True): {21, 30, 39}, (14, False): {25}, (14, True): {25, 36}, (16, False): {29, 42},
}  # fmt: skip


@pytest.mark.parametrize(("granule", "lpa2"), BLOCKS)
def test_blocks_stand_on_the_levels_that_the_manual_names(granule, lpa2):
    spec = aarch64(granule, 48, lpa2=lpa2)
    for number, level in enumerate(spec.levels[:-1]):
        entries = [PAGE[granule] * (above + 2) | 3 for above in range(number)]
        if level.shift in BLOCKS[granule, lpa2]:
            assert only(spec, *entries, 0x401).page_bits == level.shift
        else:
            with pytest.raises(FaultError) as caught:
                only(spec, *entries, 0x401)
            assert caught.value.kind is FaultKind.MALFORMED


# D8.2.4 to D8.2.8: levels that are left out, bits that the top level indexes.
@pytest.mark.parametrize(
    ("granule", "bits", "levels"),
    [
        (12, 25, [(21, 4), (12, 9)]),
        (12, 39, [(30, 9), (21, 9), (12, 9)]),
        (12, 48, [(39, 9), (30, 9), (21, 9), (12, 9)]),
        (12, 52, [(48, 4), (39, 9), (30, 9), (21, 9), (12, 9)]),
        (14, 36, [(25, 11), (14, 11)]),
        (14, 47, [(36, 11), (25, 11), (14, 11)]),
        (14, 48, [(47, 1), (36, 11), (25, 11), (14, 11)]),
        (14, 52, [(47, 5), (36, 11), (25, 11), (14, 11)]),
        (16, 42, [(29, 13), (16, 13)]),
        (16, 48, [(42, 6), (29, 13), (16, 13)]),
        (16, 52, [(42, 10), (29, 13), (16, 13)]),
    ],
)
def test_the_levels_follow_from_granule_and_bits(granule, bits, levels):
    assert [(level.shift, level.bits) for level in aarch64(granule, bits).levels] == levels


# D8.3.1: LPA, bits 15:12 are 51:48; LPA2, bits 9:8 are 51:50 and 49:48 stand in place; without, 47:12 is all.
def test_with_64k_pages_bits_15_to_12_are_the_highest_of_the_address():
    found = only(aarch64(16, 42), 0x2_0003, 0x1234_5678_0000 | 0xA000 | 0x403)
    assert found.physical == 0xA_1234_5678_0000


def test_with_lpa2_bits_9_to_8_are_the_highest_of_the_address():
    spec = aarch64(12, 39, lpa2=True)
    assert only(spec, 0x2003, 0x3003, 0x3_1234_5678_9000 | 0x200 | 0x403).physical == 0xB_1234_5678_9000
    assert only(K4, 0x2003, 0x3003, 0x3_1234_5678_9000 | 0x200 | 0x403).physical == 0x1234_5678_9000
    block = only(aarch64(12, 48, lpa2=True), 0x2_4080_0000_0000 | 0x100 | 0x401)
    assert (block.physical, block.page_bits) == (0x6_4080_0000_0000, 39)


# TTBR0_EL1: ASID 63:48, CnP 0; of 52-bit addresses 51:48 stand in 5:2.
def test_a_ttbr_carries_asid_cnp_and_high_address_bits():
    assert aarch64(12, 48).dtb(0x00AB_0000_41F3_9001) == 0x41F3_9000
    assert aarch64(12, 52).dtb(0x00AB_0000_41F3_9029) == 0xA_0000_41F3_9000
    assert aarch64(16, 48).dtb(0x0001_0000_4200_0205) == 0x1_0000_4200_0200
    assert aarch64(14, 48, lpa2=True).dtb(0x4200_0040 | 1) == 0x4200_0040


def test_tbi_ignores_the_top_byte_of_either_half():
    low, high = aarch64(12, 48, tagged=True), aarch64(12, 48, high=True, tagged=True)
    assert low.canonical(0xB7 << 56 | 0x1234) == 0x1234
    assert high.canonical(0xB7 << 56 | 0x00FF_FFFF_FFFF_F123) == (1 << 64) - 0xEDD
    assert low.canonical(0xB7 << 56 | 1 << 55) is None
    assert aarch64(12, 48).canonical(0xB7 << 56 | 0x1234) is None


@pytest.mark.parametrize(("granule", "bits"), [(13, 48), (12, 53), (12, 15), (16, 16)])
def test_sizes_that_the_architecture_has_not_are_refused(granule, bits):
    with pytest.raises(InvalidArgumentError, match="granules"):
        aarch64(granule, bits)


# -- AArch32, DDI 0406 ---------------------------------------------------------------------------------------------


def short(*entries: int, address: int = 0, spec: MmuSpec | None = None) -> Translation:
    return only(spec or arm_short(), *entries, address=address, step=0x4000)


# B3.5.1; a section as Linux maps its own memory (0x...1141e in many a boot log), and its text.
def test_a_section_of_the_linux_kernel():
    found = short(0x6001_141E, address=0x1_2345)
    assert (found.physical, found.page_bits, found.rights) == (0x6001_2345, 20, R | W)
    assert found.flags == G
    assert short(0x6001_940E).rights == R | X


def test_a_supersection_has_40_bits_of_address():
    # 31:24 in place, 23:20 are 35:32, 8:5 are 39:36
    found = short(0x1200_0000 | 0x3 << 20 | 1 << 18 | 0x5 << 5 | 0xC02, address=0x00AB_CDEF)
    assert (found.physical, found.page_bits) == (0x53_12AB_CDEF, 24)


# From an oops: *pgd=9f4c7831, *ppte=9f5a8c7f: 1 KiB tables, a small page, user read and write, never executed.
def test_a_small_page_of_a_linux_process():
    data = bytearray(0x1_0000)
    struct.pack_into("<I", data, 0x4000 + 4 * 1, 0x0000_8831)  # index 1: the second MiB; the table at 0x8800
    struct.pack_into("<I", data, 0x8800 + 4 * 0x42, 0x9F5A_8C7F)
    found = Walker(BytesMemory(data), arm_short(), 0x4000).walk(0x0014_2678)
    assert (found.physical, found.page_bits, found.rights) == (0x9F5A_8678, 12, R | W | U)
    assert found.flags == PageFlags.NONE


def test_a_large_page_has_xn_in_bit_15():
    assert short(0x8001, 0xABCD_0031, address=0xF123).rights == R | W | X | U | UX
    found = short(0x8001, 0xABCD_8031, address=0xF123)
    assert (found.physical, found.page_bits, found.rights) == (0xABCD_F123, 16, R | W | U)


# B3.7.1, table B3-6: AP[2:0] without access flag.
@pytest.mark.parametrize(
    ("ap", "rights"),
    [
        (0b000, Rights.NONE), (0b001, R | W | X), (0b010, R | W | X | U | UX), (0b011, R | W | X | U | UX),
        (0b101, R | X), (0b110, R | X | U | UX), (0b111, R | X | U | UX),
    ],
)  # fmt: skip
def test_access_permissions_of_a_small_page(ap, rights):
    assert short(0x8001, 0x7002 | (ap & 3) << 4 | (ap >> 2) << 9).rights == rights


def test_with_afe_ap0_is_the_access_flag():
    spec = arm_short(access_flag=True)
    found = short(0x8001, 0x7002 | 0b10 << 4, spec=spec)
    assert (found.rights, found.flags) == (R | W | X | U | UX, G)
    assert short(0x8001, 0x7002 | 0b11 << 4, spec=spec).flags == G | A


def test_pxn_stands_in_the_first_level_for_pages_and_sections():
    assert short(0x8005, 0x7032).rights == R | W | U | UX
    assert short(0x6000_0C03).rights == R | W | U | UX


def test_the_first_level_shrinks_with_ttbcr_n():
    assert [arm_short(split).levels[0].bits for split in (0, 1, 7)] == [12, 11, 5]
    assert arm_short(7).dtb(0x4000_00CA) == 0x4000_0080
    assert arm_short().dtb(0x4000_406A) == 0x4000_4000


# B3.6.1: Linux prints LPAE entries as *pgd=…003, *pmd=…003, and kernel sections as …711/….
def test_lpae_pages_have_40_bits_of_address_and_xn_for_both():
    found = only(arm_lpae(), 0x2003, 0x3003, 0x0040_00AB_1234_5F5F & ~0 | 3)
    assert (found.physical, found.rights) == (0xAB_1234_5000, R | W | U)
    assert only(arm_lpae(), 0x2003, 0x3003, 0xAB_1234_5F5F).rights == R | W | U | X | UX
    assert only(arm_lpae(), 0x2003, 0xAB_1220_0711).page_bits == 21


def test_lpae_tables_deny_execution_to_both_or_to_the_kernel():
    assert only(arm_lpae(), 1 << 60 | 0x2003, 0x3003, 0x7F5F).rights == R | W | U
    assert only(arm_lpae(), 1 << 59 | 0x2003, 0x3003, 0x7F5F).rights == R | W | U | UX
    assert only(arm_lpae(), 1 << 61 | 0x2003, 0x3003, 0x7F5F).rights == R | W | X


# B3.6.6: how many levels are left out follows from the size of the half.
def test_lpae_with_t1sz_2_begins_at_the_second_level():
    high = arm_lpae(0, 2, high=True)
    assert [(level.shift, level.bits) for level in high.levels] == [(21, 9), (12, 9)]
    assert only(high, 0x2003, 0x7F03, address=0xC000_0123).physical == 0x7123
    assert [level.shift for level in arm_lpae(0, 2).levels] == [30, 21, 12]


def test_lpae_ttbrs_carry_an_asid_and_are_aligned_to_32_bytes():
    assert arm_lpae().dtb(0x0012_0000_4120_3020) == 0x4120_3020


# -- Linux's PROT_NONE ---------------------------------------------------------------------------------------------


def test_linux_marks_prot_none_pages_of_arm64_by_release():
    to_6_10 = 0x04E0_0000_41F3_9FC2 & ~(1 << 11)  # PTE_PROT_NONE, bits 1:0 = 10
    from_6_11 = 0x00E0_0000_41F3_9FC2
    old, new = with_prot_none(K4, ARM64_PROT_NONE), with_prot_none(K4, ARM64_PRESENT_INVALID)
    for spec, entry in ((old, to_6_10), (new, from_6_11)):
        found = only(spec, 0x2003, 0x3003, entry, address=0x10)
        assert (found.physical, found.rights) == (0x41F3_9010, Rights.NONE)
        assert PageFlags.INACCESSIBLE in found.flags
    for spec, entry in ((new, to_6_10), (old, from_6_11), (K4, to_6_10)):
        with pytest.raises(FaultError):
            only(spec, 0x2003, 0x3003, entry)


def test_linux_marks_prot_none_pages_of_lpae_with_bit_57():
    found = only(with_prot_none(arm_lpae(), ARM_LPAE_PROT_NONE), 0x2003, 0x3003, 1 << 57 | 0x41F3_9FDE)
    assert found.physical == 0x41F3_9000
