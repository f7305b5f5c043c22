"""Records of one kind side by side: the same bytes of each, as columns in which evidence is looked for.

All records of a kind have their members at the same places, so what is true of a member is true of a whole column:
a pointer to the parent is a column of tasks, a PID a column of different numbers. What a column proves it proves by
all rows. Where no column does, up to one row in 32 may disagree: a record that was torn while it was copied, or lies
in a page that is damaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.memory import Addresses, Memory, as_addresses
from engine.records import dataclass

Column = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]

ROWS_PER_DISSENTER = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """`data[i]` are the bytes from `addresses[i]` on; `slack` rows may disagree with a claim."""

    addresses: Addresses
    data: npt.NDArray[np.uint8]
    word: int
    """Bytes of a pointer."""
    kernel_start: int
    slack: int = 0

    @classmethod
    def read(cls, memory: Memory, addresses: Sequence[int], size: int, kernel_start: int) -> Sample:
        """`size` bytes at each address; records that cannot be read whole are left out."""
        column = as_addresses(list(addresses))
        data = np.zeros((len(column), size), np.uint8)
        faults = memory.gather(column, data)
        good = np.ones(len(column), bool)
        good[faults.rows] = False
        return cls(column[good], data[good], 8 if kernel_start >> 32 else 4, kernel_start)

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def size(self) -> int:
        """Bytes of a record that are looked at."""
        return int(self.data.shape[1])

    def lenient(self) -> Sample:
        """The same, but that one row in 32 may disagree."""
        return Sample(self.addresses, self.data, self.word, self.kernel_start, len(self) // ROWS_PER_DISSENTER)

    def table(self, width: int, step: int | None = None) -> Column:
        """Unsigned numbers of `width` bytes, one column for every `step` bytes (by default as many)."""
        step = width if step is None else step
        count = max(0, (self.size - width) // step + 1)
        shape, strides = (len(self), count), (self.size, step)
        return np.ndarray(shape, f"<u{width}", self.data, 0, strides)

    def words(self) -> Column:
        """Pointers, one column for each aligned place."""
        return self.table(self.word)

    def column(self, offset: int, width: int | None = None) -> Column:
        """The numbers at one place, as 64 bits."""
        width = self.word if width is None else width
        return np.ndarray((len(self),), f"<u{width}", self.data, offset, (self.size,)).astype(np.uint64)

    def agreed(self, claim: Mask) -> npt.NDArray[np.intp]:
        """The columns of which the claim holds in every row, but for `slack` of them."""
        return np.flatnonzero((~claim).sum(axis=0) <= self.slack)

    def holds(self, claim: Mask) -> bool:
        """Whether the claim holds in every row, but for `slack` of them."""
        return int((~claim).sum()) <= self.slack

    def pointers(self, words: Column) -> Mask:
        """Which words could be addresses of objects of the kernel."""
        top = np.uint64((1 << 8 * self.word) - 4096)
        wide = words.astype(np.uint64)
        found: Mask = (wide >= np.uint64(self.kernel_start)) & (wide < top) & (wide & np.uint64(3) == 0)
        return found


def one(found: Sequence[int] | npt.NDArray[np.intp]) -> int | None:
    """The only one that was found; None where there is none, or where more could be meant."""
    return int(found[0]) if len(found) == 1 else None
