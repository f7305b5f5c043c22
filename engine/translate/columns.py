"""The records of the vectorised walk: columns of a batch of translations, of a listing, and what a walk met."""

from __future__ import annotations

from dataclasses import field

import numpy as np
import numpy.typing as npt

from engine.errors import FaultKind
from engine.memory import Addresses
from engine.records import dataclass

BUFFER = 16 << 20
"""Bytes of working memory of a walk of a whole tree, unless the caller says otherwise."""
ASK = 255
"""Kind of a row that only the absent hook understands: `physical` is the entry, `page_bits` its level.

No caller of `translate` or `blocks` sees one.
"""
UNREADABLE_MOST = 100
"""Tables that a report names."""
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Translated:
    """Columns of a batch, one row for each address; where `kinds` is not 0 the others are."""

    physical: Addresses
    page_bits: Bytes
    kinds: Bytes
    """0: mapped, else the FaultKind of the absence."""
    rights: Bytes | None = None
    flags: Bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Columns of a listing in address order: one row for each leaf entry or absent stretch. Never a stop: sizes."""

    starts: Addresses
    sizes: Addresses
    physical: Addresses
    page_bits: Bytes
    rights: Bytes
    flags: Bytes
    kinds: Bytes
    """0: mapped; ABSENT: a gap; other FaultKinds: absent with a reason, TABLE, NOT_WALKED."""

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> Blocks:
        """Some of the rows."""
        return Blocks(
            self.starts[rows],
            self.sizes[rows],
            self.physical[rows],
            self.page_bits[rows],
            self.rights[rows],
            self.flags[rows],
            self.kinds[rows],
        )

    def then(self, other: Blocks) -> Blocks:
        """These rows and those of `other`."""
        return Blocks(
            np.concatenate((self.starts, other.starts)),
            np.concatenate((self.sizes, other.sizes)),
            np.concatenate((self.physical, other.physical)),
            np.concatenate((self.page_bits, other.page_bits)),
            np.concatenate((self.rights, other.rights)),
            np.concatenate((self.flags, other.flags)),
            np.concatenate((self.kinds, other.kinds)),
        )

    def among(self, other: Blocks) -> Blocks:
        """These rows and those of `other` in address order."""
        both = self.then(other)
        return both.take(np.argsort(both.starts, kind="stable"))


def absent_rows(starts: Addresses, sizes: Addresses, kind: FaultKind) -> Blocks:
    """Rows that are absent for one reason."""
    zeros = np.zeros(len(starts), np.uint8)
    kinds = np.full(len(starts), kind, np.uint8)
    return Blocks(starts, sizes, np.zeros(len(starts), np.uint64), zeros, zeros, zeros, kinds)


@dataclass(slots=True)
class WalkReport:
    """What a walk of a tree met."""

    tables: int = 0
    """Tables read."""
    repeated: int = 0
    """Tables not read again, since the tree leads to them over and over."""
    unreadable: list[int] = field(default_factory=list)
    """Physical addresses of tables outside of memory, the first hundred."""
    malformed: int = 0
    limited: bool = False
    """The walk ended at its limit of tables."""
