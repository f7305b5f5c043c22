"""xz files: the blocks that their indices list, each of which can be unpacked by itself.

A file is one or more streams; the index at a stream's end tells the size of each block, packed and not. `xz -T0` cuts
what it packs into blocks, a single thread of xz before 5.6 makes one.

Source: the .xz file format 1.2.1, sections 2 (streams) and 4 (index).
"""

from __future__ import annotations

import lzma
import struct
import zlib

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError, NotRecognisedError
from engine.memory import Memory
from engine.records import dataclass

MAGIC = b"\xfd7zXZ\0"
_FOOTER = struct.Struct("<II2s2s")
_HEADER_SIZE = 12
BLOCK_LIMIT = 1 << 20
"""Blocks of a file, at the most: 4 TiB in blocks of 4 MiB."""
_INDEX_LIMIT = 20 << 20
_PADDING_LIMIT = 1 << 20
DECODER_LIMIT = 256 << 20
"""Bytes that unpacking may take: xz -9 needs 65 MiB, --ultra dictionaries more."""


@dataclass(frozen=True, slots=True)
class XzBlocks:
    """The blocks of a file: `starts` and `lengths` of what they hold, `offsets` and `stored` of where that lies."""

    file: Memory
    starts: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    stored: npt.NDArray[np.uint64]
    header: bytes
    """The first stream's: its flags say which check stands behind a block."""

    def decode(self, index: int) -> bytes:
        """Block `index`, checked by its own check. Raises BadDataError with its offset."""
        offset, size = int(self.offsets[index]), int(self.lengths[index])
        packed = self.file.read(offset, int(self.stored[index]))
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DECODER_LIMIT)
        try:
            # The header of a stream and one block are what a decoder takes, as long as nobody asks for the rest.
            data = unpacker.decompress(self.header + packed, size + 1)
        except lzma.LZMAError as error:
            raise BadDataError(offset, detail=str(error)) from None
        if len(data) != size:
            raise BadDataError(offset, detail=f"it holds {len(data)} bytes, its index says {size}")
        return data


def xz_blocks(file: Memory) -> XzBlocks:
    """The blocks of all streams. Raises NotRecognisedError where an index is damaged, or too large."""
    stop = file.size
    streams: list[list[tuple[int, int, int]]] = []
    count, header = 0, b""
    try:
        while stop:
            stop = _skip_padding(file, stop)
            blocks, stop, header_here = _stream(file, stop)
            if header and header_here != header:
                raise NotRecognisedError("its streams use different checks")
            header = header_here
            count += len(blocks)
            if count > BLOCK_LIMIT or len(streams) > BLOCK_LIMIT:
                raise NotRecognisedError(f"it has more than {BLOCK_LIMIT} blocks")
            streams.append(blocks)
    except FaultError:
        raise NotRecognisedError("it is cut off or damaged: its index is not where its end says") from None
    rows = np.array([block for blocks in reversed(streams) for block in blocks], np.uint64).reshape(-1, 3)
    rows = rows[rows[:, 1] > 0]
    lengths = np.ascontiguousarray(rows[:, 1])
    starts = np.cumsum(lengths, dtype=np.uint64) - lengths
    return XzBlocks(file, starts, lengths, rows[:, 0], rows[:, 2], header)


def _skip_padding(file: Memory, stop: int) -> int:
    first = stop
    while stop >= 4 and file.read(stop - 4, 4) == bytes(4):
        stop -= 4
        if first - stop > _PADDING_LIMIT:
            raise NotRecognisedError("it is damaged: it ends with zeros")
    return stop


def _stream(file: Memory, stop: int) -> tuple[list[tuple[int, int, int]], int, bytes]:
    """(offset, bytes unpacked, bytes packed) of the blocks of the stream that stops there; its start and header."""
    if stop < 2 * _HEADER_SIZE:
        raise NotRecognisedError("it is cut off: there is no index at its end")
    check, backward, flags, magic = _FOOTER.unpack(file.read(stop - _FOOTER.size, _FOOTER.size))
    size = (backward + 1) * 4
    start = stop - _FOOTER.size - size
    if magic != b"YZ" or start < _HEADER_SIZE or check != zlib.crc32(struct.pack("<I", backward) + flags):
        raise NotRecognisedError("it is cut off or damaged: there is no index at its end")
    if size > _INDEX_LIMIT:
        raise NotRecognisedError("its index is larger than that of any image of memory")
    index = file.read(start, size)
    if index[0] or zlib.crc32(index[:-4]) != int.from_bytes(index[-4:], "little"):
        raise NotRecognisedError("its index is damaged")
    records = _records(index)
    begin = start - sum(-(-packed // 4) * 4 for packed, _ in records)
    at, blocks = begin, []
    for packed, size in records:
        stored = -(-packed // 4) * 4  # its padding stands in front of its check
        blocks.append((at, size, stored))
        at += stored
    header = file.read(begin - _HEADER_SIZE, _HEADER_SIZE) if begin >= _HEADER_SIZE else b""
    if header[:6] != MAGIC or header[6:8] != flags or zlib.crc32(flags) != int.from_bytes(header[8:], "little"):
        raise NotRecognisedError("its index is damaged: it does not lead to the blocks")
    return blocks, begin - _HEADER_SIZE, header


def _records(index: bytes) -> list[tuple[int, int]]:
    """(bytes packed without padding, bytes unpacked) of each block."""
    count, at = _number(index, 1)
    if count > min(BLOCK_LIMIT, len(index) // 2):
        raise NotRecognisedError("its index is damaged, or lists more blocks than any image of memory has")
    found = []
    for _ in range(count):
        packed, at = _number(index, at)
        size, at = _number(index, at)
        found.append((packed, size))
    return found


def _number(index: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 63, 7):
        if at >= len(index):
            break
        byte = index[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise NotRecognisedError("its index is damaged")
