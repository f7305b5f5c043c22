"""A bitmap of page frames, and how many of them come before one: the number of its descriptor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Pfns = npt.NDArray[np.uint64]

_CHUNK = 1 << 14
"""Words that are looked at at once."""
_ONES = np.array([(byte).bit_count() for byte in range(256)], np.uint8)
_1, _63, _6 = np.uint64(1), np.uint64(63), np.uint64(6)


def _popcount(words: Pfns) -> Pfns:
    """The number of ones in each word."""
    bits: Pfns = _ONES[words.view(np.uint8)].reshape(-1, 8).sum(axis=1, dtype=np.uint64)
    return bits


class PageBitmap:
    """`count` bits, the lowest of each byte first, as Linux sets them on every machine."""

    def __init__(self, data: bytes | bytearray, count: int) -> None:
        """Bits behind `count` do not count; what `data` is too short for is not set, and costs nothing."""
        self.count = count = min(count, 8 * len(data))
        size = (count + 7) // 8
        padded = np.zeros(max(1, (size + 7) // 8) * 8, np.uint8)
        padded[:size] = np.frombuffer(data, np.uint8, size)
        if count % 8:
            padded[size - 1] &= (1 << count % 8) - 1
        self._bytes = padded
        self._words: Pfns = padded.view("<u8").astype(np.uint64, copy=False)
        pieces = range(0, len(self._words), _CHUNK)
        ones = np.concatenate([_popcount(self._words[at : at + _CHUNK]) for at in pieces])
        self._before: Pfns = np.cumsum(ones, dtype=np.uint64) - ones
        self.total = int(ones.sum())

    def __getitem__(self, pfn: int) -> bool:
        return 0 <= pfn < self.count and bool(self._bytes[pfn >> 3] >> (pfn & 7) & 1)

    def has(self, pfns: Pfns) -> npt.NDArray[np.bool_]:
        """Whether each is set; False behind the end."""
        inside = pfns < self.count
        if not inside.all():
            pfns = np.where(inside, pfns, np.uint64(0))
        bits = self._words[pfns >> _6] >> (pfns & _63) & _1
        found: npt.NDArray[np.bool_] = (bits != 0) & inside
        return found

    def ranks(self, pfns: Pfns) -> Pfns:
        """How many are set before each, none of which lies behind the end."""
        index = pfns >> _6
        below = self._words[index] & ((_1 << (pfns & _63)) - _1)
        found: Pfns = self._before[index] + _popcount(below)
        return found

    def rank(self, pfn: int) -> int:
        """How many are set before `pfn`."""
        if pfn >= self.count:
            return self.total
        below = int(self._words[pfn >> 6]) & (1 << (pfn & 63)) - 1
        return int(self._before[pfn >> 6]) + below.bit_count()

    @property
    def stop(self) -> int:
        """The number behind the last that is set."""
        used = np.flatnonzero(self._words)
        return int(used[-1]) * 64 + int(self._words[used[-1]]).bit_length() if len(used) else 0

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Runs (first, behind the last) of what is set in [start, stop), ascending."""
        stop = min(stop, self.count)
        begun: int | None = None
        for edge in self._edges(max(0, start) >> 6, (stop + 63) >> 6):
            if begun is None:
                begun = edge
                continue
            if max(begun, start) < min(edge, stop):
                yield max(begun, start), min(edge, stop)
            begun = None
        if begun is not None and max(begun, start) < stop:
            yield max(begun, start), stop

    def _edges(self, low: int, high: int) -> Iterator[int]:
        """Where bits differ from those before them, in the words from `low` to `high`; before these nothing is set."""
        last = np.uint64(0)
        for at in range(low, high, _CHUNK):
            words = self._words[at : min(at + _CHUNK, high)]
            before = words << _1
            before[1:] |= words[:-1] >> _63
            before[0] |= last
            last = words[-1] >> _63
            edges = words ^ before
            used = np.flatnonzero(edges)
            bits = np.unpackbits(edges[used].astype("<u8").view(np.uint8), bitorder="little").reshape(-1, 64)
            rows, places = np.nonzero(bits)
            yield from ((used[rows] + at) * 64 + places).tolist()
