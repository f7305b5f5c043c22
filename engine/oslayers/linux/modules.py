"""Kernel modules, and the kernel's image itself, as modules of the OS layer.

Sources: Linux include/linux/module.h (core_layout before 6.4, mem[] from 6.4 on), kernel/module/main.c, 5.10 to 7.x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from engine.errors import FaultError, NotFoundError
from engine.layout import StructLayout
from engine.memory import Memory
from engine.oslayer import Module
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.kernel_space import kernel_space
from engine.oslayers.linux.objects import Objects, decoded
from engine.oslayers.linux.walks import ring
from engine.records import dataclass
from engine.types import ExportInfo, Extent, ModuleInfo, SectionInfo

MODULE_LIMIT = 1 << 14
SIZE_LIMIT = 1 << 30
SECTION_LIMIT = 4096
EXPORT_LIMIT = 1 << 16
MEMORY_KINDS = ("text", "data", "rodata", "ro_after_init", "init_text", "init_data", "init_rodata")
"""The parts of a module in `mem[]` (enum mod_mem_type); those of init are freed once it runs."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
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
        return None if not info.base or not info.size else kernel_space(self.kernel).window(info.base, info.size)

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

    def _exported(self, objects: Objects) -> set[tuple[str, int]]:
        """(name, address) of what it exports to all: their letters are capital (is_exported). Raises FaultError."""
        layout, entry = objects.struct("module"), objects.struct("kernel_symbol")
        found: set[tuple[str, int]] = set()
        start, count = (objects.value(self.address, layout[name]) for name in ("syms", "num_syms"))
        for index in range(min(count, EXPORT_LIMIT) if start else 0):
            at = start + index * entry.size
            name = objects.text(_place(objects, at, entry, "name"), 512)
            found.add((name, _place(objects, at, entry, "value")))
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
                letter = letter.upper() if (text, address) in exported else letter
                yield text, address, letter, number(size.offset, size.size)


def _place(objects: Objects, at: int, entry: StructLayout, name: str) -> int:
    """A member of an exported symbol's entry: place-relative (HAVE_ARCH_PREL32_RELOCATIONS) or absolute."""
    relative = entry.get(f"{name}_offset")
    if relative is not None:
        return at + relative.offset + objects.value(at, relative)
    return objects.pointer(at + entry[name].offset)


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
    head = kernel.profile.symbol("modules") or find_head(kernel, objects)
    if head is None:
        raise NotFoundError("the kernel's list of modules is not known")
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


def find_head(kernel: Kernel, objects: Objects) -> int | None:
    """The head of the list of modules by its content, for kernels without data symbols; None where there is none.

    Of all pairs of words in the kernel's image that could be a `struct list_head`, the one counts whose ring leads
    through structures that have a module's name, state and memory.
    """
    layout, image = objects.struct("module"), kernel.found.image
    link = layout["list"]
    for head in list_heads(objects, image):
        names = 0
        for address in ring(objects.silent(), head, link, MODULE_LIMIT):
            try:
                name = objects.text_in(address, layout["name"])
                sound = objects.value(address, layout["state"]) in STATES and any(_parts(objects, address))
            except FaultError:
                sound = False
            if not sound or not _NAME.fullmatch(name):
                names = 0
                break
            names += 1
        if names:
            kernel.profile.learn("modules", head)
            return head
    return None


def list_heads(objects: Objects, image: Extent) -> Iterator[int]:
    """The places in the image that hold two pointers to outside of it, which point back."""
    word, step = objects.word, 1 << 20
    kind = np.dtype(objects.word_type)
    for start in range(image.start, image.stop - 2 * word, step):
        data = objects.memory.read_padded(start, min(step + word, image.stop - start))
        words = np.frombuffer(data, kind, len(data) // word).astype(np.uint64)
        outside = (words >= objects.kernel_start) & (words & np.uint64(word - 1) == 0)
        outside &= (words < image.start) | (words >= image.stop)
        rows = np.flatnonzero(outside[:-1] & outside[1:])
        if not len(rows):
            continue
        places = np.uint64(start) + rows.astype(np.uint64) * np.uint64(word)
        back, faults = objects.memory.words(words[rows] + np.uint64(word), kind)
        forth, more = objects.memory.words(words[rows + 1], kind)
        good = (back.astype(np.uint64) == places) & (forth.astype(np.uint64) == places)
        good[faults.rows] = False
        good[more.rows] = False
        yield from places[good].tolist()


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
    for name in ("core", "init") if "core_layout" in layout else ():
        place = objects.pointer(address + layout[f"{name}_layout.base"].offset)
        length = objects.value(address, layout[f"{name}_layout.size"])
        if place and 0 < length <= SIZE_LIMIT:
            yield Part(name, place, length)
