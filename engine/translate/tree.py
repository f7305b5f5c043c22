"""The walk of a whole tree by numpy: many tables at a time, level below level, in address order.

Each level holds as many tables as its share of the buffer allows; what it leads to is walked before it goes on, so
that what is held at one time does not depend on the size of the tree.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine.errors import FaultKind
from engine.memory import Addresses, Memory
from engine.translate.batch import TableReader
from engine.translate.columns import ASK, UNREADABLE_MOST, Blocks, Bytes, WalkReport
from engine.translate.rows import LevelRows, SpecRows
from engine.types import Extent

REPEATS = 64
"""How often one table is walked at one level. Linux's KASAN leads 100,000s of times to one table of zeros."""
TABLES_MOST = 1 << 22
"""Tables that are walked at all: 8 TiB in pages of 4 KiB."""
TABLES_LEAST = 1 << 12
WORK_PER_ENTRY = 64
"""Bytes that the columns of one entry take while it is looked at (measured)."""
_Index = npt.NDArray[np.intp]


class Bounds:
    """What keeps the walk of a hostile tree short: how often each table was met, and how many there were."""

    def __init__(self, physical: Memory, levels: int, buffer: int, report: WalkReport) -> None:
        self.report = report
        self.left = table_limit(physical, levels)
        self.remembered = remembered_tables(buffer)
        self._met: dict[tuple[int, int], int] = {}

    def admitted(self, level: int, tables: Addresses) -> npt.NDArray[np.bool_]:
        """Which of these tables are to be walked, in this order."""
        good = np.ones(len(tables), bool)
        met, repeated = self._met, 0
        for row, table in enumerate(tables.tolist()):
            key = level, table
            count = met.get(key, 0)
            if count >= REPEATS:
                good[row] = False
                repeated += 1
            elif self.left <= 0:
                good[row] = False
                self.report.limited = True
            else:
                self.left -= 1
                if count or len(met) < self.remembered:
                    met[key] = count + 1
        self.report.repeated += repeated
        return good


def top_start(rows: SpecRows, extent: Extent) -> int:
    """Where the first entry of the top table would begin, so that those in `extent` begin where they do."""
    level = rows.levels[0]
    begin = extent.start >> int(level.shift)
    return (begin - (begin & level.count - 1)) << int(level.shift)


def table_limit(physical: Memory, levels: int) -> int:
    """How many tables a walk reads at the most: what memory has room for, at every level."""
    return min(TABLES_MOST, TABLES_LEAST + levels * (physical.size >> 12))


def remembered_tables(buffer: int) -> int:
    """Of how many tables it is known how often they were met."""
    return max(1024, buffer >> 9)


