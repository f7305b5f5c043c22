"""Connector `raw`: a file whose bytes are physical memory as they stand.

    raw:memory.img                    address 0 is the file's first byte
    raw:memory.img:base=0x80000000    the file's first byte is that address
    raw:memory.img:map=memory.toml    ranges with base, length, real_base (see memory_map)
    raw:memory.img.zst:inside=yes     what a packed or split image holds (see image_source)

The file may be sparse, may grow and shrink, and may be a block device.

It counts as immutable, so that its pages may be cached and mapped, for as long as a read lease on it is held: nobody
else has it open for writing, and whoever is about to waits until nothing of it is cached. `info` says whether that is
so. Without a lease (the file of another user, a network filesystem, a running guest's memory) and from its end on it
is live; `immutable=yes` and `live=yes` decide it whatever others do.
"""

from __future__ import annotations

from typing import Self

from engine.connector import Connector
from engine.errors import InvalidArgumentError, UnusableTargetError
from engine.file_memory import FRESHNESS_HELP
from engine.image_source import ImageSource, open_source
from engine.leases import Lease
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap, read_map_file
from engine.middleware import truth
from engine.numbers import parse_number
from engine.oslayer import Options, OsLayer
from engine.types import ADDRESS_SPACE, ConnectorInfo

PAGE = 4096
"""The smallest page of all architectures: a machine has whole ones."""
_FILE_LIMIT = 1 << 63
"""No file has more bytes: off_t is signed."""


class BasedMemory(MappedMemory):
    """A file from `base` on, to wherever the file stops now."""

    def __init__(self, file: Memory, base: int) -> None:
        super().__init__(file, MemoryMap([MapRange(base, min(_FILE_LIMIT, ADDRESS_SPACE - base), 0)]))
        self.base = base

    @property
    def size(self) -> int:
        """First address behind the file's last byte."""
        return self.base + self.source.size


class RawConnector(Connector):
    """A file as physical memory."""

    kind = "raw"
    summary = "a file whose bytes are physical memory as they stand"
    options_help = {
        "base": "physical address of the file's first byte (0)",
        "map": "a TOML file of ranges: base, length, real_base",
        "inside": "yes: what a packed or split image holds (no: the file's own bytes)",
        **FRESHNESS_HELP,
    }
    opens_packed = True

    def __init__(self, source: ImageSource, memory: Memory, memory_map: MemoryMap | None, base: int) -> None:
        self._source = source
        self._memory = memory
        self._memory_map = memory_map
        self._base = base

    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Open the file. Raises NotFoundError, InvalidArgumentError, or OSError as open(2) does."""
        if parent is not None:
            raise InvalidArgumentError("raw stands on a file of this host, not on an OS layer: leave -c out")
        if not target:
            raise InvalidArgumentError("raw wants a file: raw:PATH")
        if "base" in options and "map" in options:
            raise InvalidArgumentError("raw: base= and map= exclude each other: a map says every base")
        base = parse_number(options.get("base", "0"), "base=")
        if base >= ADDRESS_SPACE:
            raise InvalidArgumentError(f"base={base:#x} is no 64-bit address")
        memory_map = read_map_file(options["map"]) if "map" in options else None
        inside = truth("inside", options.get("inside", "no"))
        source = open_source(target, options, writable=writable, as_it_is=not inside)
        memory = source.memory
        if not memory.size:
            source.close()
            raise UnusableTargetError(f"{target} is empty: there is no memory in it")
        if memory_map is not None:
            return cls(source, MappedMemory(memory, memory_map), memory_map, 0)
        return cls(source, BasedMemory(memory, base) if base else memory, None, base)

    @property
    def memory(self) -> Memory:
        """See `Connector.memory`."""
        return self._memory

    @property
    def memory_map(self) -> MemoryMap:
        """See `Connector.memory_map`; without map= as large as the file is now."""
        return MemoryMap.whole(self._source.memory.size, self._base) if self._memory_map is None else self._memory_map

    @property
    def info(self) -> ConnectorInfo:
        """See `Connector.info`."""
        memory_map = self.memory_map
        notes = list(self._source.notes)
        short = max((r.real_base + r.length for r in memory_map.ranges), default=0) - self._source.memory.size
        if short > 0:
            notes.append(f"the file is {short} bytes shorter than its memory map says; what is missing faults")
        if self._memory_map is None and (odd := self._source.memory.size % PAGE):
            notes.append(f"it ends {odd} bytes into a page of {PAGE}: it may be cut short, or no image of memory")
        return ConnectorInfo(
            kind=self.kind,
            target=self._source.path,
            size=self._memory.size,
            real_size=memory_map.real_size,
            live=not self._source.immutable,
            writable=self._memory.writable,
            notes=tuple(notes),
            freshness=self._source.freshness,
        )

    @property
    def lease(self) -> Lease | None:
        """See `Connector.lease`."""
        return self._source.lease

    def close(self) -> None:
        """See `Connector.close`."""
        self._source.close()
