"""BTF for tests: what compilers make of a C source, and their own word for every offset; and made-up blobs."""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from support import require

from engine.file_memory import FileMemory
from engine.formats.elf import ElfFile

SOURCE = """
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
enum colour { RED, GREEN = 5, BLUE };
enum sign { MINUS = -3, ZERO, PLUS = 7 };
struct list { struct list *next, *previous; };
typedef struct { int counter; } atomic;
struct inner { u8 first; u32 second; struct { u16 left; u16 right; } pair[3]; };
struct outer {
    volatile long state;
    struct list tasks;
    const char *const name;
    union { u64 whole; struct { u32 low; u32 high; }; u8 bytes[8]; };
    struct inner inner;
    atomic count;
    const volatile struct inner row[4];
    const struct inner table[2][3];
    enum colour colour; enum sign sign;
    int (*call)(struct outer *, unsigned long);
    float ratio; double wide;
    struct { struct { union { u32 deep; float deeper; }; }; };
    char comm[16];
    struct unknown *unknown;
    u8 tail[];
};
struct bits { u32 a : 3; u32 b : 7; u32 c : 22; int d : 5; u64 e : 40; u8 f : 1; u8 g : 7; struct { u32 h : 9; }; };
struct __attribute__((packed)) tight { u8 one; u32 two : 9; u32 three : 20; u64 four; };
union either { u64 number; u8 bytes[3]; struct list list; };
"""
PATHS = {
    "outer": "state tasks tasks.next tasks.previous name whole low high bytes bytes[3] inner inner.first inner.second "
    "inner.pair inner.pair[2].right count count.counter table row[1] row[1].second row colour sign call ratio wide "
    "deep deeper comm unknown",
    "inner": "first second pair pair[1].left",
    "list": "next previous",
    "atomic": "counter",
    "either": "number bytes list list.previous",
    "tight": "one four",
}
BITS = {"bits": "a b c d e f g h", "tight": "two three"}
TAGS = {"atomic": "atomic", "either": "union either"}


@dataclass(frozen=True)
class Sample:
    """One compiler's BTF, and what it says itself: {(struct, path): (offset, size)}, sizes, the bytes of bit-fields."""

    btf: bytes
    places: dict[tuple[str, str], tuple[int, int]]
    sizes: dict[str, int]
    bits: dict[tuple[str, str], bytes]
    pointer_size: int


def _source() -> str:
    lines = [SOURCE]
    facts = ["sizeof(void *)"]
    for name, paths in PATHS.items():
        tag = TAGS.get(name, f"struct {name}")
        lines.append(f"{tag} variable_{name};")
        facts.append(f"sizeof({tag})")
        for path in paths.split():
            facts += [f"__builtin_offsetof({tag}, {path})", f"sizeof((({tag} *)0)->{path})"]
    lines.append("struct bits variable_bits;")
    lines.append(f'__attribute__((section(".facts"))) const unsigned long long facts[] = {{{", ".join(facts)}}};')
    for name, fields in BITS.items():
        for field in fields.split():
            where = f"bits_{name}_{field}"
            lines.append(f'__attribute__((section(".{where}"))) const struct {name} {where} = {{ .{field} = -1 }};')
    return "\n".join(lines)


@functools.cache
def _directory() -> Path:
    made = tempfile.TemporaryDirectory(prefix="cloudfs-btf-")
    _directory.keep = made  # removed when the interpreter ends
    return Path(made.name)


@functools.cache
def compiled(compiler: str, encoder: str, *options: str) -> Sample:
    """The BTF of `SOURCE` by a compiler (`gcc`) and an encoder (`gcc`: -gbtf, `pahole`: from DWARF)."""
    require(shutil.which(compiler), f"{compiler} is not installed")
    base = _directory() / "-".join((compiler, encoder, *options))
    base.with_suffix(".c").write_text(_source())
    debug = "-gbtf" if encoder == "gcc" else "-g"
    command = [compiler, debug, *options, "-O0", "-c", str(base.with_suffix(".c")), "-o", str(base.with_suffix(".o"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if encoder == "pahole":
        pahole = shutil.which("pahole")
        require(pahole, "pahole is not installed")
        subprocess.run([pahole, "-J", str(base.with_suffix(".o"))], check=True, timeout=60)
    return _parsed(base.with_suffix(".o"))


def _parsed(path: Path) -> Sample:
    memory = FileMemory(str(path))
    elf = ElfFile(memory)
    sections = {each.name: memory.read(each.offset, each.size) for each in elf.sections if each.size}
    facts = iter(struct.unpack(f"<{len(sections['.facts']) // 8}Q", sections[".facts"]))
    pointer_size = next(facts)
    places, sizes = {}, {}
    for name, paths in PATHS.items():
        sizes[name] = next(facts)
        for field in paths.split():
            places[name, field] = next(facts), next(facts)
    bits = {(name, field): sections[f".bits_{name}_{field}"] for name in BITS for field in BITS[name].split()}
    return Sample(sections[".BTF"], places, sizes, bits, pointer_size)


# -- made-up blobs ---------------------------------------------------------------------------------------------------


class Maker:
    """Writes BTF type by type, from the format's description alone; `order` is `<` or `>`."""

    def __init__(self, order: str = "<", first: int = 1, strings_start: int = 0) -> None:
        self.order = order
        self.next = first
        self.strings_start = strings_start
        self.types = bytearray()
        self.strings = bytearray(b"\0" if not strings_start else b"")

    def text(self, name: str) -> int:
        """The offset of a new string."""
        if not name:
            return 0
        at = self.strings_start + len(self.strings)
        self.strings += name.encode() + b"\0"
        return at

    def add(self, kind: int, name: str = "", third: int = 0, *words: int, rows: int = 0, flag: bool = False) -> int:
        """A type; gives its number."""
        info = kind << 24 | rows | flag << 31
        values = [each & 0xFFFFFFFF for each in (self.text(name), info, third, *words)]
        self.types += struct.pack(f"{self.order}{len(values)}I", *values)
        self.next += 1
        return self.next - 1

    def integer(self, name: str = "int", size: int = 4, signed: bool = True) -> int:
        """A whole number."""
        return self.add(1, name, size, signed << 24 | 8 * size)

    def struct(self, name: str, size: int, *members: tuple[str, int, int], kind: int = 4, flag: bool = False) -> int:
        """A structure of members (name, type, offset in bits)."""
        words = [word for text, number, offset in members for word in (self.text(text), number, offset)]
        return self.add(kind, name, size, *words, rows=len(members), flag=flag)

    def blob(self) -> bytes:
        """The whole."""
        head = struct.pack(f"{self.order}HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types),
                           len(self.strings))  # fmt: skip
        return head + bytes(self.types) + bytes(self.strings)


def swapped(blob: bytes) -> bytes:
    """The same BTF in the other byte order: all is 32-bit words but the magic number and two bytes behind it."""
    size, at, types, _, strings = struct.unpack_from("<5I", blob, 4)
    words = struct.unpack_from(f"<{types // 4}I", blob, size + at)
    head = struct.pack(">HBB5I", 0xEB9F, blob[2], blob[3], *struct.unpack_from("<5I", blob, 4))
    start = size + at
    return head + blob[24:start] + struct.pack(f">{len(words)}I", *words) + blob[start + types :][: strings + 4]
