"""Middleware: option keys that every connector knows, since they wrap the memory that it gives.

`metrics=yes` counts reads, writes, bytes, faults and the time they take; `info` shows the figures.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping

from engine.errors import FaultError, InvalidArgumentError
from engine.memory import Addresses, Data, Faults, Memory, Rows
from engine.types import Extent

OPTIONS_HELP = {"metrics": "yes: count reads, writes, bytes, faults and time; shown in info"}


def truth(key: str, value: str) -> bool:
    """What yes and no mean in an option. Raises InvalidArgumentError for other words."""
    words = {"yes": True, "true": True, "1": True, "on": True, "no": False, "false": False, "0": False, "off": False}
    found = words.get(value.lower())
    if found is None:
        raise InvalidArgumentError(f"{key}={value}: want yes or no")
    return found


def wrap(memory: Memory, options: Mapping[str, str]) -> Memory:
    """`memory` behind what the reserved keys in `options` ask for."""
    if "metrics" in options and truth("metrics", options["metrics"]):
        memory = MeteredMemory(memory)
    return memory


class MeteredMemory(Memory):
    """A memory that counts what is asked of it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.page_size = memory.page_size
        self.writable = memory.writable
        self._lock = threading.Lock()
        self._figures = dict.fromkeys(("reads", "bytes_read", "writes", "bytes_written", "faults"), 0)
        self._seconds = 0.0

    def figures(self) -> dict[str, int | float]:
        """Counts since it was opened, and `seconds` spent in the memory below."""
        with self._lock:
            return {**self._figures, "seconds": round(self._seconds, 6)}

    def _count(self, begun: float, faults: int = 0, **figures: int) -> None:
        took = time.perf_counter() - begun
        with self._lock:
            self._seconds += took
            self._figures["faults"] += faults
            for name, number in figures.items():
                self._figures[name] += number

    @property
    def size(self) -> int:
        """As the memory below."""
        return self.memory.size

    @property
    def may_block(self) -> bool:
        """As the memory below."""
        return self.memory.may_block

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        begun = time.perf_counter()
        try:
            self.memory.readinto(address, buffer)
        except FaultError as error:
            self._count(begun, 1, reads=1, bytes_read=max(0, error.address - address))
            raise
        self._count(begun, reads=1, bytes_read=len(buffer))

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        begun = time.perf_counter()
        try:
            done = self.memory.readinto_nowait(address, buffer)
        except FaultError as error:
            self._count(begun, 1, reads=1, bytes_read=max(0, error.address - address))
            raise
        if done:
            self._count(begun, reads=1, bytes_read=len(buffer))
        return done

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        begun = time.perf_counter()
        try:
            self.memory.write(address, data)
        except FaultError as error:
            self._count(begun, 1, writes=1, bytes_written=max(0, error.address - address))
            raise
        self._count(begun, writes=1, bytes_written=len(data))

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        begun = time.perf_counter()
        faults = self.memory.gather(addresses, out)
        bad = out.shape[1] * len(faults) - int((faults.addresses - addresses[faults.rows]).sum())
        self._count(begun, len(faults), reads=len(addresses), bytes_read=out.size - bad)
        return faults

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        begun = time.perf_counter()
        faults = self.memory.scatter(addresses, rows)
        bad = rows.shape[1] * len(faults) - int((faults.addresses - addresses[faults.rows]).sum())
        self._count(begun, len(faults), writes=len(addresses), bytes_written=rows.size - bad)
        return faults

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`; counted as a read."""
        begun = time.perf_counter()
        view = self.memory.borrow(address, size)
        if view is not None:
            self._count(begun, reads=1, bytes_read=size)
        return view

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        return self.memory.extents(start, stop)

    def cached(self) -> Memory:
        """See `Memory.cached`."""
        return self
