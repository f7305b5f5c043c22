"""Fakes: memories that behave badly on purpose."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from engine.memory import Data, Memory
from engine.types import Extent


class SlowMemory(Memory):
    """A memory in front of another that answers only when it is let: for time limits and responsiveness.

    Readers wait until `gate` is set; `waiting` is set as soon as one does.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.page_size = memory.page_size
        self.writable = memory.writable
        self.gate = threading.Event()
        self.waiting = threading.Event()

    @property
    def size(self) -> int:
        """As the memory behind."""
        return self.memory.size

    @property
    def may_block(self) -> bool:
        """It does."""
        return True

    def _wait(self) -> None:
        self.waiting.set()
        self.gate.wait()

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`; waits for the gate."""
        self._wait()
        self.memory.readinto(address, buffer)

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`; waits for the gate."""
        self._wait()
        self.memory.write(address, data)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`; does not wait."""
        return self.memory.extents(start, stop)
