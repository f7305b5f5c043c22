"""Memory whose bytes lie in blocks that must be decoded first: the pages of a compressed dump, the frames of an image.

    BlockMemory(starts, lengths, decode)     block i is the `lengths[i]` bytes at `starts[i]`, had by decode(i)
    DecodedBlocks(decode)                    the bounded store of decoded blocks alone, for memories of another shape

`decode` gives a block's bytes, or raises a FaultError (BadDataError where the data is damaged) whose address is the
place in the *file*; its detail says why. Reading such a block is a SourceFaultError that names that place; the other
blocks are read as ever. It is called by several threads at once, maybe twice for a block.
"""

from __future__ import annotations

import bisect
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from engine.bytes_memory import gather_from
from engine.errors import BadDataError, FaultError, FaultKind, InvalidArgumentError, SourceFaultError
from engine.memory import NO_FAULTS, Addresses, Faults, Memory, Rows
from engine.types import Extent

Decode = Callable[[int], bytes]

STORE_LIMIT = 32 << 20
"""Bytes of decoded blocks that are kept; one block that is larger is kept alone."""
_DAMAGED_COST = 512
"""What the reason of a block that does not decode counts for."""
_U64: Callable[[bytes, int], tuple[int, ...]] = struct.Struct("<Q").unpack_from


class DecodedBlocks:
    """Blocks by number, decoded when they are first asked for; the least recently used are dropped.

    Safe for concurrent readers. A block that does not decode is remembered as such.
    """

    def __init__(self, decode: Decode, limit: int = STORE_LIMIT) -> None:
        self._decode = decode
        self._limit = limit
        self._held = 0
        self._kept: OrderedDict[int, bytes | str] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        return index in self._kept

    def block(self, index: int, address: int, *, keep: bool = True) -> bytes:
        """The bytes of a block. Raises SourceFaultError at `address` where it does not decode.

        Without `keep` a block that is not there yet does not stay: for readers that pass through once.
        """
        with self._lock:
            found = self._kept.get(index)
            if found is not None:
                self._kept.move_to_end(index)
        if found is None:
            try:
                found = self._decode(index)
            except FaultError as error:
                found = _sentence(error)
            if keep or isinstance(found, str):
                self.keep(index, found)
        if isinstance(found, str):
            raise SourceFaultError(address, FaultKind.SOURCE, found)
        return found

    def keep(self, index: int, found: bytes | str) -> None:
        """Keep a block, or why it does not decode."""
        with self._lock:
            if index not in self._kept:
                self._kept[index] = found
                self._held += _cost(found)
            while self._held > self._limit and len(self._kept) > 1:
                self._held -= _cost(self._kept.popitem(last=False)[1])

    def gather(self, indices: npt.NDArray[np.intp], offsets: Addresses, addresses: Addresses, out: Rows) -> Faults:
        """Fill row i of `out` with what stands `offsets[i]` bytes into block `indices[i]`.

        Each block is decoded once, whatever the order of the rows; `addresses` are for the faults alone.
        """
        if not len(indices):
            return NO_FAULTS
        order = np.argsort(indices, kind="stable")
        numbers, firsts = np.unique(indices[order], return_index=True)
        found: list[tuple[int, int, int]] = []
        for number, rows in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=True):
            found += self._pick(number, rows, offsets[rows], addresses[rows], out)
        found.sort()
        return Faults.of(found)

    def _pick(
        self, index: int, rows: npt.NDArray[np.intp], offsets: Addresses, addresses: Addresses, out: Rows
    ) -> list[tuple[int, int, int]]:
        try:
            block = self.block(index, 0)
        except SourceFaultError:
            out[rows] = 0
            kind = int(FaultKind.SOURCE)
            return [(row, address, kind) for row, address in zip(rows.tolist(), addresses.tolist(), strict=True)]
        part = np.empty((len(rows), out.shape[1]), np.uint8)
        faults = gather_from(np.frombuffer(block, np.uint8), offsets, part)
        out[rows] = part
        return [
            (int(rows[row]), int(addresses[row]) + int(at) - int(offsets[row]), int(FaultKind.SOURCE))
            for row, at in zip(faults.rows, faults.addresses, strict=True)
        ]


