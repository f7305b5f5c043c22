"""Memory: bytes addressed from 0 to `size`, with holes.

Physical memory, a process, a kernel, a module and a nested guest are all a `Memory`; no flag selects an
address space. A source needs one method, `readinto`, and says with `extents` where anything lies; typed
reads, padding, windows and columns are derived here once. Sources that can do better override the fast
doors (`gather`, `scatter`, `borrow`, `u8` … `u64`).

What this module does not do: it caches nothing, translates nothing, and knows of pages only that
readability changes nowhere but at multiples of `page_size`.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import (
    FaultError,
    FaultKind,
    InvalidArgumentError,
    PagedOutError,
    ReadOnlyError,
    ReadOnlyFaultError,
    SourceFaultError,
)
from engine.padding import fill_holes
from engine.records import dataclass
from engine.types import ADDRESS_SPACE, Extent, Shortcut

Data = bytes | bytearray | memoryview
Addresses = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.uint8]

COLUMN_THRESHOLD = 16
"""Up to about so many rows the scalar doors are faster than the column doors (measured)."""

_STRING_STEP = 256
_Unpack = Callable[..., tuple[int, ...]]
_U16: _Unpack = struct.Struct("<H").unpack_from
_U32: _Unpack = struct.Struct("<I").unpack_from
_U64: _Unpack = struct.Struct("<Q").unpack_from

_FAULT_CLASSES: dict[FaultKind, type[FaultError]] = {
    FaultKind.PAGED_OUT: PagedOutError,
    FaultKind.SOURCE: SourceFaultError,
    FaultKind.READ_ONLY: ReadOnlyFaultError,
}


def fault(address: int, kind: FaultKind = FaultKind.ABSENT) -> FaultError:
    """The error of that kind at `address`."""
    return _FAULT_CLASSES.get(kind, FaultError)(address, kind)


@dataclass(frozen=True, slots=True, eq=False)
class Faults:
    """The rows of a batch that failed; false when none did.

    `rows` ascend; `addresses[i]` is the first bad address of row `rows[i]`: the bytes before it were
    transferred, those from it on are zeros in what was read. `kinds` are `FaultKind` numbers.
    """

    rows: npt.NDArray[np.intp]
    addresses: Addresses
    kinds: npt.NDArray[np.uint8]

    def __bool__(self) -> bool:
        return len(self.rows) > 0

    def __len__(self) -> int:
        return len(self.rows)

    def raise_first(self) -> None:
        """Raise the fault of the first failed row, if any."""
        if len(self.rows):
            raise fault(int(self.addresses[0]), FaultKind(int(self.kinds[0])))

    @staticmethod
    def of(found: Sequence[tuple[int, int, int]]) -> Faults:
        """Faults from (row, address, kind), rows ascending."""
        if not found:
            return NO_FAULTS
        rows, addresses, kinds = zip(*found, strict=True)
        return Faults(np.array(rows, np.intp), np.array(addresses, np.uint64), np.array(kinds, np.uint8))


NO_FAULTS = Faults(np.empty(0, np.intp), np.empty(0, np.uint64), np.empty(0, np.uint8))


class Pieces:
    """Mappings of a memory's bytes: (address, the bytes from there on), ascending, disjoint and not empty."""

    __slots__ = ("_rows", "_where", "parts")

    def __init__(self, parts: Iterable[tuple[int, memoryview]]) -> None:
        self.parts = tuple(parts)
        self._rows: npt.NDArray[np.uint64] | None = None
        self._where = (0, 0)

    def where(self) -> tuple[int, int]:
        """For C: where rows of (address, size, place of the bytes), each 64 bits, stand, and how many there are.

        Good for as long as this object lives.
        """
        if self._rows is None:
            rows = [(address, len(view), np.frombuffer(view, np.uint8).ctypes.data) for address, view in self.parts]
            column = np.array(rows, np.uint64)
            self._where = column.ctypes.data, len(rows)
            self._rows = column
        return self._where

    def moved(self, start: int, size: int, to: int) -> Iterator[tuple[int, memoryview]]:
        """What lies in the `size` bytes from `start` on, as if these stood at `to`."""
        for address, view in self.parts:
            low, high = max(start, address), min(start + size, address + len(view))
            if low < high:
                yield low - start + to, view[low - address : high - address]


