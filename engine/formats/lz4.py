"""lz4 files: their blocks, each of which can be unpacked by itself, as the program lz4 makes them.

    magic u32 · flags u8 · size of blocks u8 · size of all u64, if told · dictionary u32, if told · checksum u8
    blocks: length u32 (the highest bit: not packed), bytes, checksum u32, if told; a length of 0 ends them

All blocks but the last hold as much as the header says. lz4 writes a checksum of each only if asked to (-BX); the one
of all that it writes otherwise cannot be checked by who reads a part.

Source: the LZ4 frame format 1.6.4 (2024).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError, NotRecognisedError
from engine.memory import Memory
from engine.records import dataclass

MAGIC = 0x184D2204
_INDEPENDENT, _BLOCK_CHECKSUM, _CONTENT_SIZE, _CONTENT_CHECKSUM, _DICTIONARY = 0x20, 0x10, 0x08, 0x04, 0x01
_SIZES = {4: 64 << 10, 5: 256 << 10, 6: 1 << 20, 7: 4 << 20}
_PLAIN = 1 << 31
_MASK = 0xFFFFFFFF
BLOCK_LIMIT = 1 << 22
"""Blocks of a file, at the most: 16 TiB in the blocks of 4 MiB that lz4 makes."""

Unpack = Callable[[bytes, bytearray], int]


@dataclass(frozen=True, slots=True)
class Lz4Blocks:
    """The blocks of a file: `starts` and `lengths` of what they hold, `offsets` and `stored` of where that lies."""

    file: Memory
    starts: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    stored: npt.NDArray[np.uint64]
    header: bytes
    """What stands in front of a block to make it a file of its own."""
    unpack: Unpack

    def decode(self, index: int) -> bytes:
        """Block `index`. Raises BadDataError with its offset."""
        data = _decoded(self, index, int(self.lengths[index]))
        if len(data) != int(self.lengths[index]):
            raise BadDataError(int(self.offsets[index]), detail=f"it holds {len(data)} bytes alone")
        return data


def lz4_blocks(file: Memory, unpack: Unpack) -> Lz4Blocks:
    """The blocks of a file. Raises NotRecognisedError where they hang on one another, or it is damaged."""
    try:
        return _blocks(file, unpack)
    except FaultError:
        raise NotRecognisedError("it is cut off or damaged") from None


def _blocks(file: Memory, unpack: Unpack) -> Lz4Blocks:
    magic, flags, sizes = struct.unpack("<IBB", file.read(0, 6))
    largest = _SIZES.get(sizes >> 4)
    if magic != MAGIC or flags >> 6 != 1 or largest is None:
        raise NotRecognisedError("its header is damaged, or of a version that is not known")
    if not flags & _INDEPENDENT or flags & _DICTIONARY:
        raise NotRecognisedError("its blocks hang on one another, and can be unpacked as a whole only")
    at = 7 + (8 if flags & _CONTENT_SIZE else 0)
    rows, at = _walk(file, at, largest, 4 if flags & _BLOCK_CHECKSUM else 0)
    descriptor = bytes([flags & ~(_CONTENT_SIZE | _CONTENT_CHECKSUM), sizes])
    header = struct.pack("<I", MAGIC) + descriptor + bytes([_xxh32(descriptor) >> 8 & 0xFF])
    if at + (4 if flags & _CONTENT_CHECKSUM else 0) != file.size:
        raise NotRecognisedError("something follows its first frame")
    table = np.array(rows, np.uint64).reshape(-1, 2)
    lengths = np.full(len(table), largest, np.uint64)
    starts = np.arange(len(table), dtype=np.uint64) * np.uint64(largest)
    found = Lz4Blocks(file, starts, lengths, table[:, 0], table[:, 1], header, unpack)
    if len(lengths):
        lengths[-1] = max(1, len(_decoded(found, len(lengths) - 1, largest)))
    return found


def _walk(file: Memory, at: int, largest: int, checksum: int) -> tuple[list[tuple[int, int]], int]:
    """(offset, bytes in the file) of each block with its length, and the offset behind the mark that ends them."""
    rows: list[tuple[int, int]] = []
    while length := struct.unpack("<I", file.read(at, 4))[0]:
        stored = length & (_PLAIN - 1)
        if stored > largest or len(rows) == BLOCK_LIMIT:
            raise NotRecognisedError(f"its block at offset {at:#x} is damaged")
        rows.append((at, 4 + stored + checksum))
        at += 4 + stored + checksum
    return rows, at + 4


def _decoded(blocks: Lz4Blocks, index: int, largest: int) -> bytes:
    offset = int(blocks.offsets[index])
    packed = blocks.file.read(offset, int(blocks.stored[index]))
    out = bytearray(largest)
    try:
        count = blocks.unpack(blocks.header + packed + bytes(4), out)
    except ValueError as error:
        raise BadDataError(offset, detail=str(error)) from None
    return bytes(out[:count])


def _xxh32(data: bytes) -> int:
    """XXH32 with seed 0 of less than four bytes (xxHash specification 0.1.1, steps 1, 5 and 7 of XXH32)."""
    value = 0x165667B1 + len(data)
    for byte in data:
        value = (value + byte * 0x165667B1) & _MASK
        value = (value << 11 | value >> 21) * 0x9E3779B1 & _MASK
    value = (value ^ value >> 15) * 0x85EBCA77 & _MASK
    value = (value ^ value >> 13) * 0xC2B2AE3D & _MASK
    return value ^ value >> 16
