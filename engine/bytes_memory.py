"""Bytes that this program holds, as a memory, and how rows are gathered out of them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError, FaultKind, ReadOnlyError
from engine.memory import NO_FAULTS, Addresses, Data, Faults, Memory, Pieces, Rows

ALIGNED_ROWS = 64
"""From more rows on it pays to ask whether all of them are aligned (measured)."""
SLICE_ROW = 2048
"""Rows at least so wide are gathered by slice copies, narrower ones by one fancy index (measured)."""

_U64: Callable[..., tuple[int, ...]] = struct.Struct("<Q").unpack_from


def gather_from(source: Rows, addresses: Addresses, out: Rows) -> Faults:
    """Gather rows out of a one-dimensional uint8 array: `Memory.gather` for what is mapped.

    Any alignment: 5 ns for a row of 8 bytes. Where all rows stand at multiples of their width: 2.5 ns.
    """
    count, width = out.shape
    if not count or not width:
        return NO_FAULTS
    size = len(source)
    last = size - width
    found: list[tuple[int, int, int]] = []
    if last < 0 or int(addresses.max()) > last:
        bad = np.flatnonzero(addresses > last) if last >= 0 else np.arange(count)
        for row in bad.tolist():
            address = int(addresses[row])
            have = max(0, size - address)
            out[row, :have] = source[address : address + have]
            out[row, have:] = 0
            found.append((row, address + have, FaultKind.ABSENT))
        good = np.flatnonzero(addresses <= last) if last >= 0 else np.empty(0, np.intp)
        if len(good):
            part = np.empty((len(good), width), np.uint8)
            gather_from(source, addresses[good], part)
            out[good] = part
        return Faults.of(found)
    shift = width.bit_length() - 1
    if count > ALIGNED_ROWS and width == 1 << shift and not int(np.bitwise_or.reduce(addresses)) & (width - 1):
        # In whole rows the source is contiguous, so that take copies none of it; `clip` spares it a buffer.
        rows = source[: size >> shift << shift].reshape(-1, width)
        rows.take((addresses >> np.uint64(shift)).view(np.intp), axis=0, out=out, mode="clip")
        return NO_FAULTS
    if width >= SLICE_ROW:
        here, there = source.data, out.data.cast("B")
        for row, address in enumerate(addresses.tolist()):
            there[row * width : (row + 1) * width] = here[address : address + width]
        return NO_FAULTS
    void = f"V{width}"
    windows: npt.NDArray[Any] = np.ndarray((last + 1,), void, source.data, strides=(1,))
    out.view(void)[:, 0] = windows[addresses.astype(np.intp)]
    return NO_FAULTS


class BytesMemory(Memory):
    """Bytes that this program holds, as a memory; writable over a bytearray."""

    def __init__(self, data: Data, *, writable: bool | None = None) -> None:
        self._view = memoryview(data).cast("B")
        self._last_word = len(self._view) - 8
        self._array: Rows = np.frombuffer(self._view, np.uint8) if len(self._view) else np.empty(0, np.uint8)
        self.writable = not self._view.readonly if writable is None else writable
        self.page_size = 1
        self._pieces = Pieces([(0, self._view)] if len(self._view) else [])

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self._view)

    def _span(self, address: int, size: int) -> int:
        if not 0 <= address < len(self._view):
            if size == 0:
                return 0
            raise FaultError(address)
        return min(size, len(self._view) - address)

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        count = self._span(address, len(buffer))
        buffer[:count] = self._view[address : address + count]
        if count < len(buffer):
            raise FaultError(len(self._view))

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        if not self.writable:
            raise ReadOnlyError()
        view = memoryview(data).cast("B")
        count = self._span(address, len(view))
        self._view[address : address + count] = view[:count]
        if count < len(view):
            raise FaultError(len(self._view))

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        return gather_from(self._array, addresses, out)

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`."""
        if address < 0 or address + size > len(self._view):
            return None
        return self._view[address : address + size].toreadonly()

    @property
    def words_are_cheap(self) -> bool:
        """They are."""
        return True

    def pieces(self) -> Pieces | None:
        """See `Memory.pieces`."""
        return self._pieces

    def u8(self, address: int) -> int:
        """See `Memory.u8`."""
        if 0 <= address < len(self._view):
            return self._view[address]
        raise FaultError(address)

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        if 0 <= address <= self._last_word:
            return _U64(self._view, address)[0]
        return super().u64(address)
