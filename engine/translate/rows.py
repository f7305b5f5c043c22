"""The rows of a paging mode as columns: what many entries of one level are, all at once.

A mode's numbers are code: where few bits of an entry tell its kind, rights and flags, they index a table that holds
the answers; where there are too many of them, the rows are compared one after another, which fills that table too.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import FaultKind, UnsupportedError
from engine.memory import Addresses
from engine.translate.columns import Bytes
from engine.translate.mmu import ALL_RIGHTS, EntryKind, Level, MmuSpec

INDEX_BITS = 13
"""Bits of an entry that index a table of answers: with more the table leaves the nearest caches."""
KEPT = 64
"""Modes whose rows are kept compiled."""
TABLE_BITS = 255
"""Where there are log2 of a page's size: an entry that leads to a table."""
_LAST = (1 << 64) - 1


class LevelRows:
    """One level. Codes number its rows from 1 on; 0: none of them matches."""

    def __init__(self, level: Level, number: int, entry_size: int) -> None:
        self.number = number
        self.kinds = level.kinds
        self.shift = np.uint64(level.shift)
        self.span = 1 << level.shift
        self.count = 1 << level.bits
        self.index_mask = np.uint64(self.count - 1)
        self.entry_bits = np.uint64(entry_size.bit_length() - 1)
        self.width = self.count * entry_size
        self.page_bits = np.array([0, *(_bits(kind) for kind in level.kinds)], np.uint8)
        faults = (0 if kind.fault is None else kind.fault for kind in level.kinds)
        self.faults = np.array([FaultKind.ABSENT, *faults], np.uint8)
        self.tables = (self.faults == 0) & (self.page_bits == TABLE_BITS)
        self._masks = [(np.uint64(kind.mask), np.uint64(kind.value)) for kind in level.kinds]
        self._parts = [_parts(kind) for kind in level.kinds]
        self.tested = _tested(level)
        self._index = _runs(self.tested) if self.tested.bit_count() <= INDEX_BITS else None
        self._answers: tuple[Bytes, Bytes, Bytes] | None = None
        if self._index is not None:
            every = _every(self._index)
            self._answers = self._compared(every)
        self._zero = any(not kind.value for kind in level.kinds)

    def same(self, entries: Addresses) -> int | None:
        """The code that all of these entries have (there is one at least); None where they differ, or all are 0."""
        first = int(entries[0])
        for code, kind in enumerate(self.kinds, 1):
            if kind.matches(first):
                mask, value = self._masks[code - 1]
                if ((entries & mask) == value).all() and (value or entries.all()):
                    return code
        return None

    def codes(self, entries: Addresses) -> Bytes:
        """The code of each entry."""
        codes = np.zeros(len(entries), np.uint8)
        for code, (mask, value) in enumerate(self._masks, 1):
            codes[(entries & mask) == value] = code
        if self._zero:
            codes[entries == 0] = 0
        return codes

    def details(self, entries: Addresses) -> tuple[Bytes, Bytes, Bytes]:
        """Codes, rights and flags of each entry."""
        if self._index is None or self._answers is None:
            codes, rights, flags = self._compared(entries)
        else:
            index = np.zeros(len(entries), np.uint64)
            for mask, shift in self._index:
                index |= (entries & mask) >> shift
            rows = index.view(np.int64)
            codes, rights, flags = (answers.take(rows) for answers in self._answers)
        if self._zero:
            codes[entries == 0] = 0
        return codes, rights, flags

    def _compared(self, entries: Addresses) -> tuple[Bytes, Bytes, Bytes]:
        """`details`, row after row."""
        codes = np.zeros(len(entries), np.uint8)
        rights, flags = np.zeros(len(entries), np.uint8), np.zeros(len(entries), np.uint8)
        for code, (kind, (mask, value)) in enumerate(zip(self.kinds, self._masks, strict=True), 1):
            found = np.flatnonzero((entries & mask) == value)
            codes[found] = code
            part, listed = entries[found], 0
            granted, set_flags = np.zeros(len(part), np.uint8), np.zeros(len(part), np.uint8)
            for right, wanted, equal in kind.rights:
                listed |= right.value
                granted[(part & np.uint64(wanted)) == np.uint64(equal)] |= np.uint8(right.value)
            if kind.page_bits is None:
                granted |= np.uint8(ALL_RIGHTS.value & ~listed)
            for flag, wanted, equal in kind.flags:
                set_flags[(part & np.uint64(wanted)) == np.uint64(equal)] |= np.uint8(flag.value)
            rights[found], flags[found] = granted, set_flags
        return codes, rights, flags

    def base(self, code: int, entries: Addresses) -> Addresses:
        """Where the pages or tables of entries of one code begin."""
        invert, parts = self._parts[code - 1]
        if invert:
            entries = entries ^ invert
        found: Addresses | None = None
        for mask, left, right in parts:
            part = entries & mask
            if left:
                part <<= left
            if right:
                part >>= right
            found = part if found is None else found | part
        return np.zeros(len(entries), np.uint64) if found is None else found

    def bases(self, codes: Bytes, entries: Addresses) -> Addresses:
        """`base` of entries of several codes; 0 where there is none."""
        found = np.zeros(len(entries), np.uint64)
        for code in np.flatnonzero(np.bincount(codes, minlength=1)).tolist():
            if code and not self.faults[code]:
                rows = np.flatnonzero(codes == code)
                found[rows] = self.base(code, entries[rows])
        return found

    def pages(self, codes: Bytes, entries: Addresses, addresses: Addresses) -> Addresses:
        """Where `addresses` lie, which entries of several codes map; nothing of use where one is no leaf."""
        inside: Addresses = (np.uint64(1) << self.page_bits[codes].astype(np.uint64)) - np.uint64(1)
        return self.bases(codes, entries) & ~inside | addresses & inside


