"""makedumpfile's flattened form: a dump as it was written into a pipe, put in order again without a copy.

A block of 4096 bytes (`makedumpfile`, type and version 1), then records: where in the dump, how many bytes, the bytes.
All numbers are 64-bit and big-endian; a record of -1 and -1 ends it. Later records win over earlier ones: headers are
written anew when all is known.

Source: makedumpfile.h of release 1.7; QEMU dump/dump.c (release 7.2) writes the same.
"""

from __future__ import annotations

import heapq
import itertools
import struct
from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError
from engine.memory import Memory
from engine.memory_map import MapRange

MAGIC = b"makedumpfile\0\0\0\0"
HEADER_SIZE = 4096
RECORD_LIMIT = 1 << 21
"""Records that are kept in memory, some 250 bytes each; makedumpfile writes up to 64 KiB into one, QEMU 16 KiB."""
_RECORD = struct.Struct(">qq")

_Column = npt.NDArray[np.int64]


def is_flattened(file: Memory) -> bool:
    """Whether the file is in this form."""
    return file.read_padded(0, len(MAGIC)) == MAGIC


def pieces_of(file: Memory) -> tuple[list[MapRange], str | None]:
    """Where the dump's bytes lie in the file, ascending and disjoint; and a warning where the file is cut.

    Raises BadDataError where its header cannot be, or it has too many records.
    """
    kind, version = _RECORD.unpack(file.read_padded(len(MAGIC), _RECORD.size))
    if (kind, version) != (1, 1):
        raise BadDataError(16, detail=f"a flattened dump of type {kind} and version {version}; known are 1 and 1")
    rows, warning = _records(file)
    places, sizes, sources = np.frombuffer(rows, np.int64).reshape(-1, 3).T
    return list(_in_order(places, sizes, sources)), warning


def _records(file: Memory) -> tuple[array[int], str | None]:
    """(place in the dump, size, place in the file) of each record, one after the other."""
    rows: array[int] = array("q")
    at, end = HEADER_SIZE, file.size
    while True:
        try:
            place, size = _RECORD.unpack(file.read(at, _RECORD.size))
        except FaultError:
            return rows, f"the file is cut at offset {at:#x}: what was written behind it is missing"
        if place == -1 and size == -1:
            return rows, None
        at += _RECORD.size
        if place < 0 or size <= 0 or place + size >= 1 << 62:
            return rows, f"the record at offset {at - _RECORD.size:#x} of the file is damaged: what follows is not read"
        have = min(size, end - at)
        if have > 0:
            rows.extend((place, have, at))
        at += size
        if len(rows) > 3 * RECORD_LIMIT:
            advice = "`makedumpfile -R` puts such a file in order"
            raise BadDataError(at, detail=f"more than {RECORD_LIMIT} records: {advice}")


def _in_order(places: _Column, sizes: _Column, sources: _Column) -> Iterator[MapRange]:
    """The records by place; where some overlap, the last of them counts."""
    order = np.argsort(places, kind="stable")
    starts, stops = places[order], (places + sizes)[order]
    reach = np.maximum.accumulate(stops) if len(stops) else stops
    cuts = [0, *(np.flatnonzero(starts[1:] >= reach[:-1]) + 1).tolist(), len(order)]
    for first, behind in itertools.pairwise(cuts):
        rows = order[first:behind].tolist()
        parts = [(int(row), int(places[row]), int(sizes[row]), int(sources[row])) for row in rows]
        if len(parts) == 1:
            _, place, size, source = parts[0]
            yield MapRange(place, size, source)
        elif parts:
            yield from _overlaid(parts)


def _overlaid(parts: list[tuple[int, int, int, int]]) -> Iterator[MapRange]:
    """Disjoint ranges of records (number, place, size, source) sorted by place; the highest number counts."""
    edges = sorted({edge for _, place, size, _ in parts for edge in (place, place + size)})
    waiting: list[tuple[int, int, int, int]] = []
    following = iter([*parts, (0, 1 << 62, 0, 0)])
    coming = next(following)
    for low, high in itertools.pairwise(edges):
        while coming[1] <= low:
            number, place, size, source = coming
            heapq.heappush(waiting, (-number, place, place + size, source))
            coming = next(following)
        while waiting and waiting[0][2] <= low:
            heapq.heappop(waiting)
        if waiting:
            _, place, _, source = waiting[0]
            yield MapRange(low, high - low, source + low - place)