def as_addresses(addresses: npt.ArrayLike) -> Addresses:
    """Whole numbers as a column of addresses. Raises InvalidArgumentError where one is negative or no number."""
    column = np.asarray(addresses)
    if column.dtype != np.uint64:
        if column.dtype.kind == "f" and not isinstance(addresses, np.ndarray):
            column = np.asarray(addresses, object)  # numbers on both sides of 2^63 would have become floats
            if not all(isinstance(address, int) for address in column.reshape(-1).tolist()):
                raise InvalidArgumentError("addresses are whole numbers from 0 to 2^64 - 1")
        if column.size and (column.dtype.kind not in "iuO" or min(column.tolist()) < 0):
            raise InvalidArgumentError("addresses are whole numbers from 0 to 2^64 - 1")
        try:
            column = column.astype(np.uint64)
        except (OverflowError, TypeError):
            raise InvalidArgumentError("addresses are whole numbers from 0 to 2^64 - 1") from None
    return np.ascontiguousarray(column.reshape(-1))


def _checked(size: int) -> int:
    if size < 0:
        raise InvalidArgumentError(f"{size} bytes cannot be read")
    return size


class Memory(ABC):
    """Bytes addressed from 0 to `size` (exclusive; 2^64 for a kernel), with holes.

    Safe for concurrent readers. Addresses outside [0, size) fault like any hole. Words are little-endian.
    """

    page_size: int = 4096
    writable: bool = False

    @property
    @abstractmethod
    def size(self) -> int:
        """First address behind the address space; may change where the target is live."""

    @property
    def may_block(self) -> bool:
        """Whether a read may wait for something else than memory; of a view, the worst below it."""
        return False

    @abstractmethod
    def readinto(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, contiguous, format B) with the bytes from `address` on.

        Raises FaultError with the first address that cannot be read: what lies before it stands in
        `buffer` then, the rest of `buffer` is unspecified.
        """

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """The parts of [start, stop) that hold data, ascending, disjoint and never empty.

        Outside of them a read gives zeros (the hole of a sparse file, a page never touched) or a fault.
        """
        stop = self.size if stop is None else min(stop, self.size)
        if start < stop:
            yield Extent(start, stop - start)

    def write(self, address: int, data: Data) -> None:
        """Store `data` at `address`.

        Raises ReadOnlyError where writing was not allowed when the target was opened, and FaultError
        with the first address that was not written; all before it was.
        """
        raise ReadOnlyError()

    # -- fast doors: right for every memory, overridden where the source can do better --------------

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """Like `readinto`, but gives False, with `buffer` unspecified, where the read might have to wait."""
        if self.may_block:
            return False
        self.readinto(address, buffer)
        return True

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """`size` bytes in one step, for few of them; None where another door must be taken.

        That is where it might have to wait, where a fault lies, and where this door is no faster.
        """
        return None

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """Fill row i of `out` (uint8[n, k], C-contiguous) with the k bytes at `addresses[i]`."""
        flat = out.data.cast("B") if out.size else memoryview(b"")
        width = out.shape[1]
        found: list[tuple[int, int, int]] = []
        for row, address in enumerate(addresses.tolist()):
            try:
                self.readinto(address, flat[row * width : (row + 1) * width])
            except FaultError as error:
                found.append((row, error.address, error.kind))
                out[row, max(0, error.address - address) :] = 0
        return Faults.of(found)

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """Store row i of `rows` (uint8[n, k]) at `addresses[i]`; later rows win where they overlap."""
        found: list[tuple[int, int, int]] = []
        for row, address in enumerate(addresses.tolist()):
            try:
                self.write(address, rows[row].tobytes())
            except FaultError as error:
                found.append((row, error.address, error.kind))
        return Faults.of(found)

    def borrow(self, address: int, size: int) -> memoryview | None:
        """A read-only view of the bytes themselves, without a copy; None where there is no mapping.

        The view may reach into a file that someone cuts: hand it to a system call, which answers EFAULT,
        and never touch it from Python without having asked for the file's size.
        """
        return None

    def shortcut(self) -> Shortcut | None:
        """How these bytes are had without calling this object; None where it has to be called. Never waits."""
        return None

    @property
    def words_are_cheap(self) -> bool:
        """Whether a scattered word costs no more than a look into memory: else it pays to read what is around it."""
        return False

    def pieces(self) -> Pieces | None:
        """All bytes of this memory where they lie in this program, now; None where some do not.

        The same object each time, for as long as they lie where they do. As with `borrow` a view may reach into a
        file that someone cuts: for code alone that survives it.
        """
        return None

    def cached(self) -> Memory:
        """A view for one operation that reads much: it may keep what it read until it is thrown away.

        Not shared between threads. Most memories have nothing to keep and give themselves.
        """
        return self

    def for_tables(self) -> Memory:
        """The same bytes for whoever walks page tables in them: a slow source may answer what it read a while ago."""
        return self

    def for_constants(self) -> Memory:
        """The same bytes for whoever reads them through a mapping that must not be written to; as `for_tables`."""
        return self

    def u8(self, address: int) -> int:
        """The byte at `address`."""
        return self.read(address, 1)[0]

    def u16(self, address: int) -> int:
        """The 16-bit word at `address`."""
        return _U16(self.read(address, 2))[0]

    def u32(self, address: int) -> int:
        """The 32-bit word at `address`."""
        return _U32(self.read(address, 4))[0]

    def u64(self, address: int) -> int:
        """The 64-bit word at `address`."""
        return _U64(self.read(address, 8))[0]

    # -- derived once ---------------------------------------------------------------------------------

    def u128(self, address: int) -> int:
        """The 128-bit word at `address`."""
        return int.from_bytes(self.read(address, 16), "little")

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes from `address` on, all of them. Raises FaultError with the first bad address."""
        buffer = bytearray(_checked(size))
        self.readinto(address, memoryview(buffer))
        return bytes(buffer)

    def read_available(self, address: int, buffer: memoryview) -> int:
        """Fill `buffer` up to the first fault and give the count; raises FaultError where that is 0."""
        try:
            self.readinto(address, buffer)
        except FaultError as error:
            if error.address <= address:
                raise
            return error.address - address
        return len(buffer)

    def readinto_padded(self, address: int, buffer: memoryview) -> int:
        """Fill `buffer`, zeros where nothing can be read; gives how many holes were met, see `fill_holes`."""
        try:
            self.readinto(address, buffer)
        except FaultError as error:
            return fill_holes(self, address, buffer, error, self.readinto) or 0
        return 0

    def read_padded(self, address: int, size: int) -> bytes:
        """`size` bytes from `address` on, zeros where nothing can be read."""
        buffer = bytearray(_checked(size))
        self.readinto_padded(address, memoryview(buffer))
        return bytes(buffer)

    def words(self, addresses: npt.ArrayLike, dtype: npt.DTypeLike = "<u8") -> tuple[npt.NDArray[Any], Faults]:
        """One word of `dtype` at each address, and the faults; a word that failed holds zeros.

        `addresses` may be any sequence of whole numbers. Raises InvalidArgumentError where one is no address.
        """
        kind = np.dtype(dtype)
        column = as_addresses(addresses)
        out = np.empty((len(column), kind.itemsize), np.uint8)
        faults = self.gather(column, out)
        return out.view(kind).reshape(len(column)), faults

    def read_many(self, requests: Sequence[tuple[int, int]]) -> list[bytes | FaultError]:
        """For each (address, size) its bytes, or the FaultError that reading them met."""
        results: list[bytes | FaultError] = [b""] * len(requests)
        by_size: dict[tuple[int, bool], list[int]] = {}
        for index, (address, size) in enumerate(requests):
            inside = 0 <= address < ADDRESS_SPACE
            by_size.setdefault((size, inside), []).append(index)
        for (size, inside), indices in by_size.items():
            if size > 0 and inside and len(indices) > COLUMN_THRESHOLD:
                out = np.empty((len(indices), size), np.uint8)
                faults = self.gather(np.array([requests[i][0] for i in indices], np.uint64), out)
                for row, index in enumerate(indices):
                    results[index] = out[row].tobytes()
                for row, address, kind in zip(faults.rows, faults.addresses, faults.kinds, strict=True):
                    results[indices[int(row)]] = fault(int(address), FaultKind(int(kind)))
                continue
            for index in indices:
                try:
                    results[index] = self.read(requests[index][0], size)
                except FaultError as error:
                    results[index] = error
        return results

    def cstring(self, address: int, limit: int = 4096) -> bytes:
        """The bytes from `address` up to the first NUL, at the most `limit`, without the NUL.

        A string in front of a hole is whole. Raises FaultError where a hole comes before the NUL.
        """
        parts = bytearray()
        buffer = memoryview(bytearray(min(limit, _STRING_STEP)))
        while len(parts) < limit:
            piece = buffer[: limit - len(parts)]
            count = self.read_available(address + len(parts), piece)
            found = bytes(piece[:count])
            nul = found.find(0)
            if nul >= 0:
                return bytes(parts + found[:nul])
            parts += found
        return bytes(parts)

    def window(self, start: int, size: int) -> MemoryWindow:
        """The `size` bytes from `start` on as a memory of their own, addressed from 0."""
        return MemoryWindow(self, start, size)


