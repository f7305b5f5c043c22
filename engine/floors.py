"""What a memory stands on: for reads that go down through all floors in one call of C, see `engine.translate.tower`.

A memory that can say so has a method `floor() -> Floor | None`, which never waits; None: not now. What it gives holds
for as long as its `stands` says so, which is asked before each read, and counts where its `holds` says so behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from engine.records import dataclass

Answer = Callable[[], bool]


def always() -> bool:
    """Of what cannot change: yes."""
    return True


@dataclass(frozen=True, slots=True)
class Ground:
    """Bytes by pread(2), offset = address."""

    descriptor: int
    keeper: object
    """Keeps the descriptors open."""
    stands: Answer
    pagemap: int = -1
    """Of a process: a page is read only where its entry here says that it is present."""
    pid: int = 0
    """Long pieces are read by process_vm_readv(2), and count if `pidfd` and `pagemap` still answer; 0: they are not."""
    pidfd: int = -1


@dataclass(frozen=True, slots=True)
class Ranges:
    """Another memory through a map: (address, size, address below), ascending and disjoint."""

    rows: Sequence[tuple[int, int, int]]
    below: object


@dataclass(frozen=True, slots=True)
class Through:
    """Another memory as it is."""

    below: object
    holds: Answer = always
    """Whether what was read just now is what it was taken for."""


@dataclass(frozen=True, slots=True)
class Space:
    """Another memory through page tables."""

    mode: int
    """Where `struct mode` of native/modes.h lies."""
    keeper: object
    """Keeps it there."""
    dtb: int
    below: object
    words: Sequence[tuple[int, int, int]] = ()
    """(address below, bytes, value) of what has to stand there after a read."""
    holds: Answer = always


Floor = Ground | Ranges | Through | Space


@runtime_checkable
class Deep(Protocol):
    """A memory that can be read in one call all the way down."""

    def read_down(self, address: int, buffer: memoryview) -> bool:
        """Fill `buffer`; False, and anything in it, where that has to be done by single steps."""
        ...


@runtime_checkable
class HasFloor(Protocol):
    """A memory that can say what it stands on."""

    def floor(self) -> Floor | None:
        """What it stands on; None: not to be said now."""
