"""Virtual memory: a physical memory seen through trees of page tables.

`VirtualMemory` is a Memory like any other, so it stands on another one as well: a guest's physical memory is a
view through EPT over its host's, a process in that guest a view over the view.

Reading needs none of a mapping's rights, and writing none either, as with ptrace(2); but unlike there a write goes
to the page that is mapped, which others may share: no copy is made. Nothing read outlives the operation that read
it, unless the memory is immutable (`keep`) or the view was made for one operation (`cached`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError, FaultKind, InvalidArgumentError
from engine.floors import Floor
from engine.memory import (
    COLUMN_THRESHOLD,
    NO_FAULTS,
    Addresses,
    Data,
    Faults,
    Memory,
    Rows,
    as_addresses,
    fault,
)
from engine.translate.bulk import BUFFER, Blocks, WalkReport, blocks, translate
from engine.translate.maps import coalesced, mapped_extents, mappings_of, physical_maps
from engine.translate.mmu import AbsentHook, EntryKind, Root, Translation, Walker, covered
from engine.translate.tower import Tower, space_on, tower_of
from engine.types import ADDRESS_SPACE, Extent, PhysicalMap, Rights

BULK_PAGES = 12
"""From so many pages on one vectorised walk is faster than as many scalar ones (measured)."""
TOWER_PAUSE = 256
"""Reads until it is tried again whether C can do them all the way down (`tower`)."""
NEVER = 1 << 62
"""Reads until then, of a view that keeps what it reads: it does not outlive them."""
TOWER_ROWS = 128
"""More rows than that are translated in one pass (measured)."""
MAPPED_BYTES = 1 << 18
"""Larger reads of what is mapped in this program are translated in one pass and copied here (measured)."""
TOWER_BYTES = 1 << 20
"""Larger reads are translated in one pass (measured)."""
KEPT_PAGES = 4
"""From more pages on a walker of one's own, which remembers the last table, pays (measured)."""
BATCH_PAGES = 1 << 14
"""Pages that one read translates at a time."""
EXTENT_BUFFER = 1 << 20
"""Working memory of `extents`: who asks often wants the first one soon."""


V = TypeVar("V", bound="VirtualMemory")


