"""A file as a memory: for raw images and, later, under every dump connector.

The file may be cut, grow or be written by others at any moment. Copying from the mapping of a file that was cut
is SIGBUS, so Python touches a mapping only of a file that is said to be immutable, or while a read lease keeps
writers out (`engine.leases`); of others words and blocks are read by pread(2), which answers with fewer bytes, and
columns by C that survives the signal (`engine.accelerator`), or by pread(2) without it. `borrow` is for replies of
the kernel, which answers EFAULT. Nor is a hole of a file in tmpfs ever touched by a mapping: that would give it a
page.

(0.45 µs for pread of 8 bytes, 0.25 µs for the size by lseek(2), 0.75 µs for fstat(2), measured.)

A connector over files puts `FRESHNESS_HELP` among its `options_help`, opens them with `open_image`, and hands
`FileMemory.lease`, `.immutable` and `.freshness` on to whoever asks.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from engine import accelerator
from engine.bytes_memory import SLICE_ROW, gather_from
from engine.errors import (
    ConnectorClosedError,
    FaultError,
    FaultKind,
    InvalidArgumentError,
    NotFoundError,
    ReadOnlyError,
    SourceFaultError,
    UnusableTargetError,
)
from engine.floors import Ground
from engine.leases import Lease, take
from engine.memory import COLUMN_THRESHOLD, NO_FAULTS, Addresses, Data, Faults, Memory, Pieces, Rows
from engine.middleware import truth
from engine.mounts import Backing, backing_of_file, filesystem_of
from engine.types import Extent, Shortcut

_U64: Callable[[bytes], tuple[int, ...]] = struct.Struct("<Q").unpack
_U64_FROM: Callable[[memoryview, int], tuple[int, ...]] = struct.Struct("<Q").unpack_from
_FILE_OFFSET_MAX = (1 << 63) - 1
_LAST = (1 << 64) - 1
RUN_GAP = 4096
"""Rows of a column that are nearer to one another are read in one piece."""
RUN_LIMIT = 1 << 20
"""Bytes of such a piece."""
WORDS_SIZE = 4095
"""Bytes that are copied from the mapping of a file that nobody can cut, as of a structure: they have a page already.

Who reads whole pages may read all there are, and those that a guest has never touched would get one each.
"""
LEASED_ROWS = 8192
"""Rows that are gathered from a mapping while a writer waits for the lease: 0.1 ms, from a cold disk a second."""

FRESHNESS_HELP = {
    "immutable": "yes: nobody changes the file, it may be cached and mapped (no: only while a read lease is held)",
    "live": "yes: the file may change at any time, nothing of it is cached (no: as long as there is no read lease)",
}
"""The option keys that `open_image` knows, for `Connector.options_help`."""


class _Descriptor:
    """A file descriptor that is closed with its last reference, never under a reader."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close, error: type[OSError] = OSError) -> None:
        # Bound as defaults: at the end of the interpreter the module's names are gone first.
        try:  # noqa: SIM105 - contextlib may be gone by then, too
            close(self.number)
        except error:  # as of a file on a FUSE file system whose server is gone: it is closed all the same
            pass


def open_descriptor(path: str, *, writable: bool) -> int:
    """Open a regular file or block device. Raises UnusableTargetError for what is neither, OSError as open(2).

    It is looked at before it is opened: to open a FIFO or a device does something.
    """
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory, not an image of memory", path)
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UnusableTargetError(f"{path} is neither a regular file nor a block device")
        try:
            flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{handle}", flags)
        except OSError as error:
            raise type(error)(error.errno, error.strerror, path) from None
    finally:
        os.close(handle)


def open_image(path: str, options: Mapping[str, str], *, writable: bool) -> FileMemory:
    """Open a dump or an image as its options (`FRESHNESS_HELP`) say: immutable, live, or while there is a lease.

    Raises InvalidArgumentError where they contradict one another, NotFoundError, and what `FileMemory` raises.
    """
    immutable, live = (truth(key, options.get(key, "no")) for key in ("immutable", "live"))
    if immutable and live:
        raise InvalidArgumentError("immutable=yes and live=yes exclude each other: does the file change, or not?")
    try:
        return FileMemory(path, writable=writable, immutable=immutable, leased=not live)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path!r}") from None


