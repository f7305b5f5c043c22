"""A file of symbols that a person gives (`symbols=PATH`): for kernels whose own description is gone, never needed.

A vmlinux (its .symtab, its .BTF), BTF alone (`pahole --btf_encode_detached`, /sys/kernel/btf/vmlinux), a System.map or
a Volatility ISF, plain or as .gz, .xz, .bz2. It counts only if it is of this very kernel: by build-id, by banner, by
the addresses and the sizes that the kernel's VMCOREINFO states; whichever of them both sides have must agree.

DWARF is not read: a kernel's has hundreds of megabytes, of which `pahole -J` makes BTF once and for all.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Mapping
from typing import IO, cast

from engine.errors import EngineError, FaultError, NotFoundError, NotRecognisedError, UnusableTargetError
from engine.file_memory import FileMemory
from engine.formats.btf import Btf
from engine.formats.elf import ElfFile
from engine.formats.elf.symbol_section import section_bytes, symbol_section
from engine.formats.isf import parse_isf
from engine.formats.symbol_table import SymbolTable
from engine.formats.system_map import parse_system_map
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.layout import TypeSource
from engine.oslayers.linux.finding import Found
from engine.records import dataclass

SIZE_LIMIT = 512 << 20
"""Bytes of a file that is read whole, unpacked; the largest ISF have sixty million."""
REQUIRED_SHARE = 0.75
"""Of the addresses that VMCOREINFO states so many must come out: vmemmap and mem_section are values, no addresses."""
ANCHORS = ("_stext", "swapper_pg_dir", "init_uts_ns")
BANNER_LIMIT = 512

_PACKED: dict[bytes, Callable[..., object]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}
_BTF = (b"\x9f\xeb\x01", b"\xeb\x9f\x01")
_SIZE, _OFFSET = re.compile(r"SIZE\((\w+)\)"), re.compile(r"OFFSET\((\w+)\.([\w.]+)\)")


@dataclass(frozen=True, slots=True)
class Given:
    """What a file tells of a kernel; addresses are those of the linker."""

    path: str
    types: TypeSource | None = None
    symbols: SymbolTable | None = None
    build_id: str | None = None
    banner: bytes | None = None
    notes: tuple[str, ...] = ()


def read_given(path: str) -> Given:
    """What the file at `path` tells. Raises UnusableTargetError where that is nothing, OSError as open(2) does."""
    with open(path, "rb") as file:
        head = file.read(8)
    try:
        if head.startswith(b"\x7fELF"):
            return _of_elf(path)
        data = _whole(path, head)
        if data.startswith(_BTF):
            return Given(path, types=Btf(data))
        if data[:64].lstrip().startswith(b"{"):
            isf = parse_isf(data)
            return Given(path, isf.types, isf.symbols, banner=isf.banner)
        return Given(path, symbols=parse_system_map(data))
    except (EngineError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, UnusableTargetError) or getattr(error, "errno", None) is not None:
            raise
        wanted = "a vmlinux, BTF, a System.map or a Volatility ISF"
        raise UnusableTargetError(f"symbols={path}: neither {wanted} can be read from it: {error}") from None


def _whole(path: str, head: bytes) -> bytes:
    opener = next((opener for magic, opener in _PACKED.items() if head.startswith(magic)), None)
    with open(path, "rb") if opener is None else cast("IO[bytes]", opener(path, "rb")) as file:
        data = file.read(SIZE_LIMIT + 1)
    if len(data) > SIZE_LIMIT:
        raise NotRecognisedError(f"it has more than {SIZE_LIMIT >> 20} MiB")
    return data


def _of_elf(path: str) -> Given:
    elf = ElfFile(FileMemory(path))
    sections = {section.name: section for section in elf.sections}
    types = Btf(section_bytes(elf, sections[".BTF"])) if ".BTF" in sections else None
    symbols = symbol_section(elf)
    notes: tuple[str, ...] = ()
    if types is None and ".debug_info" in sections:
        notes = (f"the types of {path} are DWARF alone, which is not read: `pahole -J {path}` adds them as BTF",)
    if types is None and symbols is None:
        raise UnusableTargetError(f"symbols={path}: {'; '.join(notes) or 'it has neither .symtab nor .BTF'}")
    return Given(path, types, symbols, elf.build_id(), _banner_of(elf, symbols), notes)


def _banner_of(elf: ElfFile, symbols: SymbolTable | None) -> bytes | None:
    address = symbols.first("linux_banner") if symbols is not None else None
    for section in elf.sections if address is not None else ():
        if address is not None and section.address and section.address <= address < section.address + section.size:
            at = elf.locate_offset(section.offset + address - section.address, 1)
            return None if at is None else elf.memory.read_padded(at, BANNER_LIMIT).partition(b"\0")[0].rstrip(b"\n")
    return None


def fitted(given: Given, found: Found) -> Given:
    """The same with addresses of this boot. Raises UnusableTargetError where it is another kernel's."""
    text = found.vmcoreinfo
    if given.build_id is not None and text.build_id is not None and given.build_id != text.build_id:
        raise _of_another(given, f"of build {given.build_id}, this memory's of build {text.build_id}")
    if given.banner is not None and found.release and f" {found.release} ".encode() not in given.banner:
        raise _of_another(given, f"«{given.banner[:80].decode('ascii', 'replace')}», this memory's is {found.release}")
    symbols = _moved(given, found)
    _check_banner(given, symbols, found)
    _check_types(given, text)
    return Given(given.path, given.types, symbols, given.build_id, given.banner, given.notes)


