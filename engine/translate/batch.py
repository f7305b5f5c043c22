"""The walk of many addresses by numpy: all of them one level down at a time.

Where the addresses lie close together the levels above the last one are walked once for each last table, not for
each address. Entries are gathered where words are cheap; of other sources whole tables are read, each once a batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import FaultKind
from engine.memory import Addresses, Memory
from engine.translate.columns import ASK, Bytes, Translated
from engine.translate.rows import LevelRows, SpecRows

CHUNK = 8192
"""Addresses that are walked together: their columns stay in the nearest cache but one."""
KEPT_BYTES = 16 << 20
"""Bytes of whole tables that a batch keeps."""
SHARED_LEAST = 64
"""Addresses from which on it pays to look for last tables that they share."""
_Index = npt.NDArray[np.intp]
_Entries = tuple[Addresses, _Index | None]
"""Entries, and the rows of them that cannot be read, if any."""


class Columns:
    """The answers of a batch while they come in: where nothing came, an address is absent."""

    def __init__(self, count: int, *, details: bool) -> None:
        self.physical = np.zeros(count, np.uint64)
        self.page_bits = np.zeros(count, np.uint8)
        self.kinds = np.full(count, FaultKind.ABSENT, np.uint8)
        self.rights = np.zeros(count, np.uint8) if details else None
        self.flags = np.zeros(count, np.uint8) if details else None

    def translated(self) -> Translated:
        """The answers."""
        return Translated(self.physical, self.page_bits, self.kinds, self.rights, self.flags)


class TableReader:
    """Entries of tables, for one batch."""

    def __init__(self, physical: Memory, entry_size: int) -> None:
        self.physical = physical
        self.cheap = physical.words_are_cheap
        self.entry_size = entry_size
        self._kind = np.dtype(f"<u{entry_size}")
        self._kept: dict[tuple[int, int], Addresses | None] = {}
        self._kept_bytes = 0

    def words(self, addresses: Addresses) -> _Entries:
        """The entries at these addresses, and the rows that cannot be read, if any."""
        out = np.empty((len(addresses), self.entry_size), np.uint8)
        faults = self.physical.gather(addresses, out)
        entries = out.view(self._kind).reshape(len(addresses))
        if self.entry_size != 8:
            entries = entries.astype(np.uint64)
        return entries, faults.rows if faults else None

    def rows(self, tables: Addresses, width: int) -> _Entries:
        """Whole tables as a matrix, and the rows that cannot be read as a whole, if any."""
        out = np.empty((len(tables), width), np.uint8)
        faults = self.physical.gather(tables, out)
        entries = out.view(self._kind)
        return entries if self.entry_size == 8 else entries.astype(np.uint64), faults.rows if faults else None

    def entries(self, level: LevelRows, table: Addresses | np.uint64, index: Addresses) -> _Entries:
        """The entry `index[i]` of `table[i]`, or of the one `table`; and the rows that cannot be read."""
        if not self.cheap:
            found = self._from_whole(level, table, index)
            if found is not None:
                return found
        at = index << level.entry_bits
        at += table
        return self.words(at)

    def _from_whole(
        self, level: LevelRows, table: Addresses | np.uint64, index: Addresses
    ) -> _Entries | None:
        """`entries` by whole tables; None where more of them were read than is of use, or one cannot be."""
        column = np.broadcast_to(np.asarray(table, np.uint64), index.shape)
        unique, inverse = np.unique(column, return_inverse=True)
        if len(unique) * 4 > len(index) or len(unique) * level.width > KEPT_BYTES:
            return None
        keys = [(address, level.width) for address in unique.tolist()]
        missing = [row for row, key in enumerate(keys) if key not in self._kept]
        if missing:
            self._read(unique[missing], [keys[row] for row in missing], level.width)
        tables = [self._kept[key] for key in keys]
        if any(one is None for one in tables):
            return None
        return np.stack([one for one in tables if one is not None])[inverse, index.view(np.int64)], None

    def _read(self, tables: Addresses, keys: list[tuple[int, int]], width: int) -> None:
        if self._kept_bytes > KEPT_BYTES:
            self._kept.clear()
            self._kept_bytes = 0
        self._kept_bytes += len(keys) * width
        matrix, bad = self.rows(tables, width)
        self._kept.update(zip(keys, matrix, strict=True))
        for row in () if bad is None else bad.tolist():
            self._kept[keys[row]] = None


class BatchWalk:
    """One tree, for one batch."""

    def __init__(self, physical: Memory, rows: SpecRows, dtb: int, *, details: bool, ask: bool) -> None:
        self.levels = rows.levels
        self.dtb = np.uint64(dtb)
        self.details = details
        self.ask = ask
        self.reader = TableReader(physical, rows.entry_size)

    def walk(self, addresses: Addresses, out: Columns, rows: _Index | None = None) -> None:
        """Fill `rows` of `out` (None: all) with where `addresses`, which are canonical, lie."""
        count = len(addresses)
        low, tables = self._shared(addresses) if count >= SHARED_LEAST and len(self.levels) > 1 else (0, None)
        for begin in range(0, count, CHUNK):
            part = addresses[begin : begin + CHUNK]
            places = np.arange(begin, begin + len(part)) if rows is None else rows[begin : begin + CHUNK]
            if tables is None:
                self._descend(part, out, places, 0, self.dtb, None)
            else:
                self._last_step(part, out, places, low, tables)

    def _shared(self, addresses: Addresses) -> tuple[int, tuple[Addresses, Bytes, npt.NDArray[np.bool_]] | None]:
        """(first prefix, (last table, rights, there is one) for each prefix) where the prefixes are few."""
        shift = self.levels[-2].shift
        low, high = int(addresses.min() >> shift), int(addresses.max() >> shift)
        if (high - low + 1) * 2 > len(addresses):
            return 0, None
        prefixes = (np.arange(high - low + 1, dtype=np.uint64) + np.uint64(low)) << shift
        found = np.zeros(len(prefixes), np.uint64)
        rights, there = np.full(len(prefixes), 0xFF, np.uint8), np.zeros(len(prefixes), bool)
        for begin in range(0, len(prefixes), CHUNK):
            part = slice(begin, begin + CHUNK)
            self._tables(prefixes[part], found[part], rights[part], there[part])
        return low, (found, rights, there)

    def _tables(self, addresses: Addresses, found: Addresses, rights: Bytes, there: npt.NDArray[np.bool_]) -> None:
        """The last tables of these addresses, where there are any."""
        rows = np.arange(len(addresses))
        table: Addresses | np.uint64 = self.dtb
        for level in self.levels[:-1]:
            index = addresses[rows] >> level.shift & level.index_mask
            entries, bad = self.reader.entries(level, table, index)
            codes, granted, _ = level.details(entries)
            go = level.tables[codes]
            if bad is not None:
                go[bad] = False
            rows, codes, entries = rows[go], codes[go], entries[go]
            if not len(rows):
                return
            rights[rows] &= granted[go]
            table = level.bases(codes, entries)
        found[rows] = table
        there[rows] = True

    def _last_step(
        self,
        addresses: Addresses,
        out: Columns,
        places: _Index,
        low: int,
        tables: tuple[Addresses, Bytes, npt.NDArray[np.bool_]],
    ) -> None:
        """One level where the last table is known, all of them where there is none."""
        found, rights, there = tables
        prefix = ((addresses >> self.levels[-2].shift) - np.uint64(low)).view(np.int64)
        last = len(self.levels) - 1
        if there.all():
            self._descend(addresses, out, places, last, found[prefix], rights[prefix] if self.details else None)
            return
        good = there[prefix]
        for rows, first in ((np.flatnonzero(good), last), (np.flatnonzero(~good), 0)):
            if len(rows):
                table = found[prefix[rows]] if first else self.dtb
                granted = rights[prefix[rows]] if first and self.details else None
                self._descend(addresses[rows], out, places[rows], first, table, granted)

    def _descend(
        self,
        addresses: Addresses,
        out: Columns,
        places: _Index,
        first: int,
        table: Addresses | np.uint64,
        rights: Bytes | None,
    ) -> None:
        """Walk from level `first` down, where `table` is, until every address has found its end."""
        for level in self.levels[first:]:
            entries, bad = self.reader.entries(level, table, addresses >> level.shift & level.index_mask)
            if bad is not None:
                out.kinds[places[bad]] = FaultKind.TABLE
                good = np.ones(len(places), bool)
                good[bad] = False
                addresses, places, entries = addresses[good], places[good], entries[good]
                rights = rights[good] if rights is not None else None
            if not len(places):
                return
            code = None if self.details else level.same(entries)
            if code is not None and level.tables[code]:
                table = level.base(code, entries)
                continue
            granted = flags = None
            if code is not None:
                codes = np.full(len(entries), code, np.uint8)
            elif self.details:
                codes, granted, flags = level.details(entries)
                rights = granted if rights is None else granted & rights
            else:
                codes = level.codes(entries)
            go = level.tables[codes]
            if not go.all():
                self._finish(level, out, places, addresses, entries, codes, ~go, rights, flags)
            addresses, places = addresses[go], places[go]
            rights = rights[go] if rights is not None else None
            if not len(places):
                return
            table = level.bases(codes[go], entries[go])

    def _finish(
        self,
        level: LevelRows,
        out: Columns,
        places: _Index,
        addresses: Addresses,
        entries: Addresses,
        codes: Bytes,
        done: npt.NDArray[np.bool_],
        rights: Bytes | None,
        flags: Bytes | None,
    ) -> None:
        """Write the answers of the addresses whose walk ends at this level."""
        ended = np.flatnonzero(done)
        faults = level.faults[codes[ended]]
        if faults.any():
            absent = np.flatnonzero(faults)
            kinds, words = faults[absent], entries[ended[absent]]
            rows = places[ended[absent]]
            if self.ask:
                asked = (kinds == FaultKind.ABSENT) & (words != 0)
                kinds[asked] = ASK
                out.physical[rows[asked]] = words[asked]
                out.page_bits[rows[asked]] = level.number
            out.kinds[rows] = kinds
            ended = ended[faults == 0]
        rows, codes, entries = places[ended], codes[ended], entries[ended]
        out.physical[rows] = level.pages(codes, entries, addresses[ended])
        out.page_bits[rows] = level.page_bits[codes]
        out.kinds[rows] = 0
        if out.rights is not None and out.flags is not None and rights is not None and flags is not None:
            out.rights[rows] = rights[ended]
            out.flags[rows] = flags[ended]
