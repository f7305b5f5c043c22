"""The vectorised walk: many addresses at once, or a whole tree, in memory of a size that the caller gives."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from engine.memory import Addresses

BUFFER = 16 << 20
"""Bytes of working memory of a walk of a whole tree, unless the caller says otherwise."""
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
