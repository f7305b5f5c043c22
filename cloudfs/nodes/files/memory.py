"""Files whose bytes are memory.

Two kinds of reading. `mem` is exact: the bytes before a fault, then EIO, as /proc/PID/mem; its offset is an
address and its size 0. A part of memory (`phys_mem`, a region, a section) is whole: its size is true and what
cannot be read is zeros, since programs that read files stop at the first EIO.

Offsets are signed 64-bit: `base` is what stands at offset 0, for a kernel 2^63.
"""

from __future__ import annotations

import os
import stat as st
from abc import abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import replace

from cloudfs.node import Attributes, File, OpenFile
from cloudfs.nodes.contexts import Context, Owner
from cloudfs.nodes.files import holes
from engine.connector import Connector
from engine.errors import ConnectorClosedError, FaultError, ReadOnlyError
from engine.leases import Lease
from engine.machine import Instance
from engine.memory import Memory
from engine.oslayer import OsLayer
from engine.padding import fill_holes
from engine.records import dataclass
from engine.types import Shortcut

BORROW_SIZE = 4096
"""Requests at least so large are answered from a mapping where there is one (1.7 us instead of 2.1, of 1 MiB
instead of 59); for smaller ones the page fault on a page that was not touched yet costs more than the copy.
"""
MAX_OFFSET = (1 << 63) - 1
"""off_t is signed."""
KERNEL_BASE = 1 << 63
"""What stands at offset 0 of a kernel's `mem`: its addresses without their top bit are the offsets."""
IMMUTABLE_TIMEOUT = 300.0
BLOCKS_WHOLE = 1024
"""Bytes up to which st_blocks tells all: with none at all, tar stores nothing but zeros."""


@dataclass(frozen=True, slots=True)
class Opened:
    """Memory for one open file, and how to give back what it holds."""

    memory: Memory
    base: int = 0
    """Address at offset 0."""
    size: int | None = None
    """Bytes of the file; None: as many as the memory has now."""
    release: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """What an instance had opened when a file was opened: once that is another thing, the file is dead."""

    instance: Instance
    layer: OsLayer | None
    connector: Connector | None

    @classmethod
    def of(cls, instance: Instance) -> Opening:
        """As it is now. Raises ConnectorClosedError where it was removed."""
        layer, connector = instance.current_layer, instance.current_connector
        if layer is None and connector is None:
            raise ConnectorClosedError(f"{instance.name} was removed")
        return cls(instance, layer, connector)


class MemoryFile(File):
    """A file over memory that `opener` gives.

    `whole` files have a size (what `size` gives) and zeros in their holes; the others are exact, of size 0
    where `size` is None. `writable` says what the target allows.
    """

    __slots__ = ("_context", "_identity", "_immutable", "_may_block", "_opener", "_size", "_whole", "_writable")

    def __init__(
        self,
        context: Context,
        name: str,
        opener: Callable[[], Opened],
        *,
        whole: bool,
        writable: bool,
        size: Callable[[], int] | int | None = None,
        immutable: bool = False,
        may_block: bool | None = None,
    ) -> None:
        self._context = context
        self._identity = (name, context.key)
        self._opener = opener
        self._whole = whole
        self._size = size
        self._writable = writable
        self._immutable = immutable and not writable
        self._may_block = may_block

    @property
    def identity(self) -> Hashable:
        """See `Node.identity`."""
        return self._identity

    @property
    def may_block(self) -> bool:
        """See `Node.may_block`."""
        if self._may_block is not None:
            return self._may_block
        return self._context.may_block and not self._context.at_hand

    @property
    def thread_group(self) -> Hashable:
        """See `Node.thread_group`."""
        return self._context.thread_group

    @property
    def _cached(self) -> bool:
        """Whether the kernel may keep the bytes: no longer where the target has turned live."""
        return self._immutable and not self._context.live

    @property
    def _lease(self) -> Lease | None:
        instance = self._context.instance
        return None if instance is None else instance.lease

    @property
    def timeout(self) -> float:
        """See `Node.timeout`."""
        return IMMUTABLE_TIMEOUT if self._cached and self._lease is None else 1.0

    def attributes(self) -> Attributes:
        """See `Node.attributes`. One block is missing, else cp and tar do not ask for holes."""
        size = self._size() if callable(self._size) else self._size or 0
        mode = st.S_IFREG | (0o600 if self._writable else 0o400)
        owner: Owner = self._context.owner()
        uid, gid = (None, None) if owner is None else owner
        blocks = (size + 511) // 512 - 1 if self._whole and size > BLOCKS_WHOLE else None
        return Attributes(mode, size, uid, gid, blocks=blocks)

    def open(self, flags: int) -> OpenFile:
        """See `File.open`. Raises ReadOnlyError for writing where the target does not allow it."""
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and not self._writable:
            raise ReadOnlyError
        if flags & (os.O_TRUNC | os.O_APPEND):
            raise PermissionError("memory can be neither truncated nor appended to")
        assert self._context.instance is not None, "memory belongs to an instance"
        opening = Opening.of(self._context.instance)
        file = (OpenWhole if self._whole else OpenExact)(opening, self._opener(), writable=writes)
        if self._cached and not file.may_block:  # readers of a cached page wait for it, and for what is read ahead
            file.direct_io, file.keep_cache, file.lease = False, True, self._lease
        return file


