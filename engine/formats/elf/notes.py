"""Notes: the small records of PT_NOTE segments and SHT_NOTE sections (System V ABI, chapter 5; elf(5))."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from engine.records import dataclass

NT_GNU_BUILD_ID = 3
BUILD_ID_LIMIT = 256
"""Bytes; linkers write 16 or 20, `--build-id=0x…` what it is given."""


@dataclass(frozen=True, slots=True)
class Note:
    """One note: who defined it, which kind of his it is, its bytes."""

    owner: bytes
    kind: int
    data: bytes


def parse_notes(data: bytes, order: str = "<", alignment: int = 4) -> Iterator[Note]:
    """The notes in `data`, up to the first that is cut.

    `alignment` is 4 or 8: bytes to which the parts of a note are padded, counted from the start of `data`
    (8 only for .note.gnu.property of 64-bit files, and for what was merged with it).
    """
    mask = 7 if alignment == 8 else 3
    unpack = struct.Struct(order + "III").unpack_from
    at = 0
    while at + 12 <= len(data):
        owner_size, size, kind = unpack(data, at)
        start = (at + 12 + owner_size + mask) & ~mask
        if start + size > len(data):
            return
        yield Note(data[at + 12 : at + 12 + owner_size].rstrip(b"\0"), kind, data[start : start + size])
        at = (start + size + mask) & ~mask


def build_id_of(data: bytes, order: str = "<", alignment: int = 4) -> str | None:
    """The build-id among the notes in `data`, hexadecimal; None where there is none.

    Old linkers merged notes of both paddings under the larger one: where `alignment` is 8 both are tried.
    """
    for padding in (8, 4) if alignment == 8 else (4,):
        for note in parse_notes(data, order, padding):
            if note.kind == NT_GNU_BUILD_ID and note.owner == b"GNU" and 0 < len(note.data) <= BUILD_ID_LIMIT:
                return note.data.hex()
    return None
