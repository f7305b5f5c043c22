"""A process's memory as the process would find it: its page tables, and what they do not map yet.

A page that was never touched is mapped nowhere, and yet it is known what an access would find: zeros in memory of the
process's own, the file's page where a file is mapped. Linux's own /proc/PID/mem answers so. What went to swap is told
to be there, and what no access could give stays a fault.

Sources: Linux mm/memory.c (do_anonymous_page, do_read_fault), mm/gup.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np

from engine.errors import FaultError, FaultKind, NotFoundError, PagedOutError
from engine.floors import Floor
from engine.memory import NO_FAULTS, Addresses, Data, Faults, Memory, Rows
from engine.oslayers.linux.cached_files import CachedPages, PageCache
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.mappings import Mapping, mappings_of
from engine.oslayers.linux.special import special_pages
from engine.oslayers.linux.swap_cache import SwapCache, swap_cache_of
from engine.oslayers.linux.user_space import UserSpace
from engine.oslayers.linux.walks import EVERYWHERE
from engine.translate.bulk import translate
from engine.translate.mmu import AbsentHook, Root
from engine.translate.tower import space_on
from engine.translate.virtual import VirtualMemory
from engine.types import Extent

R = TypeVar("R")
Identity = tuple[Sequence[tuple[int, int, int]], Callable[[], bool]]
"""(physical address, bytes, value) of words, and what is asked behind a read whether they still say all."""
LOOKS = 3
"""How often mappings are read that changed meanwhile."""
BATCH_PAGES = 4096
"""Pages that are looked up at a time once a read met one that is not mapped."""


class Mappings:
    """The mappings of one process, for one operation over live memory, else for as long as they are asked for."""

    def __init__(self, kernel: Kernel, mm: int, within: tuple[int, int] = EVERYWHERE) -> None:
        """Of others than those that hold an address from `within[0]` to `within[1]` some may be missing."""
        self.kernel = kernel
        self.mm = mm
        self.objects = kernel.objects()
        try:
            self.found = mappings_of(kernel, self.objects, mm, within)
        except NotFoundError:
            self.found = []
        self.starts = [mapping.start for mapping in self.found]
        self.areas = kernel.swap_areas(self.objects)
        self._pages: dict[int, CachedPages | None] = {}

    def at(self, address: int) -> Mapping | None:
        """The mapping that holds an address."""
        index = bisect.bisect_right(self.starts, address) - 1
        return self.found[index] if index >= 0 and address < self.found[index].stop else None

    def pages(self, mapping: Mapping) -> CachedPages | None:
        """The cached pages of the file that it maps; None where it has none."""
        if not mapping.has_file_pages:
            return None
        if mapping.file not in self._pages:
            try:
                self._pages[mapping.file] = self._cache.pages(mapping.file)
            except (FaultError, NotFoundError):
                self._pages[mapping.file] = None
        return self._pages[mapping.file]

    def source(self, mapping: Mapping) -> Memory | None:
        """What its pages come from, by their place in the file: the page cache, or the kernel's own vDSO."""
        if not mapping.private:
            return self.pages(mapping)
        size = mapping.stop - mapping.start + mapping.offset
        return special_pages(self.kernel, self.objects, self.mm, mapping.private, size)

    @cached_property
    def swap_cache(self) -> SwapCache | None:
        """What memory holds of pages that are in swap; None where that is not known."""
        return swap_cache_of(self.kernel, self.objects)

    @cached_property
    def _cache(self) -> PageCache:
        return PageCache(self.kernel, self.objects)

    @cached_property
    def own(self) -> tuple[Addresses, Addresses]:
        """(starts, stops) of memory of the process's own, neighbours joined or not."""
        rows = [(mapping.start, mapping.stop) for mapping in self.found if mapping.anonymous]
        column = np.array(rows, np.uint64).reshape(-1, 2)
        return column[:, 0].copy(), column[:, 1].copy()