class OpenMemory(OpenFile):
    """An open file over memory: what both kinds of reading share."""

    def __init__(self, opening: Opening, opened: Opened, *, writable: bool) -> None:
        self._instance = opening.instance
        self._layer = opening.layer
        self._connector = opening.connector
        self._memory = opened.memory
        self._readinto_nowait = opened.memory.readinto_nowait
        self._base = opened.base
        self._fixed_size = opened.size
        self._release = opened.release
        self._writable = writable
        kind = type(opened.memory)
        self._read_small = opened.memory.read_nowait if kind.read_nowait is not Memory.read_nowait else None
        self._borrow = opened.memory.borrow if kind.borrow is not Memory.borrow else None

    @property
    def may_block(self) -> bool:
        """See `OpenFile.may_block`."""
        return self._memory.may_block

    def _check(self) -> None:
        instance = self._instance
        if instance.current_layer is not self._layer or instance.current_connector is not self._connector:
            raise ConnectorClosedError(f"{instance.name} was removed or opened anew")

    def _count(self, read: int, faults: int = 0) -> None:
        counters = self._instance.counters
        counters.reads += 1
        counters.bytes_read += read
        counters.faults += faults

    def _room(self, offset: int) -> int:
        """Bytes of the file behind `offset`."""
        size = self._memory.size - self._base if self._fixed_size is None else self._fixed_size
        return max(0, size - offset)

    def seek(self, offset: int, whence: int) -> int | None:
        """See `OpenFile.seek`; from the memory's extents, nothing is read."""
        return self._seek(offset, whence, near=False)

    def seek_nowait(self, offset: int, whence: int) -> int | None:
        """See `OpenFile.seek_nowait`."""
        return None if self._memory.may_block else self._seek(offset, whence, near=True)

    def _seek(self, offset: int, whence: int, *, near: bool) -> int | None:
        self._check()
        room = self._room(offset) if offset >= 0 else 0
        address = self._base + offset
        stop = min(address + room, self._base + MAX_OFFSET)
        found = holes.seek(self._memory, address, stop, whence, near=near)
        return None if found is None else found - self._base

    def shortcut(self) -> Shortcut | None:
        """See `OpenFile.shortcut`: that of the memory, moved to where the file begins."""
        self._check()
        found = self._memory.shortcut()
        if found is None:
            return None
        size = MAX_OFFSET if self._fixed_size is None else self._fixed_size
        return replace(
            found,
            base=found.base + self._base,
            size=min(size, found.size - self._base),
            writable=found.writable and self._writable,
        )

    def read_nowait(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview | None:
        """See `OpenFile.read_nowait`."""
        # The hot path: what `_check` and `_count` do is written out. A memory's own size is only asked for after a
        # fault: nothing can be read behind it.
        instance = self._instance
        if instance.current_layer is not self._layer or instance.current_connector is not self._connector:
            self._check()
        fixed = self._fixed_size
        if fixed is not None and fixed - offset < size:
            size = fixed - offset
            if size <= 0:
                return b""
        counters = instance.counters
        address = self._base + offset
        quick = self._read_small if size < BORROW_SIZE else self._borrow
        if quick is not None and (data := quick(address, size)) is not None:
            counters.reads += 1
            counters.bytes_read += size
            return data
        buffer = scratch[:size]
        try:
            if not self._readinto_nowait(address, buffer):
                return None
        except FaultError as error:
            return self._despite(offset, buffer, error)
        counters.reads += 1
        counters.bytes_read += size
        return buffer

    @abstractmethod
    def _despite(self, offset: int, buffer: memoryview, error: FaultError) -> memoryview | None:
        """What a read gives, without waiting, that met a fault; None where it has to wait."""

    def count(self, reads: int, bytes_read: int, writes: int, bytes_written: int) -> None:
        """See `OpenFile.count`."""
        counters = self._instance.counters
        counters.reads += reads
        counters.bytes_read += bytes_read
        counters.writes += writes
        counters.bytes_written += bytes_written

    def write(self, offset: int, data: bytes) -> int:
        """See `OpenFile.write`; what lies before a fault is stored and counted."""
        self._check()
        if not self._writable:
            raise ReadOnlyError
        counters = self._instance.counters
        room = self._room(offset)
        address = self._base + offset
        part = data if len(data) <= room else memoryview(data)[:room]
        try:
            if data and not part:
                raise FaultError(address, detail="the file ends before it, and cannot grow")
            self._memory.write(address, part)
            stored = len(part)
        except FaultError as error:
            counters.faults += 1
            stored = error.address - address
            if stored <= 0:
                raise
        counters.writes += 1
        counters.bytes_written += stored
        return stored

    def release(self) -> None:
        """See `OpenFile.release`."""
        if self._release is not None:
            self._release()


class OpenExact(OpenMemory):
    """Reads give the bytes before the first fault; FaultError where there are none."""

    def _despite(self, offset: int, buffer: memoryview, error: FaultError) -> memoryview:
        size = error.address - self._base - offset
        if size <= 0:
            self._instance.counters.faults += 1
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        self._count(size, 1)
        return buffer[:size]

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        """See `OpenFile.read`."""
        self._check()
        if self._fixed_size is not None:
            size = min(size, self._room(offset))
            if not size:
                return b""
        address = self._base + offset
        try:
            self._memory.readinto(address, scratch[:size])
        except FaultError as error:
            size = error.address - address
            if size <= 0:
                self._instance.counters.faults += 1
                raise
            self._count(size, 1)
        else:
            self._count(size)
        return scratch[:size]


class OpenWhole(OpenMemory):
    """Reads give all bytes up to the file's size; zeros stand where nothing can be read."""

    def _despite(self, offset: int, buffer: memoryview, error: FaultError) -> memoryview | None:
        if self._memory.may_block:
            return None
        return self._filled(offset, buffer, error, self._readinto_nowait)

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        """See `OpenFile.read`."""
        self._check()
        size = min(size, self._room(offset))
        buffer = scratch[:size]
        try:
            self._memory.readinto(self._base + offset, buffer)
        except FaultError as error:
            filled = self._filled(offset, buffer, error, self._memory.readinto)
            return b"" if filled is None else filled
        self._count(size)
        return buffer

    def _filled(
        self, offset: int, buffer: memoryview, error: FaultError, readinto: Callable[[int, memoryview], bool | None]
    ) -> memoryview | None:
        """What a read gives that met a fault; None where it would have to wait."""
        buffer = buffer[: self._room(offset)]
        address = self._base + offset
        faults: int | None = 0
        if error.address < address + len(buffer):
            faults = fill_holes(self._memory, address, buffer, error, readinto)
            if faults is None:
                return None
        self._count(len(buffer), faults or 0)
        return buffer