class BlockMemory(Memory):
    """Blocks at ascending addresses, with holes between them; read-only."""

    def __init__(
        self,
        starts: npt.ArrayLike,
        lengths: npt.ArrayLike,
        decode: Decode,
        *,
        limit: int = STORE_LIMIT,
        page_size: int = 4096,
        may_block: bool = False,
    ) -> None:
        """`starts` and `lengths` are columns of bytes; a block that decodes to fewer bytes faults from there on.

        `may_block` says so of what `decode` reads from. Raises InvalidArgumentError where blocks overlap, descend, are
        empty or leave the address space.
        """
        self._starts = np.ascontiguousarray(starts, np.uint64)
        self._lengths = np.ascontiguousarray(lengths, np.uint64)
        self._stops = self._starts + self._lengths
        _check(self._starts, self._lengths, self._stops)
        self._blocks = DecodedBlocks(decode, limit)
        self._may_block = may_block
        self._start_view = self._starts.data
        self._length_view = self._lengths.data
        self._runs = _runs(self._starts, self._stops)
        odd = int(np.bitwise_or.reduce(self._starts | self._lengths)) if len(self._starts) else 0
        self.page_size = (odd | page_size) & -(odd | page_size)

    def is_kept(self, index: int) -> bool:
        """Whether a block is there without being decoded."""
        return index in self._blocks

    def keep(self, index: int, data: bytes) -> None:
        """Keep a block that was decoded otherwise, as if it had been asked for."""
        self._blocks.keep(index, data)

    @property
    def size(self) -> int:
        """First address behind the last block."""
        return int(self._stops[-1]) if len(self._stops) else 0

    @property
    def may_block(self) -> bool:
        """As what the blocks are read from."""
        return self._may_block

    def _pieces(self, address: int, size: int) -> Iterator[tuple[int, int, int, int]]:
        """(offset in the request, block, offset in it, bytes) from `address` on.

        Raises FaultError where the request leaves the blocks.
        """
        done, index = 0, bisect.bisect_right(self._start_view, address) - 1
        while done < size:
            at = address + done
            if not 0 <= index < len(self._start_view):
                raise FaultError(at)
            offset = at - self._start_view[index]
            if not 0 <= offset < self._length_view[index]:
                raise FaultError(at)
            step = min(size - done, self._length_view[index] - offset)
            yield done, index, offset, step
            done += step
            index += 1

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`. A block that lies in a longer read as a whole is not kept."""
        size = len(buffer)
        for done, index, offset, step in self._pieces(address, size):
            passing = step < size and step == self._length_view[index]
            block = self._blocks.block(index, address + done, keep=not passing)
            have = max(0, min(step, len(block) - offset))
            buffer[done : done + have] = memoryview(block)[offset : offset + have]
            if have < step:
                short = f"its block has {len(block)} bytes only"
                raise SourceFaultError(address + done + have, FaultKind.SOURCE, short)

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`: only what is decoded already; decoding is for a thread."""
        if not all(index in self._blocks for _, index, _, _ in self._pieces(address, len(buffer))):
            return False
        self.readinto(address, buffer)
        return True

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: blocks that follow one another are one extent."""
        stop = self.size if stop is None else min(stop, self.size)
        begins, ends = self._runs
        for row in range(max(0, bisect.bisect_right(begins, start) - 1), len(begins)):
            low, high = max(start, begins[row]), min(stop, ends[row])
            if begins[row] >= stop:
                return
            if low < high:
                yield Extent(low, high - low)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: each block is decoded once; rows that leave their block go one by one."""
        width = out.shape[1]
        if not len(addresses) or not width or not len(self._starts):
            return super().gather(addresses, out)
        index = np.searchsorted(self._starts, addresses, "right") - 1
        offsets, lengths = addresses - self._starts[index], self._lengths[index]
        inside = (index >= 0) & (lengths >= width) & (offsets <= lengths - np.uint64(min(width, 1 << 62)))
        if inside.all():
            return self._blocks.gather(index, offsets, addresses, out)
        good, bad = np.flatnonzero(inside), np.flatnonzero(~inside)
        part, rest = np.empty((len(good), width), np.uint8), np.empty((len(bad), width), np.uint8)
        return joined(
            (good, self._blocks.gather(index[good], offsets[good], addresses[good], part), part),
            (bad, super().gather(addresses[bad], rest), rest),
            out=out,
        )

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        index = bisect.bisect_right(self._start_view, address) - 1
        if index >= 0:
            offset = address - self._start_view[index]
            if offset + 8 <= self._length_view[index]:
                block = self._blocks.block(index, address)
                if offset + 8 <= len(block):
                    return _U64(block, offset)[0]
        return super().u64(address)


def joined(*parts: tuple[npt.NDArray[np.intp], Faults, Rows], out: Rows) -> Faults:
    """Put together what was gathered in parts: (rows of `out`, their faults, their bytes); gives all faults."""
    for rows, _, data in parts:
        out[rows] = data
    numbers = np.concatenate([rows[faults.rows] for rows, faults, _ in parts])
    order = np.argsort(numbers)
    return Faults(
        numbers[order],
        np.concatenate([faults.addresses for _, faults, _ in parts])[order],
        np.concatenate([faults.kinds for _, faults, _ in parts])[order],
    )


def _cost(found: bytes | str) -> int:
    return len(found) if isinstance(found, bytes) else _DAMAGED_COST


def _sentence(error: FaultError) -> str:
    where = f"the block at offset {error.address:#x} of the file"
    if isinstance(error, BadDataError):
        return f"{where} is damaged" + (f": {error.detail}" if error.detail else "")
    return f"{where} cannot be read: {error.detail or 'the file ends before it does'}"


def _check(starts: Addresses, lengths: Addresses, stops: Addresses) -> None:
    if starts.ndim != 1 or starts.shape != lengths.shape:
        raise InvalidArgumentError("blocks want one length for each start")
    wrong = (lengths == 0) | (stops < starts)
    wrong[1:] |= starts[1:] < stops[:-1]
    if wrong.any():
        row = int(np.argmax(wrong))
        raise InvalidArgumentError(
            f"the block of {int(lengths[row])} bytes at {int(starts[row]):#x} is empty, overlaps the one before it, "
            "or leaves the 64-bit address space"
        )


def _runs(starts: Addresses, stops: Addresses) -> tuple[list[int], list[int]]:
    """Where runs of blocks begin and stop that follow one another."""
    if not len(starts):
        return [], []
    cuts = np.flatnonzero(starts[1:] != stops[:-1])
    return starts[np.concatenate(([0], cuts + 1))].tolist(), stops[np.append(cuts, len(stops) - 1)].tolist()
