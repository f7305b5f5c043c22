"""A file as a memory: for raw images and, later, under every dump connector.

The file may be cut, grow or be written by others at any moment. Copying from the mapping of a file that was
cut is SIGBUS, so Python touches the mapping only in `gather`, right after it has asked for the size; words and
blocks are read by pread(2), which answers with fewer bytes, and `borrow` is for replies of the kernel, which
answers EFAULT. (0.45 µs for pread of 8 bytes, 0.25 µs for the size by lseek(2), measured.)
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator

import numpy as np

from engine.errors import (
    ConnectorClosedError,
    FaultError,
    FaultKind,
    ReadOnlyError,
    SourceFaultError,
    UnusableTargetError,
)
from engine.memory import Addresses, Data, Faults, Memory, Rows, gather_from
from engine.mounts import Backing, backing_of_file
from engine.types import Extent

_U64: Callable[[bytes], tuple[int, ...]] = struct.Struct("<Q").unpack
_FILE_OFFSET_MAX = (1 << 63) - 1
NOWAIT_LIMIT = 64 << 10
"""A file on disk is read without waiting in pieces of the page cache; larger ones are worth the question."""


class _Descriptor:
    """A file descriptor that is closed with its last reference, never under a reader."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)  # bound as a default: at the end of the interpreter the module's names are gone first


def open_descriptor(path: str, *, writable: bool) -> int:
    """Open a regular file or block device. Raises UnusableTargetError for what is neither, OSError as open(2)."""
    # O_NONBLOCK: a FIFO would wait for its other end, before it can be refused.
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "is a directory, not an image of memory", path)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(descriptor)
        raise UnusableTargetError(f"{path} is neither a regular file nor a block device")
    return descriptor


class FileMemory(Memory):
    """The bytes of an open file; offset = address.

    `immutable` says that nobody will change the file: its size is asked for once. Safe for concurrent readers.
    """

    def __init__(self, path: str, *, writable: bool = False, immutable: bool = False) -> None:
        """Open the file. Raises UnusableTargetError where it is no file, OSError as open(2)."""
        self.path = path
        self.writable = writable
        self.immutable = immutable
        number = open_descriptor(path, writable=writable)
        self._descriptor: _Descriptor | None = _Descriptor(number)
        self.backing = backing_of_file(number)
        self._size = os.lseek(number, 0, os.SEEK_END)
        self._mapping: memoryview | None = None
        self._array: Rows = np.empty(0, np.uint8)
        self._mappable = True

    def _open(self) -> _Descriptor:
        descriptor = self._descriptor
        if descriptor is None:
            raise ConnectorClosedError(f"{self.path} was closed")
        return descriptor

    @property
    def size(self) -> int:
        """Bytes in the file now, or, of an immutable one, when it was opened."""
        return self._size if self.immutable else os.lseek(self._open().number, 0, os.SEEK_END)

    @property
    def may_block(self) -> bool:
        """True where the file lies on FUSE or a network."""
        return self.backing is Backing.REMOTE

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        descriptor, done, size = self._open(), 0, len(buffer)
        while done < size:
            if not 0 <= address + done < _FILE_OFFSET_MAX:
                raise FaultError(address + done)
            try:
                count = os.preadv(descriptor.number, [buffer[done:] if done else buffer], address + done)
            except OSError as error:
                raise _source_fault(address + done, error) from None
            if not count:
                raise FaultError(address + done)
            done += count

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`: of a file on disk, what the page cache holds."""
        if self.backing is Backing.MEMORY:
            self.readinto(address, buffer)
            return True
        if self.backing is Backing.REMOTE or not 0 <= address < _FILE_OFFSET_MAX:
            return False
        try:
            return os.preadv(self._open().number, [buffer], address, os.RWF_NOWAIT) == len(buffer)
        except OSError:
            return False  # EAGAIN: not cached. EOPNOTSUPP: not to be known. Others: `readinto` says them.

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """See `Memory.read_nowait`: of a file in memory, by one pread(2)."""
        descriptor = self._descriptor
        if self.backing is not Backing.MEMORY or descriptor is None:
            return None
        try:
            data = os.pread(descriptor.number, size, address)
        except (OSError, OverflowError):
            return None
        return data if len(data) == size else None

    def read(self, address: int, size: int) -> bytes:
        """See `Memory.read`."""
        if 0 <= address < _FILE_OFFSET_MAX:
            try:
                data = os.pread(self._open().number, size, address)
            except OSError as error:
                raise _source_fault(address, error) from None
            if len(data) == size:
                return data
        return super().read(address, size)

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        return _U64(self.read(address, 8))[0]

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`; the file never grows."""
        if not self.writable:
            raise ReadOnlyError()
        descriptor, done, view = self._open(), 0, memoryview(data)
        limit = os.lseek(descriptor.number, 0, os.SEEK_END)
        while done < len(view):
            if not 0 <= address + done < limit:
                raise FaultError(address + done)
            try:
                done += os.pwrite(descriptor.number, view[done : done + limit - address - done], address + done)
            except OSError as error:
                raise _source_fault(address + done, error) from None

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: the data of a sparse file, by lseek(2) SEEK_DATA."""
        descriptor = self._open()
        stop = min(self.size, self.size if stop is None else stop)
        while start < stop:
            try:
                data = os.lseek(descriptor.number, start, os.SEEK_DATA)
                hole = os.lseek(descriptor.number, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # only a hole is left
                data, hole = start, stop  # a block device: all is data
            if data >= stop:
                return
            hole = min(hole, stop)
            if hole > data:
                yield Extent(data, hole - data)
            start = max(hole, data + 1)

    def _mapped(self, stop: int) -> memoryview | None:
        """The mapping, made anew where the file has grown up to `stop`; None where there can be none."""
        mapping = self._mapping
        if mapping is not None and len(mapping) >= stop:
            return mapping
        length = os.lseek(self._open().number, 0, os.SEEK_END)
        if stop > length or not length or not self._mappable:
            return None
        try:
            made = mmap.mmap(self._open().number, length, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError, OverflowError):
            self._mappable = False  # a filesystem without mmap, no address space left
            return None
        mapping = memoryview(made)
        self._array = np.frombuffer(mapping, np.uint8)
        self._mapping = mapping
        return mapping

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: from the mapping, 5 to 7 ns a word."""
        if not len(addresses) or not out.shape[1]:
            return super().gather(addresses, out)
        size = os.lseek(self._open().number, 0, os.SEEK_END)
        if self.backing is Backing.REMOTE or self._mapped(size) is None:
            return super().gather(addresses, out)
        return gather_from(self._array[:size], addresses, out)

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`. Only of files that lie in memory: from a disk the kernel might wait."""
        if self.backing is not Backing.MEMORY or address < 0:
            return None
        mapping = self._mapped(address + size)
        if mapping is None or address + size > self.size:
            return None
        return mapping[address : address + size]

    def close(self) -> None:
        """Drop descriptor and mapping; a reader at work keeps its own reference until it is done."""
        self._descriptor = None
        self._mapping = None
        self._array = np.empty(0, np.uint8)


def _source_fault(address: int, error: OSError) -> FaultError:
    return SourceFaultError(address, FaultKind.SOURCE, error.strerror or str(error))