class ProcessSpace(VirtualMemory):
    """The user half of a process's address space."""

    def __init__(
        self,
        physical: Memory,
        roots: Sequence[Root],
        absent: AbsentHook | None = None,
        *,
        keep: bool = False,
        kernel: Kernel,
        mm: int,
    ) -> None:
        super().__init__(physical, roots, absent, keep=keep)
        self.kernel = kernel
        self.mm = mm
        self._mappings: Mappings | None = None

    def cached(self) -> ProcessSpace:
        """See `Memory.cached`."""
        return ProcessSpace(
            self.physical.cached(), self.roots, self.absent, keep=True, kernel=self.kernel, mm=self.mm
        )

    def mappings(self, start: int = 0, stop: int | None = None) -> Mappings:
        """What is mapped; where that is not kept, at least what holds an address of [start, stop)."""
        if self._mappings is not None:
            return self._mappings
        if not self.keep:
            return self._found_mappings((start, self.size if stop is None else stop))
        found = self._mappings = self._found_mappings(EVERYWHERE)
        return found

    def _found_mappings(self, within: tuple[int, int]) -> Mappings:
        """The mappings; where some are torn they are read again, and who ended meanwhile has left nothing out."""
        kernel = self.kernel
        for left in reversed(range(LOOKS if kernel.live else 1)):
            with kernel.counted() as skipped:
                found = Mappings(kernel, self.mm, within)
            if not skipped or not left:
                break
            kernel.retried["VMA"] += 1
        if skipped:
            self._check_presence()
            kernel.leave_out(skipped)
        return found

    def _check_presence(self) -> None:
        """Raise ProcessExitedError where it is known that the process has ended."""

    # -- reading ------------------------------------------------------------------------------------------

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`. Raises PagedOutError, with where it is, for a page in swap."""
        try:
            super().readinto(address, buffer)
            return
        except FaultError as error:
            if error.kind not in (FaultKind.ABSENT, FaultKind.PAGED_OUT):
                raise
            done = max(0, error.address - address)
        self._read_on(address + done, buffer[done:])

    def _read_on(self, address: int, buffer: memoryview) -> None:
        """Read from a page on that is not mapped."""
        self._read_by_mappings(self.mappings(address, address + len(buffer)), address, buffer)

    def _read_by_mappings(self, mappings: Mappings, address: int, buffer: memoryview) -> None:
        """Read pages, those that are not mapped as the mappings say."""
        stop, bits = address + len(buffer), self._step.bit_length() - 1
        at = address
        while at < stop:
            first = at >> bits
            count = min(BATCH_PAGES, (stop - 1 >> bits) - first + 1)
            starts = (np.arange(count, dtype=np.uint64) + np.uint64(first)) << np.uint64(bits)
            kinds = translate(self.physical, self.roots, starts, absent=self.absent).kinds
            begins = [0, *(np.flatnonzero(kinds[1:] != kinds[:-1]) + 1).tolist(), count]
            for row, until in pairwise(begins):
                limit = min(first + until << bits, stop)
                part = buffer[at - address : limit - address]
                if kinds[row] == 0:
                    super().readinto(at, part)
                elif kinds[row] == FaultKind.ABSENT:
                    self._read_unmapped(mappings, at, part)
                elif kinds[row] == FaultKind.PAGED_OUT:
                    self._read_swapped(mappings, at, part)
                else:
                    raise self._explained(at)
                at = limit

    def _read_unmapped(self, mappings: Mappings, address: int, buffer: memoryview) -> None:
        """Read pages that no page table names."""
        at, stop = address, address + len(buffer)
        while at < stop:
            mapping = mappings.at(at)
            if mapping is None:
                raise FaultError(at)
            limit = min(mapping.stop, stop)
            part = buffer[at - address : limit - address]
            if mapping.anonymous:
                part[:] = bytes(len(part))
            else:
                source = mappings.source(mapping)
                if source is None:
                    raise FaultError(at, detail="the page is mapped, but was not brought into memory")
                offset = at - mapping.start + mapping.offset
                try:
                    source.readinto(offset, part)
                except FaultError as error:
                    raise error.moved(at - offset) from None
            at = limit

    def _read_swapped(self, mappings: Mappings, address: int, buffer: memoryview) -> None:
        """Read pages that are in swap, as far as memory has them too."""
        at, stop = address, address + len(buffer)
        while at < stop:
            limit = min((at | self._step - 1) + 1, stop)
            physical = self._in_swap_cache(mappings, at)
            if physical is None:
                raise self._explained(at)
            frame = physical + (at & self._step - 1)
            try:
                self.physical.readinto(frame, buffer[at - address : limit - address])
            except FaultError as fault:
                raise fault.moved(at - frame) from None
            at = limit

    def _in_swap_cache(self, mappings: Mappings, address: int) -> int | None:
        """Where the page lies that an entry says to be in swap; None where it is there alone."""
        format_of, cache = self.kernel.swap_entries, mappings.swap_cache
        if format_of is None or cache is None:
            return None
        number, offset = format_of.parts([entry for _, _, entry, _ in self.path(address)][-1])
        return None if number in format_of.special else cache.page(number, offset)

    def _explained(self, address: int) -> FaultError:
        """The fault at an address that no mapping can help with: of a page in swap, where it is there."""
        found = FaultError(address)
        try:
            self.walk(address)
        except FaultError as error:
            found = error.moved(0)  # one without a past: that would hold this frame, which holds it
        format_of = self.kernel.swap_entries
        if found.kind is not FaultKind.PAGED_OUT or format_of is None:
            return found
        entry = [entry for _, _, entry, _ in self.path(address)][-1]
        number, offset = format_of.parts(entry)
        if format_of.special.get(number) == "device":
            return PagedOutError(address, detail="the page is in the memory of a device")
        return PagedOutError(address, detail=self.mappings(address, address + 1).areas.place(number, offset))

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        faults = super().gather(addresses, out)
        if not faults:
            return faults
        absent = faults.kinds == FaultKind.ABSENT
        swapped = faults.kinds == FaultKind.PAGED_OUT
        if not (absent | swapped).any():
            return faults
        mappings, width = self.mappings(), out.shape[1]
        if mappings.swap_cache is not None:
            absent |= swapped
        starts, stops = mappings.own
        rows = faults.rows[absent]
        left = np.ones(len(rows), bool)
        if len(starts):
            first = addresses[rows]
            place = np.maximum(np.searchsorted(starts, first, "right").astype(np.intp) - 1, 0)
            inside = (faults.addresses[absent] == first) & self._split(first, width)
            inside &= (first >= starts[place]) & (first < stops[place]) & ~swapped[absent]
            out[rows[inside]] = 0
            left = ~inside
        flat, still = out.data.cast("B"), dict(zip(faults.rows.tolist(), range(len(faults)), strict=True))
        again: list[tuple[int, int, int]] = []
        for row in rows[~left].tolist():
            del still[row]
        for row in rows[left].tolist():
            address = int(addresses[row])
            try:
                self._read_by_mappings(mappings, address, flat[row * width : (row + 1) * width])
            except FaultError as error:
                out[row, max(0, error.address - address) :] = 0
                again.append((row, error.address, int(error.kind)))
            del still[row]
        kept = [(row, int(faults.addresses[at]), int(faults.kinds[at])) for row, at in still.items()]
        return Faults.of(sorted(again + kept))

    def u8(self, address: int) -> int:
        """See `Memory.u8`."""
        try:
            return super().u8(address)
        except FaultError:
            return Memory.u8(self, address)

    def u32(self, address: int) -> int:
        """See `Memory.u32`."""
        try:
            return super().u32(address)
        except FaultError:
            return Memory.u32(self, address)

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        try:
            return super().u64(address)
        except FaultError:
            return Memory.u64(self, address)

    # -- where data is ------------------------------------------------------------------------------------

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: what is mapped, and what the page cache holds of mapped files."""
        until = self.size if stop is None else min(stop, self.size)
        both = heapq.merge(super().extents(start, until), self._cached_extents(start, until))
        pending: Extent | None = None
        for extent in both:
            if pending is not None and extent.start <= pending.stop:
                pending = Extent(pending.start, max(pending.stop, extent.stop) - pending.start)
                continue
            if pending is not None:
                yield pending
            pending = extent
        if pending is not None:
            yield pending

    def _cached_extents(self, start: int, stop: int) -> Iterator[Extent]:
        mappings = self.mappings(start, stop)
        for mapping in mappings.found:
            low, high = max(mapping.start, start), min(mapping.stop, stop)
            source = mappings.source(mapping) if low < high else None
            if source is None:
                continue
            moved = mapping.start - mapping.offset
            for extent in source.extents(low - moved, high - moved):
                yield Extent(extent.start + moved, extent.size)


class Watched(VirtualMemory):
    """Memory of a process that may end: nothing is given of what was read after its pages became another's.

    Each read is followed by a look at whether the process is still there; every door may raise ProcessExitedError.
    """

    check: Callable[[], None] = staticmethod(lambda: None)
    """Raises ProcessExitedError where the process has ended."""
    is_look_due: Callable[[], bool] = staticmethod(lambda: False)
    """Whether `check` may take long now."""

    identity: Callable[[], Identity | None] = staticmethod(lambda: None)
    """What of physical memory tells this process from others, and what tells whether its kernel runs; None: unknown."""

    def floor(self) -> Floor | None:
        """See `engine.floors`: with what `check` looks at."""
        told = self.identity()
        if told is None or super().floor() is None:
            return None
        return space_on(self.physical, self.roots[0], *told)

    def stands(self) -> bool:
        """Whether it is the process's memory still."""
        try:
            self.check()
        except NotFoundError:
            return False
        return True

    def _checked(self, door: Callable[[], R]) -> R:
        try:
            return door()
        finally:
            self.check()

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`. Raises ProcessExitedError."""
        if not self.read_down(address, buffer):
            self._checked(lambda: super(Watched, self).readinto(address, buffer))

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        return not self.is_look_due() and super().readinto_nowait(address, buffer)

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """See `Memory.read_nowait`."""
        if self.is_look_due():
            return None
        buffer = bytearray(size)
        if not self.may_block and self.read_down(address, memoryview(buffer)):
            return bytes(buffer)
        return self._checked(lambda: super(Watched, self).read_nowait(address, size))

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`: nothing, since what is looked at later may be another's by then."""
        return None

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`. Raises ProcessExitedError."""
        for extent in super().extents(start, stop):
            self.check()
            yield extent
        self.check()

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`. Raises ProcessExitedError."""
        if self.gather_down(addresses, out):
            return NO_FAULTS
        return self._checked(lambda: super(Watched, self).gather(addresses, out))

    def u8(self, address: int) -> int:
        """See `Memory.u8`."""
        word = self._word(address, 1)
        return word if word is not None else self._checked(lambda: super(Watched, self).u8(address))

    def u32(self, address: int) -> int:
        """See `Memory.u32`."""
        word = self._word(address, 4)
        return word if word is not None else self._checked(lambda: super(Watched, self).u32(address))

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        word = self._word(address, 8)
        return word if word is not None else self._checked(lambda: super(Watched, self).u64(address))

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`. Raises ProcessExitedError; looks before, since a write cannot be taken back."""
        self.check()
        super().write(address, data)

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        self.check()
        return super().scatter(addresses, rows)


