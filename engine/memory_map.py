"""Memory maps: where in an address space there is memory, and where its bytes lie in the source.

The file format is TOML, repeated tables `[[range]]` with the integers `base` (address in the target),
`length`, and `real_base` (address in the source; `base` where it is left out).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError, InvalidArgumentError, NotFoundError
from engine.floors import Ranges
from engine.memory import Addresses, Data, Faults, Memory, Pieces, Rows
from engine.records import dataclass
from engine.types import ADDRESS_SPACE, Extent, Shortcut

RANGE_LIMIT = 1 << 20
"""More ranges than any machine has: a larger map is an error, not a slow one."""

MAP_FILE_LIMIT = 8 << 20
"""Bytes of the file of a map."""

PIECES_MOST = 4096
"""Pieces up to which a memory is handed on as such: making them costs a microsecond each, once."""


@dataclass(frozen=True, slots=True, order=True)
class MapRange:
    """`length` bytes at `base` of the target, kept at `real_base` of the source."""

    base: int
    length: int
    real_base: int

    @property
    def stop(self) -> int:
        """First address behind the range."""
        return self.base + self.length


class MemoryMap:
    """Sorted disjoint ranges."""

    def __init__(self, ranges: Iterable[MapRange]) -> None:
        """Raises InvalidArgumentError where a range is empty, leaves the address space, or overlaps another."""
        self.ranges: tuple[MapRange, ...] = tuple(sorted(ranges))
        for entry in self.ranges:
            if entry.base < 0 or entry.real_base < 0 or entry.length <= 0:
                raise InvalidArgumentError(
                    f"memory map: the range at {entry.base:#x} has length {entry.length:#x} and "
                    f"real_base {entry.real_base:#x}; none may be negative, and no length 0"
                )
            if max(entry.stop, entry.real_base + entry.length) > ADDRESS_SPACE:
                raise InvalidArgumentError(f"memory map: the range at {entry.base:#x} leaves the 64-bit address space")
        for one, two in zip(self.ranges, self.ranges[1:], strict=False):
            if one.stop > two.base:
                raise InvalidArgumentError(
                    f"memory map: {one.base:#x}-{one.stop:#x} and {two.base:#x}-{two.stop:#x} overlap"
                )

    @classmethod
    def whole(cls, size: int, base: int = 0) -> MemoryMap:
        """One range of `size` bytes at `base`, from the source's start; none where `size` is 0."""
        return cls([MapRange(base, size, 0)] if size else [])

    @classmethod
    def from_toml(cls, text: str, name: str = "memory map") -> MemoryMap:
        """Read the file format. Raises InvalidArgumentError that names `name` and what is wrong."""
        import tomllib

        try:
            document = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits
            raise InvalidArgumentError(f"{name} is not TOML: {error}") from None
        ranges = document.pop("range", [])
        if document or not isinstance(ranges, list) or len(ranges) > RANGE_LIMIT:
            raise InvalidArgumentError(f"{name}: want at most {RANGE_LIMIT} tables [[range]] and nothing else")
        found = []
        for number, table in enumerate(ranges, 1):
            if not isinstance(table, dict) or not {"base", "length"} <= table.keys() <= {"base", "length", "real_base"}:
                raise InvalidArgumentError(f"{name}: range {number} wants base and length, and may have real_base")
            if not all(type(value) is int for value in table.values()):
                raise InvalidArgumentError(f"{name}: range {number} has a value that is not an integer")
            base = int(table["base"])
            found.append(MapRange(base, int(table["length"]), int(table.get("real_base", base))))
        return cls(found)

    def to_toml(self) -> str:
        """The file format, numbers in hexadecimal."""
        return "\n".join(
            f"[[range]]\nbase = {entry.base:#x}\nlength = {entry.length:#x}\nreal_base = {entry.real_base:#x}\n"
            for entry in self.ranges
        )

    @property
    def size(self) -> int:
        """First address behind the last range."""
        return self.ranges[-1].stop if self.ranges else 0

    @property
    def real_size(self) -> int:
        """Bytes in all ranges together."""
        return sum(entry.length for entry in self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MemoryMap) and self.ranges == other.ranges

    def __hash__(self) -> int:
        return hash(self.ranges)

    def coalesced(self) -> tuple[MapRange, ...]:
        """The ranges, those joined that follow one another in target and source."""
        joined: list[MapRange] = []
        for entry in self.ranges:
            last = joined[-1] if joined else None
            if last and last.stop == entry.base and last.real_base + last.length == entry.real_base:
                joined[-1] = MapRange(last.base, last.length + entry.length, last.real_base)
            else:
                joined.append(entry)
        return tuple(joined)


