"""Modes by name, and roots from registers."""

from __future__ import annotations

import doctest

import pytest
from every_mode import MODES

from engine.errors import InvalidArgumentError
from engine.translate import modes
from engine.translate.linux_rows import linux_mode
from engine.translate.modes import high_half, mode, names, roots_for, roots_of

LINUX_TCR = 1 << 37 | 0x5 << 32 | 2 << 30 | 16 << 16 | 16
"""4K, 48 bits each, TBI0, addresses of 48 bits."""


def found(architecture: str, **registers: int) -> list[tuple[str, int]]:
    return [(spec.name, dtb) for spec, dtb in roots_of(architecture, registers)]


def test_the_examples_of_the_docstring_hold():
    assert doctest.testmod(modes).failed == 0


@pytest.mark.parametrize("name", MODES)
def test_a_mode_is_found_by_the_name_it_has(name):
    spec = MODES[name]
    plain = mode(spec.name)
    assert plain.name == spec.name
    if "+" not in name:
        assert plain is spec


def test_every_mode_names_its_manual():
    assert all(any(word in mode(name).source for word in ("SDM", "AMD64", "DDI", "RISC-V")) for name in names())


@pytest.mark.parametrize("name", ["", "x87", "aarch64-8k-48", "aarch64-4k", "arm-short-9", "aarch64-4k-48-", "X86"])
def test_an_unknown_name_is_told_what_there_is(name):
    with pytest.raises(InvalidArgumentError, match=r"x86-64.*aarch64-4k-48.*riscv-sv39"):
        mode(name)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("aarch64-4k-48", "aarch64-4k-48-high"),
        ("aarch64-16k-48-lpa2-tbi", "aarch64-16k-48-lpa2-high-tbi"),
        ("arm-short-2", "arm-short-2-high"),
        ("arm-lpae-0-2", "arm-lpae-0-2-high"),
        ("arm-lpae", None),
        ("arm-short", None),
        ("aarch64-4k-48-high", None),
        ("x86-64", None),
        ("riscv-sv48", None),
    ],
)
def test_the_other_half(name, other):
    half = high_half(name)
    assert (half.name if half else None) == other


def test_roots_for_a_mode_take_registers_or_dtbs():
    assert roots_for("x86-64", 0x235500002) == ((mode("x86-64"), 0x235500000),)
    low, high = roots_for("aarch64-4k-48", 0x0001_0000_41F3_9001, 0x41A3_3000)
    assert (low[1], high[0].name, high[1]) == (0x41F3_9000, "aarch64-4k-48-high", 0x41A3_3000)
    with pytest.raises(InvalidArgumentError, match="one root"):
        roots_for("x86-64", 0, 0)


# -- x86 -----------------------------------------------------------------------------------------------------------


def test_a_windows_guest_in_long_mode():
    assert found("x86-64", cr0=0x80050031, cr3=0x235500002, cr4=0x170678, efer=0xD01) == [("x86-64", 0x235500000)]


@pytest.mark.parametrize("name", ["amd64", "x86_64", "i386", "x86"])
def test_efer_and_cr4_say_the_mode_whatever_the_machine_is_called(name):
    assert found(name, cr3=0x1000, cr4=1 << 12 | 1 << 5, efer=0xD01) == [("x86-64-la57", 0x1000)]
    assert found(name, cr3=0x1020, cr4=1 << 5, efer=0) == [("x86-pae", 0x1020)]
    assert found(name, cr3=0x1000, cr4=0x10, efer=0) == [("x86", 0x1000)]


def test_names_of_registers_are_taken_in_any_case():
    assert found("x86_64", CR3=0x1000) == [("x86-64", 0x1000)]


def test_without_paging_there_are_no_roots():
    with pytest.raises(InvalidArgumentError, match=r"CR0\.PG"):
        found("x86_64", cr0=0x11, cr3=0)
    with pytest.raises(InvalidArgumentError, match="satp"):
        found("riscv64", satp=0)
    with pytest.raises(InvalidArgumentError, match=r"SCTLR\.M"):
        found("armhf", sctlr=0, ttbcr=0, ttbr0=0)
    with pytest.raises(InvalidArgumentError, match="off"):
        found("aarch64", tcr_el1=LINUX_TCR | 1 << 7 | 1 << 23, ttbr0_el1=0, ttbr1_el1=0)


def test_what_is_missing_is_named():
    with pytest.raises(InvalidArgumentError, match="ttbr0_el1, ttbr1_el1"):
        found("aarch64", tcr_el1=LINUX_TCR)
    with pytest.raises(InvalidArgumentError, match="cr4"):
        found("i386", cr3=0)
    with pytest.raises(InvalidArgumentError, match="only of x86, aarch64, arm, riscv"):
        found("m68k")


# -- AArch64 -------------------------------------------------------------------------------------------------------


def aarch64(tcr: int) -> list[str]:
    return [name for name, _ in found("arm64", tcr_el1=tcr, ttbr0_el1=0x4200_0001, ttbr1_el1=0x4100_0000)]


