"""The memory of a guest, put together from what its QEMU maps.

`RamMemory` is what a connector gives: it answers for as long as the QEMU lives that was opened, and no longer.
`UntouchedRam` gives zeros where a guest in a guest has not touched its RAM yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from engine.connectors.qemu.presence import Presence
from engine.errors import EngineError, FaultError, FaultKind
from engine.floors import Deep, Through
from engine.memory import COLUMN_THRESHOLD, Addresses, Data, Faults, Memory, MemoryOver, Pieces, Rows, fault
from engine.types import Extent, Shortcut

BELIEVED = 0.05
"""Seconds for which reads of a file may be answered in C, without asking whether QEMU is still there."""
SCATTERED = 256 << 10
"""Bytes from which on pages that lie anywhere are gathered rather than read one after the other (measured)."""
BLOCK = 4 << 20
"""Bytes that are gathered page by page at a time."""


class RamMemory(MemoryOver):
    """Physical memory of a guest. Raises TargetGoneError once its QEMU has ended."""

    def __init__(self, memory: Memory, presence: Presence, look: Callable[[], None] | None = None) -> None:
        """`look` is called after each read; by default it is `Presence.check`."""
        super().__init__(memory)
        self.presence = presence
        self._look = presence.check if look is None else look
        self._looks_each_time = self._look == presence.check

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        try:
            self.memory.readinto(address, buffer)
        except EngineError as error:
            raise self.presence.explained(error) from None
        self._look()

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        try:
            done = self.memory.readinto_nowait(address, buffer)
        except EngineError as error:
            raise self.presence.explained(error) from None
        (self._look if done else self.presence.check)()
        return done

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        try:
            data = self.memory.read(address, size)
        except EngineError as error:
            raise self.presence.explained(error) from None
        self._look()
        return data

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """See `Memory.read_nowait`."""
        try:
            data = self.memory.read_nowait(address, size)
        except EngineError as error:
            raise self.presence.explained(error) from None
        self._look()
        return data

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        try:
            value = self.memory.u64(address)
        except EngineError as error:
            raise self.presence.explained(error) from None
        self._look()
        return value

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        try:
            faults = self.memory.gather(addresses, out)
        except EngineError as error:
            raise self.presence.explained(error) from None
        self._look()
        if faults and len(faults) == len(addresses):
            self.presence.check_memory()
        return faults

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`: the guest sees it at once."""
        self.presence.check()
        try:
            self.memory.write(address, data)
        except EngineError as error:
            raise self.presence.explained(error) from None

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        self.presence.check()
        try:
            return self.memory.scatter(addresses, rows)
        except EngineError as error:
            raise self.presence.explained(error) from None

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        self.presence.check()
        try:
            yield from self.memory.extents(start, stop)
        except EngineError as error:
            raise self.presence.explained(error) from None

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`."""
        found = self.memory.borrow(address, size)
        self.presence.check()
        return found

    def pieces(self) -> Pieces | None:
        """See `Memory.pieces`."""
        found = self.memory.pieces()
        self.presence.check()
        return found

    def shortcut(self) -> Shortcut | None:
        """See `Memory.shortcut`: for so short a time that an end of QEMU is not missed for long."""
        self.presence.check()
        found = self.memory.shortcut()
        if found is None or found.pidfd >= 0:  # the pidfd is asked after each read
            return found
        return replace(found, until=min(found.until, time.monotonic() + BELIEVED))

    def floor(self) -> Through:
        """See `engine.floors`."""
        return Through(self.memory, self._is_there)

    def _is_there(self) -> bool:
        self._look()
        return True

    def cached(self) -> Memory:
        """See `Memory.cached`."""
        seldom = self.presence.glance() if self._looks_each_time else self._look
        return type(self)(self.memory.cached(), self.presence, seldom)


class UntouchedRam(MemoryOver):
    """Private memory of a process that is seen through its page tables: zeros where it has no page yet.

    Pages in swap, and page tables that cannot be read, fault as they do below. `extents` of what is asked lie within
    what this class is for: a private anonymous mapping.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self._deep = memory if isinstance(memory, Deep) else None

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        if self._deep is not None and len(buffer) <= SCATTERED and self._deep.read_down(address, buffer):
            return
        page, stop = self.page_size, address + len(buffer)
        first, last = -(-address // page) * page, stop // page * page
        if last - first <= COLUMN_THRESHOLD * page:
            self._read(address, buffer)
            return
        self._read(address, buffer[: first - address])
        for start in range(first, last, BLOCK):
            end = min(last, start + BLOCK)
            rows = np.frombuffer(buffer[start - address : end - address], np.uint8).reshape(-1, page)
            faults = self.memory.gather(np.arange(start, end, page, dtype=np.uint64), rows)
            others = np.flatnonzero(faults.kinds != FaultKind.ABSENT)
            if len(others):
                raise fault(int(faults.addresses[others[0]]), FaultKind(int(faults.kinds[others[0]])))
        self._read(last, buffer[last - address :])

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        if self.may_block:
            return False
        self.readinto(address, buffer)
        return True

    def _read(self, address: int, buffer: memoryview) -> None:
        """Some pages, one by one from the first that is absent on."""
        done, size, page = 0, len(buffer), self.page_size
        step = size
        while done < size:
            try:
                self.memory.readinto(address + done, buffer[done : done + step])
                done += step
            except FaultError as error:
                if error.kind is not FaultKind.ABSENT:
                    raise
                start = max(error.address - address, done)
                done = min(size, (address + start) // page * page + page - address)
                buffer[start:done] = bytes(done - start)
            step = min(page - (address + done) % page, size - done)

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        try:
            return self.memory.u64(address)
        except FaultError:
            return super().u64(address)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`; rows that fail are zeros already, but for those that go on behind their fault."""
        faults = self.memory.gather(addresses, out)
        if not faults:
            return faults
        absent = faults.kinds == FaultKind.ABSENT
        if not absent.any():
            return faults
        kept: list[tuple[int, int, int]] = []
        width = out.shape[1]
        ends = addresses[faults.rows] + np.uint64(width)
        over = absent & (ends > (faults.addresses // self.page_size + 1) * np.uint64(self.page_size))
        flat = out.data.cast("B")
        for index in np.flatnonzero(over | ~absent).tolist():
            row = int(faults.rows[index])
            if absent[index]:
                try:
                    self.readinto(int(addresses[row]), flat[row * width : (row + 1) * width])
                except FaultError as error:
                    kept.append((row, error.address, error.kind))
                continue
            kept.append((row, int(faults.addresses[index]), int(faults.kinds[index])))
        return Faults.of(kept)

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`; where there is no page yet none is made."""
        self.memory.write(address, data)

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        return self.memory.scatter(addresses, rows)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        return self.memory.extents(start, stop)

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`."""
        return self.memory.borrow(address, size)

    def floor(self) -> Through:
        """See `engine.floors`: a page that is absent is none that C reads."""
        return Through(self.memory)

    def cached(self) -> Memory:
        """See `Memory.cached`."""
        return type(self)(self.memory.cached())