class FileMemory(Memory):
    """The bytes of an open file; offset = address.

    `immutable` says that nobody will change the file: its size is asked for once. With `leased` it counts as
    immutable for as long as a read lease is held; there is none on one that is writable. `fills_holes` says that holes
    may be given pages by what gathers from them: the file is a guest's RAM, who may do so at any time. Safe for
    concurrent readers.
    """

    def __init__(
        self,
        path: str,
        *,
        writable: bool = False,
        immutable: bool = False,
        leased: bool = False,
        fills_holes: bool = False,
        mounts: Mapping[tuple[int, int], str] | None = None,
    ) -> None:
        """Open the file; for `mounts` see `backing_of_file`.

        Raises UnusableTargetError where it is no file, OSError as open(2).
        """
        self.path = path
        self.writable = writable
        self._declared = immutable
        self._fills_holes = fills_holes
        number = open_descriptor(path, writable=writable)
        self._descriptor: _Descriptor | None = _Descriptor(number)
        self.backing = backing_of_file(number, mounts)
        self.lease: Lease | None = None
        """What is told when the file turns live; None where it is live already, or said to be immutable."""
        self._reason = "live=yes says so"
        if writable:
            self._reason = "it is opened for writing"
        elif leased and not immutable:
            self._take_lease(number)
        self._size = os.lseek(number, 0, os.SEEK_END)  # behind the lease, which keeps it
        self._mapping: tuple[memoryview, Rows] | None = None
        self._copied_up = False
        self._mappable = self.backing is not Backing.REMOTE  # a page that cannot be had would be SIGBUS
        self._handed: tuple[object, int, Pieces] | None = None
        self._words: memoryview | None = None

    def _take_lease(self, number: int) -> None:
        found = take(number)
        if isinstance(found, Lease):
            self.lease, self._reason = found, "another program has opened it for writing"
        else:
            self._reason = found

    @property
    def immutable(self) -> bool:
        """Whether nobody changes the file: said so for ever, or for as long as the lease is held."""
        return self._declared or ((lease := self.lease) is not None and lease.held)

    @property
    def freshness(self) -> str:
        """Whether it is immutable or live, and why: a clause for a person."""
        if self._declared and not self.writable:
            return "immutable: immutable=yes says so"
        if self.immutable and not self.writable:
            return "immutable: nobody has it open for writing, and a read lease tells before anybody does"
        return f"live: {self._reason}"

    def _open(self) -> _Descriptor:
        descriptor = self._descriptor
        if descriptor is None:
            raise ConnectorClosedError(f"{self.path} was closed")
        return descriptor

    @property
    def size(self) -> int:
        """Bytes in the file now, or, of an immutable one, when it was opened."""
        if self.immutable:
            return self._size
        descriptor = self._open()  # held until the call is done, so that nobody else gets its number
        return os.lseek(descriptor.number, 0, os.SEEK_END)

    @property
    def may_block(self) -> bool:
        """True where the file lies on FUSE or a network."""
        return self.backing is Backing.REMOTE

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        descriptor, done, size = self._open(), 0, len(buffer)
        words = self._mapped_words(address, size)
        if words is not None:
            buffer[:] = words
            return
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
        descriptor = self._open()
        try:
            return os.preadv(descriptor.number, [buffer], address, os.RWF_NOWAIT) == len(buffer)
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
        words = self._mapped_words(address, size) if size >= 0 else None
        if words is not None:
            return words.tobytes()
        if 0 <= address < _FILE_OFFSET_MAX and size >= 0:
            descriptor = self._open()
            try:
                data = os.pread(descriptor.number, size, address)
            except OSError as error:
                raise _source_fault(address, error) from None
            if len(data) == size:
                return data
        return super().read(address, size)

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        words = self._words
        if words is None:
            words = self._words = self._look_for_words()
        if 0 <= address <= len(words) - 8:
            return _U64_FROM(words, address)[0]
        return _U64(self.read(address, 8))[0]

    def _look_for_words(self) -> memoryview:
        """The mapping of a file in memory that nobody can cut; else nothing.

        A word by it takes 0.1 µs, by pread(2) 0.5, which gives up the interpreter lock: where many threads want that,
        it is had again milliseconds later.
        """
        uncut = self.backing is Backing.MEMORY and (self._declared or (self._fills_holes and self._is_sealed()))
        pieces = self.pieces() if uncut else None
        return memoryview(b"") if pieces is None else pieces.parts[0][1]

    def _is_sealed(self) -> bool:
        """Whether the kernel lets nobody cut it (fcntl(2), F_SEAL_SHRINK), as QEMU has it of a memfd."""
        try:
            return bool(fcntl.fcntl(self._open().number, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
        except OSError:
            return False  # of a filesystem without seals

    def _mapped_words(self, address: int, size: int) -> memoryview | None:
        """Few bytes of the mapping by which words are read."""
        words = self._words
        if words is None:
            words = self._words = self._look_for_words()
        return words[address : address + size] if 0 <= address <= len(words) - size and size <= WORDS_SIZE else None

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`; the file never grows."""
        if not self.writable:
            raise ReadOnlyError()
        descriptor, done, view = self._open(), 0, memoryview(data).cast("B")
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

    def _mapped(self, descriptor: _Descriptor, stop: int, *, fills: bool = False) -> tuple[memoryview, Rows] | None:
        """The mapping, made anew where the file has grown up to `stop`; None where there can be none.

        None too, unless it `fills` them, where a file in memory has holes now, as its blocks tell.
        """
        status = os.fstat(descriptor.number)
        holes = not fills and self.backing is Backing.MEMORY and status.st_blocks * 512 < status.st_size
        if stop > status.st_size or holes or not self._mappable:
            return None
        mapping = self._mapping
        if mapping is None:
            self._copied_up = filesystem_of(descriptor.number) == "overlay"
        if self._copied_up and not self.immutable:
            return None  # a mapping goes on to show what lay below when the first writer came
        if mapping is None or len(mapping[0]) < stop:
            try:
                made = memoryview(mmap.mmap(descriptor.number, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ))
            except (OSError, ValueError, OverflowError):
                self._mappable = False  # a filesystem without mmap, no address space left
                return None
            mapping = self._mapping = (made, np.frombuffer(made, np.uint8))
        return mapping

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: from the mapping, 5 ns a word, where that is safe; else by pread, piece by piece."""
        if len(addresses) <= COLUMN_THRESHOLD or not out.shape[1]:
            return super().gather(addresses, out)
        descriptor, lease, narrow = self._open(), self.lease, out.shape[1] < SLICE_ROW
        if narrow and self._declared:
            return self._gather_mapped(descriptor, addresses, out)
        if narrow and lease is not None and lease.held:
            return self._gather_leased(lease, descriptor, addresses, out)
        found = accelerator.library()
        pieces = self.pieces() if found is not None else None
        if found is not None and pieces is not None:
            return self._gather_guarded(found, pieces, descriptor, addresses, out)
        return self._gather_pieces(descriptor, addresses, out) if narrow else super().gather(addresses, out)

    def _gather_guarded(
        self, found: accelerator.Library, pieces: Pieces, descriptor: _Descriptor, addresses: Addresses, out: Rows
    ) -> Faults:
        """From the mapping of a file that may be cut at any moment; rows that failed are asked of the file itself."""
        rows = accelerator.gather(found, pieces, addresses, out).view(np.intp)
        size = self.size
        if size < len(pieces.parts[0][1]):  # cut meanwhile: behind its end the last page shows zeros
            width = out.shape[1]
            behind = addresses > size - width if size >= width else np.ones(len(addresses), bool)
            behind[rows] = True
            rows = np.flatnonzero(behind)
        if not len(rows):
            return NO_FAULTS
        part = np.empty((len(rows), out.shape[1]), np.uint8)
        faults = self._gather_pieces(descriptor, addresses[rows], part)
        out[rows] = part
        return Faults(rows[faults.rows], faults.addresses, faults.kinds)

    @property
    def words_are_cheap(self) -> bool:
        """Where they come from a mapping."""
        return self.immutable and self.backing is not Backing.REMOTE

    def pieces(self) -> Pieces | None:
        """See `Memory.pieces`. None of a file on FUSE or a network, nor of one in memory whose holes must stay."""
        kept, descriptor = self._handed, self._open()
        if kept is not None and self._declared:
            return kept[2]
        size = self.size if self.backing is not Backing.REMOTE else 0
        mapping = self._mapped(descriptor, size, fills=self._fills_holes) if size else None
        if mapping is None:
            return None
        if kept is None or kept[0] is not mapping or kept[1] != size:
            kept = self._handed = mapping, size, Pieces([(0, mapping[0][:size])])
        return kept[2]

    def _gather_mapped(self, descriptor: _Descriptor, addresses: Addresses, out: Rows) -> Faults:
        mapping = self._mapped(descriptor, self._size) if self._size else None
        if mapping is None:
            return self._gather_pieces(descriptor, addresses, out)
        return gather_from(mapping[1][: self._size], addresses, out)

    def _gather_leased(self, lease: Lease, descriptor: _Descriptor, addresses: Addresses, out: Rows) -> Faults:
        """From the mapping, so few rows at a time that a writer who comes does not wait for long."""
        found: list[Faults] = []
        for start in range(0, len(addresses), LEASED_ROWS):
            part = slice(start, start + LEASED_ROWS)
            if lease.pin():
                try:
                    faults = self._gather_mapped(descriptor, addresses[part], out[part])
                finally:
                    lease.unpin()
            else:
                faults = self._gather_pieces(descriptor, addresses[part], out[part])
            if faults:
                found.append(Faults(faults.rows + start, faults.addresses, faults.kinds))
        return _joined(found)

    def _gather_pieces(self, descriptor: _Descriptor, addresses: Addresses, out: Rows) -> Faults:
        """Rows that lie near one another are read by one pread(2) and then picked out of what came."""
        width = out.shape[1]
        order = np.argsort(addresses, kind="stable")
        ascending = addresses[order]
        cuts = np.flatnonzero(np.diff(ascending) > RUN_GAP) + 1
        found: list[tuple[int, int, int]] = []
        for start, stop in pairwise((0, *cuts.tolist(), len(order))):
            first = start
            while first < stop:
                base = int(ascending[first])
                last = min(stop, int(np.searchsorted(ascending, np.uint64(min(base + RUN_LIMIT, _LAST)), "right")))
                rows = order[first:last]
                found += self._pick(descriptor, base, rows, addresses[rows] - np.uint64(base), out, width)
                first = last
        found.sort()
        return Faults.of(found)

    def _pick(
        self, descriptor: _Descriptor, base: int, rows: npt.NDArray[np.intp], offsets: Addresses, out: Rows, width: int
    ) -> list[tuple[int, int, int]]:
        """Fill the rows of `out` that lie from `base` on; gives the faults."""
        size = int(offsets[-1]) + width
        try:
            data = os.pread(descriptor.number, size, base) if base < _FILE_OFFSET_MAX else b""
        except OSError as error:
            if len(rows) == 1:
                out[rows] = 0
                return [(int(rows[0]), base, _source_fault(base, error).kind)]
            return [  # one bad block: each row by itself
                fault
                for row, offset in zip(rows, offsets, strict=True)
                for fault in self._pick(
                    descriptor, base + int(offset), np.array([row]), np.zeros(1, np.uint64), out, width
                )
            ]
        part = np.empty((len(rows), width), np.uint8)
        faults = gather_from(np.frombuffer(data, np.uint8), offsets, part)
        out[rows] = part
        return [
            (int(rows[row]), base + int(address), int(kind))
            for row, address, kind in zip(faults.rows, faults.addresses, faults.kinds, strict=True)
        ]

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`. Only of files that lie in memory whole: from a disk the kernel might wait."""
        if self.backing is not Backing.MEMORY or address < 0:
            return None
        mapping = self._mapped(self._open(), address + size)
        return None if mapping is None else mapping[0][address : address + size]

    def shortcut(self) -> Shortcut | None:
        """See `Memory.shortcut`."""
        descriptor = self._descriptor
        if descriptor is None or self.backing is Backing.REMOTE:
            return None
        if self.backing is not Backing.MEMORY:
            return Shortcut(descriptor, descriptor.number, writable=self.writable, nowait=True)
        # Whom the file does not belong to, mincore(2) tells that all is there (can_do_mincore of mm/mincore.c): a hole
        # of a guest's RAM may be given a page then.
        tells = self._fills_holes or os.fstat(descriptor.number).st_uid == os.geteuid()
        mapping = self._mapped(descriptor, 1, fills=tells)
        start, length = (0, 0) if mapping is None else (mapping[1].ctypes.data, mapping[1].nbytes)
        keeper = descriptor, mapping
        return Shortcut(
            keeper, descriptor.number, writable=self.writable, mapping=start, mapped=length, tells_holes=tells
        )

    def floor(self) -> Ground | None:
        """See `engine.floors`: of a file in memory, where nothing has to be waited for.

        None of one that is immutable, whose words are had from its mapping at once.
        """
        descriptor = self._descriptor
        if descriptor is None or self.backing is not Backing.MEMORY or self._declared:
            return None
        return Ground(descriptor.number, descriptor, lambda: self._descriptor is descriptor)

    def close(self) -> None:
        """Drop descriptor and mapping; a reader at work keeps its own reference until it is done."""
        self._descriptor = None
        self._mapping = self._handed = self._words = None
        if self.lease is not None:
            self.lease.release()


def _joined(found: list[Faults]) -> Faults:
    if len(found) <= 1:
        return found[0] if found else NO_FAULTS
    return Faults(
        np.concatenate([faults.rows for faults in found]),
        np.concatenate([faults.addresses for faults in found]),
        np.concatenate([faults.kinds for faults in found]),
    )


def _source_fault(address: int, error: OSError) -> FaultError:
    return SourceFaultError(address, FaultKind.SOURCE, error.strerror or str(error))
