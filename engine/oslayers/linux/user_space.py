"""The address space of a process, and what its page tables alone tell of its mappings.

Sources: Linux arch/x86/mm/pti.c (user space is no-execute in the tables that the kernel runs on, and the user's copy
of the top table lies in the page behind), arch/x86/include/asm/pgtable.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from engine.errors import FaultError
from engine.floors import Floor
from engine.memory import Memory
from engine.translate.bulk import BUFFER, Blocks, WalkReport
from engine.translate.maps import mapped, regions, take
from engine.translate.mmu import AbsentHook, Root
from engine.translate.virtual import VirtualMemory
from engine.types import Extent, PageFlags, Region, Rights

_TOP_TABLE = 4096
_NO_EXECUTE = np.uint64(1 << 63)
_SEEN = np.uint8((Rights.USER).value)
_INACCESSIBLE = np.uint8(PageFlags.INACCESSIBLE.value)


class UserSpace(VirtualMemory):
    """A process's part of an address space whose tables map the kernel too, as those of 32-bit machines do."""

    def __init__(
        self,
        physical: Memory,
        roots: Sequence[Root],
        absent: AbsentHook | None = None,
        *,
        keep: bool = False,
        stop: int | None = None,
    ) -> None:
        """`stop` is the first address that is the kernel's; None where the tables map nothing of it."""
        super().__init__(physical, roots, absent, keep=keep)
        self.stop = super().size if stop is None else min(stop, super().size)
        self._ranges = tuple((start, min(end, self.stop), walker) for start, end, walker in self._ranges)

    @property
    def size(self) -> int:
        """First address that is not the process's."""
        return self.stop

    def floor(self) -> Floor | None:
        """See `engine.floors`: nothing, where part of what the tables map is the kernel's."""
        return super().floor() if self.stop == super().size else None

    def cached(self) -> UserSpace:
        """See `Memory.cached`."""
        return UserSpace(self.physical.cached(), self.roots, self.absent, keep=True, stop=self.stop)

    def translation_blocks(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        gaps: bool = False,
        buffer: int = BUFFER,
        report: WalkReport | None = None,
    ) -> Iterator[Blocks]:
        """See `VirtualMemory.translation_blocks`."""
        until = self.stop if stop is None else min(stop, self.stop)
        return super().translation_blocks(start, until, gaps=gaps, buffer=buffer, report=report)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `VirtualMemory.extents`."""
        return super().extents(start, self.stop if stop is None else min(stop, self.stop))


def mapped_regions(space: VirtualMemory, heap: tuple[int, int] | None, stack: int | None) -> Iterator[Region]:
    """What the page tables map for user mode, joined where rights are equal; pages not in memory are in none.

    `heap` is where brk(2) begins and ends: what lies in it is called so, as is what holds the address `stack`.
    """
    for region in regions(_of_user(as_user(space).translation_blocks())):
        if heap is not None and heap[0] <= region.start and region.stop <= heap[1] + (-heap[1]) % space.page_size:
            yield replace(region, path="[heap]")
        elif stack is not None and region.start <= stack < region.stop:
            yield replace(region, path="[stack]")
        else:
            yield region


def _of_user(chunks: Iterable[Blocks]) -> Iterator[Blocks]:
    """The pages that user mode may see, and those of which all rights are taken away (PROT_NONE)."""
    for chunk in mapped(chunks):
        rows = np.flatnonzero((chunk.rights & _SEEN != 0) | (chunk.flags & _INACCESSIBLE != 0))
        if len(rows):
            yield take(chunk, rows)


def as_user(space: VirtualMemory) -> VirtualMemory:
    """The address space by the tables that user mode runs on: where KPTI is on, only these tell what is executable.

    They lie behind the kernel's, and differ in the user's half by the bit «no execute» alone: by that they are known.
    """
    spec, dtb = space.roots[0]
    if not spec.name.startswith("x86-64"):
        return space
    try:
        pages = np.frombuffer(space.physical.read(dtb, 2 * _TOP_TABLE), "<u8").reshape(2, -1)
    except FaultError:
        return space
    own, copy = pages[:, : pages.shape[1] // 2]
    if not (own & _NO_EXECUTE).any() or not np.array_equal(own & ~_NO_EXECUTE, copy & ~_NO_EXECUTE):
        return space
    return VirtualMemory(space.physical, [(spec, dtb + _TOP_TABLE)], space.absent, keep=space.keep)
