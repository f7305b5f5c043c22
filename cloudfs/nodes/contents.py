"""`processes/PID/files/`: the contents of a process's files, as far as the target's memory holds them.

`fd/N` is a link, as in /proc, and of another machine it dangles; the bytes behind it stand in `files/N`. A file that
is mapped and not open is called `START-STOP`, as in /proc/PID/map_files. Pages that memory does not hold are zeros,
and holes for those that ask (SEEK_HOLE); `fd/N` and `maps` tell the paths.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloudfs.node import Node
from cloudfs.nodes.contexts import ProcessContext, process_entry
from cloudfs.nodes.directories import ContextDirectory
from cloudfs.nodes.files.memory import MemoryFile, Opened
from cloudfs.nodes.kept import KEPT
from engine.errors import NotFoundError
from engine.memory import Memory
from engine.oslayer import CachedFiles


@process_entry("files")
def files(process: ProcessContext) -> Node | None:
    """What memory holds of the files behind fd/N and its mappings; holes are zeros."""
    return None if process.capability(CachedFiles) is None else FilesDirectory(process)


def _source(process: ProcessContext) -> CachedFiles:
    source = process.capability(CachedFiles)
    if source is None:
        raise NotFoundError(f"the contents of the files of process {process.pid} are not known")
    return source


class FilesDirectory(ContextDirectory[ProcessContext]):
    """The files of a process."""

    __slots__ = ()

    def __init__(self, process: ProcessContext) -> None:
        super().__init__(process, "files", mode=0o500, may_block=True)

    def _sizes(self) -> dict[str, int]:
        process = self.context
        return KEPT.get(
            process.instance,
            ("cached files", process.key),
            lambda: {info.name: info.size for info in _source(process).cached_files()},
            lambda found: 150 * len(found),
        )

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name in self._sizes():
            yield name, self._file(name)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        return self._file(name) if name in self._sizes() else None

    def _file(self, name: str) -> MemoryFile:
        process = self.context

        def opened() -> Opened:
            memory: Memory = _source(process).cached_file(name)
            return Opened(memory, 0, None if process.live else memory.size)

        return MemoryFile(
            process,
            f"files/{name}",
            opened,
            whole=True,
            writable=False,
            size=lambda: self._sizes().get(name, 0),
            immutable=not process.live,
            may_block=True,
        )
