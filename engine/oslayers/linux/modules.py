"""Kernel modules, and the kernel's image itself, as modules of the OS layer.

Sources: Linux include/linux/module.h (core_layout before 6.4, mem[] from 6.4 on), kernel/module/main.c, 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from engine.errors import FaultError, NotFoundError
from engine.layout import Field
from engine.memory import Memory
from engine.oslayer import Module
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects, decoded
from engine.oslayers.linux.walks import ring
from engine.types import ExportInfo, ModuleInfo, SectionInfo

MODULE_LIMIT = 1 << 14
SIZE_LIMIT = 1 << 30
SECTION_LIMIT = 4096
EXPORT_LIMIT = 1 << 16
MEMORY_KINDS = ("text", "data", "rodata", "ro_after_init", "init_text", "init_data", "init_rodata")
"""The parts of a module in `mem[]` (enum mod_mem_type); those of init are freed once it runs."""
STATES = {0: "Live", 1: "Loading", 2: "Unloading", 3: "Unformed"}
"""enum module_state; a module that is still being put together is not in /proc/modules."""


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a module's memory."""

    name: str
    base: int
    size: int


class KernelModule(Module):
    """A module that was loaded into the kernel."""

    def __init__(self, kernel: Kernel, address: int, name: str, parts: list[Part], state: str) -> None:
        self.kernel = kernel
        self.address = address
        self.name = name
        self.parts = parts
        self.state = state

    @property
    def size(self) -> int:
        """Bytes as /proc/modules counts them: all parts that are there."""
        return sum(part.size for part in self.parts)

    @property
    def info(self) -> ModuleInfo:
        """See `Module.info`; `base` is where its text begins, as /proc/modules says."""
        base = self.parts[0].base if self.parts else None
        span = max((part.base + part.size for part in self.parts), default=0) - (base or 0)
        return ModuleInfo(self.name, None, base, span if base and 0 < span <= SIZE_LIMIT else None,
                          self.kernel.found.machine, self._build_id())  # fmt: skip

    @property
    def memory(self) -> Memory | None:
        """See `Module.memory`."""
        info = self.info
        return None if not info.base or not info.size else self.kernel.found.memory.window(info.base, info.size)

    def _build_id(self) -> str | None:
        member = self.kernel.types.require("module").get("build_id")
        if member is None:
            return None
        try:
            data = self.kernel.objects().memory.read(self.address + member.offset, member.size)
        except FaultError:
            return None
        return data.hex() if any(data) else None

    def sections(self) -> Iterator[SectionInfo]:
        """See `Module.sections`: those of its file that were kept (sect_attrs), else the parts of its memory."""
        found = list(self._kept_sections())
        yield from found or (SectionInfo(part.name, part.base, part.size) for part in self.parts)

    def _kept_sections(self) -> Iterator[SectionInfo]:
        """`sect_attrs` names sections with addresses; a section goes on to the next, or to its part's stop."""
        objects = self.kernel.objects()
        try:
            layout, attributes = objects.struct("module"), objects.struct("module_sect_attrs")
            holder = objects.pointer(self.address + layout["sect_attrs"].offset)
            count = objects.value(holder, attributes["nsections"])
            one = objects.struct("module_sect_attr")
            start = holder + attributes["attrs"].offset
            name, address = one.first("battr.attr.name"), one["address"]
            found = []
            for index in range(min(count, SECTION_LIMIT)):
                at = start + index * one.size
                found.append((objects.pointer(at + address.offset),
                              objects.text(objects.pointer(at + name.offset), 256)))  # fmt: skip
        except (FaultError, NotFoundError):
            return
        found.sort()
        for index, (address_of, text) in enumerate(found):
            part = next((part for part in self.parts if part.base <= address_of < part.base + part.size), None)
            if part is None:
                continue
            following = found[index + 1][0] if index + 1 < len(found) else part.base + part.size
            yield SectionInfo(text, address_of, max(0, min(following, part.base + part.size) - address_of))

    def exports(self) -> Iterator[ExportInfo]:
        """See `Module.exports`: its own symbol table, as kallsyms shows it."""
        base = self.parts[0].base if self.parts else 0
        for name, address, _, size in self.symbols():
            if name and address >= base:
                yield ExportInfo(name, address - base, size or None)

    def _exported(self, objects: Objects) -> set[int]:
        """The addresses of what it exports to all: their letters are capital (is_exported). Raises FaultError."""
        layout, entry = objects.struct("module"), objects.struct("kernel_symbol")
        place, value = entry.get("value_offset"), entry.get("value")
        found: set[int] = set()
        start, count = (objects.value(self.address, layout[name]) for name in ("syms", "num_syms"))
        for index in range(min(count, EXPORT_LIMIT) if start else 0):
            found.add(_address_of(objects, start + index * entry.size, place, value))
        return found

    def symbols(self) -> Iterator[tuple[str, int, str, int]]:
        """(name, address, letter, size) of the symbols that the kernel keeps of it (mod_kallsyms)."""
        objects = self.kernel.objects()
        try:
            layout, table = objects.struct("module"), objects.struct("mod_kallsyms")
            entry = objects.types.struct("elf64_sym" if objects.word == 8 else "elf32_sym")
            if entry is None:
                return
            at = objects.pointer(self.address + layout["kallsyms"].offset)
            count = min(objects.value(at, table["num_symtab"]), 1 << 20)
            entries = objects.memory.read(objects.pointer(at + table["symtab"].offset), count * entry.size)
            strings = objects.pointer(at + table["strtab"].offset)
            letters = table.get("typetab")
            kinds = b"?" * count
            if letters is not None:
                kinds = objects.memory.read(objects.pointer(at + letters.offset), count)
            names, exported = _Strings(objects, strings), self._exported(objects)
        except (FaultError, NotFoundError):
            return
        name, value, size, section = entry["st_name"], entry["st_value"], entry["st_size"], entry["st_shndx"]
        for index in range(1, count):
            start = index * entry.size

            def number(member_offset: int, length: int, start: int = start) -> int:
                return int.from_bytes(entries[start + member_offset : start + member_offset + length], "little")

            if number(section.offset, section.size) == 0:  # SHN_UNDEF: of others
                continue
            text, address = names.at(number(name.offset, name.size)), number(value.offset, value.size)
            if text:
                letter = chr(kinds[index])
                yield text, address, letter.upper() if address in exported else letter, number(size.offset, size.size)


