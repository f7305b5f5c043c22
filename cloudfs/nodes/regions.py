"""`regions/`: one file for each mapped range of a process, which is what `grep -r` wants."""

from __future__ import annotations

from collections.abc import Iterator

from cloudfs.node import Node
from cloudfs.nodes.contexts import ProcessContext
from cloudfs.nodes.directories import ContextDirectory
from cloudfs.nodes.files.memory import MemoryFile, Opened
from engine.types import Region


class RegionsDirectory(ContextDirectory[ProcessContext]):
    """The mapped ranges of a process."""

    __slots__ = ()

    def __init__(self, process: ProcessContext) -> None:
        super().__init__(process, "regions", may_block=process.reads_block)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name, region in self.context.regions().items():
            yield name, region_file(self.context, name, region)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        region = self.context.regions().get(name)
        return None if region is None else region_file(self.context, name, region)


def region_file(process: ProcessContext, name: str, region: Region) -> MemoryFile:
    """The bytes of one region."""
    return MemoryFile(
        process,
        f"regions/{name}",
        lambda: open_range(process, region.start, region.size),
        whole=True,
        writable=process.instance.writable,
        size=region.size,
        immutable=not process.live,
    )


def open_range(process: ProcessContext, start: int = 0, size: int | None = None) -> Opened:
    """Part of a process's memory, or all of it, for one open file, which holds the process until its release."""
    own = process.open_process()
    try:
        return Opened(own.memory, start, size, own.close)
    except BaseException:
        own.close()
        raise
