"""Every paging mode for the tests of translation, ends of the families and a synthetic one of 128 bits among them."""

from __future__ import annotations

import os

from engine.errors import FaultError
from engine.testing import PageTableBuilder
from engine.translate import linux_rows, modes
from engine.translate.mmu import EntryKind, Level, MmuSpec, Walker
from engine.types import PageFlags, Rights

EXAMPLES = int(os.environ.get("CLOUDFS_EXAMPLES", "12"))
"""Random trees for each mode and property."""
LONG = int(os.environ.get("CLOUDFS_LONG_RUN", "0"))
"""Random trees for each mode of the long run."""


def _wide() -> MmuSpec:
    """16-byte entries, addresses of 128 bits, pages of 16 KiB; whole numbers are all it shares with the real ones."""
    address = (((1 << 120) - (1 << 14), 0),)
    table = EntryKind("table", 3, 1, address=address, rights=((Rights.WRITE, 1 << 127, 0),))
    levels = []
    for shift in range(14 + 8 * 10, 13, -10):
        rights = ((Rights.READ, 0, 0), (Rights.WRITE, 1 << 127, 0), (Rights.EXECUTE, 1 << 126, 1 << 126))
        parts = (((1 << 120) - (1 << shift), 0),)
        leaf = EntryKind(f"2^{shift}", 3, 3, shift, parts, rights, ((PageFlags.DIRTY, 4, 4),))
        levels.append(Level(shift, 10, (leaf,) if shift == 14 else (table, leaf)))
    return MmuSpec(
        "synthetic-128", "none: proves that the walk assumes no 64 bits", 16, tuple(levels), low_bits=103,
        high_bits=103, address_bits=128, root=address,
    )  # fmt: skip


WIDE = _wide()
_VARIANTS = (
    "aarch64-4k-52-high", "aarch64-16k-47-high-tbi", "aarch64-64k-52-tbi", "aarch64-64k-17", "aarch64-4k-25",
    "aarch64-4k-48-hpd", "arm-short-1", "arm-short-2-high", "arm-short-7-afe", "arm-lpae-0-2", "arm-lpae-0-2-high",
    "arm-lpae-3-0-high", "arm-lpae-1-1",
)  # fmt: skip
_WITH_PROT_NONE = {
    "x86-64": linux_rows.X86_PROT_NONE,
    "x86-pae": linux_rows.X86_PROT_NONE,
    "x86": linux_rows.X86_PROT_NONE,
    "aarch64-4k-48": linux_rows.ARM64_PRESENT_INVALID,
    "aarch64-16k-52": linux_rows.ARM64_PROT_NONE,
    "arm-lpae": linux_rows.ARM_LPAE_PROT_NONE,
    "riscv-sv48": linux_rows.RISCV_PROT_NONE,
}
MODES = {name: modes.mode(name) for name in (*modes.names(), *_VARIANTS)}
MODES |= {
    f"{name}+PROT_NONE": linux_rows.with_prot_none(modes.mode(name), bit) for name, bit in _WITH_PROT_NONE.items()
}


def built(spec: MmuSpec, seed: int, pages: int) -> PageTableBuilder:
    """A random tree."""
    builder = PageTableBuilder(spec, seed=seed, base=0x4000 if seed & 1 else 1 << 30)
    builder.populate(pages)
    return builder


def told(builder: PageTableBuilder, address: int) -> tuple[object, ...] | None:
    """What the builder's record says of an address, as `walked` says it."""
    page = builder.find(address)
    if page is None:
        return None
    inside = address & (1 << page.page_bits) - 1
    return page.physical + inside, page.page_bits, page.rights, page.flags


def walked(walker: Walker, address: int) -> tuple[object, ...] | None:
    """What a walk says of an address; None where it faults."""
    try:
        found = walker.walk(address)
    except FaultError:
        return None
    return found.physical, found.page_bits, found.rights, found.flags


def found(walker: Walker, address: int) -> tuple[int, int] | None:
    """What the short way says of it."""
    try:
        return walker.find(address)
    except FaultError:
        return None
