"""The fixed structures of ELF: header, program headers, section headers; frozen records without I/O.

Layouts: the generic System V ABI, chapters 4 and 5, and <elf.h> of glibc 2.36. Both classes, both byte orders.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from engine.errors import BadDataError, NotRecognisedError
from engine.formats.elf.machines import architecture_name
from engine.records import dataclass

MAGIC = b"\x7fELF"
IDENT_SIZE = 16
PAGE = 4096

ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_SHLIB, PT_PHDR, PT_TLS = 1, 2, 3, 4, 5, 6, 7
PF_X, PF_W, PF_R = 1, 2, 4
SHT_NULL, SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_NOTE, SHT_NOBITS, SHT_DYNSYM = 0, 1, 2, 3, 7, 8, 11
SHF_WRITE, SHF_ALLOC, SHF_TLS = 1, 2, 0x400
PN_XNUM = 0xFFFF
"""e_phnum where the true count stands in sh_info of section 0."""
SHN_XINDEX = 0xFFFF
"""e_shstrndx where the true index stands in sh_link of section 0."""

_SEGMENT_NAMES = {
    1: "LOAD",
    2: "DYNAMIC",
    3: "INTERP",
    4: "NOTE",
    5: "SHLIB",
    6: "PHDR",
    7: "TLS",
    0x6474E550: "GNU_EH_FRAME",
    0x6474E551: "GNU_STACK",
    0x6474E552: "GNU_RELRO",
    0x6474E553: "GNU_PROPERTY",
    0x6474E554: "GNU_SFRAME",
}

_HEADER_64, _HEADER_32 = "HHIQQQIHHHHHH", "HHIIIIIHHHHHH"
_SEGMENT_64, _SEGMENT_32 = "IIQQQQQQ", "IIIIIIII"
_SECTION_64, _SECTION_32 = "IIQQQQIIQQ", "IIIIIIIIII"


@dataclass(frozen=True, slots=True)
class Header:
    """The ELF header; offsets count from its first byte."""

    bits: int
    """32 or 64."""
    big_endian: bool
    kind: int
    """e_type: 1 relocatable, 2 executable, 3 shared object (or a position-independent executable), 4 core."""
    machine: int
    entry: int
    flags: int
    segments_offset: int
    segment_count: int
    """e_phnum as it stands there: PN_XNUM means «see section 0»."""
    sections_offset: int
    section_count: int
    """e_shnum as it stands there: 0 means «see section 0» where there is a table."""
    names_index: int
    """e_shstrndx as it stands there."""
    segment_entry_size: int
    section_entry_size: int

    @property
    def architecture(self) -> str:
        """Name of the machine, as `x86_64`, `i386`, `aarch64`."""
        return architecture_name(self.machine, self.bits, self.big_endian)

    @property
    def order(self) -> str:
        """The byte order as struct and numpy write it."""
        return ">" if self.big_endian else "<"

    @property
    def address_stop(self) -> int:
        """First address behind the address space of its class."""
        return 1 << self.bits


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header: a part of the file and where it goes in memory."""

    kind: int
    """p_type: PT_LOAD, PT_NOTE …"""
    flags: int
    offset: int
    address: int
    """p_vaddr: before a loader has moved the image."""
    physical: int
    file_size: int
    size: int
    alignment: int

    @property
    def kind_name(self) -> str:
        """The kind as readelf(1) writes it."""
        return _SEGMENT_NAMES.get(self.kind, f"{self.kind:#x}")

    @property
    def permissions(self) -> str:
        """Three characters as /proc/PID/maps begins its permissions: `r-x`."""
        return "".join(
            letter if self.flags & flag else "-" for letter, flag in (("r", PF_R), ("w", PF_W), ("x", PF_X))
        )

    @property
    def stop(self) -> int:
        """First address behind the segment in memory."""
        return self.address + self.size


@dataclass(frozen=True, slots=True)
class Section:
    """One section header."""

    name: str
    kind: int
    """sh_type: SHT_PROGBITS, SHT_NOBITS …"""
    flags: int
    address: int
    """sh_addr, before a loader has moved the image; 0 for what is not loaded."""
    offset: int
    size: int
    link: int
    info: int
    entry_size: int

    @property
    def occupies_memory(self) -> bool:
        """Whether the loaded image has these bytes at `address`; .tbss, which only threads have, does not."""
        return bool(self.flags & SHF_ALLOC) and not (self.flags & SHF_TLS and self.kind == SHT_NOBITS)


def header_size(bits: int) -> int:
    """Bytes of the ELF header."""
    return 64 if bits == 64 else 52


def segment_size(bits: int) -> int:
    """Bytes of one program header."""
    return 56 if bits == 64 else 32


def section_size(bits: int) -> int:
    """Bytes of one section header."""
    return 64 if bits == 64 else 40


def parse_header(data: bytes) -> Header:
    """The header that `data` begins with.

    Raises NotRecognisedError where that is no ELF header, BadDataError where it is an impossible one.
    """
    if data[:4] != MAGIC:
        raise NotRecognisedError(f"not an ELF image: it begins with {data[:4].hex(' ') or 'nothing'}, not 7f 45 4c 46")
    if len(data) < IDENT_SIZE:
        raise BadDataError(len(data), detail="the ELF header is cut")
    bits = {1: 32, 2: 64}.get(data[4])
    order = {1: "<", 2: ">"}.get(data[5])
    if bits is None or order is None:
        raise BadDataError(4, detail=f"ELF class {data[4]} and byte order {data[5]} do not exist")
    if len(data) < header_size(bits):
        raise BadDataError(len(data), detail="the ELF header is cut")
    layout = order + (_HEADER_64 if bits == 64 else _HEADER_32)
    (
        kind, machine, _, entry, segments, sections, flags, _, segment_entry, segment_count,
        section_entry, section_count, names,
    ) = struct.unpack_from(layout, data, IDENT_SIZE)  # fmt: skip
    return Header(
        bits, order == ">", kind, machine, entry, flags, segments, segment_count, sections, section_count,
        names, segment_entry, section_entry,
    )  # fmt: skip


def parse_segments(data: bytes, header: Header) -> Iterator[Segment]:
    """The program headers in `data`, which holds whole ones."""
    if header.bits == 64:
        for kind, flags, offset, address, physical, file_size, size, align in struct.iter_unpack(
            header.order + _SEGMENT_64, data
        ):
            yield Segment(kind, flags, offset, address, physical, file_size, size, align)
        return
    for kind, offset, address, physical, file_size, size, flags, align in struct.iter_unpack(
        header.order + _SEGMENT_32, data
    ):
        yield Segment(kind, flags, offset, address, physical, file_size, size, align)


def parse_sections(data: bytes, header: Header) -> Iterator[tuple[int, Section]]:
    """The section headers in `data` with the offsets of their names, which are still empty."""
    layout = header.order + (_SECTION_64 if header.bits == 64 else _SECTION_32)
    for name, kind, flags, address, offset, size, link, info, _, entry_size in struct.iter_unpack(layout, data):
        yield name, Section("", kind, flags, address, offset, size, link, info, entry_size)