class MemoryOver(Memory):
    """A memory over one other, `memory`: what it does not say itself is as there."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.page_size = memory.page_size
        self.writable = memory.writable

    @property
    def size(self) -> int:
        """As of the memory below."""
        return self.memory.size

    @property
    def may_block(self) -> bool:
        """As the memory below."""
        return self.memory.may_block

    @property
    def words_are_cheap(self) -> bool:
        """As of the memory below."""
        return self.memory.words_are_cheap


class MemoryWindow(MemoryOver):
    """A part of another memory, addressed from 0."""

    def __init__(self, memory: Memory, start: int, size: int) -> None:
        if start < 0 or size < 0 or start + size > ADDRESS_SPACE:
            raise InvalidArgumentError(f"a window of {size} bytes cannot start at {start:#x}")
        super().__init__(memory)
        self.start = start
        self._size = size
        self._handed: tuple[Pieces, Pieces] | None = None
        if start % memory.page_size:
            self.page_size = 1

    @property
    def size(self) -> int:
        """Bytes of the window."""
        return self._size

    def _clip(self, address: int, size: int) -> int:
        """How many of `size` bytes lie inside; raises FaultError where the first does not."""
        if not 0 <= address < self._size:
            if size == 0:
                return 0
            raise FaultError(address)
        return min(size, self._size - address)

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        count = self._clip(address, len(buffer))
        try:
            self.memory.readinto(self.start + address, buffer[:count])
        except FaultError as error:
            raise error.moved(-self.start) from None
        if count < len(buffer):
            raise FaultError(self._size)

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        count = self._clip(address, len(buffer))
        try:
            if not self.memory.readinto_nowait(self.start + address, buffer[:count]):
                return False
        except FaultError as error:
            raise error.moved(-self.start) from None
        if count < len(buffer):
            raise FaultError(self._size)
        return True

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """See `Memory.read_nowait`."""
        if address < 0 or address + size > self._size:
            return None
        return self.memory.read_nowait(self.start + address, size)

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        view = memoryview(data).cast("B")
        count = self._clip(address, len(view))
        try:
            self.memory.write(self.start + address, view[:count])
        except FaultError as error:
            raise error.moved(-self.start) from None
        if count < len(view):
            raise FaultError(self._size)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        stop = self._size if stop is None else min(stop, self._size)
        if start < stop:
            for extent in self.memory.extents(self.start + start, self.start + stop):
                yield Extent(extent.start - self.start, extent.size)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        width = out.shape[1]
        if not len(addresses):
            return NO_FAULTS
        if width > self._size or int(addresses.max()) > self._size - width:
            return super().gather(addresses, out)
        faults = self.memory.gather(addresses + np.uint64(self.start), out)
        return Faults(faults.rows, faults.addresses - np.uint64(self.start), faults.kinds)

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        width = rows.shape[1]
        if not len(addresses):
            return NO_FAULTS
        if width > self._size or int(addresses.max()) > self._size - width:
            return super().scatter(addresses, rows)
        faults = self.memory.scatter(addresses + np.uint64(self.start), rows)
        return Faults(faults.rows, faults.addresses - np.uint64(self.start), faults.kinds)

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`."""
        if address < 0 or address + size > self._size:
            return None
        return self.memory.borrow(self.start + address, size)

    def pieces(self) -> Pieces | None:
        """See `Memory.pieces`."""
        found = self.memory.pieces()
        if found is None:
            return None
        kept = self._handed
        if kept is None or kept[0] is not found:
            kept = self._handed = found, Pieces(found.moved(self.start, self._size, 0))
        return kept[1]