class VirtualMemory(Memory):
    """An address space: physical memory through one tree of page tables, or two (TTBR0 and TTBR1)."""

    def __init__(
        self,
        physical: Memory,
        roots: Sequence[Root],
        absent: AbsentHook | None = None,
        *,
        keep: bool = False,
        tables: Memory | None = None,
    ) -> None:
        """`absent` is asked for non-zero absent entries; `keep` says that the memory never changes.

        Page tables are read in `tables` where they are to be read elsewhere than in physical memory.
        Raises InvalidArgumentError without a root, or where two roots translate the same addresses.
        """
        if not roots:
            raise InvalidArgumentError("an address space needs a page table")
        self.physical = physical
        self.roots = tuple(roots)
        self.absent = absent
        self.keep = keep
        self._tower: Tower | None = None
        self._few: Tower | None = None
        """Of a view that keeps what it reads: gathers few rows."""
        self._tower_pause = NEVER if keep else 0
        self._tables = physical.for_tables() if tables is None else tables
        constants = physical.for_constants()
        self._constants = None if constants is physical else constants
        walkers = [Walker(self._tables, spec, dtb, absent, keep=keep) for spec, dtb in roots]
        found = [(extent.start, extent.stop, walker) for walker in walkers for extent in walker.extents]
        self._ranges = tuple(sorted(found, key=lambda entry: entry[0]))
        for one, two in zip(self._ranges, self._ranges[1:], strict=False):
            if two[0] < one[1]:
                raise InvalidArgumentError(f"two page tables translate the addresses from {two[0]:#x} on")
        in_order = {id(walker): walker for _, _, walker in self._ranges}.values()
        self._roots_in_order = tuple((walker.spec, walker.dtb) for walker in in_order)
        self._step = min(1 << spec.page_bits for spec, _ in roots)
        self.page_size = min(self._step, physical.page_size)
        self.writable = physical.writable

    @property
    def size(self) -> int:
        """First address behind all that the page tables could map; 2^64 where there is a high half."""
        return covered(self.roots)

    @property
    def may_block(self) -> bool:
        """As the memory below."""
        return self.physical.may_block

    @property
    def words_are_cheap(self) -> bool:
        """As of the memory below: a walk is made of words."""
        return self.physical.words_are_cheap

    def cached(self) -> VirtualMemory:
        """See `Memory.cached`: remembers page tables until it is thrown away."""
        return self._shared(type(self)(self.physical.cached(), self.roots, self.absent, keep=True))

    # -- all the way down in C ---------------------------------------------------------------------------

    def floor(self) -> Floor | None:
        """See `engine.floors`: one tree of page tables over a memory that is read as it is."""
        if len(self.roots) != 1 or self._constants is not None or self._tables is not self.physical:
            return None
        return space_on(self.physical, self.roots[0])

    def tower(self) -> Tower | None:
        """What reads from here down to the ground in one call; None where nothing does. None of a view that keeps."""
        if self._tower_pause:
            self._tower_pause -= 1
            return None
        tower = self._tower
        if tower is not None and tower.stands():
            return tower
        tower = self._tower = None if self.keep else tower_of(self)
        if tower is None:
            self._tower_pause = NEVER if self.keep else TOWER_PAUSE
        return tower if tower is not None and tower.stands() else None

    def _shared(self, view: V) -> V:
        """A view of the same that keeps what it reads, with what reads deeper than it can remember."""
        tower = self.tower()
        if tower is not None and tower.lacks_pieces:
            view._few = tower
            if tower.deep:
                view._tower, view._tower_pause = tower, 0
        return view

    def gather_down(self, addresses: Addresses, out: Rows) -> bool:
        """Fill few rows; False, and anything in them, where that has to be done otherwise."""
        if len(addresses) > TOWER_ROWS or out.shape[1] > self._step:
            return False
        tower = self._few if self.keep else self.tower()
        return tower is not None and tower.lacks_pieces and tower.stands() and tower.gather(addresses, out)

    def _word(self, address: int, size: int) -> int | None:
        """The word there; None where it has to be read by single steps."""
        tower = self.tower()
        return None if tower is None else tower.word(address, size)

    def read_down(self, address: int, buffer: memoryview) -> bool:
        """See `engine.floors.Deep`."""
        if not 0 < len(buffer) <= TOWER_BYTES:
            return False
        tower = self.tower()
        if tower is None or (len(buffer) > MAPPED_BYTES and not tower.lacks_pieces):
            return False
        return tower.readinto(address, buffer)

    # -- one address -----------------------------------------------------------------------------------

    def _walker(self, address: int) -> Walker:
        for start, stop, walker in self._ranges:
            if start <= address < stop:
                return walker
        for _, _, walker in self._ranges:
            if walker.spec.ignored_bits and walker.spec.canonical(address) is not None:
                return walker
        raise FaultError(address, detail="no page table translates it")

    def walk(self, address: int) -> Translation:
        """Where `address` lies, with its page's size, rights and flags. Raises FaultError with the kind of absence."""
        return self._walker(address).walk(address)

    def path(self, address: int) -> Iterator[tuple[int, int, int, EntryKind | None]]:
        """(level, entry address, entry, its kind or None) of each step of the walk. Raises as `Walker.path`."""
        return self._walker(address).path(address)

    def virt_to_phys(self, address: int) -> int:
        """The physical address of `address`. Raises FaultError with the kind of its absence."""
        return self._walker(address).find(address)[0]

    def _pieces(self, address: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the request, physical address, size), page by page. Raises FaultError at the first absent one."""
        done = 0
        walker = self._walker(address)
        if size > KEPT_PAGES * self._step and not self.keep:
            walker = Walker(self._tables, walker.spec, walker.dtb, self.absent, keep=True)
        while done < size:
            physical, bits = walker.find(address + done)
            step = min(size - done, (1 << bits) - (address + done & (1 << bits) - 1))
            yield done, physical, step
            done += step

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        if self.read_down(address, buffer):
            return
        if self._constants is not None:
            self._read_by_kind(address, buffer, self._constants)
            return
        if len(buffer) >= BULK_PAGES * self._step:
            self._read_pages(address, buffer)
            return
        for offset, physical, step in self._pieces(address, len(buffer)):
            try:
                self.physical.readinto(physical, buffer[offset : offset + step])
            except FaultError as error:
                raise error.moved(address + offset - physical) from None

    def _read_by_kind(self, address: int, buffer: memoryview, constants: Memory) -> None:
        """Page by page, those that may not be written to from where they may be a while old."""
        done = 0
        while done < len(buffer):
            found = self.walk(address + done)
            page = 1 << found.page_bits
            step = min(len(buffer) - done, page - (address + done & page - 1))
            source = self.physical if found.rights & Rights.WRITE else constants
            try:
                source.readinto(found.physical, buffer[done : done + step])
            except FaultError as error:
                raise error.moved(address + done - found.physical) from None
            done += step

    def _read_pages(self, address: int, buffer: memoryview) -> None:
        """Many pages: translated in one pass, read in runs or gathered."""
        size = len(buffer)
        for done, starts, physical, good in self._page_runs(address, size):
            runs, steps = _runs(physical[:good], self._step)
            if len(runs) * 4 <= good:
                self._read_runs(address, buffer, done, starts[runs], physical[runs], steps)
            else:
                self._gather_pages(address, buffer, starts[:good], physical[:good])
            if good < len(starts):
                at = max(int(starts[good]), address)
                self.walk(at)  # says why it is absent; where it is not any more, the page came in this very moment
                raise FaultError(at)

    def _page_runs(self, address: int, size: int) -> Iterator[tuple[int, Addresses, Addresses, int]]:
        """(offset, starts, physical addresses, count of pages before the first absent one), batch by batch."""
        step = self._step
        first, last = address // step, (address + size - 1) // step
        for begin in range(first, last + 1, BATCH_PAGES):
            count = min(BATCH_PAGES, last + 1 - begin)
            if (begin + count) * step > ADDRESS_SPACE:
                count = max(0, ADDRESS_SPACE // step - begin)
            if count <= 0:
                raise FaultError(max(address, begin * step))
            starts = (np.arange(count, dtype=np.uint64) + np.uint64(begin)) * np.uint64(step)
            found = translate(self._tables, self.roots, starts, absent=self.absent)
            bad = np.flatnonzero(found.kinds)
            yield begin * step - address, starts, found.physical, int(bad[0]) if len(bad) else count

    def _read_runs(
        self,
        address: int,
        buffer: memoryview,
        done: int,
        starts: Addresses,
        physical: Addresses,
        counts: npt.NDArray[np.intp],
    ) -> None:
        """Runs of page frames that follow one another: one read each."""
        step, stop = self._step, address + len(buffer)
        for start, frame, count in zip(starts.tolist(), physical.tolist(), counts.tolist(), strict=True):
            skip = max(0, address - start)
            size = min(start + count * step, stop) - start - skip
            at = start + skip - address
            try:
                self.physical.readinto(frame + skip, buffer[at : at + size])
            except FaultError as error:
                raise error.moved(start - frame) from None

    def _gather_pages(self, address: int, buffer: memoryview, starts: Addresses, physical: Addresses) -> None:
        """Scattered page frames: the whole ones in one gather, those cut by the request each by itself."""
        step, stop = self._step, address + len(buffer)
        head = 1 if len(starts) and int(starts[0]) < address else 0
        tail = 1 if len(starts) > head and int(starts[-1]) + step > stop else 0
        one = np.ones(1, np.intp)
        if head:
            self._read_runs(address, buffer, 0, starts[:1], physical[:1], one)
        whole = slice(head, len(starts) - tail)
        count = len(starts[whole])
        if count:
            at = int(starts[head]) - address
            out = np.frombuffer(buffer[at : at + count * step], np.uint8).reshape(count, step)
            faults = self.physical.gather(physical[whole], out)
            if faults:
                row = int(faults.rows[0])
                frame = int(physical[whole][row])
                raise fault(int(faults.addresses[0]) - frame + int(starts[whole][row]), FaultKind(int(faults.kinds[0])))
        if tail:
            self._read_runs(address, buffer, 0, starts[-1:], physical[-1:], one)

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """See `Memory.read_nowait`."""
        if self.physical.may_block or (address & self._step - 1) + size > self._step:
            return None
        buffer = bytearray(size)
        if self.read_down(address, memoryview(buffer)):
            return bytes(buffer)
        try:
            return self.physical.read_nowait(self.virt_to_phys(address), size)
        except FaultError:
            return None

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`. Writes to the page frame that is mapped, whatever its rights and whoever shares it."""
        view = memoryview(data).cast("B")
        for offset, physical, step in self._pieces(address, len(view)):
            try:
                self.physical.write(physical, view[offset : offset + step])
            except FaultError as error:
                raise error.moved(address + offset - physical) from None

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`: of bytes that lie in one page."""
        try:
            physical, bits = self._walker(address).find(address)
        except FaultError:
            return None
        if (address & (1 << bits) - 1) + size > 1 << bits:
            return None
        return self.physical.borrow(physical, size)

    def u8(self, address: int) -> int:
        """See `Memory.u8`."""
        if not self._tower_pause and (word := self._word(address, 1)) is not None:
            return word
        physical = self._walker(address).find(address)[0]
        try:
            return self.physical.u8(physical)
        except FaultError as error:
            raise error.moved(address - physical) from None

    def u32(self, address: int) -> int:
        """See `Memory.u32`."""
        if not self._tower_pause and (word := self._word(address, 4)) is not None:
            return word
        if address & self._step - 1 > self._step - 4:
            return super().u32(address)
        physical = self._walker(address).find(address)[0]
        try:
            return self.physical.u32(physical)
        except FaultError as error:
            raise error.moved(address - physical) from None

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        if self._tower_pause:
            self._tower_pause -= 1
        elif (word := self._word(address, 8)) is not None:
            return word
        if address & self._step - 1 > self._step - 8:
            return super().u64(address)
        physical = self._walker(address).find(address)[0]
        try:
            return self.physical.u64(physical)
        except FaultError as error:
            raise error.moved(address - physical) from None

    # -- columns -----------------------------------------------------------------------------------------

    def virt_to_phys_many(self, addresses: npt.ArrayLike) -> tuple[Addresses, Faults]:
        """The physical address of each, and the faults; a row that failed holds 0.

        `addresses` may be any sequence of whole numbers. Raises InvalidArgumentError where one is no address.
        """
        column = as_addresses(addresses)
        found = translate(self._tables, self.roots, column, absent=self.absent)
        rows = np.flatnonzero(found.kinds)
        if not len(rows):
            return found.physical, NO_FAULTS
        found.physical[rows] = 0
        return found.physical, Faults(rows, column[rows], found.kinds[rows])

    def _split(self, addresses: Addresses, width: int) -> npt.NDArray[np.bool_]:
        """Which rows lie within one page each."""
        return (addresses & np.uint64(self._step - 1)) <= max(0, self._step - width)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: one pass of translation, one gather."""
        width = out.shape[1]
        if self.gather_down(addresses, out):
            return NO_FAULTS
        if len(addresses) <= COLUMN_THRESHOLD or not 0 < width <= self._step:
            return super().gather(addresses, out)
        within = self._split(addresses, width)
        if within.all():
            return self._gather(addresses, out)
        good, bad = np.flatnonzero(within), np.flatnonzero(~within)
        part, rest = np.empty((len(good), width), np.uint8), np.empty((len(bad), width), np.uint8)
        faults, edges = self._gather(addresses[good], part), super().gather(addresses[bad], rest)
        out[good], out[bad] = part, rest
        return _merged(_renumbered(faults, good), _renumbered(edges, bad))

    def _gather(self, addresses: Addresses, out: Rows) -> Faults:
        """`gather` of rows that lie within one page each."""
        physical, absent = self.virt_to_phys_many(addresses)
        if not absent:
            return _moved(self.physical.gather(physical, out), physical, addresses)
        good = np.ones(len(addresses), bool)
        good[absent.rows] = False
        present = np.flatnonzero(good)
        part = np.empty((len(present), out.shape[1]), np.uint8)
        faults = _moved(self.physical.gather(physical[present], part), physical[present], addresses[present])
        out[present] = part
        out[absent.rows] = 0
        return _merged(_renumbered(faults, present), absent)

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`: one pass of translation, one scatter."""
        width = rows.shape[1]
        if len(addresses) <= COLUMN_THRESHOLD or not 0 < width <= self._step or not self._split(addresses, width).all():
            return super().scatter(addresses, rows)
        physical, absent = self.virt_to_phys_many(addresses)
        if not absent:
            return _moved(self.physical.scatter(physical, rows), physical, addresses)
        good = np.ones(len(addresses), bool)
        good[absent.rows] = False
        present = np.flatnonzero(good)
        faults = _moved(
            self.physical.scatter(physical[present], rows[present]), physical[present], addresses[present]
        )
        return _merged(_renumbered(faults, present), absent)

    # -- what is mapped ------------------------------------------------------------------------------------

    def translation_blocks(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        gaps: bool = False,
        buffer: int = BUFFER,
        report: WalkReport | None = None,
    ) -> Iterator[Blocks]:
        """Columns of every leaf entry of [start, stop), in address order, in bounded memory.

        With `gaps` what is absent has rows too. `report` is told what the walk met.
        """
        for root in self._roots_in_order:
            until = covered([root]) if stop is None else min(stop, covered([root]))
            if start < until:
                yield from blocks(
                    self._tables, root, start, until, buffer=buffer, absent=self.absent, gaps=gaps, report=report
                )
                start = until

    def physical_maps(self, start: int = 0, stop: int | None = None) -> Iterator[PhysicalMap]:
        """What is mapped, as runs that follow one another in both address spaces with equal rights and page size."""
        return physical_maps(self.translation_blocks(start, stop))

    def coalesced(self, start: int = 0, stop: int | None = None) -> Iterator[Blocks]:
        """`physical_maps` as columns."""
        return coalesced(self.translation_blocks(start, stop))

    def page_map(self, gap: int = 0, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """The mapped ranges of addresses; holes of at most `gap` bytes are passed over."""
        return mapped_extents(self.translation_blocks(start, stop), gap)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: what is mapped to where physical memory has not ended."""
        blocks = self.translation_blocks(start, stop, buffer=EXTENT_BUFFER)
        for extent in mapped_extents(blocks, size=self.physical.size):
            first = max(start, extent.start)
            last = extent.stop if stop is None else min(stop, extent.stop)
            if first < last:
                yield Extent(first, last - first)

    def phys_to_virt(self, physical: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Every address in [start, stop) that is mapped to this physical address, ascending."""
        return [int(address) for address in self.phys_to_virt_many([physical], start, stop)[1]]

    def phys_to_virt_many(
        self, physical: npt.ArrayLike, start: int = 0, stop: int | None = None
    ) -> tuple[npt.NDArray[np.intp], Addresses]:
        """(rows of `physical`, addresses): every mapping of each, sorted by row, then address."""
        frames = as_addresses(physical)
        found = list(mappings_of(self.translation_blocks(start, stop), frames))
        if not found:
            return np.empty(0, np.intp), np.empty(0, np.uint64)
        rows, addresses = (np.concatenate(columns) for columns in zip(*found, strict=True))
        order = np.lexsort((addresses, rows))
        return rows[order], addresses[order]


def _runs(physical: Addresses, step: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """(first rows, counts) of the runs of page frames that follow one another."""
    if not len(physical):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    cuts = np.flatnonzero(physical[1:] - physical[:-1] != step) + 1
    begins = np.concatenate((np.zeros(1, np.intp), cuts))
    return begins, np.diff(np.append(begins, len(physical)))


def _moved(faults: Faults, physical: Addresses, addresses: Addresses) -> Faults:
    """Faults of the physical memory, their addresses those of the address space."""
    if not faults:
        return faults
    return Faults(faults.rows, faults.addresses - physical[faults.rows] + addresses[faults.rows], faults.kinds)


def _renumbered(faults: Faults, rows: npt.NDArray[np.intp]) -> Faults:
    """Faults of a part of a batch, their rows those of the whole batch."""
    return Faults(rows[faults.rows], faults.addresses, faults.kinds) if faults else faults


def _merged(one: Faults, two: Faults) -> Faults:
    """Two sets of faults as one, rows ascending."""
    if not one or not two:
        return one or two
    rows = np.concatenate((one.rows, two.rows))
    order = np.argsort(rows)
    return Faults(
        rows[order],
        np.concatenate((one.addresses, two.addresses))[order],
        np.concatenate((one.kinds, two.kinds))[order],
    )
