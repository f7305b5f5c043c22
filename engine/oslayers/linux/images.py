"""The ELF images of a process in a kernel that is read from memory.

What was not read into memory of an image is told by nobody: its headers come from the process's memory, which knows
the page cache, and its section table from the page cache alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

from engine.elf_modules import MappedImage, executable_first
from engine.errors import FaultError, NotFoundError
from engine.formats.elf import LoadedImage, loaded_images
from engine.memory import Memory
from engine.oslayer import Process
from engine.oslayers.linux.cached_files import CachedFile
from engine.oslayers.linux.spaces import ProcessSpace


class LinuxImage(MappedImage):
    """One image in a process."""

    def __init__(self, process: Process, image: LoadedImage) -> None:
        super().__init__(process, image)
        self._space = process.memory

    def _mapped_file(self) -> Memory | None:
        """The file from its first byte on, as far as the page cache holds it."""
        space = self._space
        if not isinstance(space, ProcessSpace):
            return None
        mappings = space.mappings()
        mapping = mappings.at(self.image.region.start)
        pages = mappings.pages(mapping) if mapping is not None else None
        return None if pages is None else CachedFile(pages)

    @property
    def cached_file(self) -> Memory | None:
        """See `Module.cached_file`."""
        file, start = self._mapped_file(), self.image.region.offset
        return file if file is None or not start else file.window(start, max(0, file.size - start))

    def file(self) -> AbstractContextManager[Memory | None]:
        """See `MappedImage.file`: from the page cache."""
        return contextlib.nullcontext(self._mapped_file())


def process_images(process: Process) -> Iterator[LinuxImage]:
    """The images mapped into a process: the executable first, the others ascending by base."""
    try:
        images = loaded_images(process.memory, list(process.regions()))
    except (FaultError, NotFoundError):
        return iter(())
    return iter([LinuxImage(process, image) for image in executable_first(process, images)])
