"""The walks of `batch` and `tree` in C, fed with the same rows: `native/accelerator.c` says what they do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine.accelerator import Library, place
from engine.errors import FaultKind
from engine.memory import Addresses, Memory, Pieces
from engine.translate.columns import UNREADABLE_MOST, Blocks, Bytes, WalkReport
from engine.translate.mmu import ALL_RIGHTS, EntryKind
from engine.translate.rows import LevelRows, SpecRows
from engine.translate.tree import remembered_tables, table_limit, top_start
from engine.types import Extent

OTHER = 254
"""Kind of an address that the mode does not translate."""
LEVELS, PARTS, RULES = 8, 6, 12
"""The most that the C has room for."""
ROW_BYTES = 28
"""Bytes of one raw row."""
_Words = npt.NDArray[np.uint64]

# Words of `struct tree`.
_DONE, _LEFT, _REMEMBERED, _SLOTS, _TABLES = 1, 4, 5, 7, 8
_REPEATED, _MALFORMED, _LIMITED, _UNREADABLES, _MET, _UNREADABLE = 9, 10, 11, 12, 14, 15


def mode_of(found: Library, rows: SpecRows) -> int | None:
    """Where the rows of a mode stand as the C reads them (`struct mode`), for as long as `rows` lives.

    None where the C has no room for them.
    """
    if rows.native is None:
        rows.native = _native(found, rows)
    return rows.native[1] or None


def _native(found: Library, rows: SpecRows) -> tuple[_Words, int]:
    kinds = [kind for level in rows.levels for kind in level.kinds]
    fits = len(rows.levels) <= LEVELS and all(
        len(kind.address) <= PARTS and max(len(kind.rights), len(kind.flags)) <= RULES for kind in kinds
    )
    if not fits:
        return np.empty(0, np.uint64), 0
    column = np.array(_mode(rows), np.uint64)
    if int(found.mode_size(len(kinds))) != column.nbytes:
        raise AssertionError("the accelerator and this module disagree about struct mode")
    return column, place(column)


def _mode(rows: SpecRows) -> list[int]:
    spec, elsewhere = rows.spec, rows.spec.elsewhere
    words = [
        rows.entry_size, len(rows.levels),
        max(0, rows.low_stop - 1), int(rows.low_stop > 0), rows.high_start or 0, int(rows.high_start is not None),
        spec.ignored_bits, rows.top,
        elsewhere.start if elsewhere else 0, elsewhere.stop - 1 if elsewhere else 0, int(elsewhere is not None),
    ]  # fmt: skip
    first = 0
    for level in rows.levels:
        words += [int(level.shift), level.count - 1, len(level.kinds), first, level.tested]
        first += len(level.kinds)
    words += [0] * 5 * (LEVELS - len(rows.levels))
    for level in rows.levels:
        for code, kind in enumerate(level.kinds, 1):
            words += _kind(level, code, kind)
    return words


def _kind(level: LevelRows, code: int, kind: EntryKind) -> list[int]:
    table = bool(level.tables[code])
    inside = (1 << kind.page_bits) - 1 if kind.page_bits is not None else 0
    plain = not kind.invert and len(kind.address) == 1 and not kind.address[0][1]
    listed = 0
    for right, _, _ in kind.rights:
        listed |= right.value
    words = [
        kind.mask, kind.value, kind.address[0][0] if plain else 0,
        inside, kind.page_bits or 0, int(table), int(kind.fault or 0), kind.invert,
        len(kind.address), len(kind.rights), len(kind.flags), ALL_RIGHTS.value & ~listed if table else 0,
    ]  # fmt: skip
    for mask, shift in kind.address:
        words += [mask, max(shift, 0), max(-shift, 0)]
    words += [0] * 3 * (PARTS - len(kind.address))
    for rules in (kind.rights, kind.flags):
        for bit, mask, value in rules:
            words += [mask, value, bit.value]
        words += [0] * 3 * (RULES - len(rules))
    return words


class Answers:
    """Columns of a batch in one piece of memory, for the C to fill."""

    __slots__ = ("at", "count", "details", "words")

    def __init__(self, count: int, *, details: bool) -> None:
        self.count = count
        self.details = details
        self.words = np.empty(8 * count + (4 if details else 2) * count, np.uint8)
        self.at = place(self.words)

    def small(self, number: int) -> Bytes:
        """Column number 0 to 3 of bytes."""
        begin = (8 + number) * self.count
        return self.words[begin : begin + self.count]

    @property
    def physical(self) -> Addresses:
        """The column of addresses."""
        return self.words[: 8 * self.count].view(np.uint64)


def walk(
    found: Library, pieces: Pieces, mode: int, dtb: int, addresses: Addresses, out: Answers, *, ask: bool
) -> npt.NDArray[np.bool_] | None:
    """Fill `out` with where `addresses` lie; gives which of them the mode does not translate, if any."""
    count = out.count
    small = out.at + 8 * count
    more = (small + 2 * count, small + 3 * count) if out.details else (None, None)
    others = found.translate(
        *pieces.where(), mode, dtb, place(addresses), count, out.at, small, small + count, *more, ask
    )
    if not others:
        return None
    kinds = out.small(1)
    other: npt.NDArray[np.bool_] = kinds == OTHER
    kinds[other] = FaultKind.ABSENT
    return other


class NativeTreeWalk:
    """`TreeWalk` in C, over mappings."""

    def __init__(
        self, found: Library, physical: Memory, pieces: Pieces, rows: SpecRows, mode: int, dtb: int,
        *, buffer: int, ask: bool, report: WalkReport,
    ) -> None:  # fmt: skip
        self.library = found
        self.pieces = pieces
        self.mode = mode
        self.rows = rows
        self.dtb = dtb
        self.ask = ask
        self.report = report
        self.begun = False
        self.capacity = max(1024, buffer // (4 * ROW_BYTES))
        remembered = remembered_tables(buffer)
        slots = 1 << (2 * remembered - 1).bit_length()
        self._met = np.zeros(3 * slots, np.uint64)
        self._tree = np.zeros(found.tree_size // 8, np.uint64)
        self._tree[_LEFT] = table_limit(physical, len(rows.levels)) - 1
        self._tree[_REMEMBERED], self._tree[_SLOTS], self._tree[_MET] = remembered, slots, place(self._met)

    def walk(self, extent: Extent, low: int, last: int) -> Iterator[Blocks]:
        """See `TreeWalk.walk`."""
        tree = self._tree
        memory = *self.pieces.where(), self.mode, place(tree)
        self.library.tree_begin(*memory, self.dtb, top_start(self.rows, extent), low, last)
        if self.begun:  # the other half of the same table
            tree[_TABLES] = 0
        self.begun = True
        while not tree[_DONE]:
            words, small = np.empty((3, self.capacity), np.uint64), np.empty((4, self.capacity), np.uint8)
            count = int(
                self.library.tree_walk(*memory, self.capacity, place(words.reshape(-1)), place(small.reshape(-1)),
                                       int(self.ask))
            )  # fmt: skip
            self._tell()
            if count:
                yield _rows(words, small, count)

    def _tell(self) -> None:
        tree, report = self._tree, self.report
        report.tables += int(tree[_TABLES])
        report.repeated += int(tree[_REPEATED])
        report.malformed += int(tree[_MALFORMED])
        report.limited |= bool(tree[_LIMITED])
        for table in tree[_UNREADABLE : _UNREADABLE + int(tree[_UNREADABLES])].tolist():
            if table not in report.unreadable and len(report.unreadable) < UNREADABLE_MOST:
                report.unreadable.append(table)
        tree[[_TABLES, _REPEATED, _MALFORMED]] = 0


def _rows(words: _Words, small: Bytes, count: int) -> Blocks:
    """The first rows of columns; a few of them are copied, so that they do not hold all."""
    whole = count * 2 > words.shape[1]
    starts, sizes, physical = words[:, :count] if whole else words[:, :count].copy()
    page_bits, rights, flags, kinds = small[:, :count] if whole else small[:, :count].copy()
    return Blocks(starts, sizes, physical, page_bits, rights, flags, kinds)
