"""Page tables of a kernel that are damaged, written anew as far as what they mapped is plain arithmetic.

A table is damaged where much of it leads out of memory, or is no entry of its mode; and where it is empty, although
what lies there is mapped linearly. An entry that is absent among sound ones is a hole that the kernel has made: it
takes pages out of its map, and gives parts of its image back.

What is written is a view for reading objects: nothing in memory changes, and what page tables really say is told by
the tables alone.

Sources: Linux arch/x86/mm/pat/set_memory.c (set_memory_np: absent, but not 0), arch/arm64/mm/pageattr.c and init.c
(free_initmem leaves empty tables behind); releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError, FaultKind, UnsupportedError
from engine.memory import Addresses, Faults, Memory, MemoryOver, Rows
from engine.oslayers.linux.linear_maps import PAGE, LinearMap, Ram
from engine.records import dataclass
from engine.translate.batch import TableReader
from engine.translate.mmu import EntryKind, Level, Root, Walker
from engine.translate.rows import LevelRows, rows_of
from engine.translate.virtual import VirtualMemory
from engine.types import ADDRESS_SPACE, Extent

LOST_SHARE = 8
"""Of a table of which an eighth or more is impossible nothing is believed; else its single wrong entries are mended."""
_BATCH = 512
"""Tables that are looked through at a time."""
LARGEST_PAGE = 25
"""Log2 of the largest page that is written: RAM is known in steps, and a larger one might reach beyond it."""
ADDED_LIMIT = 1 << 14
"""Pages that may be replaced or added."""
_ALIGNED = 1 << 21
"""Where tables are added begins at a multiple."""

Mask = npt.NDArray[np.bool_]


class PatchedTables(MemoryOver):
    """Physical memory for whoever walks page tables in it, some pages of which are replaced, or added behind it."""

    def __init__(self, memory: Memory, pages: dict[int, bytes]) -> None:
        super().__init__(memory)
        self.page_size = PAGE
        self.writable = False
        self._pages = pages
        self._size = max([memory.size, *(start + PAGE for start in pages)])
        self._starts = np.array(sorted(pages), np.uint64)

    @property
    def size(self) -> int:
        """See `Memory.size`."""
        return self._size

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        done = 0
        while done < len(buffer):
            at = address + done
            step = min(len(buffer) - done, PAGE - at % PAGE)
            page = self._pages.get(at & -PAGE)
            if page is None:
                self.memory.readinto(at, buffer[done : done + step])
            else:
                buffer[done : done + step] = page[at % PAGE : at % PAGE + step]
            done += step

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: rows that touch a page of ours are read by themselves."""
        step = np.uint64(PAGE - 1)
        last = addresses + np.uint64(max(1, out.shape[1]) - 1)
        first = np.searchsorted(self._starts, addresses & ~step)
        ours = first < np.searchsorted(self._starts, last, "right")
        if ours.all():
            return super().gather(addresses, out)
        if not ours.any():
            return self.memory.gather(addresses, out)
        found: list[tuple[int, int, int]] = []
        for mine in (True, False):
            rows = np.flatnonzero(ours == mine)
            part = np.empty((len(rows), out.shape[1]), np.uint8)
            faults = super().gather(addresses[rows], part) if mine else self.memory.gather(addresses[rows], part)
            out[rows] = part
            triples = zip(rows[faults.rows].tolist(), faults.addresses.tolist(), faults.kinds.tolist(), strict=True)
            found += triples
        return Faults.of(sorted(found))


@dataclass(slots=True)
class Repair:
    """What was written anew."""

    pages: dict[int, bytes] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    """Where the tables lie in which something was wrong."""
    lost: set[int] = field(default_factory=set)
    """Tables, or pages of them, of which nothing is believed."""
    next_free: int = 0
    """Where the next table is added."""


