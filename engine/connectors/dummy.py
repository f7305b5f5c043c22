"""Connector `dummy`: made memory of any size whose every byte is known, to try things on and to test with.

    dummy                              64 MiB
    dummy:size=5G,seed=7,holes=yes     laid out as a PC does (3 to 4 GiB left free), every 16th page absent

The word at address a is splitmix64(a / 8 + seed): `made_bytes` says what must be read. What is written is
kept in pages of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt

from engine.connector import Connector
from engine.errors import FaultError, InvalidArgumentError, ReadOnlyError
from engine.memory import Data, Memory
from engine.memory_map import MapRange, MemoryMap
from engine.middleware import truth
from engine.numbers import parse_number
from engine.oslayer import Options, OsLayer
from engine.types import ConnectorInfo, Extent

PAGE = 4096
HOLE_EVERY = 16
"""With holes=yes the last page of every so many is absent."""
GAP_START, GAP_STOP = 3 << 30, 4 << 30
"""Where a PC keeps its devices below 4 GiB."""
SIZE_LIMIT = 1 << 52
WRITTEN_LIMIT = 1 << 16
"""Pages that may be written to: 256 MiB."""
_BLOCK = 1 << 20
_GROUP = HOLE_EVERY * PAGE


def _words(first: int, count: int, seed: int) -> npt.NDArray[np.uint64]:
    """splitmix64 of the word numbers (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    index = np.arange(count, dtype=np.uint64) + np.uint64((first + seed) % (1 << 64))
    z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def made_bytes(address: int, size: int, seed: int = 0) -> bytes:
    """What a fresh dummy memory holds at `address`."""
    first = address // 8
    words = _words(first, (address + size + 7) // 8 - first, seed)
    return words.astype("<u8").tobytes()[address % 8 : address % 8 + size]


class DummyMemory(Memory):
    """Computed bytes; see the module."""

    page_size = PAGE

    def __init__(self, memory_map: MemoryMap, seed: int, *, holes: bool, writable: bool) -> None:
        self.memory_map = memory_map
        self.seed = seed
        self.holes = holes
        self.writable = writable
        self._written: dict[int, bytearray] = {}
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """First address behind all memory."""
        return self.memory_map.size

    def _readable(self, address: int, size: int) -> int:
        """How many of `size` bytes from `address` on there are without a break."""
        for extent in self.extents(address, address + size):
            return extent.size if extent.start == address else 0
        return 0

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        stop = self.size if stop is None else min(stop, self.size)
        for entry in self.memory_map.ranges:
            low, high = max(start, entry.base), min(stop, entry.stop)
            while low < high:
                group = low // _GROUP * _GROUP
                until = min(high, group + _GROUP - PAGE) if self.holes else high
                if low < until:
                    yield Extent(low, until - low)
                low = group + _GROUP if self.holes else high

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        size = self._readable(address, len(buffer)) if address >= 0 else 0
        for offset in range(0, size, _BLOCK):
            step = min(_BLOCK, size - offset)
            buffer[offset : offset + step] = made_bytes(address + offset, step, self.seed)
        if self._written:
            self._overlay(address, buffer[:size])
        if size < len(buffer):
            raise FaultError(address + size)

    def _overlay(self, address: int, buffer: memoryview) -> None:
        """Lay the written pages over what was computed."""
        with self._lock:
            for page in range(address // PAGE, (address + len(buffer) - 1) // PAGE + 1):
                written = self._written.get(page)
                if written is not None:
                    low, high = max(address, page * PAGE), min(address + len(buffer), (page + 1) * PAGE)
                    buffer[low - address : high - address] = written[low - page * PAGE : high - page * PAGE]

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        if not self.writable:
            raise ReadOnlyError()
        view = memoryview(data).cast("B")
        size = self._readable(address, len(view)) if address >= 0 else 0
        done = 0
        while done < size:
            page, offset = divmod(address + done, PAGE)
            step = min(size - done, PAGE - offset)
            with self._lock:
                if page not in self._written:
                    if len(self._written) >= WRITTEN_LIMIT:
                        raise FaultError(address + done, detail="dummy keeps at most 256 MiB of written pages")
                    self._written[page] = bytearray(made_bytes(page * PAGE, PAGE, self.seed))
                self._written[page][offset : offset + step] = view[done : done + step]
            done += step
        if size < len(view):
            raise FaultError(address + size)


class DummyConnector(Connector):
    """Made memory with known truth."""

    kind = "dummy"
    summary = "made memory whose every byte is known, to try things on"
    options_help = {
        "size": "bytes of memory (64M)",
        "seed": "another number, other bytes (0)",
        "holes": "yes: every 16th page is absent (no)",
    }

    def __init__(self, memory: DummyMemory) -> None:
        self._memory = memory

    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Make the memory. Raises InvalidArgumentError."""
        if parent is not None or target:
            raise InvalidArgumentError("dummy wants neither a target nor a parent: dummy[:size=…,seed=…,holes=…]")
        size = parse_number(options.get("size", "64M"), "size=")
        if not 0 < size <= SIZE_LIMIT or size % PAGE:
            raise InvalidArgumentError(f"size={options.get('size')}: want a multiple of 4K up to 4096T")
        seed = parse_number(options.get("seed", "0"), "seed=")
        holes = truth("holes", options.get("holes", "no"))
        return cls(DummyMemory(_layout(size), seed, holes=holes, writable=writable))

    @property
    def memory(self) -> Memory:
        """See `Connector.memory`."""
        return self._memory

    @property
    def memory_map(self) -> MemoryMap:
        """See `Connector.memory_map`."""
        return self._memory.memory_map

    @property
    def info(self) -> ConnectorInfo:
        """See `Connector.info`."""
        memory_map = self._memory.memory_map
        return ConnectorInfo(
            kind=self.kind,
            target="",
            size=memory_map.size,
            real_size=memory_map.real_size,
            live=self._memory.writable,
            writable=self._memory.writable,
            notes=("every byte is made up: splitmix64 of its address",),
        )

    def close(self) -> None:
        """See `Connector.close`: nothing is held."""


def _layout(size: int) -> MemoryMap:
    if size <= GAP_START:
        return MemoryMap.whole(size)
    return MemoryMap([MapRange(0, GAP_START, 0), MapRange(GAP_STOP, size - GAP_START, GAP_STOP)])
