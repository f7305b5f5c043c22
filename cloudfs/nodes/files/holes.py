"""Where memory holds data, as lseek(2) asks for it: lazily, window by window, in bounded time."""

from __future__ import annotations

import os
import time

from cloudfs.node import no_data
from engine.memory import Memory

NEAR = 256 << 20
"""Bytes that are looked through without a thread: 0.4 ms where the kernel tells of every page (before 6.7)."""
WINDOW = 16 << 30
"""Bytes that are looked through between two looks at the clock, at first."""
QUICK = 0.05
"""Seconds: after a window that took less the next one is twice as wide."""
PATIENCE = 5.0
"""Seconds after which a search stops where it is, and gives that as the answer: reading goes on from there."""


def seek(memory: Memory, start: int, stop: int, whence: int, *, near: bool = False) -> int | None:
    """The address in [start, stop) where data or a hole begins; `stop` is where a hole begins.

    Raises OSError(ENXIO) where there is none. With `near` only what lies near is looked at; None: it is not there.
    After `PATIENCE` seconds it gives the address that it has come to.
    """
    if start >= stop:
        raise no_data()
    find = _data if whence == os.SEEK_DATA else _hole
    at, window = start, NEAR if near else WINDOW
    began = last = time.monotonic()
    while True:
        limit = min(stop, at + window)
        found = find(memory, at, limit)
        if found < limit:
            return found
        at = limit
        if at >= stop:
            break
        if near:
            return None
        now = time.monotonic()
        if now - began > PATIENCE:
            return at
        window *= 2 if now - last < QUICK else 1
        last = now
    if whence == os.SEEK_DATA:
        raise no_data()
    return stop


def _data(memory: Memory, start: int, stop: int) -> int:
    """Where data begins; `stop` where there is none."""
    for extent in memory.extents(start, stop):
        return max(start, extent.start)
    return stop


def _hole(memory: Memory, start: int, stop: int) -> int:
    """Where a hole begins; `stop` where all is data."""
    at = start
    for extent in memory.extents(start, stop):
        if extent.start > at:
            break
        at = max(at, extent.stop)
    return min(at, stop)
