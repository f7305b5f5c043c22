"""The memory of a process of this host.

Small reads go by /proc/PID/mem, large ones and columns by process_vm_readv, each after a look at pagemap:
what that look is for, and the ways that are taken where a page is not there, stand in `transfer`.

What is kept between two reads: the descriptors, which belong to one address space, and for a second whether
a mapping may have to be waited for (see `looks`). No byte and no mapping is.
"""

from __future__ import annotations

import struct
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from os import pread, preadv
from typing import TypeVar

import numpy as np

from engine.errors import FaultError, FaultKind, ReadOnlyError
from engine.floors import Ground
from engine.memory import NO_FAULTS, Addresses, Data, Faults, Memory, Rows
from engine.oslayers.native import columns, transfer, usual, vectors
from engine.oslayers.native.descriptors import Descriptors, NoMemoryError, open_descriptors
from engine.oslayers.native.extents import data_runs
from engine.oslayers.native.looks import LOOKS
from engine.oslayers.native.mappings import AddressSpaceGoneError, WouldWaitError
from engine.oslayers.native.pagemap import (
    HELD,
    LEAST_HELD,
    PAGE_SHIFT,
    PAGE_SIZE,
    PRESENT,
    SCAN_PAGES,
    TOP_BYTE,
    PageKind,
)
from engine.oslayers.native.procfs import PF_KTHREAD, ProcDirectory
from engine.oslayers.native.transfer import CHUNK, VECTOR_BYTES
from engine.types import ADDRESS_SPACE, Extent, Shortcut

OPEN_LIMIT = 128
"""Memories that hold their four descriptors at one time: half of what a process may usually open."""

T = TypeVar("T")

_U16 = struct.Struct("<H").unpack
_U32 = struct.Struct("<I").unpack
_U64 = struct.Struct("<Q").unpack
_OFFSET_MASK = PAGE_SIZE - 1