def _address_of(objects: Objects, entry: int, place: Field | None, value: Field | None) -> int:
    """What an exported symbol names: place-relative (HAVE_ARCH_PREL32_RELOCATIONS) or absolute."""
    if place is not None:
        return entry + place.offset + objects.value(entry, place)
    return objects.pointer(entry + value.offset) if value is not None else 0


class _Strings:
    """A string table, read once, as far as it can be."""

    LIMIT = 1 << 22

    def __init__(self, objects: Objects, start: int) -> None:
        self._objects = objects
        self._start = start

    @cached_property
    def _pages(self) -> dict[int, bytes]:
        return {}

    def at(self, offset: int) -> str:
        """The string at `offset`; empty where it cannot be read."""
        if not 0 <= offset < self.LIMIT:
            return ""
        page = offset >> 12
        data = b""
        while len(data) < 1024:
            if page not in self._pages:
                self._pages[page] = self._objects.memory.read_padded(self._start + (page << 12), 4096)
            piece = self._pages[page]
            data += piece[offset & 0xFFF :] if not data else piece
            if b"\0" in data:
                break
            page += 1
            offset = 0
        return decoded(data.partition(b"\0")[0])


def kernel_modules(kernel: Kernel) -> Iterator[KernelModule]:
    """The modules in the order of /proc/modules: the youngest first. Those still being put together are left out.

    Raises NotFoundError where the list's head or the types are not known.
    """
    objects = kernel.objects()
    layout = objects.struct("module")
    head = kernel.profile.require("modules")
    for address in ring(objects, head, layout["list"], MODULE_LIMIT, kind="module list"):
        try:
            state = STATES.get(objects.value(address, layout["state"]), "?")
            name = objects.text_in(address, layout["name"])
            parts = list(_parts(objects, address))
        except FaultError:
            objects.skipped["module"] += 1
            continue
        if state != "Unformed":
            yield KernelModule(kernel, address, name, parts, state)


def _parts(objects: Objects, address: int) -> Iterator[Part]:
    layout = objects.struct("module")
    array = layout.get("mem")
    if array is not None:
        one = objects.struct("module_memory")
        base, size = one["base"], one["size"]
        for index in range(min(array.size // one.size, len(MEMORY_KINDS))):
            at = address + array.offset + index * one.size
            place, length = objects.pointer(at + base.offset), objects.value(at, size)
            if place and 0 < length <= SIZE_LIMIT:
                yield Part(MEMORY_KINDS[index], place, length)
        return
    for name in ("core", "init"):
        place = objects.pointer(address + layout[f"{name}_layout.base"].offset)
        length = objects.value(address, layout[f"{name}_layout.size"])
        if place and 0 < length <= SIZE_LIMIT:
            yield Part(name, place, length)
