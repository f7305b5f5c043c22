"""Shortcuts: reads and writes of memory that the shim answers by itself, without the interpreter.

An open file may tell how its bytes are had by system calls alone (`OpenFile.shortcut`). The shim is told so after a
read that came to Python, and believes it for a second at the most: then one read comes to Python again, and all that
is checked there is checked again. Whatever is not plain comes to Python at once. What is answered is the same.
"""

from __future__ import annotations

import time
from typing import Protocol

from cloudfs.node import OpenFile
from cloudfs.shim import COUNTS, SHORTCUTS, USED, Shim
from engine.errors import EngineError

AGE = 1.0
"""Seconds for which a shortcut is believed; whatever was removed or opened anew in the daemon ends it at once."""


class Totals(Protocol):
    """Counters of all that a mount does."""

    reads: int
    bytes_read: int
    writes: int
    bytes_written: int


class Shortcuts:
    """Those of one mount. All methods belong to the thread of the loop; `count` is for `Shim.hasten`."""

    def __init__(self, shim: Shim, totals: Totals) -> None:
        self._shim = shim
        self._words = shim.words
        self._totals = totals
        self._open: dict[int, tuple[int, float, OpenFile, object]] = {}
        """By place: handle, until when, the file, and what keeps its descriptors open."""

    def offer(self, handle: int, file: OpenFile) -> None:
        """A read of `file` came to Python: have the next ones answered in C, where that can be."""
        place, now = handle % SHORTCUTS, time.monotonic()
        known = self._open.get(place)
        if known is not None and now < known[1]:
            return  # this handle's, or that of another which came first
        self._forget(place)
        try:
            way = file.shortcut()
        except (EngineError, OSError):
            return  # the next read says so
        until = now + AGE if way is None else min(way.until, now + AGE)
        self._open[place] = handle, until, file, way and way.keeper
        if way is not None:
            self._shim.set(handle, way, until)

    def withdraw(self, handle: int) -> None:
        """From now on all requests of that handle come to Python."""
        known = self._open.get(handle % SHORTCUTS)
        if known is not None and known[0] == handle:
            self._forget(handle % SHORTCUTS)

    def withdraw_all(self) -> None:
        """The same of all handles: something was removed or opened anew."""
        for place in list(self._open):
            self._forget(place)

    def _forget(self, place: int) -> None:
        known = self._open.pop(place, None)
        if known is not None:
            self._shim.set(known[0], None)

    def count(self) -> None:
        """Add what was answered in C to the counters that Python keeps: before anything else is done in Python."""
        used = self._words[USED]
        for place, (_, _, file, _) in self._open.items():
            if used >> place & 1:
                self._count_one(place, file)
        self._words[USED] = 0

    def _count_one(self, place: int, file: OpenFile) -> None:
        words, totals, start = self._words, self._totals, COUNTS + 4 * place
        reads, bytes_read, writes, bytes_written = words[start : start + 4]
        for index in range(start, start + 4):
            words[index] = 0
        totals.reads += reads
        totals.bytes_read += bytes_read
        totals.writes += writes
        totals.bytes_written += bytes_written
        file.count(reads, bytes_read, writes, bytes_written)