def repaired(memory: VirtualMemory, ram: Ram, maps: Sequence[LinearMap]) -> Repair:
    """The tables of a kernel that are damaged, written anew for what is mapped linearly; none where all are sound."""
    root = memory.roots[0]
    found = Repair(next_free=-(-memory.physical.size // _ALIGNED) * _ALIGNED)
    for one in maps:
        _Pass(memory.physical, root, ram, one, found).run()
    return found


@dataclass(slots=True)
class _Tables:
    """Tables of one level, as columns: a row for each entry."""

    matrix: Addresses
    at: Addresses
    """The first address that an entry translates."""
    bases: Addresses
    wanted: Mask
    """Which should map something: RAM within the linear map."""
    leads_on: Mask
    """Which lead to a table that is in memory."""
    broken: Mask
    """Which are to be written anew."""


class _Pass:
    """One walk down through the tables of a linear map."""

    def __init__(self, physical: Memory, root: Root, ram: Ram, linear: LinearMap, repair: Repair) -> None:
        self.physical, self.ram, self.linear, self.repair = physical, ram, linear, repair
        self.spec, self.dtb = root
        self.memory = Extent(ram.extent.start, physical.size - ram.extent.start)

    def run(self) -> None:
        """All levels, the top one first."""
        try:
            levels = rows_of(self.spec).levels
        except UnsupportedError:
            return
        top = self.spec.levels[0]
        tables = np.array([self.dtb], np.uint64)
        starts = np.array([self.linear.region.start & -(1 << top.shift + top.bits)], np.uint64)
        for level in levels:
            below: list[tuple[int, int]] = []
            for row in range(0, len(tables), _BATCH):
                below += self._level(level, tables[row : row + _BATCH], starts[row : row + _BATCH])
            if not below:
                return
            tables, starts = (np.array(column, np.uint64) for column in zip(*below, strict=True))

    def _level(self, level: LevelRows, tables: Addresses, starts: Addresses) -> Iterator[tuple[int, int]]:
        """Mend what is wrong in these tables of one level; gives (table, address) of those below."""
        read = self._read(level, tables, starts)
        sound = np.flatnonzero(read.wanted & read.leads_on)
        yield from zip(read.bases[sound].tolist(), read.at[sound].tolist(), strict=True)
        for row in np.unique(np.flatnonzero(read.broken) // level.count).tolist():
            first, table = row * level.count, int(tables[row])
            if table < self.physical.size:
                self.repair.damaged.add(table)
            new = read.matrix[row].copy()
            for index in np.flatnonzero(read.broken[first : first + level.count]).tolist():
                address = int(read.at[first + index])
                new[index], child = self._entry(level, address)
                if child is not None:
                    yield child, address
            self._put(table, new)

    def _read(self, level: LevelRows, tables: Addresses, starts: Addresses) -> _Tables:
        source = PatchedTables(self.physical, self.repair.pages) if self.repair.pages else self.physical
        matrix, bad = TableReader(source, self.spec.entry_size).rows(tables, level.width)
        if bad is not None:
            matrix[bad] = 0
        entries = np.ascontiguousarray(matrix).reshape(-1)
        region = self.linear.region
        with np.errstate(over="ignore"):
            at = (starts[:, None] + (np.arange(level.count, dtype=np.uint64) << level.shift)[None, :]).reshape(-1)
            last = at + np.uint64(level.span - 1)
            wanted = (at <= np.uint64(region.stop - 1)) & (last >= np.uint64(region.start))
            first = np.maximum(at, np.uint64(region.start)) - np.uint64(self.linear.distance)
            last = np.minimum(last, np.uint64(region.stop - 1)) - np.uint64(self.linear.distance)
        wanted &= self.ram.has(first, last)
        told = _told(level, entries, at, self.memory, self.repair.next_free)
        count = _part(level)  # a table of 16 KiB lies in four pages, each of which may be damaged by itself
        inside = np.arange(0, level.width, min(level.width, PAGE), dtype=np.uint64)
        parts = (tables[:, None] + inside[None, :]).reshape(-1)
        lost = _are_lost(told.impossible.reshape(-1, count))
        blank = ~entries.reshape(-1, count).any(axis=1) & wanted.reshape(-1, count).any(axis=1)
        for row in np.flatnonzero(blank).tolist():
            lost[row] = self._is_lost(int(at[row * count]), count * level.span)
        lost |= np.isin(parts, list(self.repair.lost)) | (parts >= np.uint64(self.physical.size))
        self.repair.lost.update(parts[lost].tolist())
        broken = wanted & (told.impossible | np.repeat(lost, count) & ~told.there)
        return _Tables(matrix, at, told.bases, wanted, told.tables & told.there, broken)

    def _is_lost(self, start: int, size: int) -> bool:
        """Whether an empty table was one in which something was mapped: certain for RAM, of an image by signs."""
        if self.linear.known is None:
            return True
        last = start + size - 1
        if any(start <= address <= last for address in self.linear.known):
            return True
        beside = [address for address in (start - 1, last + 1) if address in self.linear.region]
        return all(self._is_mapped(address) for address in beside)

    def _is_mapped(self, address: int) -> bool:
        try:
            return Walker(self.physical, self.spec, self.dtb).find(address)[0] == self.linear.place(address)
        except FaultError:
            return False

    def _entry(self, level: LevelRows, address: int) -> tuple[int, int | None]:
        """An entry for what begins at an address (0: there can be none), and the table to which it leads, if one."""
        region, place = self.linear.region, self.linear.place(address)
        rows, last = self.spec.levels[level.number], level.number == len(self.spec.levels) - 1
        fits = region.start <= address and address + level.span <= region.stop and not place % level.span
        entry = encoded(rows, place, rows.shift) if last or (fits and rows.shift <= LARGEST_PAGE) else None
        if entry is not None or last:
            return entry or 0, None
        table = self.repair.next_free
        entry = encoded(rows, table, None)
        if entry is None or len(self.repair.pages) >= ADDED_LIMIT:
            return 0, None
        width = max(PAGE, self.spec.entry_size << self.spec.levels[level.number + 1].bits)
        self.repair.pages.update((page, bytes(PAGE)) for page in range(table, table + width, PAGE))
        self.repair.next_free += width
        return entry, table

    def _put(self, table: int, entries: Addresses) -> None:
        """Replace a table, with what else lies in its pages."""
        data = entries.astype(f"<u{self.spec.entry_size}").tobytes()
        for page in range(table & -PAGE, table + len(data), PAGE):
            whole = bytearray(self.repair.pages.get(page) or self.physical.read_padded(page, PAGE))
            low, high = max(page, table), min(page + PAGE, table + len(data))
            whole[low - page : high - page] = data[low - table : high - table]
            self.repair.pages[page] = bytes(whole)


def encoded(level: Level, place: int, page_bits: int | None) -> int | None:
    """An entry of a level for a page of that size, or for a table (None); None where the mode has none for it."""
    for kind in level.kinds:
        if kind.fault is not None or kind.invert or kind.page_bits != page_bits:
            continue
        entry = kind.value
        for mask, shift in kind.address:
            entry |= (place >> shift if shift >= 0 else place << -shift) & mask
        if kind.base(entry) == place and _first_kind(level, entry) is kind:
            return entry
    return None


def _first_kind(level: Level, entry: int) -> EntryKind | None:
    return next((kind for kind in level.kinds if entry and kind.matches(entry)), None)


@dataclass(slots=True)
class _Told:
    """What entries say, as columns."""

    bases: Addresses
    tables: Mask
    there: Mask
    """Which lead to a table or a page in memory."""
    impossible: Mask
    """Which lead out of memory, or are no entries of the mode."""


def _told(
    level: LevelRows, entries: Addresses, at: Addresses, memory: Extent, added: int = 0
) -> _Told:
    """`at`: the addresses that the entries translate; behind `memory`, up to `added`, there are tables too."""
    codes = level.codes(entries)
    malformed = level.faults[codes] == FaultKind.MALFORMED
    codes[level.faults[codes] != 0] = 0
    bases, tables = level.bases(codes, entries), level.tables[codes] & (codes > 0)
    inside = (np.uint64(1) << np.where(tables, 0, level.page_bits[codes]).astype(np.uint64)) - np.uint64(1)
    lies: Addresses = (bases & ~inside).astype(np.uint64) | at & inside
    there = (lies >= np.uint64(memory.start)) & (lies < np.uint64(memory.stop))
    there |= tables & (lies >= np.uint64(memory.stop)) & (lies < np.uint64(added))
    there &= codes > 0
    return _Told(bases, tables, there, (codes > 0) & ~there | malformed)


def _part(level: LevelRows) -> int:
    """Entries of a table that lie in one page."""
    return level.count * min(level.width, PAGE) // level.width


def _are_lost(impossible: Mask) -> Mask:
    """Of which tables, one in a row, so much is impossible that nothing in them is believed."""
    counts = np.count_nonzero(impossible, axis=1)
    found: Mask = (counts > 0) & (counts * LOST_SHARE >= impossible.shape[1])
    return found


@dataclass(frozen=True, slots=True)
class LostTable:
    """A table that is damaged as a whole, or, where it has several pages, one of these."""

    span: Extent
    """What it maps."""
    empty: bool
    """Whether it holds nothing: a kernel may have emptied it."""


def lost_table(memory: VirtualMemory, address: int) -> LostTable | None:
    """The table in which the walk of an address ends, if it is damaged as a whole; None where it is not.

    The one above counts too, where it leads out of memory. Of a top table it is None.
    """
    spec = memory.roots[0][0]
    steps: list[tuple[int, int]] = []
    try:
        for number, entry_address, _, _ in memory.path(address):  # what came before a fault counts
            steps.append((number, entry_address))
    except FaultError as error:
        if error.kind is not FaultKind.TABLE:
            return None
    if not steps or not steps[-1][0]:
        return None
    number, entry_address = steps[-1]
    level = rows_of(spec).levels[number]
    count = _part(level)
    size = level.span * count
    start = address & -size
    table = entry_address - (address - start) // level.span * spec.entry_size
    width = count * spec.entry_size
    entries, bad = TableReader(memory.physical, spec.entry_size).rows(np.array([table], np.uint64), width)
    if bad is not None:
        return None
    at = np.uint64(start) + (np.arange(count, dtype=np.uint64) << level.shift)
    told = _told(level, np.ascontiguousarray(entries).reshape(-1), at, Extent(0, memory.physical.size))
    empty = not entries.any()
    if not empty and not _are_lost(told.impossible.reshape(1, -1))[0]:
        return None
    return LostTable(Extent(start, min(size, ADDRESS_SPACE - start)), empty)


__all__ = ["LostTable", "PatchedTables", "Repair", "lost_table", "repaired"]
