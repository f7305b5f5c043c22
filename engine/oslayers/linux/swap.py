"""Pages that are not where they belong: what Linux writes into the entry of a page that it took away.

An entry of a process that is neither zero nor present holds a type and an offset. Low types are areas of swap (zram is
one), and the offset the page's slot there; the highest are pages on the move, pages of a device, poisoned ones, and
marks. Where type and offset stand depends on architecture and release, and which types are special also on what the
kernel was built with, which its own functions tell.

Sources: Linux include/linux/swap.h (the types above MAX_SWAPFILES, counted downwards: marks since 5.19, devices,
migration, poison), swapops.h, arch/x86/include/asm/pgtable_64.h, arch/arm64/include/asm/pgtable.h (moved in 5.19 and
6.11), arch/riscv/include/asm/pgtable.h (moved in 6.3); releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field

from engine.errors import FaultError, FaultKind, NotFoundError
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.paths import Paths
from engine.records import dataclass
from engine.translate.mmu import AbsentHook, Translation

TYPES = 32
"""2^MAX_SWAPFILES_SHIFT, on every architecture."""
CACHE_OFFSET_BITS = 58
"""Bits of the offset in an entry of the page cache, below the type (swp_entry_t: 63 bits of a value, 5 of the type)."""
_GUARDS = 2 | 4
"""Of a mark: PTE_MARKER_POISONED and PTE_MARKER_GUARD; every access ends in a signal (include/linux/swapops.h)."""


@dataclass(frozen=True, slots=True)
class SwapEntries:
    """How the entries of absent pages are read."""

    type_shift: int
    offset_shift: int
    offset_bits: int
    inverted: bool = False
    """Whether the offset stands there inverted (x86-64, against L1TF)."""
    special: Mapping[int, str] = field(default_factory=dict)
    """Type → what it means: `mark`, `device`, `migration`, `poison`; all others are areas of swap."""

    def parts(self, entry: int) -> tuple[int, int]:
        """(type, offset)."""
        offset = (~entry if self.inverted else entry) >> self.offset_shift & (1 << self.offset_bits) - 1
        return entry >> self.type_shift & TYPES - 1, offset

    def kind(self, entry: int) -> FaultKind:
        """Why a page with this entry cannot be read."""
        number, offset = self.parts(entry)
        meaning = self.special.get(number)
        if meaning == "mark":
            return FaultKind.GUARD if offset & _GUARDS else FaultKind.ABSENT
        return _KINDS.get(meaning or "", FaultKind.PAGED_OUT)


_KINDS = {"migration": FaultKind.MIGRATING, "poison": FaultKind.SOURCE}


def special_types(release: tuple[int, int], *, devices: bool, poison: bool) -> dict[int, str]:
    """The special types of a kernel: with pages of devices (DEVICE_PRIVATE), with MEMORY_FAILURE."""
    device_count = 3 if release >= (6, 15) else 4 if release >= (5, 14) else 2
    counts = (
        ("mark", 1 if release >= (5, 19) else 0),
        ("device", device_count if devices else 0),
        ("migration", 3 if release >= (5, 19) else 2),
        ("poison", 1 if poison else 0),
    )
    found: dict[int, str] = {}
    top = TYPES
    for meaning, count in counts:
        found |= dict.fromkeys(range(top - count, top), meaning)
        top -= count
    return found


def swap_entries(machine: str, release: tuple[int, int], special: Mapping[int, str]) -> SwapEntries | None:
    """The format of a machine's entries; None where it is not known."""
    if machine == "x86_64":
        return SwapEntries(59, 9, 50, inverted=True, special=special)
    if machine == "aarch64":
        if release >= (6, 11):
            return SwapEntries(6, 12, 50, special=special)
        return SwapEntries(3 if release >= (5, 19) else 2, 8, 50, special=special)
    if machine == "riscv64":
        return SwapEntries(7, 12, 52, special=special) if release >= (6, 3) else SwapEntries(6, 11, 53, special=special)
    return None


def entries_of(machine: str, release: tuple[int, int], known: Callable[[str], bool]) -> SwapEntries | None:
    """The format of a kernel's entries; `known` tells whether the kernel has a function."""
    devices = any(map(known, ("make_device_exclusive_range", "make_device_exclusive")))
    if release < (5, 14):
        devices = known("migrate_vma_setup")
    return swap_entries(machine, release, special_types(release, devices=devices, poison=known("memory_failure")))


def absent_hook(entries: SwapEntries | None) -> AbsentHook:
    """What to ask about absent entries of a process; without a format all count as paged out."""

    def known(_address: int, entry: int, _level: int) -> Translation | FaultKind:
        assert entries is not None  # else it is not asked
        return entries.kind(entry)

    def unknown(_address: int, _entry: int, _level: int) -> Translation | FaultKind:
        return FaultKind.PAGED_OUT

    return unknown if entries is None else known


class SwapAreas:
    """The areas that a kernel swaps to, in one operation."""

    def __init__(self, objects: Objects, table: int | None) -> None:
        """`table` is the address of `swap_info`, an array of pointers; None where it is not known."""
        self.objects = objects
        self._table = table
        self._paths: dict[int, str | None] = {}

    def path(self, number: int) -> str | None:
        """The file or device of an area; None where it is not known."""
        if number not in self._paths:
            self._paths[number] = self._read(number)
        return self._paths[number]

    def _read(self, number: int) -> str | None:
        if self._table is None:
            return None
        try:
            area = self.objects.pointer(self._table + number * self.objects.word)
            if not self.objects.is_pointer(area):
                return None
            file = self.objects.pointer(area + self.objects.struct("swap_info_struct")["swap_file"].offset)
            return Paths(self.objects).of_file(file) if self.objects.is_pointer(file) else None
        except (FaultError, NotFoundError):
            return None

    def place(self, number: int, offset: int) -> str:
        """A clause for people: where a page of an area is."""
        path = self.path(number)
        return f"the page is in swap: slot {offset} of {path if path is not None else f'area {number}'}"
