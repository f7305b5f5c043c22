"""The headers of a kdump file: of both widths and byte orders, versions 0 to 6."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from engine.errors import BadDataError, FaultError, NotRecognisedError
from engine.memory import Memory
from engine.records import dataclass

SIGNATURES = (b"KDUMP   ", b"DISKDUMP")
VERSION_LIMIT = 16
"""The format is at 6; a greater number means the other byte order, or no header at all."""
HEAD_SIZE = 464
PAGE_SIZES = tuple(1 << bits for bits in range(12, 19))
BITMAP_LIMIT = 256 << 20
"""Bytes of one bitmap, which is held in memory: 8 TiB of physical addresses in pages of 4 KiB."""

_NAME = 65
_RELEASE, _MACHINE = 12 + 2 * _NAME, 12 + 4 * _NAME
_FIELDS_AT = {64: 424, 32: 412}
"""Where `status` stands: behind a timestamp of two words of that width."""
_SUB_HEADERS = {64: ("QIIQQ" "QQQQQQ" "QQQ",), 32: ("IIIII" "QIQIQI" "QQQ", "IIIII4x" "QI4xQI4xQI4x" "QQQ")}
"""Without padding, in the byte order of the file; 32-bit machines align 64-bit words to 4 or to 8."""
_FIRST_OF_VERSION = {1: 1, 2: 2, 3: 5, 4: 7, 5: 9, 6: 11}
"""Version → which field of the sub header it brought first."""


@dataclass(frozen=True, slots=True)
class KdumpHeader:
    """What the first blocks of a file say; sizes in bytes, places from the file's beginning."""

    version: int
    bits: int
    order: str
    """Byte order as struct writes it."""
    status: int
    """The ways of compression that were used: see `pages`."""
    page_size: int
    sub_header_size: int
    bitmap_size: int
    """Of both bitmaps together, where there are two."""
    page_count: int
    """max_mapnr: behind the last page frame."""
    cpu_count: int
    machine: str
    """As uname(2) says; empty where it is not told."""
    release: str
    dump_level: int | None
    """Bits of what was left out, see makedumpfile(8) -d; None in files that do not say."""
    first_pfn: int | None
    """Of a part of a split dump: the first page frame whose page may be in it."""
    stop_pfn: int | None
    vmcoreinfo: tuple[int, int]
    """Place and size; (0, 0) where there is none."""
    notes: tuple[int, int]

    @property
    def bitmaps_at(self) -> int:
        """Where the bitmaps lie."""
        return self.page_size + self.sub_header_size

    @property
    def one_bitmap(self) -> int:
        """Bytes of one bitmap as far as it counts."""
        return (self.page_count + 7) // 8

    @property
    def has_two_bitmaps(self) -> bool:
        """Whether it says of left out pages that they exist; old diskdumps have one bitmap only."""
        blocks = -(-self.one_bitmap // self.page_size)
        return self.bitmap_size >= 2 * blocks * self.page_size

    @property
    def descriptors_at(self) -> int:
        """Where the page descriptors lie."""
        return self.bitmaps_at + self.bitmap_size


def read_header(file: Memory) -> KdumpHeader:
    """The headers of a file. Raises NotRecognisedError where it has none, BadDataError for impossible ones."""
    try:
        head = file.read(0, HEAD_SIZE)
    except FaultError as error:
        raise NotRecognisedError(f"it has {error.address} bytes: no kdump file is so short") from None
    if head[:8] not in SIGNATURES:
        raise NotRecognisedError(f"it begins with {head[:8]!r}, not with KDUMP or DISKDUMP")
    for order in "<>":
        if struct.unpack_from(order + "I", head, 8)[0] < VERSION_LIMIT:
            for bits in (64, 32):
                made = _read(file, head, order, bits)
                if made is not None:
                    return _checked(made)
    raise BadDataError(8, detail="the kdump header is of no known version, or its page size cannot be")


def _read(file: Memory, head: bytes, order: str, bits: int) -> KdumpHeader | None:
    """The header, if it makes sense with this width and byte order."""
    (version,) = struct.unpack_from(order + "I", head, 8)
    status, page_size, sub_blocks, bitmap_blocks, count, _, _, _, _, cpus = struct.unpack_from(
        order + "10I", head, _FIELDS_AT[bits]
    )
    if page_size not in PAGE_SIZES or not bitmap_blocks:
        return None
    level, first, stop, info, notes = None, None, None, (0, 0), (0, 0)
    sub = _sub_header(file, head, order, bits, page_size, count) if version and sub_blocks else None
    if sub is not None:
        level = sub[1] & 0xFF
        if sub[2]:
            first, stop = (sub[11], sub[12]) if version >= 6 else (sub[3], sub[4])
        info, notes = (sub[5], sub[6]), (sub[7], sub[8])
        count = sub[13] or count
    return KdumpHeader(
        version, bits, order, status, page_size, sub_blocks * page_size, bitmap_blocks * page_size, count, cpus,
        _word(head, _MACHINE), _word(head, _RELEASE), level, first, stop, info, notes,
    )  # fmt: skip


def _sub_header(
    file: Memory, head: bytes, order: str, bits: int, page_size: int, count: int
) -> tuple[int, ...] | None:
    """The fields of the sub header, zeros where this version has none; None of a diskdump, which has another."""
    if not head.startswith(SIGNATURES[0]):
        return None
    (version,) = struct.unpack_from(order + "I", head, 8)
    known = [first for since, first in _FIRST_OF_VERSION.items() if since > version]
    fields = min(known, default=14)
    forms = [struct.Struct(order + form) for form in _SUB_HEADERS[bits]]
    data = file.read_padded(page_size, max(form.size for form in forms))
    rows = [(form.unpack_from(data)[:fields] + (0,) * 14)[:14] for form in forms]
    return next((row for row in rows if _makes_sense(row, count, file.size)), rows[0])


def _makes_sense(row: tuple[int, ...], count: int, size: int) -> bool:
    """Whether its places lie in the file, and it agrees on the number of pages."""
    places = ((row[5], row[6]), (row[7], row[8]), (row[9], row[10]))
    inside = all(at + length <= size and (at > 0 or not length) for at, length in places)
    return inside and (not row[13] or min(row[13], 0xFFFF_FFFF) == count)


def _checked(header: KdumpHeader) -> KdumpHeader:
    if not header.page_count:
        raise BadDataError(0, detail="the kdump header says that there are no pages")
    if header.one_bitmap > header.bitmap_size:
        raise BadDataError(
            0, detail=f"{header.page_count} pages do not fit into bitmaps of {header.bitmap_size} bytes"
        )
    if header.one_bitmap > BITMAP_LIMIT:
        raise BadDataError(0, detail=f"{header.page_count} pages are more than any machine has")
    return header


def _word(head: bytes, at: int) -> str:
    """A field of new_utsname."""
    text = head[at : at + _NAME].partition(b"\0")[0].decode("ascii", "replace")
    return text if text.isprintable() else ""


LEVELS = ((2 | 4, "cache"), (8, "user"), (16, "free"))
"""Bits of a dump level and what they leave out (makedumpfile(8) -d); pages of zeros, bit 1, are read all the same."""


def why_left_out(level: int | None) -> str:
    """Why a page that the machine has may be missing: a clause for a person."""
    kinds = list(_kinds(level or 0))
    if not kinds:
        return "left out of the dump"
    names = kinds[0] if len(kinds) == 1 else ", ".join(kinds[:-1]) + " or " + kinds[-1]
    return f"left out by dump level {level}: {names} pages"


def _kinds(level: int) -> Iterator[str]:
    return (name for bits, name in LEVELS if level & bits)
