"""The image of a module as a file: loaded segments put back to where they stood in the ELF file.

readelf -l, objdump and gdb open it. It holds what memory holds: relocated pointers, variables as they are now,
zeros where nothing can be read. Section headers are mostly not loaded: the header then says that there are none.
What is no ELF image is served as it lies in memory.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import EngineError, FaultError
from engine.formats.elf import ElfImage
from engine.memory import Memory
from engine.types import Extent

PLACES: dict[int, tuple[tuple[int, int], ...]] = {64: ((0x28, 8), (0x3C, 4)), 32: ((0x20, 4), (0x30, 4))}
"""(offset, size) in the ELF header of e_shoff, and of e_shnum with e_shstrndx (System V ABI, chapter 4)."""
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
    """What the file is made of: disjoint pieces by ascending offset, zeros between them, and bytes to blank."""

    pieces: tuple[Piece, ...]
    size: int
    blank: tuple[tuple[int, int], ...] = ()


def image_plan(memory: Memory) -> ImagePlan:
    """The plan for a module whose memory begins with its header; flat where that is no ELF image."""
    flat = ImagePlan((Piece(0, 0, memory.size),) if memory.size else (), memory.size)
    try:
        image = ElfImage(memory)
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
    return ImagePlan(tuple(pieces), stop, () if has_sections else PLACES[header.bits])


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
        for start, size in self.plan.blank:
            _blank(buffer, max(0, start - address), min(count, start + size - address))
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
