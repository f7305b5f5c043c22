"""BTF records: the header, the kinds of type, and where each type begins (include/uapi/linux/btf.h, Linux 6.12)."""

from __future__ import annotations

import enum
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, NotRecognisedError
from engine.records import dataclass

MAGIC = 0xEB9F
HEADER_SIZE = 24
SIZE_LIMIT = 32 << 20
"""Bytes; Linux refuses more than 16 MiB, and makes 3 to 8 of them."""
TYPE_WORDS = 3
"""Words at the beginning of every type: name, info, size or type."""

Words = npt.NDArray[np.uint32]


class Kind(enum.IntEnum):
    """What a BTF type is (BTF_KIND_*)."""

    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


LAST_KIND = max(Kind)
MODIFIERS = frozenset({Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
"""They are looked through."""

_EXTRA_WORDS = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
ROW_WORDS = {
    Kind.STRUCT: 3, Kind.UNION: 3, Kind.ENUM: 2, Kind.FUNC_PROTO: 2, Kind.DATASEC: 3, Kind.ENUM64: 3,
}  # fmt: skip
"""Words of each of the rows (members, names of an enum …) that follow the first three words of a type."""

_FIXED = np.full(32, TYPE_WORDS, np.int32)
_PER_ROW = np.zeros(32, np.int32)
for _kind, _words in _EXTRA_WORDS.items():
    _FIXED[_kind] += _words
for _kind, _words in ROW_WORDS.items():
    _PER_ROW[_kind] = _words

_BLOCK = 1 << 15
"""Words handled at once: what they need stays in a processor's cache."""
_DOUBLINGS = 4
"""Of every 2^4 types one is found by a step of Python, the others by columns."""


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a BTF blob: its byte order, and where its two sections lie in it (start, size)."""

    order: str
    types: tuple[int, int]
    strings: tuple[int, int]

    @property
    def size(self) -> int:
        """Bytes of the whole blob."""
        return max(sum(self.types), sum(self.strings))


def parse_header(data: bytes) -> Header:
    """The header at the front of `data`.

    Raises NotRecognisedError where there is none, BadDataError where it is impossible; the blob may be cut.
    """
    if len(data) < HEADER_SIZE:
        raise NotRecognisedError(f"{len(data)} bytes are too few for BTF")
    order = {0x9F: "<", 0xEB: ">"}.get(data[0], "")
    if not order or struct.unpack_from(order + "H", data)[0] != MAGIC:
        raise NotRecognisedError("BTF begins with the bytes 9f eb or eb 9f")
    version, flags = data[2], data[3]
    header_size, type_at, type_size, string_at, string_size = struct.unpack_from(order + "5I", data, 4)
    if version != 1 or flags:
        raise BadDataError(2, detail=f"BTF of version {version} with flags {flags:#x}; 1 and 0 are known")
    if not HEADER_SIZE <= header_size <= 4096:
        raise BadDataError(4, detail=f"a BTF header of {header_size} bytes")
    header = Header(order, (header_size + type_at, type_size), (header_size + string_at, string_size))
    apart = sum(header.types) <= header.strings[0] or sum(header.strings) <= header.types[0]
    if type_at % 4 or type_size % 4 or not apart or header.size > SIZE_LIMIT:
        raise BadDataError(8, detail="BTF whose sections overlap, are too large or out of line")
    return header


def kinds_of(info: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The kind in each info word."""
    return (info >> np.uint32(24)) & np.uint32(0x1F)


def steps_of(info: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """How many words each type has, by its info word."""
    kinds = kinds_of(info)
    found: npt.NDArray[np.int32] = _PER_ROW[kinds] * (info & np.uint32(0xFFFF)).astype(np.int32) + _FIXED[kinds]
    return found


def type_starts(words: Words) -> npt.NDArray[np.int32]:
    """The index of the first word of every type, ascending.

    Types have different lengths and stand one behind the other: which word begins one is known only from
    the one before. Here the place where a type *would* end is computed for every word of a block, and
    doubled (`jump[jump]`), so that Python makes one step for sixteen types.
    Raises BadDataError with the offset in the section where a kind is unknown or the last type is cut.
    """
    parts: list[npt.NDArray[np.int32]] = []
    entry, total = 0, len(words)
    while entry < total:
        starts, entry = _block_starts(words, entry)
        parts.append(starts)
    if entry != total:
        raise BadDataError(4 * int(parts[-1][-1]), detail="the last BTF type reaches over the end")
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _block_starts(words: Words, entry: int) -> tuple[npt.NDArray[np.int32], int]:
    """The types that begin in the block at `entry`, and where the next one begins."""
    size = min(_BLOCK, len(words) - entry)
    info = words[entry + 1 : entry + 1 + size]
    kind = kinds_of(info)
    step = np.full(size, TYPE_WORDS, np.int32)
    step[: len(info)] = _PER_ROW[kind] * (info & np.uint32(0xFFFF)).astype(np.int32) + _FIXED[kind]
    jump = np.arange(size + 1, dtype=np.int32)
    jump[:size] += step
    np.minimum(jump, size, out=jump)
    jumps = [jump]
    for _ in range(_DOUBLINGS):
        jumps.append(jumps[-1][jumps[-1]])
    far, at = jumps[-1].data, 0
    heads: list[int] = []
    while at < size:
        heads.append(at)
        at = far[at]
    starts = np.array(heads, np.int32)
    for each in reversed(jumps[:-1]):
        starts = np.stack((starts, each[starts]), axis=1).ravel()
    starts = starts[starts < size]
    last = int(starts[-1])
    if last >= len(info):
        raise BadDataError(4 * (entry + last), detail="a BTF type is cut")
    found = kind[starts]
    bad = np.flatnonzero((found == 0) | (found > LAST_KIND))
    if len(bad):
        first = int(starts[bad[0]])
        raise BadDataError(4 * (entry + first), detail=f"BTF kind {int(found[bad[0]])} is not known")
    return starts + np.int32(entry), entry + last + int(step[last])
