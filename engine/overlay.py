"""Copy on write: a memory that takes writes and never hands them on, to experiment on a target without touching it.

A page is copied when it is first written to, and is this overlay's own from then on: what the target writes there
afterwards is not seen any more, as in a private mapping of a file.
"""

from __future__ import annotations

import bisect
import heapq
import threading
from collections.abc import Iterator

import numpy as np

from engine.errors import FaultError
from engine.memory import Addresses, Data, Faults, Memory, MemoryOver, Pieces, Rows
from engine.types import Extent

PAGE = 4096
PAGES_MOST = 1 << 16
"""Pages that may be written to: 256 MiB."""


class OverlayMemory(MemoryOver):
    """A memory with pages of its own over those of another."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.writable = True
        self.page_size = min(memory.page_size, PAGE)
        self._pages: dict[int, bytearray] = {}
        self._numbers: list[int] = []
        self._lock = threading.Lock()

    @property
    def written(self) -> int:
        """How many pages were written to."""
        return len(self._numbers)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: those of the memory below, and the pages that were written to."""
        stop = self.size if stop is None else min(stop, self.size)
        with self._lock:
            low = bisect.bisect_left(self._numbers, start // PAGE)
            high = bisect.bisect_left(self._numbers, -(-stop // PAGE))
            pages = self._numbers[low:high]
        own = [(max(start, number * PAGE), min(stop, (number + 1) * PAGE)) for number in pages]
        below = ((extent.start, extent.stop) for extent in self.memory.extents(start, stop))
        yield from _joined(below, own)

    def _lay_over(self, address: int, buffer: memoryview) -> None:
        """Put what was written to the pages of [address, address + size) over what was read of them."""
        stop = address + len(buffer)
        with self._lock:
            numbers = self._numbers
            for index in range(bisect.bisect_left(numbers, address // PAGE), len(numbers)):
                start = numbers[index] * PAGE
                if start >= stop:
                    return
                low, high = max(address, start), min(stop, start + PAGE)
                buffer[low - address : high - address] = self._pages[numbers[index]][low - start : high - start]

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        try:
            self.memory.readinto(address, buffer)
        except FaultError as error:
            self._lay_over(address, buffer[: max(0, error.address - address)])
            raise
        self._lay_over(address, buffer)

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        try:
            done = self.memory.readinto_nowait(address, buffer)
        except FaultError as error:
            self._lay_over(address, buffer[: max(0, error.address - address)])
            raise
        if done:
            self._lay_over(address, buffer)
        return done

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        faults = self.memory.gather(addresses, out)
        width = out.shape[1]
        if self._numbers and out.size:
            with self._lock:
                numbers = np.array(self._numbers, np.uint64)
            first = np.searchsorted(numbers, addresses // np.uint64(PAGE))
            last = np.searchsorted(numbers, (addresses + np.uint64(width - 1)) // np.uint64(PAGE), "right")
            rows = np.flatnonzero(last > first)
            good = dict(zip(faults.rows.tolist(), faults.addresses.tolist(), strict=True))
            flat = out.data.cast("B")
            for row in rows.tolist():
                address = int(addresses[row])
                size = good.get(row, address + width) - address
                self._lay_over(address, flat[row * width : row * width + max(0, size)])
        return faults

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`. A page that cannot be read below faults, and so does one above the bound of 256 MiB."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            number, offset = divmod(address + done, PAGE)
            step = min(len(view) - done, PAGE - offset)
            self._write(number, offset, view[done : done + step])
            done += step

    def _write(self, number: int, offset: int, data: memoryview) -> None:
        with self._lock:
            page = self._pages.get(number)
            if page is not None:
                page[offset : offset + len(data)] = data
                return
            full = len(self._pages) >= PAGES_MOST
        if full:
            raise FaultError(number * PAGE + offset, detail="an overlay keeps at most 256 MiB of written pages")
        page = self._copy(number, offset, len(data))
        with self._lock:
            page = self._pages.setdefault(number, page)
            page[offset : offset + len(data)] = data
            index = bisect.bisect_left(self._numbers, number)
            if index == len(self._numbers) or self._numbers[index] != number:
                self._numbers.insert(index, number)

    def _copy(self, number: int, offset: int, size: int) -> bytearray:
        """The page as it is below; the part that is written to must be readable there."""
        page = bytearray(PAGE)
        self.memory.readinto(number * PAGE + offset, memoryview(page)[offset : offset + size])
        self.memory.readinto_padded(number * PAGE, memoryview(page))
        return page

    def pieces(self) -> Pieces | None:
        """See `Memory.pieces`: those below, until something is written."""
        return None if self._numbers else self.memory.pieces()

    def cached(self) -> Memory:
        """See `Memory.cached`."""
        return self


def _joined(below: Iterator[tuple[int, int]], own: list[tuple[int, int]]) -> Iterator[Extent]:
    """Two ascending lists of extents as one, what touches or overlaps joined."""
    current: tuple[int, int] | None = None
    for start, stop in heapq.merge(below, own):
        if current is not None and start <= current[1]:
            current = current[0], max(current[1], stop)
            continue
        if current is not None:
            yield Extent(current[0], current[1] - current[0])
        current = start, stop
    if current is not None:
        yield Extent(current[0], current[1] - current[0])
