"""What connectors have in common whose target is one image file, which `engine.image_source` opens."""

from __future__ import annotations

from collections.abc import Iterable

from engine.connector import Connector
from engine.image_source import ImageSource
from engine.leases import Lease
from engine.memory import Memory
from engine.memory_map import MemoryMap
from engine.types import ConnectorInfo, TargetHints


class ImageConnector(Connector):
    """An image file as physical memory; a subclass opens it."""

    opens_packed = True

    def __init__(
        self,
        source: ImageSource,
        memory: Memory,
        memory_map: MemoryMap,
        notes: Iterable[str] = (),
        hints: TargetHints | None = None,
    ) -> None:
        self._source = source
        self._memory = memory
        self._memory_map = memory_map
        self._notes = tuple(notes)
        self._hints = hints or TargetHints()

    @property
    def memory(self) -> Memory:
        """See `Connector.memory`."""
        return self._memory

    @property
    def memory_map(self) -> MemoryMap:
        """See `Connector.memory_map`."""
        return self._memory_map

    @property
    def info(self) -> ConnectorInfo:
        """See `Connector.info`."""
        return ConnectorInfo(
            kind=self.kind,
            target=self._source.path,
            size=self._memory.size,
            real_size=self._memory_map.real_size,
            live=not self._source.immutable,
            writable=self._memory.writable,
            notes=self._notes,
            freshness=self._source.freshness,
        )

    @property
    def lease(self) -> Lease | None:
        """See `Connector.lease`."""
        return self._source.lease

    def hints(self) -> TargetHints:
        """See `Connector.hints`: what the image told when it was opened."""
        return self._hints

    def close(self) -> None:
        """See `Connector.close`."""
        self._source.close()