def test_linux_with_4k_pages_and_tags():
    roots = found("aarch64", TCR_EL1=LINUX_TCR, TTBR0_EL1=0x0001_0000_41F3_9000, TTBR1_EL1=0x00AB_0000_41A3_3000)
    assert roots == [("aarch64-4k-48-tbi", 0x41F3_9000), ("aarch64-4k-48-high", 0x41A3_3000)]


# TG0: 00 4K, 01 64K, 10 16K. TG1: 01 16K, 10 4K, 11 64K.
@pytest.mark.parametrize(
    ("low", "high", "names"),
    [(0, 2, "4k 4k"), (1, 3, "64k 64k"), (2, 1, "16k 16k"), (0, 3, "4k 64k"), (2, 2, "16k 4k")],
)
def test_the_halves_have_granules_of_their_own(low, high, names):
    sizes = names.split()
    assert aarch64(high << 30 | 25 << 16 | low << 14 | 17) == [f"aarch64-{sizes[0]}-47", f"aarch64-{sizes[1]}-39-high"]


def test_ds_makes_52_bits_of_4k_and_16k():
    ds = 1 << 59
    assert aarch64(ds | 2 << 30 | 12 << 16 | 16) == ["aarch64-4k-48-lpa2", "aarch64-4k-52-high"]
    assert aarch64(ds | 3 << 30 | 12 << 16 | 1 << 14 | 12) == ["aarch64-64k-52", "aarch64-64k-52-high"]


def test_a_size_below_the_least_counts_as_the_least():
    assert aarch64(2 << 30 | 12 << 16 | 12) == ["aarch64-4k-48", "aarch64-4k-48-high"]


def test_a_half_that_is_switched_off_is_left_out():
    assert aarch64(LINUX_TCR | 1 << 7) == ["aarch64-4k-48-high"]
    assert aarch64(LINUX_TCR | 1 << 23) == ["aarch64-4k-48-tbi"]


def test_hpd_is_part_of_the_mode():
    assert aarch64(LINUX_TCR | 1 << 42) == ["aarch64-4k-48-tbi", "aarch64-4k-48-high-hpd"]


def test_a_reserved_granule_is_refused():
    with pytest.raises(InvalidArgumentError, match="reserved"):
        aarch64(LINUX_TCR | 3 << 14)


# -- ARM -----------------------------------------------------------------------------------------------------------


def test_linux_with_short_descriptors_has_one_root():
    assert found("armhf", ttbcr=0, ttbr0=0x4120_406A, ttbr1=0x4000_406A) == [("arm-short", 0x4120_4000)]


def test_ttbcr_n_splits_short_descriptors():
    roots = found("arm", ttbcr=2, ttbr0=0x4120_106A, ttbr1=0x4000_406A, sctlr=1 << 29 | 1)
    assert roots == [("arm-short-2-afe", 0x4120_1000), ("arm-short-2-high-afe", 0x4000_4000)]
    assert [name for name, _ in found("arm", ttbcr=2 | 1 << 4, ttbr0=0, ttbr1=0)] == ["arm-short-2-high"]


def test_linux_with_lpae_gives_ttbr1_the_last_gib():
    roots = found("armv7l", ttbcr=0xB502_3500, ttbr0=0x0001_0000_4134_3000, ttbr1=0x4020_7000)
    assert roots == [("arm-lpae-0-2", 0x4134_3000), ("arm-lpae-0-2-high", 0x4020_7000)]
    assert [name for name, _ in found("arm", ttbcr=1 << 31, ttbr0=0)] == ["arm-lpae"]
    assert [name for name, _ in found("arm", ttbcr=1 << 31 | 1 << 7 | 2 << 16, ttbr0=0, ttbr1=0)] == [
        "arm-lpae-0-2-high"
    ]


# -- RISC-V --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name"), [(8, "sv39"), (9, "sv48"), (10, "sv57")])
def test_satp_says_the_mode(number, name):
    assert found("riscv64", satp=number << 60 | 0x8_1F00) == [(f"riscv-{name}", 0x81F0_0000)]
    with pytest.raises(InvalidArgumentError):
        found("riscv64", satp=1 << 60)


def test_satp_of_a_32_bit_machine_has_one_bit_of_mode():
    assert found("riscv32", satp=1 << 31 | 0x8_1F00) == [("riscv-sv32", 0x81F0_0000)]


# -- Linux ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "release", "bit"),
    [
        ("x86-64", (5, 10), 8), ("x86", (6, 1), 8), ("aarch64-4k-48", (6, 10), 58), ("aarch64-4k-48", (6, 11), 11),
        ("arm-lpae-0-2", (6, 1), 57), ("riscv-sv57", (6, 12), 5),
    ],
)  # fmt: skip
def test_linux_marks_pages_without_access_by_architecture_and_release(name, release, bit):
    kinds = linux_mode(mode(name), release).levels[-1].kinds
    assert kinds[-1].mask == kinds[-1].value | 1 == 1 << bit | 1


def test_linux_adds_nothing_to_short_descriptors():
    assert linux_mode(mode("arm-short"), (6, 1)) is mode("arm-short")
