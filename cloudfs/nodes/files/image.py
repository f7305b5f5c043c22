"""The image of a module as a file: loaded segments put back to where they stood in the ELF file.

readelf, objdump and gdb open it. It holds what memory holds: relocated pointers, variables as they are now, zeros
where nothing can be read. Two things are as in the file, without which no tool reads it: section headers are mostly
not loaded, and the header then says that there are none; the addresses in the dynamic section, to which loaders add
the base, are linked addresses again. What is no ELF image is served as it lies in memory.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator
from typing import Literal

from engine.errors import EngineError, FaultError
from engine.formats.elf import ElfImage
from engine.formats.elf.records import PT_DYNAMIC
from engine.memory import Memory
from engine.records import dataclass
from engine.types import Extent

_SECTION_FIELDS = {64: ((0x28, 8), (0x3C, 4)), 32: ((0x20, 4), (0x30, 4))}
"""(offset, size) in the ELF header of e_shoff, and of e_shnum with e_shstrndx (System V ABI, chapter 4)."""
_ADDRESS_TAGS = frozenset((3, 4, 5, 6, 7, 12, 13, 17, 23, 25, 26, 32, 34, 36)).union(
    (0x6FFFFFF0, 0x6FFFFFFC, 0x6FFFFFFE), range(0x6FFFFE00, 0x6FFFFF00)
)
"""Tags of the dynamic section whose value is an address (System V ABI, chapter 5; DT_ADDRRNGLO … of <elf.h>)."""
DYNAMIC_LIMIT = 1 << 16
"""Bytes of a dynamic section that are looked at."""
SLACK = 16 << 20
"""Bytes by which offsets in the file may exceed twice the module's size in memory; more is a hostile header."""


@dataclass(frozen=True, slots=True, order=True)
class Piece:
    """`size` bytes at `offset` of the file that lie at `address` of the module's memory."""

    offset: int
    address: int
    size: int


@dataclass(frozen=True, slots=True)
class ImagePlan:
    """What the file is made of: disjoint pieces by ascending offset, zeros between them, and bytes laid over it."""

    pieces: tuple[Piece, ...]
    size: int
    patches: tuple[tuple[int, bytes], ...] = ()

    def offset_of(self, address: int, size: int) -> int | None:
        """Where in the file `size` bytes of the memory stand, or None."""
        for piece in self.pieces:
            if piece.address <= address and address + size <= piece.address + piece.size:
                return piece.offset + address - piece.address
        return None


def image_plan(memory: Memory, base_address: int = 0) -> ImagePlan:
    """The plan for a module whose memory begins with its header, and lies at `base_address` of its address space.

    Flat where that is no ELF image.
    """
    flat = ImagePlan((Piece(0, 0, memory.size),) if memory.size else (), memory.size)
    try:
        image = ElfImage(memory, base_address)
        header, loads, base = image.header, image.loads, image.link_base
        table = header.section_count * header.section_entry_size
        has_sections = bool(table) and image.locate_offset(header.sections_offset, table) is not None
    except (EngineError, OSError):
        return flat
    pieces: list[Piece] = []
    stop = 0
    for segment in sorted(loads, key=lambda load: load.offset):
        offset, address, size = segment.offset, segment.address - base, segment.file_size
        if offset < stop:  # two segments share bytes of the file: the first one has them
            cut = min(stop - offset, size)
            offset, address, size = offset + cut, address + cut, size - cut
        size = min(size, memory.size - address)
        if address < 0 or size <= 0 or offset + size > 2 * memory.size + SLACK:
            continue
        pieces.append(Piece(offset, address, size))
        stop = offset + size
    if not pieces or pieces[0].offset:
        return flat
    patches = () if has_sections else tuple((at, bytes(size)) for at, size in _SECTION_FIELDS[header.bits])
    plan = ImagePlan(tuple(pieces), stop, patches)
    return ImagePlan(plan.pieces, stop, patches + tuple(_linked_addresses(image, plan)))


def _linked_addresses(image: ElfImage, plan: ImagePlan) -> Iterator[tuple[int, bytes]]:
    """What to lay over the addresses in the dynamic section to which the loader has added the base."""
    word = image.header.bits // 8
    layout = struct.Struct(image.header.order + ("QQ" if word == 8 else "II"))
    order: Literal["little", "big"] = "big" if image.header.big_endian else "little"
    for segment in image.segments:
        if segment.kind != PT_DYNAMIC:
            continue
        try:
            at = image.locate_segment(segment)
            size = min(segment.file_size, DYNAMIC_LIMIT) // layout.size * layout.size
            data = image.read(at, size, "the dynamic section")
        except EngineError:
            return
        for index, (tag, value) in enumerate(layout.iter_unpack(data)):
            linked = image.unrelocated(value)
            offset = plan.offset_of(at + index * layout.size + word, word)
            if tag in _ADDRESS_TAGS and linked != value and offset is not None:
                yield offset, linked.to_bytes(word, order)


class ImageMemory(Memory):
    """A module's memory in the layout of its file."""

    def __init__(self, memory: Memory, plan: ImagePlan) -> None:
        self.memory = memory
        self.plan = plan
        self._offsets = [piece.offset for piece in plan.pieces]
        aligned = all((piece.offset - piece.address) % memory.page_size == 0 for piece in plan.pieces)
        self.page_size = memory.page_size if aligned else 1

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.plan.size

    @property
    def may_block(self) -> bool:
        """As the module's memory."""
        return self.memory.may_block

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the file, address, size) of what of [start, stop) lies in memory."""
        for piece in self.plan.pieces[max(0, bisect.bisect_right(self._offsets, start) - 1) :]:
            if piece.offset >= stop:
                return
            low, high = max(start, piece.offset), min(stop, piece.offset + piece.size)
            if low < high:
                yield low, piece.address + low - piece.offset, high - low

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`; what lies between the pieces is zeros."""
        self._read(address, buffer, nowait=False)

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        return self._read(address, buffer, nowait=True)

    def _read(self, address: int, buffer: memoryview, *, nowait: bool) -> bool:
        count = min(len(buffer), self.size - address)
        done = 0
        for offset, at, size in self._pieces(address, address + count):
            here = offset - address
            _blank(buffer, done, here)
            part = buffer[here : here + size]
            try:
                if not nowait:
                    self.memory.readinto(at, part)
                elif not self.memory.readinto_nowait(at, part):
                    return False
            except FaultError as error:
                raise error.moved(offset - at) from None
            done = here + size
        _blank(buffer, done, count)
        for start, patch in self.plan.patches:
            low, high = max(start, address), min(start + len(patch), address + count)
            if low < high:
                buffer[low - address : high - address] = patch[low - start : high - start]
        if count < len(buffer):
            raise FaultError(address + max(0, count))
        return True

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        stop = self.size if stop is None else min(stop, self.size)
        for offset, at, size in self._pieces(start, stop):
            for extent in self.memory.extents(at, at + size):
                yield Extent(extent.start - at + offset, extent.size)


def _blank(buffer: memoryview, start: int, stop: int) -> None:
    if start < stop:
        buffer[start:stop] = bytes(stop - start)
