"""Pages kept for a while, for sources that are slow to ask: a debug stub, a file on another machine.

What may be old is said by kind of page: page tables, pages that a process may only read, or all of them. Kinds are
known to who reads: whoever walks page tables asks `Memory.for_tables`, whoever reads through a mapping without the
right to write `Memory.for_constants`, and gets a view that keeps pages; all else is read anew.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from engine.errors import FaultKind
from engine.memory import NO_FAULTS, Addresses, Data, Faults, Memory, Rows, fault
from engine.types import Extent

PAGE = 4096
PAGES_MOST = 1 << 14
"""Pages that are kept: 64 MiB."""
AT_ONCE = 256
KINDS = {"tables": (True, False, False), "read-only": (True, True, False), "all": (True, True, True)}
"""What is kept: page tables, pages that may only be read, everything."""

Page = tuple[float, bytes, int]
"""When it was read, its bytes up to the first fault, the kind of the fault (0: none)."""


class PageCache:
    """Pages of one memory, each for `lifetime` seconds; the least recently used go first."""

    def __init__(self, memory: Memory, lifetime: float) -> None:
        self.memory = memory
        self.lifetime = lifetime
        self.hits = 0
        self.misses = 0
        self._pages: OrderedDict[int, Page] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, numbers: Sequence[int]) -> dict[int, Page]:
        """These pages, at most `AT_ONCE` of them; those not kept are read in one go."""
        oldest = time.monotonic() - self.lifetime
        found: dict[int, Page] = {}
        with self._lock:
            for number in numbers:
                page = self._pages.get(number)
                if page is not None and page[0] >= oldest:
                    self._pages.move_to_end(number)
                    found[number] = page
            missing = [number for number in numbers if number not in found]
            self.hits += len(found)
            self.misses += len(missing)
        if missing:
            read = self._read(missing)
            found.update(read)
            with self._lock:
                self._pages.update(read)
                while len(self._pages) > PAGES_MOST:
                    self._pages.popitem(last=False)
        return found

    def _read(self, numbers: Sequence[int]) -> dict[int, Page]:
        began = time.monotonic()  # before: what is read a moment later is younger than it says
        out = np.empty((len(numbers), PAGE), np.uint8)
        addresses = np.array(numbers, np.uint64) * np.uint64(PAGE)
        faults = self.memory.gather(addresses, out)
        short = {
            row: (at - int(addresses[row]), kind)
            for row, at, kind in zip(
                faults.rows.tolist(), faults.addresses.tolist(), faults.kinds.tolist(), strict=True
            )
        }
        pages: dict[int, Page] = {}
        for row, number in enumerate(numbers):
            good, kind = short.get(row, (PAGE, 0))
            pages[number] = began, out[row, :good].tobytes(), kind
        return pages

    def drop(self, address: int, size: int) -> None:
        """Forget what is about to be written to."""
        with self._lock:
            for number in range(address // PAGE, (address + max(size, 1) - 1) // PAGE + 1):
                self._pages.pop(number, None)


class CachedPages(Memory):
    """A memory read through a cache of its pages."""

    def __init__(self, cache: PageCache) -> None:
        self.cache = cache
        self.memory = cache.memory
        self.page_size = min(PAGE, self.memory.page_size)
        self.writable = self.memory.writable

    @property
    def size(self) -> int:
        """As the memory below."""
        return self.memory.size

    @property
    def may_block(self) -> bool:
        """As the memory below."""
        return self.memory.may_block

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        return self.memory.extents(start, stop)

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`. What is longer than a few hundred pages is read past the cache."""
        if len(buffer) > AT_ONCE * PAGE or address < 0:
            self.memory.readinto(address, buffer)
            return
        done, size = 0, len(buffer)
        first, last = address // PAGE, (address + max(size, 1) - 1) // PAGE
        pages: dict[int, Page] = {}
        for begin in range(first, last + 1, AT_ONCE):
            pages.update(self.cache.get(range(begin, min(last + 1, begin + AT_ONCE))))
        while done < size:
            number, offset = divmod(address + done, PAGE)
            _, data, kind = pages[number]
            part = data[offset : offset + size - done]
            buffer[done : done + len(part)] = part
            done += len(part)
            if done < size and (address + done) // PAGE == number:
                raise fault(address + done, FaultKind(kind))

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        width = out.shape[1]
        if not len(addresses) or not 0 < width <= PAGE:
            return super().gather(addresses, out) if width else NO_FAULTS
        first = addresses // np.uint64(PAGE)
        if bool((first != (addresses + np.uint64(width - 1)) // np.uint64(PAGE)).any()):
            return super().gather(addresses, out)
        found: list[tuple[int, int, int]] = []
        order = np.argsort(first, kind="stable")
        numbers, starts = np.unique(first[order], return_index=True)
        bounds = [*starts.tolist(), len(order)]
        for begin in range(0, len(numbers), AT_ONCE):
            group = numbers[begin : begin + AT_ONCE].tolist()
            pages = self.cache.get(group)
            for index, number in enumerate(group, begin):
                rows = order[bounds[index] : bounds[index + 1]]
                offsets = (addresses[rows] - np.uint64(number * PAGE)).astype(np.intp)
                _, data, kind = pages[number]
                page = np.zeros(PAGE, np.uint8)
                page[: len(data)] = np.frombuffer(data, np.uint8)
                out[rows] = page[offsets[:, None] + np.arange(width)]
                for row, offset in zip(rows.tolist(), offsets.tolist(), strict=True):
                    if offset + width > len(data):
                        found.append((row, number * PAGE + max(offset, len(data)), kind))
        return Faults.of(sorted(found))

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        size = memoryview(data).nbytes
        try:
            self.memory.write(address, data)
        finally:
            self.cache.drop(address, size)


class KindCache(Memory):
    """A memory whose views for page tables, and for what may only be read, keep pages; itself it keeps none."""

    def __init__(self, memory: Memory, kept: str, lifetime: float) -> None:
        self.memory = memory
        self.page_size = memory.page_size
        self.writable = memory.writable
        self.cache = PageCache(memory, lifetime)
        tables, constants, everything = KINDS[kept]
        view = CachedPages(self.cache)
        self._tables: Memory = view if tables else self
        self._constants: Memory = view if constants else self
        self._plain: Memory = view if everything else memory

    def for_tables(self) -> Memory:
        """See `Memory.for_tables`."""
        return self._tables

    def for_constants(self) -> Memory:
        """See `Memory.for_constants`."""
        return self._constants

    @property
    def size(self) -> int:
        """As the memory below."""
        return self.memory.size

    @property
    def may_block(self) -> bool:
        """As the memory below."""
        return self.memory.may_block

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        return self.memory.extents(start, stop)

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        self._plain.readinto(address, buffer)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        return self._plain.gather(addresses, out)

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        try:
            self.memory.write(address, data)
        finally:
            self.cache.drop(address, memoryview(data).nbytes)
