"""Dump files made by hand, after the formats' own descriptions: for cases that no tool writes on demand."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

ET_CORE, PT_LOAD, PT_NOTE, PN_XNUM = 4, 1, 4, 0xFFFF


@dataclass(frozen=True)
class Load:
    """A PT_LOAD segment: bytes at a physical address, and how much more it has in memory."""

    physical: int
    data: bytes
    more: int = 0
    virtual: int = 0


def note(owner: bytes, kind: int, data: bytes, order: str = "<") -> bytes:
    """One ELF note, padded to 4."""
    name = owner + b"\0"
    padded = name + bytes(-len(name) % 4) + data + bytes(-len(data) % 4)
    return struct.pack(order + "III", len(name), len(data), kind) + padded


def elf_core(
    loads: Sequence[Load], notes: bytes = b"", *, bits: int = 64, order: str = "<", kind: int = ET_CORE,
    machine: int = 62, many: bool = False, gap: int = 0,
) -> bytes:  # fmt: skip
    """An ELF file with these segments; `many` writes their number where PN_XNUM says, `gap` misaligns the bytes."""
    wide = bits == 64
    head, entry, section = (64, 56, 64) if wide else (52, 32, 40)
    count = len(loads) + 1
    at = head + entry * count + (section if many else 0) + gap
    rows = [_segment(wide, order, PT_NOTE, at, 0, 0, len(notes), len(notes))]
    at += len(notes)
    for load in loads:
        size = len(load.data)
        rows.append(_segment(wide, order, PT_LOAD, at, load.virtual, load.physical, size, size + load.more))
        at += size
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1 if order == "<" else 2, 1]) + bytes(9)
    sections_at = head + entry * count if many else 0
    header = struct.pack(
        order + ("HHIQQQIHHHHHH" if wide else "HHIIIIIHHHHHH"), kind, machine, 1, 0, head, sections_at, 0, head, entry,
        PN_XNUM if many else count, section if many else 0, 1 if many else 0, 0,
    )  # fmt: skip
    table = b""
    if many:
        layout = order + ("IIQQQQIIQQ" if wide else "IIIIIIIIII")
        table = struct.pack(layout, 0, 0, 0, 0, 0, 0, 0, count, 0, 0)
    return b"".join([ident, header, *rows, table, bytes(gap), notes, *(load.data for load in loads)])


def _segment(
    wide: bool, order: str, kind: int, offset: int, virtual: int, physical: int, file_size: int, size: int
) -> bytes:
    if wide:
        return struct.pack(order + "IIQQQQQQ", kind, 7, offset, virtual, physical, file_size, size, 0)
    return struct.pack(order + "IIIIIIII", kind, offset, virtual, physical, file_size, size, 7, 0)


Pack = Callable[[bytes], tuple[bytes, int]]
"""A page → its bytes in the file and the flag that says how they are packed."""


def plain(page: bytes) -> tuple[bytes, int]:
    return page, 0


def deflated(page: bytes) -> tuple[bytes, int]:
    return zlib.compress(page, 1), 1


@dataclass(frozen=True)
class Kdump:
    """How a kdump file is written; `kdump` writes it."""

    bits: int = 64
    order: str = "<"
    version: int = 6
    signature: bytes = b"KDUMP   "
    page: int = 4096
    level: int = 0
    status: int = 0
    pack: Pack = plain
    padded: bool = False
    """As 32-bit machines do that align 64-bit words to 8."""
    text: bytes = b""
    notes: bytes = b""
    split: tuple[int, int] | None = None
    one_bitmap: bool = False
    count: int | None = None
    """max_mapnr, if not what fits."""
    machine: bytes = b"x86_64"

    def sub_header(self, text_at: int, notes_at: int, count: int) -> bytes:
        word, gap = ("Q", "") if self.bits == 64 else ("I", "4x" if self.padded else "")
        first, stop = self.split or (0, 0)
        parts = [
            struct.pack(self.order + word + "I", 0, self.level),
            struct.pack(self.order + "I2" + word + gap, int(self.split is not None), first, stop),
            struct.pack(self.order + "Q" + word + gap, text_at, len(self.text)),
            struct.pack(self.order + "Q" + word + gap, notes_at, len(self.notes)),
            struct.pack(self.order + "Q" + word + gap, 0, 0),
            struct.pack(self.order + "3Q", first, stop, count),
        ]
        return b"".join(parts[: self.version])


def _bits(pfns: Iterable[int], size: int) -> bytes:
    made = bytearray(size)
    for pfn in pfns:
        made[pfn >> 3] |= 1 << (pfn & 7)
    return bytes(made)


def kdump(pages: Mapping[int, bytes], how: Kdump, left_out: Iterable[int] = ()) -> bytes:
    """A file with these pages; `left_out` are pages that the machine has and the file has not."""
    size, ram = how.page, sorted({*pages, *left_out})
    count = how.count if how.count is not None else max(ram) + 1
    blocks = -(-(max(ram) + 1) // 8 // size) or 1
    bitmaps = (b"" if how.one_bitmap else _bits(ram, blocks * size)) + _bits(pages, blocks * size)
    low, high = how.split or (0, max(ram) + 1)
    mine = [pfn for pfn in sorted(pages) if low <= pfn < high]
    text_at = size + 512
    notes_at = text_at + len(how.text)
    sub = how.sub_header(text_at if how.text else 0, notes_at if how.notes else 0, count)
    sub = sub.ljust(512, b"\0") + how.text + how.notes
    sub_blocks = -(-len(sub) // size)
    fields = struct.pack(
        how.order + "10I", how.status, size, sub_blocks, len(bitmaps) // size, min(count, 0xFFFFFFFF), 0, 0, 0, 0, 1
    )
    names = b"".join(name.ljust(65, b"\0") for name in (b"Linux", b"", b"6.1.0", b"", how.machine, b""))
    head = how.signature + struct.pack(how.order + "I", how.version) + names
    head = head.ljust(424 if how.bits == 64 else 412, b"\0") + fields
    at = (1 + sub_blocks) * size + len(bitmaps)
    data, table = bytes(size), b""
    start = at + 24 * len(mine)
    for pfn in mine:
        if not any(pages[pfn]):
            table += struct.pack(how.order + "QIIQ", start, size, 0, 0)
            continue
        packed, flag = how.pack(pages[pfn])
        table += struct.pack(how.order + "QIIQ", start + len(data), len(packed), flag, 0)
        data += packed
    return head.ljust(size, b"\0") + sub.ljust(sub_blocks * size, b"\0") + bitmaps + table + data


def flattened(pieces: Iterable[tuple[int, bytes]], *, ended: bool = True) -> bytes:
    """makedumpfile's form for pipes."""
    records = b"".join(struct.pack(">qq", at, len(data)) + data for at, data in pieces)
    head = b"makedumpfile".ljust(16, b"\0") + struct.pack(">qq", 1, 1)
    return head.ljust(4096, b"\0") + records + (struct.pack(">qq", -1, -1) if ended else b"")
