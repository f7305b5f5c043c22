"""ELF, as a file and as an image in memory, over any Memory; every machine, both classes and byte orders.

    ElfFile(memory)            the file: section headers, file offsets
    ElfImage(memory, base)     a loaded image: only what its segments brought into memory
    loaded_images(memory, regions)   the images that a loader has mapped into an address space

Both give header, segments, sections, build-id, soname, needed libraries, exports and imports. Nothing in an image
is believed: lengths are checked before they are read, walks are bounded, a symbol that cannot be is skipped and
counted. What is missing is None or empty, what is impossible a BadDataError with its address.

What it does not do: no relocation, no debug information, no .symtab; it never writes, and it caches for the life
of one object only (for a live target, one object per operation).
"""

from engine.formats.elf.loaded import VDSO, LoadedImage, loaded_images, mapped_images
from engine.formats.elf.notes import Note, build_id_of, parse_notes
from engine.formats.elf.reader import Elf, ElfFile, ElfImage
from engine.formats.elf.records import Header, Section, Segment

__all__ = [
    "VDSO",
    "Elf",
    "ElfFile",
    "ElfImage",
    "Header",
    "LoadedImage",
    "Note",
    "Section",
    "Segment",
    "build_id_of",
    "loaded_images",
    "mapped_images",
    "parse_notes",
]
