"""The memory behind a stub: pages fetched together, kept while the target stands still."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import numpy as np

from engine.connectors.gdb.session import PAGE, Session
from engine.errors import FaultError, FaultKind, ReadOnlyError, SourceFaultError
from engine.memory import NO_FAULTS, Addresses, Data, Faults, Memory, Rows
from engine.memory_map import MemoryMap
from engine.types import Extent

AHEAD = 256
"""Pages of one conversation."""
ROWS = 4096
"""Rows of one conversation where they are asked for one by one."""
SPARSE = 32
"""A row of at most one such part of a page is asked for alone where nothing else of its page is wanted."""


class StubMemory(Memory):
    """Memory through a debug stub, within a memory map: outside of it nothing is ever asked for.

    Devices are outside, since reading them may change them.
    """

    page_size = PAGE

    def __init__(self, session: Session, memory_map: MemoryMap, *, writable: bool) -> None:
        self.memory_map = memory_map
        self.writable = writable
        self._session = session
        self._ranges = memory_map.coalesced()
        self._bases = [entry.base for entry in self._ranges]

    @property
    def size(self) -> int:
        """First address behind all memory."""
        return self.memory_map.size

    @property
    def may_block(self) -> bool:
        """It talks to another program."""
        return True

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        stop = self.size if stop is None else min(stop, self.size)
        for entry in self._ranges:
            low, high = max(start, entry.base), min(stop, entry.stop)
            if low < high:
                yield Extent(low, high - low)

    def _inside(self, address: int, size: int) -> int:
        """How many of `size` bytes from `address` on lie in the map without a break."""
        index = bisect.bisect_right(self._bases, address) - 1
        return min(size, max(0, self._ranges[index].stop - address)) if index >= 0 else 0

    def _is_whole(self, number: int) -> bool:
        return self._inside(number * PAGE, PAGE) == PAGE

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        number, skip = divmod(address, PAGE)
        if skip + len(buffer) <= PAGE and (kept := self._session.kept((number,))) is not None:
            part = kept[number][skip : skip + len(buffer)]
            if len(part) == len(buffer):
                buffer[:] = part
                return
        inside = self._inside(address, len(buffer))
        done = 0
        while done < inside:
            number, skip = divmod(address + done, PAGE)
            count = min(AHEAD, -(-(skip + inside - done) // PAGE))
            pages = self._pages(list(range(number, number + count)))
            for page in range(number, number + count):
                start, data = pages[page]
                at = max(0, address + done - start)
                part = data[at : at + inside - done]
                buffer[done : done + len(part)] = part
                done += len(part)
                if done < inside and (address + done) // PAGE == page:
                    raise SourceFaultError(address + done, detail="the stub cannot read there")
        if inside < len(buffer):
            raise FaultError(address + max(0, inside))

    def _pages(self, numbers: list[int]) -> dict[int, tuple[int, bytes]]:
        """(first address, bytes) of the part of each page that is in the map."""
        whole = [number for number in numbers if self._is_whole(number)]
        found = {number: (number * PAGE, data) for number, data in self._session.read_pages(whole).items()}
        edges = [number for number in numbers if number not in found]
        if edges:
            parts = []
            for number in edges:
                extent = next(iter(self.extents(number * PAGE, (number + 1) * PAGE)), Extent(number * PAGE, 0))
                parts.append((extent.start, extent.size))
            for number, (start, _), data in zip(edges, parts, self._session.read(parts), strict=True):
                found[number] = start, data
        return found

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: the pages of all rows in a few conversations."""
        width = out.shape[1]
        if not len(addresses) or not width:
            return NO_FAULTS
        first = addresses // np.uint64(PAGE)
        last = (addresses + np.uint64(width - 1)) // np.uint64(PAGE)
        if width > PAGE or bool((first != last).any()):
            return super().gather(addresses, out)
        found: list[tuple[int, int, int]] = []
        order = np.argsort(first, kind="stable")
        numbers, starts = np.unique(first[order], return_index=True)
        if len(numbers) * 2 > len(addresses) and width * SPARSE <= PAGE:
            return self._gather_words(addresses, out)
        bounds = [*starts.tolist(), len(order)]
        for begin in range(0, len(numbers), AHEAD):
            group = numbers[begin : begin + AHEAD].tolist()
            pages = self._pages([number for number in group if self._inside_any(number)])
            for index, number in enumerate(group, begin):
                rows = order[bounds[index] : bounds[index + 1]]
                self._fill(out, rows, addresses, pages.get(number, (number * PAGE, b"")), found)
        return Faults.of(sorted(found))

    def _gather_words(self, addresses: Addresses, out: Rows) -> Faults:
        """Rows of which hardly two lie in one page: they alone are asked for, not the pages around them."""
        width = out.shape[1]
        found: list[tuple[int, int, int]] = []
        for begin in range(0, len(addresses), ROWS):
            group = addresses[begin : begin + ROWS].tolist()
            wanted = [(address, self._inside(address, width)) for address in group]
            for row, (address, data) in enumerate(zip(group, self._session.read(wanted), strict=True), begin):
                self._place(out, row, address, data, found)
        return Faults.of(found)

    def _place(self, out: Rows, row: int, address: int, data: bytes, found: list[tuple[int, int, int]]) -> None:
        out[row, : len(data)] = np.frombuffer(data, np.uint8)
        if len(data) < out.shape[1]:
            out[row, len(data) :] = 0
            at = address + len(data)
            found.append((row, at, FaultKind.SOURCE if self._inside(at, 1) else FaultKind.ABSENT))

    def _inside_any(self, number: int) -> bool:
        return next(iter(self.extents(number * PAGE, (number + 1) * PAGE)), None) is not None

    def _fill(
        self, out: Rows, rows: object, addresses: Addresses, page: tuple[int, bytes], found: list[tuple[int, int, int]]
    ) -> None:
        start, data = page
        width = out.shape[1]
        for row in np.asarray(rows).tolist():
            address = int(addresses[row])
            part = data[address - start : address - start + width] if address >= start else b""
            self._place(out, row, address, part, found)

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        if not self.writable:
            raise ReadOnlyError()
        view = memoryview(data).cast("B")
        inside = self._inside(address, len(view))
        done = self._session.write(address, view[:inside]) if inside > 0 else 0
        if done < inside:
            raise SourceFaultError(address + done, detail="the stub refuses to write there")
        if inside < len(view):
            raise FaultError(address + max(0, inside))
