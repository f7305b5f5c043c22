"""AVML images: LiME's headers of version 2, the bytes of each range packed by snappy.

    header · snappy stream: identifier, then pieces of at most 64 KiB each · its length u64

The length stands *behind* the stream, so a file is walked from its end, block by block; where that does not lead to
its beginning, also from there, piece by piece. What lies between is damaged. The pieces of a range are looked up when
something of it is first read.

Sources: AVML 0.9 src/image.rs and src/io/snappy.rs; snappy framing_format.txt (2015): a piece is a type u8, a length
u24, and, packed (0) or as it is (1), a masked CRC-32C u32 before its data; packed data begin with their unpacked
length as a varint.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from engine.block_memory import DecodedBlocks
from engine.errors import BadDataError, FaultError
from engine.formats.lime import AVML, HEADER, RECORD_LIMIT, Record, Records, disjoint, read_header
from engine.memory import Memory

PIECE_LIMIT = 64 << 10
"""Bytes of an unpacked piece, at the most."""
STREAM_IDENTIFIER = b"\xff\x06\x00\x00sNaPpY"
_PACKED, _PLAIN, _FIRST_SKIPPED = 0, 1, 0x80
_DENSEST = 24
"""Bytes that a stored byte can stand for: snappy copies 64 bytes by 3."""
_SMALLEST_PIECE = 2048
"""Bytes of a piece on the average of a range, at the least: nobody flushes more often than every page."""
_WALK_LIMIT = 1 << 22
"""Pieces that are walked when a file is opened: 256 GiB of memory."""
_BLOCK_LIMIT = 1 << 22
_INDEX_STORE = 16 << 20
_TRAILER = 8

Unpack = Callable[[bytes, bytearray], int]
"""Unpacks a snappy stream into a buffer and gives the count. Raises ValueError where it is damaged."""


def avml_records(file: Memory) -> Records:
    """The blocks of an AVML image, as far as it is sound. Raises NotRecognisedError where none of it is."""
    size = file.size
    behind, reached = _from_the_end(file, size)
    notes: list[str] = []
    before, stopped = _from_the_beginning(file, reached, notes) if reached else ([], 0)
    if stopped < reached:
        notes.append(f"bytes {stopped:#x}-{reached:#x} of the file are damaged: no block is found there")
    return disjoint([*before, *reversed(behind)], notes)


def _from_the_end(file: Memory, size: int) -> tuple[list[Record], int]:
    """Blocks from the last one back, as their lengths tell; and where the first of them begins."""
    found: list[Record] = []
    at = size
    while at >= HEADER.size + _TRAILER and len(found) < RECORD_LIMIT:
        try:
            stored = file.u64(at - _TRAILER)
        except FaultError:
            break
        offset = at - _TRAILER - stored
        extent = read_header(file, offset - HEADER.size, AVML) if offset >= HEADER.size else None
        if extent is None or not _plausible(extent.size, stored):
            break
        found.append(Record(extent.start, extent.size, offset, stored))
        at = offset - HEADER.size
    return found, at


def _from_the_beginning(file: Memory, stop: int, notes: list[str]) -> tuple[list[Record], int]:
    """Blocks from the first one on, as their pieces tell; and where the last of them stops, or is damaged."""
    found: list[Record] = []
    at, budget = 0, [_WALK_LIMIT]
    while at < stop and len(found) < RECORD_LIMIT:
        extent = read_header(file, at, AVML)
        if extent is None:
            break
        offset = at + HEADER.size
        walked = _walk(file, Record(extent.start, extent.size, offset, stop - offset), budget)
        done, at, why = walked
        if why is None:
            found.append(Record(extent.start, extent.size, offset, at - offset))
            if _length_behind(file, at) != at - offset:
                notes.append(f"the length of the block that ends at offset {at:#x} of the file is damaged")
            at = min(at + _TRAILER, stop)
            continue
        size = extent.size if _plausible(extent.size, stop - offset) else done
        if size:
            found.append(Record(extent.start, size, offset, stop - offset))
        notes.append(f"the block of {extent.start:#x}-{extent.stop:#x} is damaged at offset {at:#x} of the file: {why}")
        at = stop
    return found, at


def _walk(file: Memory, record: Record, budget: list[int]) -> tuple[int, int, str | None]:
    """(bytes of memory, where in the file they stop, why not all of the block is there)."""
    done, at = 0, record.offset
    try:
        for start, size, offset, stored in pieces(file, record, budget):
            done, at = start + size, offset + stored
    except FaultError as error:
        return done, error.address, error.detail or "the file ends there"
    return done, at, None


def _length_behind(file: Memory, at: int) -> int | None:
    try:
        return file.u64(at)
    except FaultError:
        return None


def _plausible(size: int, stored: int) -> bool:
    return 0 < size <= stored * _DENSEST


def pieces(file: Memory, record: Record, budget: list[int] | None = None) -> Iterator[tuple[int, int, int, int]]:
    """(offset in the range, bytes of it, offset in the file, bytes there) of each piece of a range.

    Raises BadDataError with the offset in the file from which on it makes no sense, or where more pieces come than
    such a range, or the `budget` for several, may have.
    """
    at, stop, done = record.offset, record.offset + record.stored, 0
    left = min(record.size // _SMALLEST_PIECE + 256, _WALK_LIMIT)
    budget = [_WALK_LIMIT] if budget is None else budget
    while done < record.size:
        try:
            head = file.read(at, min(13, stop - at)) if stop - at >= 4 else b""
        except FaultError:
            head = b""
        left, budget[0] = left - 1, budget[0] - 1
        if len(head) < 4:
            raise BadDataError(at, detail="it is cut off")
        if left < 0 or budget[0] < 0:
            raise BadDataError(at, detail="it has too many pieces to look for its end")
        stored = 4 + int.from_bytes(head[1:4], "little")
        if stored > stop - at:
            raise BadDataError(at, detail="a piece leaves it")
        size = _unpacked_size(head, stored, at)
        if size:
            if size > min(PIECE_LIMIT, record.size - done):
                raise BadDataError(at, detail=f"a piece claims {size} bytes")
            yield done, size, at, stored
        done += size
        at += stored


def _unpacked_size(head: bytes, stored: int, at: int) -> int:
    if head[0] >= _FIRST_SKIPPED:
        return 0
    if head[0] > _PLAIN:
        raise BadDataError(at, detail=f"no piece has type {head[0]}")
    if stored < 9:
        raise BadDataError(at, detail="a piece is empty")
    if head[0] == _PLAIN:
        return stored - 8
    size = 0
    for shift, byte in enumerate(head[8:13]):
        size |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return size
    raise BadDataError(at, detail="the length of a piece is damaged")


class AvmlBlocks:
    """The ranges of an AVML image in blocks of one size, for `BlockMemory`: `starts`, `lengths`, `decode`."""

    def __init__(self, file: Memory, records: tuple[Record, ...], unpack: Unpack) -> None:
        self._file = file
        self._records = records
        self._unpack = unpack
        self.step = PIECE_LIMIT
        while sum(record.size // self.step + 1 for record in records) > _BLOCK_LIMIT + len(records):
            self.step *= 2
        counts = [-(-record.size // self.step) for record in records]
        self._firsts = np.concatenate(([0], np.cumsum(counts))).tolist()
        self.starts = np.concatenate([self._starts_of(*pair) for pair in zip(records, counts, strict=True)])
        self.lengths = np.full(len(self.starts), self.step, np.uint64)
        for record, first in zip(records, self._firsts[1:], strict=True):
            self.lengths[first - 1] = (record.size - 1) % self.step + 1
        self._pieces = DecodedBlocks(self._index, _INDEX_STORE)

    def _starts_of(self, record: Record, count: int) -> npt.NDArray[np.uint64]:
        return np.uint64(record.start) + np.arange(count, dtype=np.uint64) * np.uint64(self.step)

    def _index(self, number: int) -> bytes:
        """The pieces of a range as rows of four numbers; where it is damaged the last one has no size."""
        rows: list[tuple[int, int, int, int]] = []
        try:
            rows.extend(pieces(self._file, self._records[number]))
        except FaultError as error:
            rows.append((sum(rows[-1][:2]) if rows else 0, 0, error.address, 0))
        return np.array(rows, np.int64).tobytes()

    def decode(self, index: int) -> bytes:
        """Block `index`. Raises BadDataError with the offset in the file where nothing of it can be had."""
        number = bisect.bisect_right(self._firsts, index) - 1
        low = (index - self._firsts[number]) * self.step
        high = low + int(self.lengths[index])
        rows = np.frombuffer(self._pieces.block(number, 0), np.int64).reshape(-1, 4)
        parts: list[bytes] = []
        at = low
        first = max(0, int(np.searchsorted(rows[:, 0], low, "right")) - 1)
        for start, size, offset, stored in rows[first:].tolist():
            if start >= high:
                break
            piece = self._piece(offset, size, stored)
            if piece is None:
                if at == low:
                    raise BadDataError(offset, detail="its packed data make no sense")
                break
            parts.append(piece[max(0, low - start) : high - start])
            at += len(parts[-1])
        return b"".join(parts)

    def _piece(self, offset: int, size: int, stored: int) -> bytes | None:
        if not size:
            return None
        out = bytearray(size)
        try:
            count = self._unpack(STREAM_IDENTIFIER + self._file.read(offset, stored), out)
        except ValueError:
            return None
        return bytes(out) if count == size else None
