"""Several memories one behind the other, as the parts of an image that was split."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError
from engine.memory import Addresses, Data, Faults, Memory, Pieces, Rows
from engine.types import Extent


class JoinedMemory(Memory):
    """Parts at ascending addresses; between them may be holes. Of each so many bytes count as it has now."""

    def __init__(self, parts: Sequence[tuple[int, Memory]]) -> None:
        """(address, memory) in ascending order, disjoint."""
        self._starts = [start for start, _ in parts]
        self._parts = [part for _, part in parts]
        self._sizes = [part.size for part in self._parts]
        self._start_column = np.array(self._starts, np.uint64)
        self._size_column = np.array(self._sizes, np.uint64)
        self._handed: tuple[list[Pieces], Pieces] | None = None
        self.writable = all(part.writable for part in self._parts)
        odd = min((part.page_size for part in self._parts), default=1)
        for start, size in zip(self._starts[1:], self._sizes, strict=False):
            odd |= start | size
        self.page_size = odd & -odd

    @property
    def size(self) -> int:
        """First address behind the last part."""
        return self._starts[-1] + self._sizes[-1] if self._starts else 0

    @property
    def may_block(self) -> bool:
        """As the worst part."""
        return any(part.may_block for part in self._parts)

    def _pieces(self, address: int, size: int) -> Iterator[tuple[int, Memory, int, int]]:
        """(offset in the request, part, address in it, bytes). Raises FaultError where the request leaves the parts."""
        done, index = 0, bisect.bisect_right(self._starts, address) - 1
        while done < size:
            at = address + done
            if not 0 <= index < len(self._starts) or not 0 <= at - self._starts[index] < self._sizes[index]:
                raise FaultError(at)
            offset = at - self._starts[index]
            step = min(size - done, self._sizes[index] - offset)
            yield done, self._parts[index], offset, step
            done += step
            index += 1

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        for done, part, offset, step in self._pieces(address, len(buffer)):
            try:
                part.readinto(offset, buffer[done : done + step])
            except FaultError as error:
                raise error.moved(address + done - offset) from None

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        for done, part, offset, step in self._pieces(address, len(buffer)):
            try:
                if not part.readinto_nowait(offset, buffer[done : done + step]):
                    return False
            except FaultError as error:
                raise error.moved(address + done - offset) from None
        return True

    def _whole(self, address: int, size: int) -> tuple[Memory, int] | None:
        """The part that holds all of it, and where."""
        index = bisect.bisect_right(self._starts, address) - 1
        if index < 0 or address - self._starts[index] + size > self._sizes[index]:
            return None
        return self._parts[index], address - self._starts[index]

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """See `Memory.read_nowait`."""
        found = self._whole(address, size)
        return None if found is None else found[0].read_nowait(found[1], size)

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        view = memoryview(data).cast("B")
        for done, part, offset, step in self._pieces(address, len(view)):
            try:
                part.write(offset, view[done : done + step])
            except FaultError as error:
                raise error.moved(address + done - offset) from None

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        stop = self.size if stop is None else min(stop, self.size)
        for base, size, part in zip(self._starts, self._sizes, self._parts, strict=True):
            low, high = max(start, base), min(stop, base + size)
            if low < high:
                for extent in part.extents(low - base, high - base):
                    yield Extent(extent.start + base, extent.size)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: by part; rows that leave their part go one by one."""
        width = out.shape[1]
        if not len(addresses) or not width or not self._parts:
            return super().gather(addresses, out)
        index = np.searchsorted(self._start_column, addresses, "right") - 1
        offsets, sizes = addresses - self._start_column[index], self._size_column[index]
        inside = (index >= 0) & (sizes >= width) & (offsets <= sizes - np.minimum(sizes, np.uint64(width)))
        found: list[tuple[int, int, int]] = []
        for number in np.unique(index[inside]).tolist():
            rows = np.flatnonzero(inside & (index == number))
            found += self._gathered(rows, self._parts[number], offsets[rows], self._starts[number], out)
        rest = np.flatnonzero(~inside)
        if len(rest):
            part = np.empty((len(rest), width), np.uint8)
            faults = super().gather(addresses[rest], part)
            out[rest] = part
            found += zip(rest[faults.rows].tolist(), faults.addresses.tolist(), faults.kinds.tolist(), strict=True)
        return Faults.of(sorted(found))

    @staticmethod
    def _gathered(
        rows: npt.NDArray[np.intp], part: Memory, offsets: Addresses, base: int, out: Rows
    ) -> list[tuple[int, int, int]]:
        data = np.empty((len(rows), out.shape[1]), np.uint8)
        faults = part.gather(offsets, data)
        out[rows] = data
        moved = (faults.addresses + np.uint64(base)).tolist()
        return list(zip(rows[faults.rows].tolist(), moved, faults.kinds.tolist(), strict=True))

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`."""
        found = self._whole(address, size)
        return None if found is None or address < 0 else found[0].borrow(found[1], size)

    @property
    def words_are_cheap(self) -> bool:
        """Whether they are in every part."""
        return all(part.words_are_cheap for part in self._parts)

    def pieces(self) -> Pieces | None:
        """See `Memory.pieces`."""
        found = [part.pieces() for part in self._parts]
        kept = self._handed
        if kept is not None and len(found) == len(kept[0]) and all(map(operator.is_, found, kept[0])):
            return kept[1]
        have = [pieces for pieces in found if pieces is not None]
        if len(have) < len(found):
            return None
        spans = zip(have, self._sizes, self._starts, strict=True)
        made = Pieces(part for pieces, size, start in spans for part in pieces.moved(0, size, start))
        self._handed = have, made
        return made

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        found = self._whole(address, 8)
        if found is None or address < 0:
            return super().u64(address)
        try:
            return found[0].u64(found[1])
        except FaultError as error:
            raise error.moved(address - found[1]) from None