class TreeWalk:
    """The leaves of one tree as raw rows: neither clipped nor joined, the hook not asked."""

    def __init__(
        self, physical: Memory, rows: SpecRows, dtb: int, *, buffer: int, ask: bool, report: WalkReport
    ) -> None:
        self.physical = physical
        self.rows = rows
        self.dtb = dtb
        self.ask = ask
        self.report = report
        self.reader = TableReader(physical, rows.entry_size)
        self.begun = False
        self.bounds = Bounds(physical, len(rows.levels), buffer, report)
        share = buffer // (2 * len(rows.levels))
        self.batches = [max(1, share // (level.count * WORK_PER_ENTRY)) for level in rows.levels]

    def walk(self, extent: Extent, low: int, last: int) -> Iterator[Blocks]:
        """What lies in [`low`, `last`] of `extent`, one of the mode's, edges rounded to whole entries."""
        start = top_start(self.rows, extent)
        top = np.array([self.dtb], np.uint64)
        if self.begun:  # the other half of the same table
            self.report.tables -= 1
        self.begun = True
        yield from self._chunk(0, top, np.array([start], np.uint64), np.array([0xFF], np.uint8), low, last)

    def _chunk(
        self, number: int, tables: Addresses, starts: Addresses, rights: Bytes, low: int, last: int
    ) -> Iterator[Blocks]:
        """What these tables of level `number` map, and all below them."""
        level = self.rows.levels[number]
        entries, bad = self._entries(level, tables)
        self.report.tables += len(tables)
        where, words, places = self._present(level, entries, bad, starts, low, last)
        del entries
        if not len(where):
            return
        codes, granted, flags = level.details(words)
        granted &= rights[where // level.count]
        kinds = level.faults[codes]
        if bad is not None:
            unreadable = bad[where]
            kinds[unreadable] = FaultKind.TABLE
            words[unreadable] = 0
        below = level.tables[codes] & (kinds == 0)
        children: Addresses = level.bases(codes[below], words[below])
        go = np.flatnonzero(below)
        admitted = self.bounds.admitted(number + 1, children) if len(go) else np.empty(0, bool)
        kinds[go[~admitted]] = FaultKind.NOT_WALKED
        go, children = go[admitted], children[admitted]
        self.report.malformed += int(np.count_nonzero(kinds == FaultKind.MALFORMED))
        own = np.ones(len(where), bool)
        own[go] = False
        rows = self._rows(level, places, words, codes, granted, flags, kinds, np.flatnonzero(own))
        if not len(go):
            if len(rows):
                yield rows
            return
        yield from _merged(rows, self._below(number + 1, children, places[go], granted[go], low, last))

    def _below(
        self, number: int, tables: Addresses, starts: Addresses, rights: Bytes, low: int, last: int
    ) -> Iterator[Blocks]:
        step = self.batches[number]
        for begin in range(0, len(tables), step):
            part = slice(begin, begin + step)
            yield from self._chunk(number, tables[part], starts[part], rights[part], low, last)

    def _entries(self, level: LevelRows, tables: Addresses) -> tuple[Addresses, npt.NDArray[np.bool_] | None]:
        """All entries of these tables, one after another, and which of them cannot be read, if any."""
        matrix, bad = self.reader.rows(tables, level.width)
        if bad is None:
            return matrix.reshape(-1), None
        matrix = matrix.copy() if not matrix.flags.writeable else matrix
        unreadable = np.zeros(matrix.shape, bool)
        size, index = self.physical.size, np.arange(level.count, dtype=np.uint64) << level.entry_bits
        for row in bad.tolist():
            table = int(tables[row])
            if len(self.report.unreadable) < UNREADABLE_MOST and table not in self.report.unreadable:
                self.report.unreadable.append(table)
            if table >= size:
                unreadable[row] = True
                continue
            words, missing = self.reader.words(index + tables[row])
            matrix[row] = words
            if missing is not None:
                unreadable[row][missing] = True
        return matrix.reshape(-1), unreadable.reshape(-1)

    def _present(
        self,
        level: LevelRows,
        entries: Addresses,
        bad: npt.NDArray[np.bool_] | None,
        starts: Addresses,
        low: int,
        last: int,
    ) -> tuple[_Index, Addresses, Addresses]:
        """(places, words, addresses) of the entries that are not zero, or unreadable, and in the range."""
        where = np.flatnonzero(entries if bad is None else (entries != 0) | bad)
        words = entries[where]
        addresses = starts[where // level.count] + ((where % level.count).astype(np.uint64) << level.shift)
        begin, end = int(starts[0]), int(starts[-1]) + (level.count * level.span - 1)
        if begin < low or end > last:
            inside = addresses <= np.uint64(last)
            inside &= addresses + np.uint64(level.span - 1) >= np.uint64(low)
            where, words, addresses = where[inside], words[inside], addresses[inside]
        return where, words, addresses

    def _rows(
        self,
        level: LevelRows,
        places: Addresses,
        words: Addresses,
        codes: Bytes,
        rights: Bytes,
        flags: Bytes,
        kinds: Bytes,
        own: _Index,
    ) -> Blocks:
        """The raw rows of those entries of a level that lead to no table."""
        whole = len(own) == len(places)
        if not whole:
            places, words, codes, kinds = places[own], words[own], codes[own], kinds[own]
            rights, flags = rights[own], flags[own]
        physical, bits = level.pages(codes, words, places), level.page_bits[codes]
        if kinds.any():
            if self.ask:
                kinds[(kinds == FaultKind.ABSENT) & (words != 0)] = ASK
            absent = kinds != 0
            asked = kinds == ASK
            physical[absent], bits[absent], rights[absent], flags[absent] = 0, 0, 0, 0
            physical[asked], bits[asked] = words[asked], level.number
            keep = kinds != FaultKind.ABSENT
            rows = Blocks(places, np.full(len(places), level.span, np.uint64), physical, bits, rights, flags, kinds)
            return rows if keep.all() else rows.take(keep)
        return Blocks(places, np.full(len(places), level.span, np.uint64), physical, bits, rights, flags, kinds)


def _merged(rows: Blocks, below: Iterator[Blocks]) -> Iterator[Blocks]:
    """Rows of a level among those of the levels below it, in address order."""
    done = 0
    for chunk in below:
        upto = int(np.searchsorted(rows.starts, chunk.starts[-1], "right"))
        if upto > done:
            yield rows.take(slice(done, upto)).among(chunk)
            done = upto
        else:
            yield chunk
    if done < len(rows):
        yield rows.take(slice(done, None)) if done else rows
