"""Dump files made by hand, after the formats' own descriptions: for cases that no tool writes on demand."""

from __future__ import annotations

import struct
from collections.abc import Sequence
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
