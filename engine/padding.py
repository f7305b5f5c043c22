"""Zeros where nothing can be read, for readers who want all bytes of a range."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from engine.errors import FaultError
from engine.types import Extent


class Extended(Protocol):
    """What is asked of a `Memory`: where it may hold data, and where that may change."""

    @property
    def page_size(self) -> int:
        """See `Memory.page_size`."""

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""


def fill_holes(
    memory: Extended,
    address: int,
    buffer: memoryview,
    error: FaultError,
    readinto: Callable[[int, memoryview], bool | None],
) -> int | None:
    """Go on after the first fault of a read: data where `memory` says there is any, zeros elsewhere.

    Gives how many holes were met, or None where `readinto` gave False: it would have to wait. Asks for the
    extents once, and of what lies between them for one byte, so that a wide hole costs no more than a narrow one.
    """
    page, stop, holes = memory.page_size, address + len(buffer), 1
    at = max(error.address, address)
    done = min((at // page + 1) * page, stop)
    _zero(buffer, at - address, done - address)
    in_hole = True
    for extent in (*memory.extents(done, stop), Extent(stop, 0)):
        if done < extent.start:
            try:
                if not in_hole and readinto(done, buffer[done - address : done - address + 1]) is False:
                    return None
            except FaultError:
                holes += 1
                in_hole = True
            _zero(buffer, done - address, extent.start - address)
        done, limit = extent.start, min(extent.stop, stop)
        step = limit - done
        while done < limit:
            until = min(done + step, limit)
            try:
                if readinto(done, buffer[done - address : until - address]) is False:
                    return None
                done = until
                in_hole = False
                step *= 2
            except FaultError as fault:
                bad = max(fault.address, done)
                holes += not (in_hole and bad == done)
                in_hole = True
                done = min((bad // page + 1) * page, limit)
                _zero(buffer, bad - address, done - address)
                step = page  # a read may look at all that it is asked for before it says what is missing
    return holes


def _zero(buffer: memoryview, start: int, stop: int) -> None:
    if start < stop:
        buffer[start:stop] = bytes(stop - start)
