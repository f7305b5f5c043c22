"""LiME images: ranges of physical memory, each behind a header that says where it lay.

    magic u32 · version u32 · first address u64 · last address u64 (inclusive) · reserved u64 · the bytes

Version 1 of magic «EMiL» holds the bytes as they are; version 2 of magic «AVML» packs them (`engine.formats.avml`).
Nothing says how many ranges there are: they follow one another to the end of the file.

Sources: LiME's documentation of its format; AVML 0.9 src/image.rs, which writes both and leaves out every block of
16 MiB that holds nothing but zeros.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise

from engine.errors import FaultError, NotRecognisedError
from engine.memory import Memory
from engine.records import dataclass
from engine.types import ADDRESS_SPACE, Extent

HEADER = struct.Struct("<IIQQQ")
LIME = (0x4C694D45, 1)
AVML = (0x4C4D5641, 2)
RECORD_LIMIT = 1 << 18
"""More ranges than any file has: 4 TiB in the blocks of AVML."""
ELIDED_BLOCK = 16 << 20
"""MAX_BLOCK_SIZE of AVML: a block of so many bytes that are all zeros is not written."""


@dataclass(frozen=True, slots=True)
class Record:
    """One range: `size` bytes at the physical address `start`, which take `stored` bytes at `offset` of the file."""

    start: int
    size: int
    offset: int
    stored: int

    @property
    def stop(self) -> int:
        """First address behind it."""
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class Records:
    """The ranges of a file, by address and disjoint, and sentences on what of it is damaged."""

    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()

    @property
    def zeros(self) -> tuple[Extent, ...]:
        """Gaps of whole blocks behind a whole block, which AVML leaves out where they hold nothing but zeros."""
        gaps = []
        for one, two in pairwise(self.records):
            gap = two.start - one.stop
            if gap and not gap % ELIDED_BLOCK and one.size == ELIDED_BLOCK:
                gaps.append(Extent(one.stop, gap))
        return tuple(gaps)

    @property
    def by_avml(self) -> bool:
        """Whether the ranges are cut as AVML cuts them, which LiME itself never does."""
        cut = any(one.stop == two.start and one.size == ELIDED_BLOCK for one, two in pairwise(self.records))
        return cut and all(record.size <= ELIDED_BLOCK for record in self.records)


def version_of(file: Memory) -> tuple[int, int]:
    """`LIME` or `AVML`: what a file begins with. Raises NotRecognisedError for anything else."""
    try:
        found = struct.unpack("<II", file.read(0, 8))
    except FaultError:
        raise NotRecognisedError("the file is too short for a LiME or AVML header") from None
    for magic, version in (LIME, AVML):
        if found == (magic, version):
            return magic, version
        if found[0] == magic:
            raise NotRecognisedError(f"its header says version {found[1]}, and only version {version} is known")
    raise NotRecognisedError("it begins with neither LiME's magic nor AVML's")


def read_header(file: Memory, offset: int, kind: tuple[int, int]) -> Extent | None:
    """The addresses that the header at `offset` announces; None where no header of that kind stands there."""
    try:
        magic, version, first, last, _ = HEADER.unpack(file.read(offset, HEADER.size))
    except FaultError:
        return None
    if (magic, version) != kind or not first <= last < ADDRESS_SPACE - 1:
        return None
    return Extent(first, last + 1 - first)


def lime_records(file: Memory) -> Records:
    """The ranges of a LiME image, up to the first header that is damaged or missing.

    Raises NotRecognisedError where there is not a single sound one.
    """
    size, offset = file.size, 0
    found: list[Record] = []
    notes: list[str] = []
    while offset < size:
        extent = read_header(file, offset, LIME)
        if extent is None or len(found) == RECORD_LIMIT:
            notes.append(
                f"at offset {offset:#x} of the file no range begins that makes sense: "
                f"its last {size - offset} bytes are left out"
            )
            break
        data = offset + HEADER.size
        have = min(extent.size, size - data)
        if have:
            found.append(Record(extent.start, have, data, have))
        if have < extent.size:
            notes.append(
                f"the file is cut off: of the range {extent.start:#x}-{extent.stop:#x} at its offset {offset:#x} "
                f"the last {extent.size - have} bytes are missing"
            )
        offset = data + extent.size
    return disjoint(found, notes)


def disjoint(found: Iterable[Record], notes: list[str]) -> Records:
    """The records by address, without those that overlap others. Raises NotRecognisedError where none is left."""
    kept: list[Record] = []
    dropped = 0
    for record in sorted(found, key=lambda record: record.start):
        if kept and record.start < kept[-1].stop:
            dropped += 1
        else:
            kept.append(record)
    if not kept:
        raise NotRecognisedError("; ".join(["no range of memory in it is whole", *notes]))
    if dropped:
        notes.append(f"{dropped} ranges overlap others and are left out")
    return Records(tuple(kept), tuple(notes))
