"""ELF as a file and ELF as a loaded image: two ways to find things, one reader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from engine.errors import BadDataError
from engine.formats.elf.dynamic import DT_SONAME, Dynamic
from engine.formats.elf.records import ET_REL, PN_XNUM, PT_DYNAMIC, PT_LOAD, Segment
from engine.formats.elf.symbols import Symbols
from engine.formats.elf.view import View
from engine.memory import Memory
from engine.types import ExportInfo, ImportInfo, SectionInfo

LOAD_LIMIT = 1024
"""Loaded segments of an image with symbols; linkers make ten, a memory dump a million."""


class Elf(View):
    """An ELF image: an `ElfFile` or an `ElfImage`."""

    @cached_property
    def dynamic(self) -> Dynamic | None:
        """The dynamic section; None where there is none. Raises BadDataError for an impossible one."""
        if len(self.loads) > LOAD_LIMIT:
            return None  # a core file: what it says of images is not about itself
        for segment in self.segments:
            if segment.kind == PT_DYNAMIC and segment.file_size:
                return Dynamic(self, self.locate_segment(segment), segment.file_size)
        return None

    @cached_property
    def symbols(self) -> Symbols | None:
        """The dynamic symbols; None where there are none. Raises BadDataError where they cannot be read."""
        dynamic = self.dynamic
        return Symbols(dynamic) if dynamic is not None and dynamic.symbol_count else None

    @property
    def skipped(self) -> int:
        """Symbols left out so far since they could not be read."""
        return self.symbols.skipped if self.symbols is not None else 0

    def soname(self) -> str | None:
        """The name by which others need this library; None where it has none."""
        from_tag = self.dynamic.values.get(DT_SONAME) if self.dynamic is not None else None
        return self.dynamic.string(from_tag) if self.dynamic is not None and from_tag is not None else None

    def needed(self) -> list[str]:
        """The names of the libraries that it needs, in their order; those that cannot be read are left out."""
        if self.dynamic is None:
            return []
        names = (self.dynamic.string(offset) for offset in self.dynamic.needed_names)
        return [name for name in names if name is not None]

    def exports(self) -> Iterator[ExportInfo]:
        """The symbols that it offers; see `Symbols.exports`. Raises BadDataError where they cannot be read."""
        return iter(()) if self.symbols is None else self.symbols.exports()

    def imports(self) -> Iterator[ImportInfo]:
        """The symbols that it wants; see `Symbols.imports`. Raises BadDataError where they cannot be read."""
        return iter(()) if self.symbols is None else self.symbols.imports()

    def section_infos(self, base: int = 0) -> Iterator[SectionInfo]:
        """The sections that are in memory when the image is loaded at `base`, in the order of the table.

        Those outside of the loaded range are left out. A relocatable object has no addresses: nothing.
        """
        size = self.load_size
        for section in self.sections if self.header.kind != ET_REL else ():
            offset = section.address - self.link_base
            if section.occupies_memory and 0 <= offset <= size - section.size:
                yield SectionInfo(section.name, base + offset, section.size)

    def segment_infos(self, base: int = 0) -> Iterator[SectionInfo]:
        """The segments of the image loaded at `base`, for images without sections: `LOAD#0.r-x`, `DYNAMIC#0`."""
        counts: dict[str, int] = {}
        for segment in self.segments:
            kind, offset = segment.kind_name, segment.address - self.link_base
            if not segment.size or offset < 0 or offset + segment.size > self.load_size:
                continue
            number = counts[kind] = counts.get(kind, -1) + 1
            name = f"{kind}#{number}.{segment.permissions}" if segment.kind == PT_LOAD else f"{kind}#{number}"
            yield SectionInfo(name, base + offset, segment.size)


class ElfFile(Elf):
    """An ELF file: address 0 of the memory is its first byte."""

    def _load_of(self, address: int) -> Segment | None:
        for segment in self.loads:
            if segment.address <= address < segment.address + segment.file_size:
                return segment
        return None

    def locate(self, address: int, what: str) -> int:
        """See `View.locate`."""
        segment = self._load_of(address)
        if segment is None:
            raise BadDataError(0, detail=f"{what} would lie at {address:#x}, where nothing is loaded")
        return address - segment.address + segment.offset

    def locate_offset(self, offset: int, size: int) -> int | None:
        """See `View.locate_offset`."""
        return offset

    def room(self, address: int) -> int:
        """See `View.room`."""
        segment = self._load_of(address)
        if segment is None:
            return 0
        skip = address - segment.address
        return max(0, min(segment.file_size - skip, self.memory.size - segment.offset - skip))

    def unrelocated(self, value: int) -> int:
        """See `View.unrelocated`: nobody has touched a file."""
        return value

    def locate_segment(self, segment: Segment) -> int:
        """See `View.locate_segment`."""
        return segment.offset


class ElfImage(Elf):
    """An image as a loader left it in memory: address 0 of the memory is the first byte of its header.

    Only what is loaded is there, and the section headers are not. Some loaders add the load address to
    the pointers of the dynamic section (glibc, to most of them), others leave them (musl, the kernel of
    its vDSO): both are understood, entry by entry.
    """

    def __init__(
        self, memory: Memory, base: int = 0, head: bytes = b"", segments_at: int | None = None
    ) -> None:
        """`base` is the address at which the image lies in the address space of its process."""
        super().__init__(memory, head)
        self.base = base
        self.segments_at = segments_at

    def segment_count(self) -> int:
        """See `View.segment_count`: no kernel loads an image that has more than its header can say."""
        if self.header.segment_count == PN_XNUM:
            raise BadDataError(0, detail=f"{PN_XNUM} or more program headers in a loaded image")
        return self.header.segment_count

    def locate(self, address: int, what: str) -> int:
        """See `View.locate`."""
        offset = address - self.link_base
        if not 0 <= offset < self.memory.size:
            raise BadDataError(max(offset, 0), detail=f"{what} would lie outside of the image")
        return offset

    def locate_offset(self, offset: int, size: int) -> int | None:
        """See `View.locate_offset`: what a loaded segment takes of the file is there."""
        for segment in self.loads:
            if segment.offset <= offset and offset + size <= segment.offset + segment.file_size:
                at = offset - segment.offset + segment.address - self.link_base
                return at if 0 <= at <= self.memory.size - size else None
        return None

    def room(self, address: int) -> int:
        """See `View.room`."""
        return max(0, self.memory.size - (address - self.link_base)) if address >= self.link_base else 0

    def unrelocated(self, value: int) -> int:
        """See `View.unrelocated`."""
        linked = value - self.base + self.link_base
        if self._is_inside(linked) and not self._is_inside(value):
            return linked
        return value

    def _is_inside(self, address: int) -> bool:
        return 0 <= address - self.link_base < self.load_size

    def locate_segment(self, segment: Segment) -> int:
        """See `View.locate_segment`."""
        return self.locate(segment.address, "a segment")
