"""ELF images for tests: compiled ones, loaded ones, and made ones of any class, byte order and machine."""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support import require

from engine.formats.elf import ElfFile

SOURCE = """
__thread int counter_of_thread = 7;
int number = 42;
const char text[] = "text";
static int hidden_function(int x) { return x + 1; }
int plain(int x) { return hidden_function(x) + number + counter_of_thread; }
__attribute__((weak)) int weak(void) { return 1; }
__attribute__((visibility("hidden"))) int invisible(void) { return 2; }
__attribute__((visibility("protected"))) int guarded(void) { return 3; }
static void *choose(void) { return plain; }
int chosen(int x) __attribute__((ifunc("choose")));
extern int wanted(int);
__attribute__((weak)) extern int perhaps(int);
int calls(void) { return wanted(1) + (perhaps ? perhaps(2) : 0); }
"""
VERSIONED = """
int old_size(void) { return 1; }
int new_size(void) { return 2; }
int first_gone(void) { return 3; }
int last_gone(void) { return 4; }
__asm__(".symver old_size,size@ONE_1");
__asm__(".symver new_size,size@@ONE_2");
__asm__(".symver first_gone,gone@ONE_1");
__asm__(".symver last_gone,gone@ONE_2");
"""
VERSIONS = "ONE_1 { local: *; };\nONE_2 { } ONE_1;\n"


@functools.cache
def _directory() -> Path:
    made = tempfile.TemporaryDirectory(prefix="cloudfs-elf-")
    _directory.keep = made  # removed when the interpreter ends
    return Path(made.name)


@functools.cache
def compiled(name: str, *options: str, source: str = SOURCE, script: str = "") -> str:
    """The path of `source` compiled by gcc with `options`; skips where there is no gcc, or none for -m32."""
    require(shutil.which("gcc"), "gcc is not installed")
    base = _directory() / name
    base.with_suffix(".c").write_text(source)
    if script:
        base.with_suffix(".map").write_text(script)
        options = (*options, f"-Wl,--version-script={base.with_suffix('.map')}")
    command = ["gcc", "-O1", "-nostdlib", "-fPIC", "-o", str(base), str(base.with_suffix(".c")), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    require(done.returncode == 0, f"gcc cannot make {name}: {done.stderr}")
    return str(base)


def stripped(path: str) -> str:
    """A copy of the file that has no section headers any more."""
    require(shutil.which("objcopy"), "objcopy (binutils) is not installed")
    data = bytearray(Path(path).read_bytes())
    wide = data[4] == 2
    struct.pack_into("<Q" if wide else "<I", data, 40 if wide else 32, 0)  # e_shoff
    struct.pack_into("<HH", data, 60 if wide else 48, 0, 0)  # e_shnum, e_shstrndx
    out = Path(f"{path}.no-sections")
    out.write_bytes(data)
    return str(out)


def load(elf: ElfFile, base: int | None = None) -> bytearray:
    """The image as a loader puts it into memory; its dynamic pointers relocated to `base` as glibc does."""
    image = bytearray(elf.load_size)
    for segment in elf.loads:
        at = segment.address - elf.link_base
        image[at : at + segment.file_size] = elf.memory.read(segment.offset, segment.file_size)
    if base is None:
        return image
    word = elf.header.order + ("QQ" if elf.header.bits == 64 else "II")
    segment = next(segment for segment in elf.segments if segment.kind == 2)
    # elf/get-dynamic-info.h of glibc 2.36: these are adjusted, the tables of versions needed are not.
    adjusted = {3, 4, 5, 6, 7, 17, 23, 36, 0x6FFFFEF5, 0x6FFFFFF0}
    at = segment.address - elf.link_base
    for place in range(at, at + segment.file_size, struct.calcsize(word)):
        tag, value = struct.unpack_from(word, image, place)
        if tag in adjusted:
            struct.pack_into(word, image, place, tag, value + base - elf.link_base)
    return image


# -- made by hand ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeSymbol:
    """One symbol; `section` 0 is undefined."""

    name: bytes
    value: int = 0
    size: int = 0
    binding: int = 1
    kind: int = 2
    other: int = 0
    section: int = 1


def _hash(name: bytes) -> int:
    value = 0
    for byte in name:
        value = (value << 4) + byte
        value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
    return value


def make_elf(
    symbols: Sequence[MadeSymbol],
    *,
    bits: int = 64,
    big_endian: bool = False,
    machine: int = 62,
    build_id: bytes = b"",
    wide_hash: bool = False,
) -> bytes:
    """A shared object with these dynamic symbols, one loaded segment and no section headers.

    0        0x200     0x400       0x1000
    | header | dynamic | note      | symbols, strings, DT_HASH |
    """
    order, word = (">" if big_endian else "<"), ("Q" if bits == 64 else "I")
    strings, table = b"\0", struct.pack(order + ("IBBHQQ" if bits == 64 else "IIIBBH"), 0, 0, 0, 0, 0, 0)
    for symbol in symbols:
        info = symbol.binding << 4 | symbol.kind
        if bits == 64:
            row = (len(strings), info, symbol.other, symbol.section, symbol.value, symbol.size)
        else:
            row = (len(strings), symbol.value, symbol.size, info, symbol.other, symbol.section)
        table += struct.pack(order + ("IBBHQQ" if bits == 64 else "IIIBBH"), *row)
        strings += symbol.name + b"\0"
    chains = [0] * (len(symbols) + 1)
    first = 0
    for number in range(1, len(symbols) + 1):
        chains[number], first = first, number
    words = [1, len(chains), first, *chains]
    hashes = struct.pack(f"{order}{len(words)}{'Q' if wide_hash else 'I'}", *words)
    at = 0x1000
    parts = b""
    places = []
    for part in (table, strings, hashes):
        places.append(at + len(parts))
        parts += part + bytes(-len(part) % 8)
    dynamic = b"".join(
        struct.pack(order + word * 2, tag, value)
        for tag, value in (
            (14, 1 if symbols else 0), (6, places[0]), (11, 24 if bits == 64 else 16), (5, places[1]),
            (10, len(strings)), (4, places[2]), (0, 0),
        )
    )  # fmt: skip
    note = struct.pack(order + "III", 4, len(build_id), 3) + b"GNU\0" + build_id if build_id else b""
    size = at + len(parts)
    segments = [(1, 5, 0, size), (2, 6, 0x200, len(dynamic)), (4, 4, 0x400, len(note))]
    data = bytearray(size)
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 2 if big_endian else 1, 1, 3]) + bytes(8)  # 3: GNU, for IFUNC
    head, entry = (64, 56) if bits == 64 else (52, 32)
    data[:16] = ident
    struct.pack_into(
        order + "HHI" + word * 3 + "IHHHHHH", data, 16, 3, machine, 1, 0, head, 0, 0, head, entry, len(segments),
        64 if bits == 64 else 40, 0, 0,
    )  # fmt: skip
    for number, (kind, flags, offset, length) in enumerate(segments):
        place = head + number * entry
        if bits == 64:
            struct.pack_into(order + "IIQQQQQQ", data, place, kind, flags, offset, offset, offset, length, length, 4)
        else:
            struct.pack_into(order + "IIIIIIII", data, place, kind, offset, offset, offset, length, length, flags, 4)
    data[0x200 : 0x200 + len(dynamic)] = dynamic
    data[0x400 : 0x400 + len(note)] = note
    data[at:] = parts
    return bytes(data)
