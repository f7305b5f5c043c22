"""The contents of the files of a process: those that it has open, and those that it only maps."""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import FaultError, NotFoundError
from engine.memory import Memory
from engine.oslayers.linux.cached_files import CachedFile, PageCache
from engine.oslayers.linux.files import Descriptors
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.mappings import mappings_of
from engine.oslayers.linux.tasks import TaskRecord, Tasks
from engine.types import CachedFileInfo


class Contents:
    """The files of one process, in one operation."""

    def __init__(self, kernel: Kernel, tasks: Tasks, record: TaskRecord) -> None:
        """Raises NotFoundError where the kernel's types lack what this needs."""
        self.kernel = kernel
        self.record = record
        self._descriptors = Descriptors(kernel, tasks)
        self.objects = self._descriptors.objects
        self._mapping = self.objects.struct("file")["f_mapping"]
        self._cache = PageCache(kernel, self.objects, self._descriptors.paths)

    def _files(self) -> Iterator[tuple[str, int]]:
        """(name, address of the `struct file`), each file that is only mapped once."""
        seen: set[int] = set()
        for number, file in self._descriptors.files(self.record.address):
            seen.add(self._space(file))
            yield str(number), file
        for mapping in mappings_of(self.kernel, self.objects, self.record.mm) if self.record.mm else ():
            space = self._space(mapping.file) if mapping.has_file_pages else 0
            if space and space not in seen:
                seen.add(space)
                yield f"{mapping.start:x}-{mapping.stop:x}", mapping.file

    def _space(self, file: int) -> int:
        try:
            return self.objects.pointer(file + self._mapping.offset)
        except FaultError:
            return 0

    def infos(self) -> Iterator[CachedFileInfo]:
        """What has contents: files and block devices."""
        for name, file in self._files():
            try:
                size = self._cache.pages(file).file_size
                path = self._descriptors.paths.of_file(file)
            except (FaultError, NotFoundError):
                continue
            yield CachedFileInfo(name, path, size)

    def file(self, name: str) -> Memory:
        """The contents of one. Raises NotFoundError where there is none of that name, or it cannot be read."""
        for found, file in self._files():
            if found == name:
                try:
                    return CachedFile(self._cache.pages(file))
                except FaultError:
                    break
        raise NotFoundError(f"process {self.record.pid} has no file {name} whose contents could be in memory")
