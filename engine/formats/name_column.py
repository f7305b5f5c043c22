"""Finding a name in a column of names that stand one after another in one block of bytes, without decoding them.

A hundred thousand names as Python strings, or in a dictionary, would cost tens of megabytes and of milliseconds;
here the first eight bytes of each are one number, so that a look-up is one comparison over a column (50 µs for
100,000 names) and a look at the few names that are left.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

PAD = 8
"""Bytes that are read past the first byte of a name."""
_DECODE = ("utf-8", "surrogateescape")


class NameColumn:
    """Names that end with a NUL each: row i begins at `starts[i]` of a block of bytes.

    The block ends with a NUL. Rows whose start lies outside of it are never found, and have the name "".
    """

    def __init__(self, block: bytes | memoryview, starts: npt.NDArray[Any]) -> None:
        self._block = bytes(block)
        self._starts = starts

    def __len__(self) -> int:
        return len(self._starts)

    @cached_property
    def _keys(self) -> npt.NDArray[np.uint64]:
        """The first eight bytes of each name, and what follows it where it is shorter."""
        padded = np.frombuffer(self._block + bytes(PAD), np.uint8)
        windows: npt.NDArray[Any] = np.ndarray((len(self._block) + 1,), f"V{PAD}", padded.data, strides=(1,))
        inside = np.minimum(self._starts, len(self._block)).astype(np.intp)
        keys: npt.NDArray[np.uint64] = windows[inside].view(np.uint64)
        return keys

    def find(self, name: bytes) -> list[int]:
        """The rows that have this name, ascending."""
        whole = name + b"\0"
        if b"\0" in name:
            return []
        key = np.uint64(int(np.frombuffer(whole[:PAD].ljust(PAD, b"\0"), np.uint64)[0]))
        if len(whole) >= PAD:
            equal = self._keys == key
        else:
            mask = np.frombuffer((b"\xff" * len(whole)).ljust(PAD, b"\0"), np.uint64)[0]
            equal = (self._keys & mask) == key
        rows = np.flatnonzero(equal)
        return [row for row in rows.tolist() if self._block.startswith(whole, int(self._starts[row]))]

    def bytes_at(self, row: int) -> bytes:
        """The name of a row."""
        start = int(self._starts[row])
        stop = self._block.find(0, start) if 0 <= start < len(self._block) else -1
        return self._block[start:stop] if stop >= 0 else b""

    def __getitem__(self, row: int) -> str:
        return self.bytes_at(row).decode(*_DECODE)
