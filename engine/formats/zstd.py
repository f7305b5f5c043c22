"""Zstandard files: their frames, each of which can be unpacked by itself.

The frames are listed by a seek table at the end (the seekable format), or found by walking from block to block where
each says how large it is. `zstd` itself makes one frame of what it packs; pzstd, t2sz and others make many.

Sources: RFC 8878, sections 3.1.1 (frames and blocks) and 3.1.2 (skippable frames); facebook/zstd
contrib/seekable_format/zstd_seekable_compression_format.md 0.1.0.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError, NotRecognisedError
from engine.memory import Memory
from engine.records import dataclass

_MAGIC = 0xFD2FB528
_SKIPPABLE = 0x184D2A50
_SEEK_TABLE = 0x184D2A5E
_SEEK_MAGIC = 0x8F92EAB1
_SEEK_FOOTER = struct.Struct("<IBI")
FRAME_LIMIT = 1 << 20
"""Frames of a file, at the most."""
_BLOCK_LIMIT = 1 << 22
"""Blocks that are walked: 512 GiB of memory."""
_DICTIONARY_BYTES = (0, 1, 2, 4)
_CHECKSUM = 4
_RLE, _RESERVED = 1, 3

Unpack = Callable[[bytes, bytearray], int]


@dataclass(frozen=True, slots=True)
class ZstdFrames:
    """The frames of a file: `starts` and `lengths` of what they hold, `offsets` and `stored` of where that lies."""

    file: Memory
    starts: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    stored: npt.NDArray[np.uint64]
    unpack: Unpack

    def decode(self, index: int) -> bytes:
        """Frame `index`. Raises BadDataError with its offset."""
        offset, size = int(self.offsets[index]), int(self.lengths[index])
        out = bytearray(size)
        try:
            count = self.unpack(self.file.read(offset, int(self.stored[index])), out)
        except ValueError as error:
            raise BadDataError(offset, detail=str(error)) from None
        if count != size:
            raise BadDataError(offset, detail=f"it holds {count} bytes, and {size} were announced")
        return bytes(out)


def zstd_frames(file: Memory, unpack: Unpack, largest: int) -> ZstdFrames:
    """The frames of a file. Raises NotRecognisedError where one holds more than `largest` bytes, or does not say."""
    try:
        rows = _by_table(file)
        if rows is None:
            rows = np.array(_by_walking(file, largest), np.uint64).reshape(-1, 3)
    except FaultError:
        raise NotRecognisedError("it is cut off or damaged") from None
    rows = rows[rows[:, 1] > 0]
    if len(rows) and int(rows[:, 1].max()) > largest:
        raise NotRecognisedError(_too_large(int(rows[:, 1].max())))
    lengths = np.ascontiguousarray(rows[:, 1])
    starts = np.cumsum(lengths, dtype=np.uint64) - lengths
    return ZstdFrames(file, starts, lengths, rows[:, 0], rows[:, 2], unpack)


def _too_large(size: int) -> str:
    return f"it holds {size >> 20} MiB in one frame, which can be unpacked as a whole only"


def _by_table(file: Memory) -> npt.NDArray[np.uint64] | None:
    """(offset, bytes unpacked, bytes packed) of each frame, as the table at the end says; None where there is none."""
    size = file.size
    if size < 8 + _SEEK_FOOTER.size:
        return None
    count, flags, magic = _SEEK_FOOTER.unpack(file.read(size - _SEEK_FOOTER.size, _SEEK_FOOTER.size))
    if magic != _SEEK_MAGIC or count > FRAME_LIMIT:
        return None
    width = 12 if flags & 0x80 else 8
    start = size - _SEEK_FOOTER.size - count * width
    if start < 8 or struct.unpack("<II", file.read(start - 8, 8)) != (_SEEK_TABLE, size - start):
        return None
    table = np.frombuffer(file.read(start, count * width), "<u4").reshape(count, width // 4).astype(np.uint64)
    stops = np.cumsum(table[:, 0], dtype=np.uint64)
    if count and int(stops[-1]) > start - 8:
        raise NotRecognisedError("its table of frames is damaged")
    return np.column_stack((stops - table[:, 0], table[:, 1], table[:, 0]))


def _by_walking(file: Memory, largest: int) -> list[tuple[int, int, int]]:
    size, at = file.size, 0
    found: list[tuple[int, int, int]] = []
    budget = [_BLOCK_LIMIT]
    skipped = 0
    while at < size:
        magic, length = struct.unpack("<II", file.read(at, 8))
        if magic & ~0xF == _SKIPPABLE:
            at += 8 + length
            skipped += 1
        elif magic == _MAGIC:
            start = at
            unpacked, at, behind = _header(file, at)
            if unpacked > largest:
                raise NotRecognisedError(_too_large(unpacked))
            at = _walk_blocks(file, at, budget) + behind
            found.append((start, unpacked, at - start))
        else:
            raise NotRecognisedError(f"no frame begins at its offset {at:#x}")
        if max(len(found), skipped) > FRAME_LIMIT:
            raise NotRecognisedError(f"it has more than {FRAME_LIMIT} frames")
    return found


def _header(file: Memory, at: int) -> tuple[int, int, int]:
    """(bytes that the frame unpacks to, offset of its first block, bytes of the checksum behind its last)."""
    descriptor = file.u8(at + 4)
    single = descriptor >> 5 & 1
    before = 5 + (1 - single) + _DICTIONARY_BYTES[descriptor & 3]
    width = (single, 2, 4, 8)[descriptor >> 6]
    if not width:
        raise NotRecognisedError("a frame of it does not say how much it holds")
    unpacked = int.from_bytes(file.read(at + before, width), "little") + (256 if width == 2 else 0)
    return unpacked, at + before + width, 4 if descriptor & _CHECKSUM else 0


def _walk_blocks(file: Memory, at: int, budget: list[int]) -> int:
    """The offset behind the last block of a frame."""
    while True:
        head = int.from_bytes(file.read(at, 3), "little")
        kind, length = head >> 1 & 3, head >> 3
        budget[0] -= 1
        if kind == _RESERVED or budget[0] < 0:
            raise NotRecognisedError(f"its block at offset {at:#x} is damaged")
        at += 3 + (1 if kind == _RLE else length)
        if head & 1:
            return at