def _bits(kind: EntryKind) -> int:
    if kind.fault is not None:
        return 0
    return TABLE_BITS if kind.page_bits is None else kind.page_bits


def _parts(kind: EntryKind) -> tuple[np.uint64 | None, list[tuple[np.uint64, np.uint64 | None, np.uint64 | None]]]:
    parts = [
        (np.uint64(mask), np.uint64(shift) if shift > 0 else None, np.uint64(-shift) if shift < 0 else None)
        for mask, shift in kind.address
    ]
    return np.uint64(kind.invert) if kind.invert else None, parts


def _tested(level: Level) -> int:
    """The bits of an entry that rows of this level look at, but for addresses."""
    tested = 0
    for kind in level.kinds:
        tested |= kind.mask
        for _, mask, _ in (*kind.rights, *kind.flags):
            tested |= mask
    return tested


def _runs(bits: int) -> list[tuple[np.uint64, np.uint64]]:
    """(mask, shift to the right) of each run of `bits` that gathers them all at the bottom."""
    runs, used, position = [], 0, 0
    while bits:
        low = (bits & -bits).bit_length() - 1
        length = ((bits >> low) + 1 & ~(bits >> low)).bit_length() - 1
        runs.append((np.uint64((1 << length) - 1 << low), np.uint64(low - used)))
        used, position = used + length, low + length
        bits = bits >> position << position
    return runs


def _every(runs: list[tuple[np.uint64, np.uint64]]) -> Addresses:
    """An entry for each index that `runs` can give."""
    size = sum(int(mask).bit_count() for mask, _ in runs)
    index = np.arange(1 << size, dtype=np.uint64)
    entries = np.zeros(1 << size, np.uint64)
    for mask, shift in runs:
        entries |= (index << shift) & mask
    return entries


class SpecRows:
    """A mode whose addresses and entries fit columns of 64 bits."""

    def __init__(self, spec: MmuSpec) -> None:
        """Raises UnsupportedError for a mode that needs more than 64 bits."""
        _check(spec)
        self.spec = spec
        self.entry_size = spec.entry_size
        self.levels = tuple(LevelRows(level, number, spec.entry_size) for number, level in enumerate(spec.levels))
        self.low_stop = 1 << spec.low_bits if spec.low_bits else 0
        self.high_start = (1 << spec.address_bits) - (1 << spec.high_bits) if spec.high_bits else None
        self.top = (1 << spec.address_bits) - 1
        self.native: tuple[npt.NDArray[np.uint64], int] | None = None
        """The same for the accelerator, which sets it, and where that is."""

    def canonical(self, addresses: Addresses) -> tuple[Addresses, npt.NDArray[np.bool_] | None]:
        """The addresses without their tags, and which this mode translates; None: all of them."""
        ignored, elsewhere = self.spec.ignored_bits, self.spec.elsewhere
        if not ignored and elsewhere is None and self.low_stop and int(addresses.max()) < self.low_stop:
            return addresses, None
        found = addresses & np.uint64(~ignored & _LAST) if ignored else addresses
        good = found <= np.uint64(self.low_stop - 1) if self.low_stop else np.zeros(len(addresses), bool)
        if self.high_start is not None:
            high = addresses | np.uint64(ignored) if ignored else addresses
            upper = high >= np.uint64(self.high_start)
            if ignored:
                found = np.where(good, found, high)
            good |= upper
        if self.top < _LAST:
            good &= addresses <= np.uint64(self.top)
        if elsewhere is not None:
            good &= (addresses < np.uint64(elsewhere.start)) | (addresses > np.uint64(elsewhere.stop - 1))
        return found, None if good.all() else good


def _check(spec: MmuSpec) -> None:
    """Raise UnsupportedError where columns of 64 bits do not hold what `spec` says."""
    bases = (
        sum(mask << shift if shift >= 0 else mask >> -shift for mask, shift in kind.address)
        for level in spec.levels
        for kind in level.kinds
    )
    wide = spec.entry_size > 8 or spec.address_bits > 64 or spec.levels[0].shift > 63
    if wide or any(base > _LAST - (1 << 32) for base in bases):
        raise UnsupportedError(f"paging mode {spec.name} needs more than 64 bits: it walks one address at a time")


_compiled: dict[int, tuple[MmuSpec, SpecRows]] = {}


def rows_of(spec: MmuSpec) -> SpecRows:
    """The compiled rows of a mode, kept. Raises UnsupportedError for a mode that needs more than 64 bits."""
    found = _compiled.get(id(spec))  # its hash would cost more than all else; the entry keeps the mode alive
    if found is not None:
        return found[1]
    if len(_compiled) >= KEPT:
        _compiled.clear()
    rows = SpecRows(spec)
    _compiled[id(spec)] = spec, rows
    return rows
