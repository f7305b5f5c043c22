"""Keeping the daemon from growing: the kernel is asked to forget nodes that nobody uses, and circles are looked for."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from cloudfs.inodes import InodeTable

ROUND = 30.0
"""Seconds after which, where many nodes are known, directories that nobody used in them are forgotten."""

COLLECTED = 20_000
"""Nodes up to which circles of all ages are looked for in each round, which takes some milliseconds then.

Python itself does so after millions of new objects: of what has a whole address space with it few are too many.
"""

Invalidate = Callable[[int, bytes], None]
"""Has the kernel forget a name: (inode of its directory, name)."""


class Pruning:
    """Chooses what is forgotten; `in_use` gives the inodes whose names must stay valid."""

    def __init__(self, inodes: InodeTable, invalidate: Invalidate, in_use: Callable[[], set[int | None]]) -> None:
        self._inodes = inodes
        self._invalidate = invalidate
        self._in_use = in_use
        self._next_round = 0.0

    def shrink(self) -> None:
        """Ask for what is above the bound, and once in a round for what nobody used in it."""
        for parent, name in self._inodes.surplus(self._in_use):
            self._invalidate(parent, name)
        now = time.monotonic()
        if now >= self._next_round:
            self._next_round = now + ROUND
            if self._inodes.round_is_due:
                self.forget_stale()
            if len(self._inodes) <= COLLECTED:
                gc.collect()

    def forget_stale(self, *, each: bool = False) -> None:
        """Ask for directories that nobody used since this was called last; with `each`, for all."""
        for parent, name in self._inodes.stale(self._in_use(), each=each):
            self._invalidate(parent, name)

    def forget_remaining(self) -> None:
        """Ask for every node by its own name."""
        for parent, name in self._inodes.remaining(self._in_use()):
            self._invalidate(parent, name)
