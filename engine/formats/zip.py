"""ZIP files: which member holds an image of memory, and where its bytes lie if they are stored as they are.

The central directory at the end of the file is read, in bounded pieces; ZIP64 is known.

Source: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14-4.3.16 (its ends) and
4.5.3 (ZIP64 extra field).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from engine.errors import FaultError, NotRecognisedError
from engine.memory import Memory
from engine.records import dataclass

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_COMMENT_LIMIT = 0xFFFF
_DIRECTORY_LIMIT = 16 << 20
"""Bytes of the central directory that are read: of an image there is one member, or a few."""
_SMALL = 16
"""A member counts as the image beside others if it is so many times larger than all of them together."""
STORED = 0
_METHODS = {8: "deflated", 9: "deflated", 12: "packed by bzip2", 14: "packed by LZMA", 93: "packed by Zstandard"}
_ENCRYPTED = 1
_ZIP64 = 1
_ALL_ONES = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a ZIP file; `header` is the offset of its local header."""

    name: str
    size: int
    stored: int
    header: int
    method: int
    encrypted: bool

    @property
    def packing(self) -> str:
        """How its bytes are kept, in words."""
        if self.encrypted:
            return "encrypted"
        return "stored" if self.method == STORED else _METHODS.get(self.method, f"packed by method {self.method}")


def members(file: Memory) -> Iterator[Member]:
    """The files in it; ends where the directory makes no sense. Raises NotRecognisedError where there is none."""
    start, size = _directory(file)
    if size > _DIRECTORY_LIMIT:
        raise NotRecognisedError("there are too many files in it to look for an image of memory")
    try:
        data = file.read(start, size)
    except FaultError:
        raise NotRecognisedError("it is cut off or damaged: its directory is not where its end says") from None
    at = 0
    while at + _CENTRAL.size <= size:
        fields = _CENTRAL.unpack_from(data, at)
        if fields[0] != b"PK\x01\x02":
            return
        flags, method = fields[3:5]
        names, extras, comments = fields[10:13]
        name = data[at + _CENTRAL.size : at + _CENTRAL.size + names]
        extra = data[at + _CENTRAL.size + names : at + _CENTRAL.size + names + extras]
        plain, stored, header = _wide(extra, fields[9], fields[8], fields[16])
        at += _CENTRAL.size + names + extras + comments
        if not name.endswith(b"/"):
            yield Member(
                name.decode("utf-8", "replace"), plain, stored, header, method, bool(flags & _ENCRYPTED)
            )


def _directory(file: Memory) -> tuple[int, int]:
    """Where the central directory lies, and its bytes."""
    size = file.size
    start = max(0, size - _COMMENT_LIMIT - _END.size)
    tail = file.read(start, size - start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise NotRecognisedError("it is cut off or damaged: there is no directory at its end")
    length, offset = _END.unpack_from(tail, at)[5:7]
    end = start + at
    if end >= _LOCATOR.size:
        magic, _, where, _ = _LOCATOR.unpack(file.read(end - _LOCATOR.size, _LOCATOR.size))
        if magic == b"PK\x06\x07" and where <= size - _END64.size:
            record = _END64.unpack(file.read(where, _END64.size))
            if record[0] == b"PK\x06\x06":
                length, offset = record[8:10]
    return offset, length


def _wide(extra: bytes, size: int, stored: int, header: int) -> tuple[int, int, int]:
    """The three numbers, those that do not fit 32 bits from the ZIP64 extra field, in this order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if kind == _ZIP64:
            wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            size, stored, header = (next(wide, one) if one == _ALL_ONES else one for one in (size, stored, header))
            break
        at += 4 + length
    return size, stored, header


def image_member(file: Memory) -> Member:
    """The only member, or the one beside which the others are small. Raises NotRecognisedError where there is none."""
    found = sorted(members(file), key=lambda member: member.size, reverse=True)
    if not found or not found[0].size:
        raise NotRecognisedError("there is no file in it")
    if sum(member.size for member in found[1:]) * _SMALL > found[0].size:
        names = ", ".join(member.name for member in found[:3])
        raise NotRecognisedError(f"it holds {len(found)} files ({names} …), and none is much larger than the rest")
    return found[0]


def stored_at(file: Memory, member: Member) -> int:
    """The offset of a stored member's first byte. Raises NotRecognisedError where it is not whole."""
    try:
        fields = _LOCAL.unpack(file.read(member.header, _LOCAL.size))
    except FaultError:
        fields = (b"",)
    if fields[0] != b"PK\x03\x04":
        raise NotRecognisedError(f"it is damaged: {member.name} is not where the directory says")
    return member.header + _LOCAL.size + int(fields[9]) + int(fields[10])