def read_map_file(path: str) -> MemoryMap:
    """The map that a file holds. Raises NotFoundError, InvalidArgumentError that say what is wrong with it."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAP_FILE_LIMIT + 1)
    except FileNotFoundError:
        raise NotFoundError(f"map={path}: there is no such file") from None
    if len(text) > MAP_FILE_LIMIT:
        raise InvalidArgumentError(f"map={path} is larger than any memory map")
    try:
        return MemoryMap.from_toml(text.decode(), path)
    except UnicodeDecodeError:
        raise InvalidArgumentError(f"map={path} is not text") from None


class MappedMemory(Memory):
    """A source seen through a memory map."""

    def __init__(self, source: Memory, memory_map: MemoryMap) -> None:
        self.source = source
        self.memory_map = memory_map
        self._ranges = memory_map.coalesced()
        largest = max(self._ranges, key=lambda entry: entry.length, default=MapRange(0, 0, 0))
        self._largest = largest.base, largest.stop - 8, largest.real_base
        self._bases = [entry.base for entry in self._ranges]
        self._base_column = np.array(self._bases, np.uint64)
        self._last_column = np.array([entry.length - 1 for entry in self._ranges], np.uint64)
        self._real_column = np.array([entry.real_base for entry in self._ranges], np.uint64)
        self.page_size = _granularity(source.page_size, self._ranges)
        self.writable = source.writable
        self._handed: tuple[Pieces, Pieces] | None = None

    @property
    def size(self) -> int:
        """First address behind the last range."""
        return self.memory_map.size

    @property
    def may_block(self) -> bool:
        """As the source."""
        return self.source.may_block

    def _pieces(self, address: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(offset in the request, address in the source, size) of what is mapped from `address` on.

        Raises FaultError where the request leaves the ranges.
        """
        done = 0
        index = bisect.bisect_right(self._bases, address) - 1
        while done < size:
            at = address + done
            entry = self._ranges[index] if 0 <= index < len(self._ranges) else None
            if entry is None or not entry.base <= at < entry.stop:
                raise FaultError(at)
            step = min(size - done, entry.stop - at)
            yield done, entry.real_base + at - entry.base, step
            done += step
            index += 1

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        whole = self._scalar(address, len(buffer))
        if whole is not None:
            try:
                self.source.readinto(whole, buffer)
            except FaultError as error:
                raise error.moved(address - whole) from None
            return
        for offset, real, step in self._pieces(address, len(buffer)):
            try:
                self.source.readinto(real, buffer[offset : offset + step])
            except FaultError as error:
                raise error.moved(address + offset - real) from None

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        for offset, real, step in self._pieces(address, len(buffer)):
            try:
                if not self.source.readinto_nowait(real, buffer[offset : offset + step]):
                    return False
            except FaultError as error:
                raise error.moved(address + offset - real) from None
        return True

    def read_nowait(self, address: int, size: int) -> bytes | None:
        """See `Memory.read_nowait`."""
        real = self._scalar(address, size)
        return None if real is None else self.source.read_nowait(real, size)

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        view = memoryview(data).cast("B")
        for offset, real, step in self._pieces(address, len(view)):
            try:
                self.source.write(real, view[offset : offset + step])
            except FaultError as error:
                raise error.moved(address + offset - real) from None

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        stop = self.size if stop is None else min(stop, self.size)
        index = max(0, bisect.bisect_right(self._bases, start) - 1)
        for entry in self._ranges[index:]:
            low, high = max(start, entry.base), min(stop, entry.stop)
            if entry.base >= stop:
                return
            if low < high:
                delta = entry.base - entry.real_base
                for extent in self.source.extents(low - delta, high - delta):
                    yield Extent(extent.start + delta, extent.size)

    def _translate(self, addresses: Addresses, width: int) -> tuple[Addresses, npt.NDArray[np.bool_]]:
        """Source addresses, and which rows lie within one range (the others' addresses say nothing)."""
        index = np.searchsorted(self._base_column, addresses, "right") - 1
        offsets = addresses - self._base_column[index]
        last, less = self._last_column[index], np.uint64(max(width, 1) - 1)
        inside = (index >= 0) & (last >= less) & (offsets <= last - less)
        return offsets + self._real_column[index], inside

    def _translate_one(self, addresses: Addresses, width: int) -> tuple[Addresses, npt.NDArray[np.bool_]]:
        """`_translate` over a single range, a third of its cost."""
        entry = self._ranges[0]
        offsets = addresses - np.uint64(entry.base)  # wraps below the base, and so exceeds the length
        inside = offsets <= max(0, entry.length - width) if width <= entry.length else np.zeros(len(offsets), bool)
        return offsets + np.uint64(entry.real_base), inside

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        if not len(addresses) or not self._ranges:
            return super().gather(addresses, out)
        translate = self._translate_one if len(self._ranges) == 1 else self._translate
        real, inside = translate(addresses, out.shape[1])
        if inside.all():
            return _moved(self.source.gather(real, out), addresses, real)
        good, bad = np.flatnonzero(inside), np.flatnonzero(~inside)
        part = np.empty((len(good), out.shape[1]), np.uint8)
        faults = _moved(self.source.gather(real[good], part), addresses[good], real[good])
        out[good] = part
        rest = np.empty((len(bad), out.shape[1]), np.uint8)
        edges = super().gather(addresses[bad], rest)
        out[bad] = rest
        rows = np.concatenate((good[faults.rows], bad[edges.rows]))
        order = np.argsort(rows)
        return Faults(
            rows[order],
            np.concatenate((faults.addresses, edges.addresses))[order],
            np.concatenate((faults.kinds, edges.kinds))[order],
        )

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        if not len(addresses) or not self._ranges:
            return super().scatter(addresses, rows)
        real, inside = self._translate(addresses, rows.shape[1])
        if not inside.all():
            return super().scatter(addresses, rows)
        return _moved(self.source.scatter(real, rows), addresses, real)

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index < 0 or address + size > self._ranges[index].stop:
            return None
        entry = self._ranges[index]
        return self.source.borrow(entry.real_base + address - entry.base, size)

    def shortcut(self) -> Shortcut | None:
        """See `Memory.shortcut`: of the first range.

        `base` is negative where that lies higher here than in the source: what is asked for below it is then no
        offset of a file.
        """
        found = self.source.shortcut() if self._ranges else None
        if found is None:
            return None
        first = self._ranges[0]
        shift = first.real_base - first.base
        return replace(found, base=found.base + shift, size=min(first.stop, max(0, found.size - shift)))

    def floor(self) -> Ranges:
        """See `engine.floors`."""
        return Ranges([(entry.base, entry.length, entry.real_base) for entry in self._ranges], self.source)

    def cached(self) -> Memory:
        """See `Memory.cached`: over one of the source, where that keeps anything."""
        source = self.source.cached()
        return self if source is self.source else MappedMemory(source, self.memory_map)

    @property
    def words_are_cheap(self) -> bool:
        """As of the source."""
        return self.source.words_are_cheap

    def pieces(self) -> Pieces | None:
        """See `Memory.pieces`."""
        found = self.source.pieces()
        if found is None or len(found.parts) * len(self._ranges) > PIECES_MOST:
            return None
        kept = self._handed
        if kept is None or kept[0] is not found:
            parts = (found.moved(entry.real_base, entry.length, entry.base) for entry in self._ranges)
            kept = self._handed = found, Pieces(chain.from_iterable(parts))
        return kept[1]

    def _scalar(self, address: int, size: int) -> int | None:
        """The source address of what lies within one range."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index < 0 or address + size > self._ranges[index].stop:
            return None
        entry = self._ranges[index]
        return entry.real_base + address - entry.base

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        base, last, real = self._largest
        if not base <= address <= last:
            index = bisect.bisect_right(self._bases, address) - 1
            if index < 0 or address + 8 > self._ranges[index].stop:
                return super().u64(address)
            base, real = self._ranges[index].base, self._ranges[index].real_base
        try:
            return self.source.u64(real + address - base)
        except FaultError as error:
            raise error.moved(base - real) from None


def _moved(faults: Faults, addresses: Addresses, real: Addresses) -> Faults:
    """Faults of the source, their addresses those of the target."""
    if not faults:
        return faults
    return Faults(faults.rows, faults.addresses - real[faults.rows] + addresses[faults.rows], faults.kinds)


def _granularity(page_size: int, ranges: tuple[MapRange, ...]) -> int:
    """The page size, or the power of two that divides where every range begins and stops in target and source."""
    odd = page_size
    for entry in ranges:
        odd |= entry.base | entry.length | entry.real_base
    return odd & -odd
