"""A bitmap of page frames, and how many of them come before one: the number of its descriptor."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Pfns = npt.NDArray[np.uint64]

_CHUNK = 1 << 18
"""Page frames whose bits are unpacked at once."""
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
        pieces = range(0, len(self._words), _CHUNK >> 3)
        ones = np.concatenate([_popcount(self._words[at : at + (_CHUNK >> 3)]) for at in pieces])
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
        """Runs (first, behind the last) of what is set in [start, stop), as far as they lie in one chunk."""
        stop = min(stop, self.count)
        for low in range(max(0, start) // 8 * 8, stop, _CHUNK):
            piece = self._bytes[low >> 3 : (min(low + _CHUNK, stop) + 7) >> 3]
            if not piece.any():
                continue
            bits = np.unpackbits(piece, bitorder="little")
            edges = np.flatnonzero(np.diff(bits, prepend=0, append=0)) + low
            for first, behind in edges.reshape(-1, 2).tolist():
                if max(first, start) < min(behind, stop):
                    yield max(first, start), min(behind, stop)
