"""Rows that Linux adds to a paging mode: pages that are resident though no access is allowed.

mprotect(PROT_NONE) and NUMA balancing clear the valid bit and keep the frame; /proc/PID/mem reads such pages, and so
does a walk with these rows, which flags them INACCESSIBLE: `linux_mode(mode("x86-64"), (6, 12))`.

Not here: swap and migration entries, whose numbering depends on release and configuration, are for an OS layer's
`absent` hook. On ARM with short descriptors the hardware's entry of such a page is zero, and that of a page which was
not looked at for a while too: `arm_of_linux` reads Linux's own entries, half a page below.
Sources: arch/x86/include/asm/pgtable_types.h (_PAGE_PROTNONE, bit 8), pgtable-invert.h (frame numbers stored
inverted since 4.19 and its stable branches, except with two levels: pgtable-2level.h); arch/arm64/include/asm/
pgtable-prot.h (PTE_PROT_NONE, bit 58, to 6.10; PTE_PRESENT_INVALID, bit 11, from 6.11 on); arch/arm/include/asm/
pgtable-3level.h (L_PTE_NONE, bit 57); arch/riscv/include/asm/pgtable-bits.h (_PAGE_PROT_NONE, bit 5).
"""

from __future__ import annotations

from dataclasses import replace

from engine.translate.mmu import EntryKind, MmuSpec
from engine.types import PageFlags, Rights

X86_PROT_NONE = 1 << 8
ARM64_PROT_NONE = 1 << 58
"""Releases to 6.10."""
ARM64_PRESENT_INVALID = 1 << 11
"""Releases from 6.11 on; in entries of swap it is clear there, as bit 58 is before."""
ARM_LPAE_PROT_NONE = 1 << 57
RISCV_PROT_NONE = 1 << 5
_LARGE = 1 << 7

_ARM_PRESENT, _ARM_YOUNG, _ARM_DIRTY, _ARM_READ_ONLY, _ARM_USER, _ARM_NO_EXECUTE, _ARM_NONE = (
    1 << bit for bit in (0, 1, 6, 7, 8, 9, 11)
)
_ARM_HARDWARE = 1 << 11
"""PTE_HWTABLE_OFF: the hardware's last table lies so far behind Linux's, in the same page."""


def linux_mode(spec: MmuSpec, release: tuple[int, int]) -> MmuSpec:
    """The mode with what a Linux of that release adds to it; as it is where that is nothing (short descriptors)."""
    arm64 = ARM64_PRESENT_INVALID if release >= (6, 11) else ARM64_PROT_NONE
    bits = {"x86": X86_PROT_NONE, "aarch64": arm64, "arm-lpae": ARM_LPAE_PROT_NONE, "riscv": RISCV_PROT_NONE}
    found = next((bit for family, bit in bits.items() if spec.name.startswith(family)), None)
    return spec if found is None else with_prot_none(spec, found)


def with_prot_none(spec: MmuSpec, bit: int) -> MmuSpec:
    """The mode with rows for resident pages without access, marked by `bit` (one of the constants above).

    Such an entry has bit 0 clear, `bit` set, and of x86's large pages bit 7; rights it grants none.
    """
    added: dict[int, tuple[EntryKind, ...]] = {}
    for number, level in enumerate(spec.levels):
        leaves = [kind for kind in level.kinds if kind.page_bits == level.shift]
        if leaves:
            added[number] = (_row(leaves[0], spec, bit, number == len(spec.levels) - 1),)
    return spec.with_kinds(added)


def arm_of_linux(spec: MmuSpec) -> MmuSpec:
    """Short descriptors whose last tables are Linux's own: all resident pages of processes, with their rights.

    Source: arch/arm/include/asm/pgtable-2level.h (L_PTE_*, two tables of hardware behind two of Linux in each page).
    """
    first, last = spec.levels
    page = next(kind for kind in last.kinds if kind.page_bits == last.shift)
    common = replace(page, mask=_ARM_PRESENT | _ARM_NONE, address=((0xFFFFF000, 0),))
    flags = ((PageFlags.ACCESSED, _ARM_YOUNG, _ARM_YOUNG), (PageFlags.DIRTY, _ARM_DIRTY, _ARM_DIRTY))
    rights = (
        (Rights.READ, 0, 0),
        (Rights.WRITE, _ARM_READ_ONLY, 0),
        (Rights.USER, _ARM_USER, _ARM_USER),
        (Rights.EXECUTE, _ARM_NO_EXECUTE, 0),
        (Rights.USER_EXECUTE, _ARM_NO_EXECUTE | _ARM_USER, _ARM_USER),
    )
    kinds = (
        replace(common, value=_ARM_PRESENT, rights=rights, flags=flags),
        replace(common, name=f"{page.name} PROT_NONE", value=_ARM_PRESENT | _ARM_NONE, rights=(),
                flags=((PageFlags.INACCESSIBLE, 0, 0), *flags)),
    )  # fmt: skip
    tables = tuple(
        kind if kind.page_bits is not None else replace(kind, address=((mask & ~_ARM_HARDWARE, shift),))
        for kind in first.kinds
        for mask, shift in kind.address[:1]
    )
    levels = (replace(first, kinds=tables), replace(last, kinds=kinds))
    return replace(spec, name=f"{spec.name}+linux", levels=levels)


def _row(leaf: EntryKind, spec: MmuSpec, bit: int, last: bool) -> EntryKind:
    large = _LARGE if bit == X86_PROT_NONE and not last else 0
    stored = sum(mask for mask, _ in leaf.address)
    inverted = bit == X86_PROT_NONE and spec.entry_size == 8
    return replace(
        leaf,
        name=f"{leaf.name} PROT_NONE",
        mask=1 | bit | large,
        value=bit | large,
        rights=(),
        flags=((PageFlags.INACCESSIBLE, 0, 0), *(row for row in leaf.flags if not row[1] & (1 | bit))),
        invert=stored if inverted else 0,
    )