class WatchedSpace(Watched, ProcessSpace):
    """The memory of a process that may end."""

    def _check_presence(self) -> None:
        self.check()

    def cached(self) -> ProcessSpace:
        """See `Memory.cached`."""
        view = WatchedSpace(
            self.physical.cached(), self.roots, self.absent, keep=True, kernel=self.kernel, mm=self.mm
        )
        view.check, view.is_look_due, view.identity = self.check, self.is_look_due, self.identity
        return self._shared(view)


class WatchedUserSpace(Watched, UserSpace):
    """The same of a kernel that tells nothing of mappings."""


def process_space(
    kernel: Kernel,
    mm: int,
    pgd: int,
    check: Callable[[], None] | None = None,
    identity: Callable[[], Identity | None] = lambda: None,
) -> VirtualMemory:
    """The memory of the process whose mm lies at `mm`, its top page table at `pgd`. Raises FaultError.

    `check` raises ProcessExitedError where the process has ended: it is asked at each read. `identity` gives what it
    looks at, for reads that are done in C.
    """
    space = kernel.space_of(pgd)
    told = kernel.knows("vm_area_struct")
    if check is None:
        if not told:
            return space
        return ProcessSpace(space.physical, space.roots, space.absent, keep=space.keep, kernel=kernel, mm=mm)
    watched: Watched
    if told:
        watched = WatchedSpace(space.physical, space.roots, space.absent, keep=space.keep, kernel=kernel, mm=mm)
    else:
        watched = WatchedUserSpace(space.physical, space.roots, space.absent, keep=space.keep, stop=space.size)
    watched.check, watched.is_look_due, watched.identity = check, kernel.is_look_due, identity
    return watched
