"""What a file and a loaded image have in common: header, program headers, section headers, build-id.

Everything read is bounded: by the limits below, and by the size of the memory before a byte is asked for.
What does not exist is None or empty; what cannot be is a BadDataError with its address in the memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property

from engine.errors import BadDataError, FaultError
from engine.formats.elf import records
from engine.formats.elf.notes import build_id_of
from engine.formats.elf.records import PAGE, Header, Section, Segment
from engine.memory import Memory

HEAD_SIZE = 2048
"""Bytes read at once at first: header, program headers and, from every linker seen, the build-id."""
SEGMENT_LIMIT = 1 << 20
SECTION_LIMIT = 1 << 18
SECTION_NAMES_LIMIT = 16 << 20
"""Bytes of the table of section names; of all names together, which may overlap, four times as many."""
NOTE_LIMIT = 8 << 10
"""Bytes of one note segment that are searched for a build-id."""
NOTE_COUNT_LIMIT = 16
NAME_LIMIT = 1 << 16
"""Bytes; mangled names of C++ templates reach tens of thousands."""


def page_floor(address: int) -> int:
    """The address of its page."""
    return address & -PAGE


def page_ceiling(address: int) -> int:
    """The address of the page behind, or itself where it is one."""
    return (address + PAGE - 1) & -PAGE


def name_at(table: bytes, offset: int, limit: int = NAME_LIMIT) -> str | None:
    """The string at an offset of a string table; None where none ends within `limit` bytes."""
    stop = table.find(b"\0", offset, offset + limit) if offset < len(table) else -1
    return None if stop < 0 else table[offset:stop].decode("utf-8", "surrogateescape")


class View(ABC):
    """An ELF image over a memory that begins with its header. Not shared between threads."""

    segments_at: int | None = None
    """Where in the memory the program headers lie, if not where the header says."""

    def __init__(self, memory: Memory, head: bytes = b"") -> None:
        """Read the header; `head`, where given, holds the first bytes of `memory`, read before.

        Raises NotRecognisedError where there is no ELF header, BadDataError where it is impossible.
        """
        self.memory = memory
        self._head = head or self._first_bytes()
        self.header: Header = records.parse_header(self._head)

    def _first_bytes(self) -> bytes:
        buffer = bytearray(min(HEAD_SIZE, self.memory.size))
        count = self.memory.read_available(0, memoryview(buffer))
        return bytes(buffer[:count])

    def read(self, address: int, size: int, what: str) -> bytes:
        """`size` bytes of the memory. Raises BadDataError where they would lie outside of it."""
        if size < 0 or address < 0 or address + size > self.memory.size:
            raise BadDataError(max(address, 0), detail=f"{what} would have {size} bytes there, outside of the image")
        if address + size <= len(self._head):
            return self._head[address : address + size]
        return self.memory.read(address, size)

    # -- where things lie -----------------------------------------------------------------------------

    @abstractmethod
    def locate(self, address: int, what: str) -> int:
        """Where in the memory the byte lies that is linked to `address`. Raises BadDataError where nowhere."""

    @abstractmethod
    def locate_offset(self, offset: int, size: int) -> int | None:
        """Where in the memory a range of the file lies; None where it is not in there."""

    @abstractmethod
    def room(self, address: int) -> int:
        """How many bytes from linked `address` on there are at the most; 0 where none."""

    @abstractmethod
    def unrelocated(self, value: int) -> int:
        """The linked address that a pointer means which a loader may have relocated."""

    @abstractmethod
    def locate_segment(self, segment: Segment) -> int:
        """Where in the memory a segment begins."""

    def read_linked(self, address: int, size: int, what: str) -> bytes:
        """`size` bytes from linked `address` on. Raises BadDataError where the image has not so many there."""
        at = self.locate(address, what)
        if not 0 <= size <= self.room(address):
            raise BadDataError(at, detail=f"{what} would have {size} bytes, more than the image has there")
        return self.read(at, size, what)

    def read_linked_up_to(self, address: int, size: int, what: str) -> bytes:
        """At the most `size` bytes from linked `address` on: fewer where the image or a page ends before."""
        at = self.locate(address, what)
        buffer = bytearray(min(size, self.room(address)))
        return bytes(buffer[: self.memory.read_available(at, memoryview(buffer))])

    # -- tables ---------------------------------------------------------------------------------------

    @cached_property
    def _section_zero(self) -> Section | None:
        """Section header 0, where counts stand that are too large for the header."""
        header = self.header
        if not header.sections_offset:
            return None
        size = self._entry_size(header.section_entry_size, records.section_size(header.bits), "section headers")
        at = self.locate_offset(header.sections_offset, size)
        if at is None:
            return None
        return next(records.parse_sections(self.read(at, size, "section header 0"), header))[1]

    def _entry_size(self, stated: int, right: int, what: str) -> int:
        if stated != right:
            raise BadDataError(0, detail=f"the ELF header says that {what} have {stated} bytes, not {right}")
        return right

    def segment_count(self) -> int:
        """The true number of program headers."""
        count = self.header.segment_count
        if count == records.PN_XNUM and self._section_zero is not None:
            count = self._section_zero.info
        return count

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The program headers in their order. Raises BadDataError for an impossible table."""
        header, count = self.header, self.segment_count()
        if not count or not header.segments_offset:
            return ()
        size = self._entry_size(header.segment_entry_size, records.segment_size(header.bits), "program headers")
        at = self.segments_at if self.segments_at is not None else header.segments_offset
        if count > SEGMENT_LIMIT:
            raise BadDataError(at, detail=f"{count} program headers")
        data = self.read(at, size * count, "the table of program headers")
        return tuple(records.parse_segments(data, header))

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The section headers in their order, the empty one at 0 included; () where there is no table.

        A loaded image has none, but for a few like the vDSO. Raises BadDataError for an impossible table.
        """
        header, zero = self.header, self._section_zero
        if zero is None:
            return ()
        count = header.section_count or zero.size
        size = records.section_size(header.bits) * count
        if count > SECTION_LIMIT:
            raise BadDataError(header.sections_offset, detail=f"{count} section headers")
        at = self.locate_offset(header.sections_offset, size)
        if at is None:
            return ()
        rows = list(records.parse_sections(self.read(at, size, "the table of section headers"), header))
        index = zero.link if header.names_index == records.SHN_XINDEX else header.names_index
        names = self._section_names(rows[index][1]) if 0 < index < len(rows) else b""
        found, budget = [], 4 * SECTION_NAMES_LIMIT
        for offset, section in rows:
            name = name_at(names, offset) or ""
            budget -= len(name)
            if budget < 0:
                raise BadDataError(at, detail="the names of the sections overlap too much")
            found.append(replace(section, name=name))
        return tuple(found)

    def _section_names(self, section: Section) -> bytes:
        if section.kind == records.SHT_NOBITS or section.size > SECTION_NAMES_LIMIT:
            return b""
        at = self.locate_offset(section.offset, section.size)
        return b"" if at is None else self.read(at, section.size, "the names of sections")

    # -- the image ------------------------------------------------------------------------------------

    @cached_property
    def loads(self) -> tuple[Segment, ...]:
        """The segments that a loader maps, those of 0 bytes left out. Raises BadDataError for impossible ones."""
        found = tuple(s for s in self.segments if s.kind == records.PT_LOAD and s.size)
        for segment in found:
            if segment.stop > self.header.address_stop or segment.file_size > segment.size:
                raise BadDataError(0, detail=f"a segment of {segment.size} bytes at {segment.address:#x}")
        return found

    @cached_property
    def link_base(self) -> int:
        """The address to which the image's first byte is linked: 0 in most shared objects.

        The page of the ELF header, or, where the header is not loaded, the lowest page that is.
        """
        for segment in self.loads:
            if segment.offset < PAGE and segment.address >= segment.offset:
                return page_floor(segment.address - segment.offset)
        return min((page_floor(segment.address) for segment in self.loads), default=0)

    @cached_property
    def load_size(self) -> int:
        """Bytes from the link base to the last page of the last loaded segment; 0 where nothing is loaded."""
        stop = max((page_ceiling(segment.stop) for segment in self.loads), default=self.link_base)
        return stop - self.link_base

    # -- notes ----------------------------------------------------------------------------------------

    def build_id(self) -> str | None:
        """The GNU build-id in hexadecimal, as readelf(1) prints it; None where there is none to be read."""
        notes = [s for s in self.segments if s.kind == records.PT_NOTE]
        for segment in notes[:NOTE_COUNT_LIMIT]:
            found = self._build_id_at(segment)
            if found is not None:
                return found
        return self._build_id_of_sections()

    def _build_id_at(self, segment: Segment) -> str | None:
        try:
            at = self.locate_segment(segment)
            data = self.read(at, min(segment.file_size, NOTE_LIMIT), "a note")
        except FaultError:
            return None
        return build_id_of(data, self.header.order, segment.alignment)

    def _build_id_of_sections(self) -> str | None:
        """For objects without program headers: kernel modules, relocatable files."""
        try:
            sections = [s for s in self.sections if s.kind == records.SHT_NOTE]
        except FaultError:
            return None
        for section in sections[:NOTE_COUNT_LIMIT]:
            try:
                at = self.locate_offset(section.offset, section.size)
                data = b"" if at is None else self.read(at, min(section.size, NOTE_LIMIT), "a note")
            except FaultError:
                continue
            found = build_id_of(data, self.header.order)
            if found is not None:
                return found
        return None
