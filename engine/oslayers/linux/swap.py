"""Pages that are not where they belong: what Linux writes into the entry of a page that it took away.

An entry of a process that is neither zero nor present names a place in swap or zram, a page on the move, or a mark;
never nothing. The type of x86-64's entries stands in bits 63:59, so that moving pages can be told from swapped ones;
of other architectures, whose type bits moved between releases, all count as paged out.

Sources: Linux include/linux/swap.h (the types above MAX_SWAPFILES: poisoned, migrating, device, marks), swapops.h,
arch/x86/include/asm/pgtable_64.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from engine.errors import FaultKind
from engine.translate.mmu import AbsentHook, Translation

_TYPE_SHIFT = 59
_MIGRATING = range(24, 28)
"""Read, read-exclusive and write migration; 24 to 26 from 5.19 on, 26 and 27 before."""
_MARK = 31
"""PTE_MARKER: a guard page or a userfaultfd's mark (5.19 on); no page was there."""


def absent_hook(machine: str) -> AbsentHook:
    """What to ask about absent entries of a process of this architecture."""

    def x86_64(_address: int, entry: int, _level: int) -> Translation | FaultKind:
        kind = entry >> _TYPE_SHIFT
        if kind == _MARK:
            return FaultKind.ABSENT
        return FaultKind.MIGRATING if kind in _MIGRATING else FaultKind.PAGED_OUT

    def any_other(_address: int, _entry: int, _level: int) -> Translation | FaultKind:
        return FaultKind.PAGED_OUT

    return x86_64 if machine == "x86_64" else any_other
