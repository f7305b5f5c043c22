"""Images of memory in the formats of dumps, written by the formats' descriptions and not by the code under test.

    lime_image([(0x1000, data)])      LiME version 1
    avml_image([(0x1000, data)])      AVML version 2, blocks of zeros left out as AVML does
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable

AVML_BLOCK = 16 << 20
SNAPPY_PIECE = 64 << 10

Ranges = Iterable[tuple[int, bytes]]


def lime_header(magic: bytes, version: int, start: int, size: int) -> bytes:
    return magic + struct.pack("<IQQQ", version, start, start + size - 1, 0)


def lime_image(ranges: Ranges) -> bytes:
    return b"".join(lime_header(b"EMiL", 1, start, len(data)) + data for start, data in ranges)


def avml_blocks(ranges: Ranges, block: int = AVML_BLOCK) -> list[tuple[int, bytes]]:
    """(address, block of the file) of each block that is not left out."""
    return [
        (start + at, avml_block(start + at, data[at : at + block]))
        for start, data in ranges
        for at in range(0, len(data), block)
        if any(data[at : at + block])
    ]


def avml_block(start: int, data: bytes) -> bytes:
    packed = snappy_stream(data)
    return lime_header(b"AVML", 2, start, len(data)) + packed + struct.pack("<Q", len(packed))


def avml_image(ranges: Ranges, block: int = AVML_BLOCK) -> bytes:
    return b"".join(data for _, data in avml_blocks(ranges, block))


def snappy_stream(data: bytes, piece: int = SNAPPY_PIECE) -> bytes:
    """The framing format, with the identifier and, as the description asks for, what does not shrink left as it is."""
    parts = [b"\xff\x06\x00\x00sNaPpY"]
    for at in range(0, len(data), piece):
        part = data[at : at + piece]
        parts.append(snappy_piece(part))
    return b"".join(parts)


@functools.lru_cache(32)
def snappy_piece(part: bytes) -> bytes:
    packed = snappy_raw(part)
    kind, body = (0, packed) if len(packed) < len(part) else (1, part)
    body = struct.pack("<I", masked_crc32c(part)) + body
    return bytes([kind]) + len(body).to_bytes(3, "little") + body


def snappy_raw(data: bytes) -> bytes:
    """Packed by runs of one byte alone: a literal, then copies of 64 bytes from one byte back."""
    out, size = bytearray(), len(data)
    while True:
        out.append(size & 0x7F | (0x80 if size > 0x7F else 0))
        size >>= 7
        if not size:
            break
    at = 0
    while at < len(data):
        run = len(data) - at - len(data[at:].lstrip(data[at : at + 1]))
        if run >= 8:
            out += bytes([0, data[at]])
            left = run - 1
            while left:
                step = min(64, left)
                out += bytes([(step - 1) << 2 | 2, 1, 0])
                left -= step
            at += run
            continue
        stop = min(at + 4096, len(data))
        cut = next((i for i in range(at + 1, stop - 8) if len(set(data[i : i + 8])) == 1), stop)
        out += bytes([61 << 2]) + (cut - at - 1).to_bytes(2, "little") + data[at:cut]
        at = cut
    return bytes(out)


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli), rotated and shifted as snappy's framing_format.txt says in section 3."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ---- VMware: after descriptions by others; no file that VMware has written was to be had ---------------------------


def vmss_tag(name: str, indices: tuple[int, ...], value: bytes) -> bytes:
    """A tag with a short value."""
    head = bytes([len(indices) << 6 | len(value), len(name)]) + name.encode()
    return head + struct.pack(f"<{len(indices)}I", *indices) + value


def vmss_block(name: str, indices: tuple[int, ...], data: bytes, padding: int = 0, *, kind: int = 63) -> bytes:
    """A tag with a block for a value; 62 for `kind` is a compressed one."""
    head = bytes([len(indices) << 6 | kind, len(name)]) + name.encode() + struct.pack(f"<{len(indices)}I", *indices)
    return head + struct.pack("<QQH", len(data), len(data), padding) + bytes(padding) + data


def vmss_memory(regions: Iterable[tuple[int, int, int]]) -> list[bytes]:
    """Tags of the group memory: (page frame, page in the memory's file, pages)."""
    rows = list(regions)
    tags = [vmss_tag("align_mask", (), struct.pack("<I", 0xFFFF))]
    tags.append(vmss_tag("regionsCount", (), struct.pack("<I", len(rows))))
    for index, row in enumerate(rows):
        for name, value in zip(("regionPPN", "regionPageNum", "regionSize"), row, strict=True):
            tags.append(vmss_tag(name, (index,), struct.pack("<I", value)))
    return tags


def vmss_file(groups: dict[str, list[bytes]], magic: int = 0xBED2BED2) -> bytes:
    """A state file: the table of groups, then the tags of each."""
    table, body = b"", b""
    at = 12 + 80 * len(groups)
    for name, tags in groups.items():
        data = b"".join(tags) + b"\0\0"
        table += struct.pack("<64sQQ", name.encode(), at + len(body), len(data))
        body += data
    return struct.pack("<III", magic, 8, len(groups)) + table + body
