"""The .symtab of an ELF file: what the linker knew of every symbol, read by columns.

Sources: System V ABI, generic part, chapter 4 (Elf64_Sym, Elf32_Sym); nm(1) for the letters.
"""

from __future__ import annotations

import numpy as np

from engine.errors import BadDataError
from engine.formats.elf.reader import ElfFile
from engine.formats.elf.records import Section
from engine.formats.symbol_table import SymbolTable

SHT_SYMTAB, SHT_NOBITS = 2, 8
SHF_WRITE, SHF_EXECINSTR = 1, 4
SHN_UNDEF, SHN_LORESERVE, SHN_ABS = 0, 0xFF00, 0xFFF1
STT_SECTION, STT_FILE, STT_TLS = 3, 4, 6
SIZE_LIMIT = 256 << 20
"""Bytes of the table and of its names; a kernel with debug information has some ten million of each."""


def section_bytes(elf: ElfFile, section: Section) -> bytes:
    """The contents of a section. Raises BadDataError where it is too large, or lies outside of the file."""
    at = elf.locate_offset(section.offset, section.size)
    if at is None or section.size > SIZE_LIMIT:
        raise BadDataError(section.offset, detail=f"section {section.name} of {section.size} bytes")
    return elf.read(at, section.size, section.name)


def symbol_section(elf: ElfFile) -> SymbolTable | None:
    """The symbols of .symtab that lie somewhere; None where the file is stripped. Raises BadDataError."""
    sections = elf.sections
    section = next((each for each in sections if each.kind == SHT_SYMTAB), None)
    if section is None or not 0 < section.link < len(sections):
        return None
    names = section_bytes(elf, sections[section.link]) + b"\0"
    wide, order = elf.header.bits == 64, elf.header.order
    fields = (
        [("name", "u4"), ("info", "u1"), ("other", "u1"), ("index", "u2"), ("value", "u8"), ("size", "u8")]
        if wide
        else [("name", "u4"), ("value", "u4"), ("size", "u4"), ("info", "u1"), ("other", "u1"), ("index", "u2")]
    )
    row = np.dtype([(name, order + kind) for name, kind in fields])
    data = section_bytes(elf, section)
    rows = np.frombuffer(data, row, len(data) // row.itemsize)
    kinds = rows["info"] & 0xF
    real = (rows["index"] != SHN_UNDEF) & (rows["name"] < len(names)) & (rows["name"] > 0)
    rows = rows[real & ~np.isin(kinds, (STT_SECTION, STT_FILE, STT_TLS))]
    letters = [_letter(each) for each in sections]
    columns = zip(*(rows[name].tolist() for name in ("value", "index", "name", "info")), strict=True)
    return SymbolTable.of(
        (value, _case(b"a" if index >= SHN_LORESERVE or index >= len(letters) else letters[index], info), text)
        for value, index, name, info in columns
        if (text := names[name : names.index(0, name)])
    )


def _letter(section: Section) -> bytes:
    if section.flags & SHF_EXECINSTR:
        return b"t"
    if section.kind == SHT_NOBITS:
        return b"b"
    return b"d" if section.flags & SHF_WRITE else b"r"


def _case(letter: bytes, info: int) -> bytes:
    """The letter of nm(1) is upper case for what other files see; weak ones are w."""
    binding = info >> 4
    return b"w" if binding == 2 else letter.upper() if binding == 1 else letter
