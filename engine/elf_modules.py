"""The ELF images in a process as modules, whatever OS layer it belongs to.

They are found in the process's memory and its list of mappings alone (`engine.formats.elf.loaded_images`). What
memory does not hold, the section table above all, an OS layer may have of the mapped file: `MappedImage.file`.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

from engine.errors import AccessDeniedError, EngineError, FaultError, NotRecognisedError
from engine.formats.elf import VDSO, Elf, ElfFile, ElfImage, LoadedImage
from engine.memory import Memory
from engine.oslayer import Module, Process, ProcFiles
from engine.types import ExportInfo, ImportInfo, ModuleInfo, SectionInfo

AT_PHDR = 3
"""Auxiliary vector: address of the executable's program headers (getauxval(3))."""
_DELETED = " (deleted)"
_HEADER_SIZE = 52
"""Bytes that tell whether file and memory are the same image: the ELF header, of 64-bit ones most of it."""
_UNREADABLE = (FaultError, NotRecognisedError, AccessDeniedError)
T = TypeVar("T")


def executable_first(process: Process, images: Sequence[LoadedImage]) -> list[LoadedImage]:
    """The images of a process, the one that it was started from first, the others ascending by base."""
    executable = _executable_of(process, images)
    return sorted(images, key=lambda image: (image is not executable, image.base))


def _executable_of(process: Process, images: Sequence[LoadedImage]) -> LoadedImage | None:
    if not images:
        return None
    address = _program_headers(process)
    for image in images:
        if image.base <= address < image.stop:
            return image
    path = process.info.executable
    return next((image for image in images if image.region.path.removesuffix(_DELETED) == path), images[0])


def _program_headers(process: Process) -> int:
    """Where the kernel says that the executable's program headers lie; -1 where it does not."""
    files = process.capability(ProcFiles)
    try:
        vector = files.read("auxv") if files is not None else b""
    except (EngineError, OSError):
        return -1
    # Words of the process, not of ours; read as 64 bits, a first type of 32 bits has its value above it.
    layout = "=QQ" if len(vector) >= 8 and struct.unpack_from("=Q", vector)[0] < 1 << 32 else "=II"
    size = struct.calcsize(layout)
    pairs = struct.iter_unpack(layout, vector[: len(vector) // size * size])
    return next((value for kind, value in pairs if kind == AT_PHDR), -1)


class MappedImage(Module):
    """One image in a process, as it was when the modules were listed."""

    def __init__(self, process: Process, image: LoadedImage) -> None:
        self.process = process
        self.image = image

    def file(self) -> AbstractContextManager[Memory | None]:
        """The mapped file from its first byte on, for one operation; None where it cannot be had. May block."""
        return contextlib.nullcontext()

    @property
    def info(self) -> ModuleInfo:
        """See `Module.info`; reads nothing. `path` is what /proc/PID/maps shows, ` (deleted)` included."""
        image, path = self.image, self.image.region.path
        name = path.removesuffix(_DELETED).rpartition("/")[2]
        return ModuleInfo(name or path, path, image.base, image.size, image.architecture, image.build_id)

    @property
    def memory(self) -> Memory:
        """See `Module.memory`."""
        return self.process.memory.window(self.image.base, self.image.size)

    def elf(self) -> ElfImage:
        """The image in memory, to be read anew. Raises BadDataError, FaultError, NotRecognisedError."""
        return ElfImage(self.memory, self.image.base, segments_at=self.image.segments_at)

    def sections(self) -> Iterator[SectionInfo]:
        """See `Module.sections`. May block: opens the mapped file, in a worker thread therefore only.

        Where the file cannot be had the segments are given, by what memory says of them: `LOAD#0.r-x`, `DYNAMIC#0`.
        """
        base, region = self.image.base, self.image.region
        found: list[SectionInfo] = []
        if region.path == VDSO:
            with contextlib.suppress(*_UNREADABLE):  # a short one may have its section headers behind what is mapped
                found = list(ElfFile(self.process.memory.window(base, region.size)).section_infos(base))
        else:
            found = self._from_file(lambda elf: list(elf.section_infos(base))) or []
        return iter(found) if found else self.elf().segment_infos(base)

    def exports(self) -> Iterator[ExportInfo]:
        """See `Module.exports`: from memory; where its tables cannot be read, from the file, which may block."""
        return iter(self._from_memory(lambda elf: list(elf.exports())))

    def imports(self) -> Iterator[ImportInfo]:
        """See `Module.imports`: from memory; where its tables cannot be read, from the file, which may block."""
        return iter(self._from_memory(lambda elf: list(elf.imports())))

    def _from_memory(self, take: Callable[[Elf], T]) -> T:
        try:
            return take(self.elf())
        except _UNREADABLE:
            found = self._from_file(take)
            if found is None:
                raise
            return found

    def _from_file(self, take: Callable[[Elf], T]) -> T | None:
        """What the mapped file says; None where it cannot be had, or is not what lies in memory."""
        region, head = self.image.region, self.image.head
        with self.file() as file:
            if file is None:
                return None
            try:
                # An image may lie inside of another file, as libraries in an Android package do.
                memory = file.window(region.offset, max(0, file.size - region.offset)) if region.offset else file
                if head and memory.read(0, _HEADER_SIZE) != head[:_HEADER_SIZE]:
                    return None
                return take(ElfFile(memory))
            except _UNREADABLE:
                return None
