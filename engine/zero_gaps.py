"""Memory some of whose gaps are known to hold nothing but zeros: a dump leaves them out, a read gives them."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from engine.errors import FaultError
from engine.memory import Addresses, Data, Faults, Memory, MemoryOver, Rows
from engine.types import Extent


class ZeroGaps(MemoryOver):
    """`memory`, and zeros in `gaps`, which are ascending, disjoint, not empty, and where it has nothing."""

    def __init__(self, memory: Memory, gaps: Sequence[Extent]) -> None:
        super().__init__(memory)
        self._starts = [gap.start for gap in gaps]
        self._stops = [gap.stop for gap in gaps]
        self._start_column = np.array(self._starts, np.uint64)
        self._stop_column = np.array(self._stops, np.uint64)
        for gap in gaps:
            odd = gap.start | gap.size
            self.page_size = min(self.page_size, odd & -odd)

    @property
    def size(self) -> int:
        """As the memory below, or up to the last gap."""
        return max(self.memory.size, self._stops[-1] if self._stops else 0)

    def _zeros_from(self, address: int) -> int:
        """How many zeros are known to stand from `address` on."""
        index = bisect.bisect_right(self._starts, address) - 1
        return max(0, self._stops[index] - address) if index >= 0 else 0

    def _fill(self, address: int, buffer: memoryview, nowait: bool) -> bool:
        done, size = 0, len(buffer)
        while True:
            rest = buffer[done:] if done else buffer
            try:
                if not nowait:
                    self.memory.readinto(address + done, rest)
                elif not self.memory.readinto_nowait(address + done, rest):
                    return False
            except FaultError as error:
                zeros = min(self._zeros_from(error.address), address + size - error.address)
                if not zeros or error.address < address + done:
                    raise
                done = error.address - address
                buffer[done : done + zeros] = bytes(zeros)
                done += zeros
                if done < size:
                    continue
            return True

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        self._fill(address, buffer, False)

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        return self._fill(address, buffer, True)

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """See `Memory.read_nowait`."""
        return self.memory.read_nowait(address, size)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: the gaps hold no data."""
        return self.memory.extents(start, stop)

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`: there is no room for what would stand in a gap."""
        self.memory.write(address, data)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: rows that leave a gap go one by one, all others at once."""
        if not self._starts or not len(addresses):
            return self.memory.gather(addresses, out)
        index = np.searchsorted(self._start_column, addresses, "right") - 1
        stops = self._stop_column[index]
        zeros = (index >= 0) & (addresses < stops) & (stops - addresses >= out.shape[1])
        if not zeros.any():
            return self._gather(addresses, out)
        rows = np.flatnonzero(~zeros)
        part = np.empty((len(rows), out.shape[1]), np.uint8)
        faults = self._gather(addresses[rows], part)
        out[zeros] = 0
        out[rows] = part
        return Faults(rows[faults.rows], faults.addresses, faults.kinds)

    def _gather(self, addresses: Addresses, out: Rows) -> Faults:
        """Rows of which none lies in a gap as a whole."""
        faults = self.memory.gather(addresses, out)
        if not faults:
            return faults
        rows = faults.rows
        part = out[rows]
        rest = super().gather(addresses[rows], part)
        out[rows] = part
        return Faults(rows[rest.rows], rest.addresses, rest.kinds)

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        return self.memory.scatter(addresses, rows)

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`."""
        return self.memory.borrow(address, size)

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        try:
            return self.memory.u64(address)
        except FaultError:
            return super().u64(address)
