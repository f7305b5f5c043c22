"""The names of kallsyms: where each begins, and all of them written out, by columns."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError
from engine.records import dataclass

STEP = 256
"""Symbols from one marker to the next."""
NAME_LIMIT = 1024
"""Bytes of a symbol on the average of a piece; Linux allows 512 of one."""

_PADDING = 16
"""Bytes that may follow the last name, up to the alignment of what comes behind."""
_PIECE = 1 << 15
"""Compressed bytes written out at once: what they need stays in a processor's cache."""
_END, _NOTHING = 256, 257
"""What stands for the first byte of a length (the end of the name before) and for its second."""

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Starts:
    """Where the symbols begin in the compressed names, but for those that damage hides."""

    rows: npt.NDArray[np.int64]
    """Where each symbol's length stands."""
    numbers: npt.NDArray[np.int64]
    """Which symbol of the table each row is."""
    wide: npt.NDArray[np.bool_]
    """Which lengths have two bytes."""
    damaged: tuple[tuple[int, int], ...]
    """(start, stop) of what belongs to no row."""
    stop: int
    count: int
    """Symbols of the table, those that are hidden among them."""

    @staticmethod
    def forgotten(count: int) -> Starts:
        """Of a sound table whose names are written out already: nobody looks at its rows again."""
        nothing = np.empty(0, np.int64)
        return Starts(nothing, np.arange(count), nothing.astype(np.bool_), (), 0, count)


def symbol_starts(data: Bytes, markers: Array, count: int) -> Starts:
    """Where each of `count` symbols begins in the compressed names.

    Where one begins is known only from the one before; the markers, one for every 256 symbols, make it a walk
    on all of them at once. A length is one byte, or two where bit 7 of the first is set (since Linux 6.1).
    A walk that does not end at the next marker went through damage: its 256 symbols are left out.
    Raises BadDataError where that is more than half of them.
    """
    lanes = -(-count // STEP)
    if count <= 0 or lanes > len(markers) or len(data) < 2:
        raise BadDataError(0, detail=f"{count} symbols with {len(markers)} markers")
    heads = markers[:lanes].astype(np.int64)
    rows, stops = walk(data, heads, count - STEP * (lanes - 1))
    wanted = np.append(heads[1:], len(data))
    good = stops == wanted
    good[-1] = wanted[-1] - _PADDING < stops[-1] <= wanted[-1]
    if 2 * np.count_nonzero(good) < lanes:
        raise BadDataError(0, detail="the names of kallsyms do not fit their markers")
    numbers = np.flatnonzero(np.repeat(good, STEP)[:count])
    flat = rows.T.reshape(-1)[numbers]
    damaged = tuple((int(heads[lane]), int(wanted[lane])) for lane in np.flatnonzero(~good).tolist())
    return Starts(flat, numbers, data[flat] >= 0x80, damaged, int(max(stops[-1], 0)) if good[-1] else len(data), count)


def walk(data: Bytes, heads: npt.NDArray[np.int64], last: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """256 symbols from each of `heads` on, of the last one only `last`: where they begin [256, lanes], where they end.

    A walk that leaves the data ends at -1.
    """
    limit = len(data) - 2
    at = heads.copy()
    lost = np.zeros(len(heads), np.bool_)
    rows = np.empty((STEP, len(heads)), np.int64)
    end_of_last = -1
    for row in range(STEP):
        if row == last:
            end_of_last = int(at[-1])
        outside = at > limit
        if outside.any():
            outside[-1] &= row < last
            lost |= outside
            at = np.minimum(at, limit)
        rows[row] = at
        first = data[at].astype(np.int64)
        wide = first >> 7
        at = at + 1 + wide + (first & 0x7F) + wide * (data[at + 1].astype(np.int64) << 7)
    if last < STEP:
        at[-1] = end_of_last
    at[lost] = -1
    return rows, at


def expand(data: Bytes, starts: Starts, tokens: list[bytes]) -> tuple[bytes, npt.NDArray[np.int32]]:
    """All names written out, a NUL before each and at the end, and where each begins (at its type letter).

    Raises BadDataError where they would be longer than names can be.
    """
    texts = [*tokens, b"\0", b""]
    table = np.frombuffer(b"".join(texts), np.uint8)
    lengths = np.array([len(text) for text in texts], np.int32)
    places = np.cumsum(lengths, dtype=np.int32) - lengths
    pieces: list[bytes] = []
    begins = np.empty(len(starts.rows), np.int32)
    total, limit = 0, NAME_LIMIT * len(starts.rows)
    bounds = np.searchsorted(starts.rows, np.arange(0, starts.stop + _PIECE, _PIECE)).tolist()
    for low, high in pairwise(bounds):
        if low == high:
            continue
        first = int(starts.rows[low])
        stop = int(starts.rows[high]) if high < len(starts.rows) else starts.stop
        tokens_here = data[first:stop].astype(np.intp)
        rows = starts.rows[low:high] - first
        tokens_here[rows] = _END
        tokens_here[rows[starts.wide[low:high]] + 1] = _NOTHING
        for begin, end in starts.damaged:
            if begin < stop and end > first:
                tokens_here[max(begin - first, 0) : end - first] = _NOTHING
                if begin >= first:
                    tokens_here[begin - first] = _END
        sizes = lengths[tokens_here]
        ends = np.cumsum(sizes, dtype=np.int32)
        size = int(ends[-1])
        if total + size > limit:
            raise BadDataError(first, detail="the names of kallsyms are longer than names can be")
        begins[low:high] = ends[rows] + total
        source = np.repeat(places[tokens_here] - ends + sizes, sizes)
        source += np.arange(size, dtype=np.int32)
        pieces.append(table[source].tobytes())
        total += size
    pieces.append(b"\0")
    return b"".join(pieces), begins
