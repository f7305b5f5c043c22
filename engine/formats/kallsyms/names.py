"""The names of kallsyms: where each begins, and all of them written out, by columns."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError

STEP = 256
"""Symbols from one marker to the next."""
NAME_LIMIT = 1024
"""Bytes of a symbol on the average of a piece; Linux allows 512 of one."""

_PIECE = 1 << 15
"""Compressed bytes written out at once: what they need stays in a processor's cache."""
_END, _NOTHING = 256, 257
"""What stands for the first byte of a length (the end of the name before) and for its second."""

Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Starts:
    """Where in the compressed names each symbol's length stands, which lengths have two bytes, and where all end."""

    rows: npt.NDArray[np.int64]
    wide: npt.NDArray[np.bool_]
    stop: int


def symbol_starts(data: Bytes, markers: Array, count: int) -> Starts:
    """Where each of `count` symbols begins in the compressed names.

    Where one begins is known only from the one before; the markers, one for every 256 symbols, make it a walk
    on all of them at once. A length is one byte, or two where bit 7 of the first is set (since Linux 6.1).
    Raises BadDataError, with an offset in the names, where the walks do not end at the next marker.
    """
    lanes = -(-count // STEP)
    if count <= 0 or lanes > len(markers):
        raise BadDataError(0, detail=f"{count} symbols with {len(markers)} markers")
    at = markers[:lanes].astype(np.int64)
    last = count - STEP * (lanes - 1)
    limit = len(data) - 2
    rows = np.empty((STEP, lanes), np.int64)
    for row in range(STEP):
        if row == last and lanes:
            stop, at = int(at[-1]), at[:-1]
        if not len(at):
            break
        if int(at.max()) > limit:
            raise BadDataError(limit, detail="the names of kallsyms reach over their end")
        rows[row, : len(at)] = at
        first = data[at].astype(np.int64)
        wide = first >> 7
        at = at + 1 + wide + (first & 0x7F) + wide * (data[at + 1].astype(np.int64) << 7)
    if last == STEP:
        stop, at = int(at[-1]), at[:-1]
    wrong = np.flatnonzero(at != markers[1 : len(at) + 1]) if last >= STEP or len(at) else np.empty(0, np.intp)
    if len(wrong) or stop > len(data):
        bad = int(at[wrong[0]]) if len(wrong) else stop
        raise BadDataError(bad, detail="the names of kallsyms do not fit their markers")
    flat = rows.T.reshape(-1)[:count]
    return Starts(flat, data[flat] >= 0x80, stop)


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