class _Opened:
    """The memories that hold descriptors: above the limit those opened first let go of theirs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._memories: OrderedDict[weakref.ref[NativeMemory], None] = OrderedDict()

    def _forget(self, entry: weakref.ref[NativeMemory]) -> None:
        # Called whenever a memory is collected, also in a thread that holds the lock: one call, which needs none.
        self._memories.pop(entry, None)

    def add(self, memory: NativeMemory) -> None:
        """It has opened its descriptors."""
        entry = weakref.ref(memory, self._forget)
        above: list[NativeMemory | None] = []
        with self._lock:
            self._memories.pop(entry, None)
            self._memories[entry] = None
            while len(self._memories) > OPEN_LIMIT:
                above.append(self._memories.popitem(last=False)[0]())
        for first in above:
            if first is not None:
                first.close()

    def remove(self, memory: NativeMemory) -> None:
        """It has let go of them."""
        self._memories.pop(weakref.ref(memory), None)


_opened = _Opened()


class NativeMemory(Memory):
    """All addresses of one process, 0 to 2^64; those that the process could not use fault.

    Every method raises ProcessExitedError once the process has ended, also if its PID is in use again, and
    AccessDeniedError where the host does not allow to look. When the process runs another program, the next
    call is about that one's memory. A kernel thread and a zombie have no memory: every address faults.
    """

    page_size = PAGE_SIZE

    def __init__(self, directory: ProcDirectory, *, writable: bool = False) -> None:
        self._directory = directory
        self.writable = writable
        self._files: Descriptors | None = None
        self._asked = False
        """Whether to look, before the next read that may wait, at what the process maps."""

    @property
    def size(self) -> int:
        """2^64: any address may be asked for."""
        return ADDRESS_SPACE

    def close(self) -> None:
        """Drop the descriptors; they are closed when the last reader is done, and opened again on next use."""
        self._files = None
        _opened.remove(self)

    # -- what may wait ------------------------------------------------------------------------------------

    @property
    def may_block(self) -> bool:
        """Whether any of the process's mappings lies on a FUSE or network file system, or on an unknown one.

        As the last look at its mappings told, which is believed for a second. True where there was none since:
        looking takes the process's mmap_lock, for which one may have to wait. The next read or write looks.
        False where its mappings cannot be looked at: a read then fails at once.
        """
        answer = LOOKS.answer(self._directory)
        if answer is None:
            self._asked = True
            return True
        return answer

    def _look(self) -> None:
        self._asked = False
        LOOKS.look(self._directory)

    # -- descriptors --------------------------------------------------------------------------------------

    def _descriptors(self) -> Descriptors:
        files = self._files
        if files is None:
            files, keep = open_descriptors(self._directory, writable=self.writable)
            if keep:
                self._files = files
                _opened.add(self)
        return files

    def _attempt(self, address: int, action: Callable[[Descriptors], T]) -> T:
        """Do it; once more where the process has started another program meanwhile."""
        try:
            return self._try(action)
        except NoMemoryError:
            stat = self._directory.stat()
        why = "is a kernel thread, which has no memory of its own"
        if not stat.flags & PF_KTHREAD:
            why = f"has no memory now (state {stat.state})"
        raise FaultError(address, detail=f"process {self._directory.pid} {why}")

    def _attempt_rows(
        self, at: Addresses, action: Callable[[Descriptors], columns.Found], out: Rows | None = None
    ) -> columns.Found:
        """Do it as `_attempt` does; without memory each row of `at` fails, and `out` is zeros."""
        try:
            return self._try(action)
        except NoMemoryError:
            self._directory.stat()
        if out is not None:
            out[:] = 0
        return [(row, address, FaultKind.ABSENT) for row, address in enumerate(at.tolist())]

    def _try(self, action: Callable[[Descriptors], T]) -> T:
        if self._asked:
            self._look()
        for _ in range(2):
            try:
                return action(self._descriptors())
            except AddressSpaceGoneError:
                self.close()
                LOOKS.forget(self._directory)
        raise NoMemoryError

    # -- reading ------------------------------------------------------------------------------------------

    def _read_held(self, address: int, buffer: memoryview, wanted: PageKind) -> bool:
        """The usual case in as few calls as possible: every page is there. False where anything is not so."""
        files, size = self._files, len(buffer)
        if files is None or not 0 < size <= CHUNK:
            return False
        found = usual.library() if size >= usual.LEAST and files.pagemap >= 0 else None
        if found is not None:
            return usual.read(found, files, address, buffer, swapped=wanted is HELD)
        first = address >> PAGE_SHIFT
        count = (address + size - 1 >> PAGE_SHIFT) - first + 1
        try:
            if count == 1:
                entry = pread(files.pagemap, 8, first << 3)
                if not entry or entry[TOP_BYTE] < wanted.least:
                    return False
            elif count >= SCAN_PAGES and files.scanner is not None:
                start, stop = first << PAGE_SHIFT, first + count << PAGE_SHIFT
                if not files.scanner.covers(start, stop, wanted.categories):
                    return False
            else:
                top = pread(files.pagemap, count * 8, first * 8)[TOP_BYTE::8]
                if len(top) != count or top.translate(None, wanted.top_bytes):
                    return False
            if size > VECTOR_BYTES and files.vectors:
                return vectors.read_span(files.pid, address, buffer) == size and files.same()
            return preadv(files.mem, (buffer,), address) == size
        except (OSError, OverflowError):
            return False

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        if self._asked or not self._read_held(address, buffer, HELD):
            self._attempt(address, lambda files: transfer.read(files, address, buffer))

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`: False also where a page of a file is not present, or is in swap.

        A page of a file may have to be fetched from anywhere; from our own mount it would never come. Every look
        at a process takes its mmap_lock, which others may hold while they wait for such a page: so here nothing
        is asked of a process that was not found harmless within the last second, by a thread that could wait.
        """
        if self.may_block:
            return False
        if self._read_held(address, buffer, PRESENT):
            return True
        try:
            transfer.read(self._descriptors(), address, buffer, wait=False)
        except (WouldWaitError, AddressSpaceGoneError, NoMemoryError):
            return False
        return True

    def shortcut(self) -> Shortcut | None:
        """See `Memory.shortcut`: for as long as the last look at the mappings is believed."""
        files, until = self._files, LOOKS.harmless_until(self._directory)
        if files is None or until is None or files.pagemap < 0:
            return None
        pid = files.pid if files.vectors else 0
        return Shortcut(files, files.mem, until, pagemap=files.pagemap, pid=pid, pidfd=files.pidfd)

    def floor(self) -> Ground | None:
        """See `engine.floors`: once it was read from, and for as long as nobody has to look at its mappings first."""
        files = self._files
        if files is None or files.pagemap < 0:
            return None
        pid = files.pid if files.vectors else 0
        return Ground(
            files.mem, files, lambda: self._files is files and not self._asked, files.pagemap, pid, files.pidfd
        )

    def _short(self, address: int, size: int) -> bytes | None:
        """`size` bytes inside of one page that is held, or None where it is not that simple."""
        files = self._files
        if files is None or self._asked or (address & _OFFSET_MASK) + size > PAGE_SIZE:
            return None
        try:
            entry = pread(files.pagemap, 8, address >> PAGE_SHIFT << 3)
            if not entry or entry[TOP_BYTE] < LEAST_HELD:
                return None
            data = pread(files.mem, size, address)
        except (OSError, OverflowError):
            return None
        return data if len(data) == size else None

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        data = self._short(address, size)
        return super().read(address, size) if data is None else data

    def u8(self, address: int) -> int:
        """See `Memory.u8`."""
        data = self._short(address, 1)
        return super().u8(address) if data is None else data[0]

    def u16(self, address: int) -> int:
        """See `Memory.u16`."""
        data = self._short(address, 2)
        return super().u16(address) if data is None else int(_U16(data)[0])

    def u32(self, address: int) -> int:
        """See `Memory.u32`."""
        data = self._short(address, 4)
        return super().u32(address) if data is None else int(_U32(data)[0])

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        data = self._short(address, 8)
        return super().u64(address) if data is None else int(_U64(data)[0])

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        count, width = out.shape
        if not count or not width:
            return NO_FAULTS
        if width > columns.WIDEST_ROW:
            return super().gather(addresses, out)
        addresses = np.ascontiguousarray(addresses, np.uint64)
        found: columns.Found = []
        for start in range(0, count, columns.BLOCK_ROWS):
            stop = start + columns.BLOCK_ROWS
            at, part = addresses[start:stop], out[start:stop]
            failed = self._attempt_rows(at, partial(columns.gather, addresses=at, out=part), part)
            found += [(start + row, address, kind) for row, address, kind in failed]
        return Faults.of(found)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: pages that were written, files whole, shared memory as far as it has data.

        Nothing in the process is touched, and what was never touched costs no time.
        """
        stop = ADDRESS_SPACE if stop is None else min(stop, ADDRESS_SPACE)
        start = max(start, 0)
        while start < stop:
            try:
                files = self._descriptors()
                for begin, end in data_runs(files, start, stop):
                    yield Extent(begin, end - begin)
                    start = end
                return
            except NoMemoryError:
                return
            except AddressSpaceGoneError:
                self.close()
                self._directory.stat()

    # -- writing ------------------------------------------------------------------------------------------

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`: as a debugger writes, through pages that are read-only to the process."""
        if not self.writable:
            raise ReadOnlyError
        view = memoryview(data).cast("B")
        self._attempt(address, lambda files: transfer.write(files, address, view))

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        if not self.writable:
            raise ReadOnlyError
        count, width = rows.shape
        if not count or not width:
            return NO_FAULTS
        if width > columns.WIDEST_ROW:
            return super().scatter(addresses, rows)
        addresses = np.ascontiguousarray(addresses, np.uint64)
        rows = np.ascontiguousarray(rows, np.uint8)
        found: columns.Found = []
        for start in range(0, count, columns.BLOCK_ROWS):
            stop = start + columns.BLOCK_ROWS
            at, part = addresses[start:stop], rows[start:stop]
            failed = self._attempt_rows(at, partial(columns.scatter, addresses=at, rows=part))
            found += [(start + row, address, kind) for row, address, kind in failed]
        return Faults.of(found)
