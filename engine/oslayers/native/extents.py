"""Where in an address space there is data: pages that are held, and files."""

from __future__ import annotations

import errno
import heapq
import os
from collections.abc import Iterator

from engine.oslayers.native.descriptors import Descriptors
from engine.oslayers.native.mappings import AddressSpaceGoneError, Mapping
from engine.oslayers.native.pagemap import (
    PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED,
    PAGE_SIZE,
    Run,
    joined,
    stream_runs,
)
from engine.oslayers.native.storage import Storage
from engine.oslayers.native.transfer import open_mapped

_UNREADABLE = b"[vvar"
"""Begin of the names of the kernel's mappings that nobody can read through another process."""


def _held(files: Descriptors, start: int, stop: int) -> Iterator[Run]:
    """The runs of held pages in [start, stop), which lies in a mapping; everything without pagemap."""
    if files.pagemap < 0:
        yield start, stop
        return
    if files.scanner is None:
        yield from stream_runs(files.pagemap, start, stop)
        return
    first, last = start // PAGE_SIZE * PAGE_SIZE, -(-stop // PAGE_SIZE) * PAGE_SIZE
    try:
        yield from files.scanner.runs(first, last, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, skip_zero_page=True)
    except ProcessLookupError:
        raise AddressSpaceGoneError from None


def _data_of(descriptor: int, mapping: Mapping, start: int, stop: int) -> Iterator[Run]:
    """The parts of [start, stop) that the file behind them holds data for (lseek(2), SEEK_DATA)."""
    moved = mapping.start - mapping.offset
    at = start - moved
    while at < stop - moved:
        try:
            begin = os.lseek(descriptor, at, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:
                yield at + moved, stop
            return
        if begin + moved >= stop or end <= at:
            return
        yield begin + moved, end + moved
        at = end


def _of_memory_file(files: Descriptors, mapping: Mapping, start: int, stop: int) -> Iterator[Run]:
    """Data of shared memory: what the file holds and, where the mapping is private, pages of its own."""
    try:
        descriptor = open_mapped(files, mapping)
    except FileNotFoundError:
        descriptor = None
    if descriptor is None:
        if mapping.huge and not mapping.shared:
            yield from _held(files, start, stop)
        else:
            yield start, stop
        return
    try:
        data = _data_of(descriptor, mapping, start, stop)
        yield from data if mapping.shared else heapq.merge(data, _held(files, start, stop))
    finally:
        os.close(descriptor)


def _of_mapping(files: Descriptors, mapping: Mapping, start: int, stop: int) -> Iterator[Run]:
    match mapping.storage:
        case Storage.SHARED_MEMORY | Storage.MEMORY_FILE:
            return _of_memory_file(files, mapping, start, stop)
        case Storage.FILE:
            return iter(((start, stop),))
        case Storage.KERNEL if not mapping.name.startswith(_UNREADABLE):
            return iter(((start, stop),))
        case _:
            return _held(files, start, stop)


def data_runs(files: Descriptors, start: int, stop: int) -> Iterator[Run]:
    """The parts of [start, stop) that hold data, ascending, disjoint, never touching one another.

    A mapping of a file counts whole: it has content, present or not.
    """

    def clipped() -> Iterator[Run]:
        for mapping in files.mappings.within(start, stop):
            low, high = max(start, mapping.start), min(stop, mapping.stop)
            for begin, end in _of_mapping(files, mapping, low, high):
                if max(begin, low) < min(end, high):
                    yield max(begin, low), min(end, high)

    return joined(clipped())