def _of_another(given: Given, why: str) -> UnusableTargetError:
    return UnusableTargetError(f"symbols={given.path} is not of this kernel: it is {why}; give the file of that build")


def _moved(given: Given, found: Found) -> SymbolTable | None:
    if given.symbols is None:
        return None
    references = found.vmcoreinfo.symbols
    moved = given.symbols
    for name in ANCHORS:
        linked, here = given.symbols.first(name), references.get(name)
        if linked is not None and here is not None:
            moved = given.symbols.moved(here - linked, found.candidate.kernel_start)
            break
    known, equal = moved.agreement(references)
    if equal < REQUIRED_SHARE * known:
        raise _of_another(given, f"of one with {known - equal} of {known} known symbols at other addresses")
    return moved


def _check_banner(given: Given, symbols: SymbolTable | None, found: Found) -> None:
    address = symbols.first("linux_banner") if symbols is not None else None
    if given.banner is None or address is None:
        return
    try:
        here = found.memory.cstring(address, BANNER_LIMIT).rstrip(b"\n")
    except FaultError:
        return
    if here.startswith(b"Linux version ") and here != given.banner:
        raise _of_another(given, f"of another build («{given.banner[-60:].decode('ascii', 'replace')}»)")


def _check_types(given: Given, text: Vmcoreinfo) -> None:
    """Every size and offset that the kernel states must be that of the types: two at least tell releases apart."""
    if given.types is None:
        return
    if given.types.struct("task_struct") is None:
        raise UnusableTargetError(f"symbols={given.path}: it has types, but not those of a kernel: no task_struct")
    stated = _stated(text.values)
    wrong = [name for name, value in stated.items() if _told(given.types, name) not in (None, value)]
    if wrong:
        raise _of_another(given, f"of one in which {', '.join(wrong[:3])} differ{'s' if len(wrong) == 1 else ''}")


def _stated(values: Mapping[str, str]) -> dict[str, int]:
    found = {key: value for key, value in values.items() if _SIZE.fullmatch(key) or _OFFSET.fullmatch(key)}
    return {key: int(value) for key, value in found.items() if value.isdecimal() and len(value) < 20}


def _told(types: TypeSource, key: str) -> int | None:
    """What types tell of a line of VMCOREINFO; None where they do not know the structure or the member."""
    size, offset = _SIZE.fullmatch(key), _OFFSET.fullmatch(key)
    try:
        if size is not None:
            return types.require(size[1]).size
        return None if offset is None else types.require(offset[1])[offset[2]].offset
    except NotFoundError:
        return None
