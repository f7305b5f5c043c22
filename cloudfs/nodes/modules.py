"""`modules/`: the images in an address space, each a directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cloudfs import render
from cloudfs.node import Node
from cloudfs.nodes.contexts import InstanceContext, ModuleContext, ProcessContext, UniqueNames, module_entry
from cloudfs.nodes.directories import ContextDirectory, EntryDirectory
from cloudfs.nodes.files.image import ImageMemory, ImagePlan, image_plan
from cloudfs.nodes.files.memory import MemoryFile, Opened
from cloudfs.nodes.files.text import TextFile, info_file, json_file
from cloudfs.nodes.kept import KEPT
from cloudfs.nodes.regions import open_range
from engine.errors import FaultError, NotFoundError
from engine.formats.elf.records import MAGIC
from engine.memory import Memory
from engine.types import SectionInfo

Parent = ProcessContext | InstanceContext


class ModulesDirectory(ContextDirectory[Parent]):
    """The modules of a process or of a kernel: `NAME`, further ones of that name `NAME@BASE`."""

    __slots__ = ()

    def __init__(self, parent: Parent) -> None:
        super().__init__(parent, "modules", may_block=True)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name, module in self.context.modules().items():
            yield name, ModuleDirectory(ModuleContext.of(self.context, name, module.info))

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        module = self.context.modules().get(name)
        return None if module is None else ModuleDirectory(ModuleContext.of(self.context, name, module.info))


class ModuleDirectory(EntryDirectory[ModuleContext]):
    """One module."""

    __slots__ = ()

    def __init__(self, module: ModuleContext) -> None:
        super().__init__(module, "module", module_entry, may_block=True)

    def check(self) -> None:
        """Raise NotFoundError where it is mapped no more."""
        self.context.module()


@module_entry("info")
def info(module: ModuleContext) -> Node | None:
    """Name, path, base, size, architecture, build-id."""
    return info_file(module, "info", lambda: render.module_record(module.info))


@module_entry("info.json")
def info_json(module: ModuleContext) -> Node | None:
    """The same as JSON."""
    return json_file(module, "info.json", lambda: render.module_record(module.info))


def _memory(module: ModuleContext) -> Memory:
    memory = module.module().memory
    if memory is None:
        raise NotFoundError(f"it is not known where module {module.info.name!r} lies in memory")
    return memory


def _open_part(module: ModuleContext, offset: int, size: int) -> Opened:
    """`size` bytes from `offset` of the module on, for one open file."""
    if isinstance(module.parent, ProcessContext):
        return open_range(module.parent, (module.info.base or 0) + offset, size)
    return Opened(_memory(module), offset, size)


def _is_mapped(module: ModuleContext) -> bool:
    return module.info.base is not None and bool(module.info.size)


@module_entry("mem")
def mem(module: ModuleContext) -> Node | None:
    """Its memory; offset = address - base, and a hole gives EIO."""
    if not _is_mapped(module):
        return None
    return MemoryFile(
        module,
        "mem",
        lambda: _open_part(module, 0, module.info.size or 0),
        whole=False,
        writable=module.instance.writable,
        size=module.info.size,
        may_block=True,
    )


def _cached_file(module: ModuleContext) -> Memory | None:
    """The module's file, where the target's memory holds at least its header."""
    file = module.module().cached_file
    try:
        return file if file is not None and file.read(0, len(MAGIC)) == MAGIC else None
    except FaultError:
        return None


@module_entry("image")
def image(module: ModuleContext) -> Node | None:
    """Its file from the page cache, else its memory as an ELF file; holes are zeros."""
    if not _is_mapped(module):
        return None

    def make_plan() -> ImagePlan:
        return image_plan(_memory(module), module.info.base or 0)

    def plan() -> ImagePlan:
        return KEPT.get(module.instance, ("image plan", module.key), make_plan)

    def opened() -> Opened:
        file = _cached_file(module)
        if file is not None:
            return Opened(file, 0, file.size)
        part = _open_part(module, 0, module.info.size or 0)
        layout = ImageMemory(part.memory.window(part.base, part.size or 0), plan())
        return Opened(layout, 0, layout.size, part.release)

    def size() -> int:
        file = _cached_file(module)
        return plan().size if file is None else file.size

    return MemoryFile(
        module,
        "image",
        opened,
        whole=True,
        writable=False,
        size=size,
        immutable=not module.live,
        may_block=True,
    )


@module_entry("exports")
def exports(module: ModuleContext) -> Node | None:
    """What it offers to others: address, size, kind, name; by address."""

    def lines() -> Iterator[str]:
        base = module.info.base
        for symbol in sorted(module.module().exports(), key=lambda symbol: (symbol.offset, symbol.name)):
            size = "-" if symbol.size is None else f"{symbol.size:x}"
            name = render.escape_terminal(symbol.name)
            yield f"{(base or 0) + symbol.offset:016x} {size:>8} {symbol.kind or '-':<8} {name}\n"

    return _table(module, "exports", lines)


@module_entry("imports")
def imports(module: ModuleContext) -> Node | None:
    """What it takes from others: name, and library and version where they are known."""

    def lines() -> Iterator[str]:
        for symbol in module.module().imports():
            words = (symbol.name, symbol.library or "-", symbol.version or "-")
            yield " ".join(map(render.escape_terminal, words)) + "\n"

    return _table(module, "imports", lines)


def _table(module: ModuleContext, name: str, lines: Callable[[], Iterator[str]]) -> TextFile:
    return TextFile(module, name, lambda: "".join(lines()), sized=False, may_block=True)


@module_entry("sections")
def sections(module: ModuleContext) -> Node | None:
    """One file for each section, or for each segment where sections are not known."""
    return SectionsDirectory(module) if _is_mapped(module) else None


class SectionsDirectory(ContextDirectory[ModuleContext]):
    """The sections of a module: `NAME`, further ones of that name `NAME@BASE`."""

    __slots__ = ()

    def __init__(self, module: ModuleContext) -> None:
        super().__init__(module, "sections", may_block=True)

    def _found(self) -> dict[str, SectionInfo]:
        context = self.context

        def listed() -> dict[str, SectionInfo]:
            names = UniqueNames()
            return {names.name(section.name, section.base): section for section in context.module().sections()}

        key = ("sections", context.key)
        return KEPT.get(context.instance, key, listed, lambda found: 300 * len(found))

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name, section in self._found().items():
            yield name, section_file(self.context, name, section)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        section = self._found().get(name)
        return None if section is None else section_file(self.context, name, section)


def section_file(module: ModuleContext, name: str, section: SectionInfo) -> MemoryFile:
    """The bytes of one section in memory."""
    offset = section.base - (module.info.base or 0)
    return MemoryFile(
        module,
        f"sections/{name}",
        lambda: _open_part(module, offset, section.size),
        whole=True,
        writable=module.instance.writable,
        size=section.size,
        immutable=not module.live,
        may_block=True,
    )
