"""Where the pages of a kdump file lie: bitmaps and descriptors, asked for in columns, and what unpacks a page."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.decoders import Unpack, decoder
from engine.errors import BadDataError, FaultError, FaultKind, PluginError
from engine.formats.kdump.bitmap import PageBitmap, Pfns
from engine.formats.kdump.header import KdumpHeader
from engine.formats.kdump.lzo import decompress
from engine.memory import Memory
from engine.records import dataclass

ZLIB, LZO, SNAPPY, ZSTD = 0x1, 0x2, 0x4, 0x20
"""How a page is packed: flags of its descriptor, and of the header's status."""
INCOMPLETE = 0x8
"""In the status: there was no room for all pages."""
DESCRIPTOR_SIZE = 24
_DESCRIPTOR = {order: struct.Struct(order + "QIIQ") for order in "<>"}
_PACKED = ZLIB | LZO | SNAPPY | ZSTD
_KINDS = {
    order: np.dtype([("offset", order + "u8"), ("size", order + "u4"), ("flags", order + "u4"), ("rest", order + "u8")])
    for order in "<>"
}


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a dump, which holds the pages of [first, stop); `base` is where it begins in the joined source."""

    header: KdumpHeader
    first: int
    stop: int
    base: int = 0


class PageTable:
    """The descriptors of all pages that were dumped, over one file or the parts of a split dump."""

    def __init__(self, source: Memory, parts: Sequence[Part], dumped: PageBitmap) -> None:
        """`parts` ascend and are disjoint; `dumped` is the same in all of them."""
        self.source = source
        self.dumped = dumped
        self.order = parts[0].header.order
        self.page_size = parts[0].header.page_size
        self._firsts = np.array([part.first for part in parts], np.uint64)
        self._stops = np.array([part.stop for part in parts], np.uint64)
        self._bases = np.array([part.base for part in parts], np.uint64)
        self._whole = len(parts) == 1 and not parts[0].first and parts[0].stop >= dumped.count
        ranks = [dumped.rank(part.first) for part in parts]
        # The descriptor of the first page of a part is the first in its file: what comes before it is in others.
        starts = [
            (part.base + part.header.descriptors_at - DESCRIPTOR_SIZE * rank) % (1 << 64)
            for part, rank in zip(parts, ranks, strict=True)
        ]
        self._starts = np.array(starts, np.uint64)
        self._dtype = _KINDS[self.order]
        self._unpackers: dict[int, Unpack] = {}
        self.zeros = np.array([self._zero_page(part) for part in parts], np.uint64)

    def holds(self, pfns: Pfns) -> npt.NDArray[np.bool_]:
        """Whether each page was dumped, into one of the parts that are there."""
        there = self.dumped.has(pfns)
        if self._whole:
            return there
        index = np.searchsorted(self._firsts, pfns, "right") - 1
        found: npt.NDArray[np.bool_] = there & (index >= 0) & (pfns < self._stops[index])
        return found

    def holds_one(self, pfn: int) -> bool:
        """Whether a page was dumped, into one of the parts that are there."""
        return self.dumped[pfn] and (self._whole or bool(self.holds(np.array([pfn], np.uint64))[0]))

    def descriptors(self, pfns: Pfns) -> tuple[Pfns, Pfns, Pfns]:
        """Place, size and flags of pages that it `holds`, place and size 0 where the file is cut."""
        index = np.searchsorted(self._firsts, pfns, "right") - 1
        at = self._starts[index] + np.uint64(DESCRIPTOR_SIZE) * self.dumped.ranks(pfns)
        rows = np.zeros((len(pfns), DESCRIPTOR_SIZE), np.uint8)
        self.source.gather(at, rows)
        found = rows.view(self._dtype)[:, 0]
        offsets = found["offset"].astype(np.uint64)
        return np.where(offsets, offsets + self._bases[index], 0), found["size"], found["flags"]

    def is_zero(self, offsets: Pfns) -> npt.NDArray[np.bool_]:
        """Which of these places is that of the page of zeros that all such pages share."""
        return np.isin(offsets, self.zeros)

    def page(self, pfn: int, most: int | None = None) -> bytes:
        """The bytes of a page that it `holds`; with `most` at least so many of the first, in less time.

        Raises BadDataError, or another FaultError, whose address is the place in the file.
        """
        index = int(self._firsts.searchsorted(np.uint64(pfn), "right")) - 1 if len(self._firsts) > 1 else 0
        at = (int(self._starts[index]) + DESCRIPTOR_SIZE * self.dumped.rank(pfn)) % (1 << 64)
        offset, size, flags, _ = _DESCRIPTOR[self.order].unpack(self.source.read(at, DESCRIPTOR_SIZE))
        if not offset:
            raise FaultError(at, FaultKind.SOURCE, "there was no room for the page when the dump was written")
        return self._unpacked(offset + int(self._bases[index]), size, flags, most)

    def _unpacked(self, offset: int, size: int, flags: int, most: int | None) -> bytes:
        packing = flags & _PACKED
        if not 0 < size <= 2 * self.page_size or (not packing and size != self.page_size):
            raise BadDataError(offset, detail=f"its descriptor says that it has {size} bytes")
        data = self.source.read(offset, size)
        if not packing:
            return data
        try:
            return self._unpack(packing, data, most)
        except ValueError as error:
            raise BadDataError(offset, detail=str(error)) from None
        except PluginError as error:
            raise FaultError(offset, FaultKind.SOURCE, str(error)) from None

    def _unpack(self, packing: int, data: bytes, most: int | None) -> bytes:
        """A page, or its first bytes. Raises ValueError where it is damaged, PluginError where a library is missing."""
        if packing == ZLIB:
            return _inflated(data, self.page_size, most)
        if packing == LZO:
            return decompress(data, self.page_size, most)
        if packing not in (SNAPPY, ZSTD):
            raise ValueError(f"it is packed in a way that is not known: {packing:#x}")
        page = bytearray(self.page_size)
        count = self.unpacker(packing)(data, page)
        if count != len(page):
            raise ValueError(f"its data hold {count} bytes, not {len(page)}")
        return bytes(page)

    def unpacker(self, packing: int) -> Unpack:
        """What a library gives to unpack with. Raises PluginError where it is missing."""
        found = self._unpackers.get(packing)
        if found is None:
            found = self._unpackers[packing] = decoder("zstd" if packing == ZSTD else "raw snappy", "kdump")
        return found

    def _zero_page(self, part: Part) -> int:
        """Where the page of zeros would lie: the first behind the descriptors. 0 where something else is there."""
        rows = self.dumped.rank(part.stop) - self.dumped.rank(part.first)
        at = part.base + part.header.descriptors_at + DESCRIPTOR_SIZE * rows
        try:
            return at if not any(self.source.read(at, self.page_size)) else 0
        except FaultError:
            return 0


def _inflated(data: bytes, size: int, most: int | None) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        made = unpacker.decompress(data, most or size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(made) != size and most is None:
        raise ValueError(f"its data hold {'more' if len(made) > size else len(made)} bytes, not {size}")
    return made
