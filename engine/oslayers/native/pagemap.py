"""Which pages of an address space hold something: /proc/PID/pagemap (admin-guide/mm/pagemap.rst).

A page *is held* when it is present or in swap. Every other one was never touched, was given back, or is a
page of a file that is not mapped in: reading it through the process would make the kernel put a page there.

Two ways: the entries, 8 bytes a page, and the ioctl PAGEMAP_SCAN (Linux 6.7), which gives runs and steps over
what has no page tables. Measured: 1.0, 1.9 and 8.2 us for the entries of 1, 32 and 256 pages; 2.0 us and
0.012 us a page for the ioctl.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import threading
from collections.abc import Iterator
from fcntl import ioctl
from typing import NamedTuple

PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
PAGE_SHIFT = PAGE_SIZE.bit_length() - 1
TOP_BYTE = 7 if sys.byteorder == "little" else 0
"""Where in an entry its bits 56 to 63 stand; 63 is «present», 62 «swapped»."""
LEAST_HELD, LEAST_PRESENT = 0x40, 0x80
"""The top byte of an entry is at least so much where the page is held, or present."""
_HELD_TABLE = bytes(LEAST_HELD) + b"\1" * (256 - LEAST_HELD)
_PRESENT_TABLE = bytes(LEAST_PRESENT) + b"\1" * (256 - LEAST_PRESENT)

PAGEMAP_SCAN = 3 << 30 | 96 << 16 | ord("f") << 8 | 16
"""_IOWR('f', 16, struct pm_scan_arg), include/uapi/linux/fs.h of Linux 6.7."""
PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PAGE_IS_ZERO = 1 << 3, 1 << 4, 1 << 5


class PageKind(NamedTuple):
    """Pages that a read asks for: the least and all top bytes of their entries, their categories for the ioctl."""

    least: int
    top_bytes: bytes
    categories: int


HELD = PageKind(LEAST_HELD, bytes(range(LEAST_HELD, 256)), PAGE_IS_PRESENT | PAGE_IS_SWAPPED)
PRESENT = PageKind(LEAST_PRESENT, bytes(range(LEAST_PRESENT, 256)), PAGE_IS_PRESENT)

_SCAN = struct.Struct("=12Q")
"""size, flags, start, stop, walk end, vector, its length, most pages, inverted, all of, any of, returned."""
_RUN = struct.Struct("=3Q")
_RUNS = 512
SCAN_PAGES = 64
"""From so many pages on the ioctl is the faster way (measured)."""
_STREAM_PAGES = 1 << 16

Run = tuple[int, int]
"""Start and stop, as addresses."""


class _Runs(threading.local):
    """Room of this thread for the runs that the ioctl gives back."""

    def __init__(self) -> None:
        self.room = ctypes.create_string_buffer(_RUN.size)


_local = _Runs()


class Scanner:
    """PAGEMAP_SCAN on an open pagemap, once it is known to work."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @staticmethod
    def works(descriptor: int) -> bool:
        """Whether this kernel answers."""
        try:
            ioctl(descriptor, PAGEMAP_SCAN, bytearray(_SCAN.pack(_SCAN.size, *(0,) * 9, PAGE_IS_PRESENT, 0)))
        except OSError as error:
            return error.errno in (errno.EINVAL, errno.ESRCH)
        return True

    def covers(self, start: int, stop: int, categories: int) -> bool:
        """Whether every page of [start, stop) is in one of the categories."""
        address = ctypes.addressof(_local.room)
        argument = _SCAN.pack(_SCAN.size, 0, start, stop, 0, address, 1, 0, 0, 0, categories, 0)
        count: int = ioctl(self._descriptor, PAGEMAP_SCAN, bytearray(argument))
        return count == 1 and _RUN.unpack(_local.room)[:2] == (start, stop)

    def runs(self, start: int, stop: int, categories: int, *, skip_zero_page: bool) -> Iterator[Run]:
        """Runs of pages in [start, stop), both page-aligned, that are in one of the categories.

        With `skip_zero_page` pages that are only the kernel's page of zeros are left out.
        """
        vector = ctypes.create_string_buffer(_RUN.size * _RUNS)
        zero = PAGE_IS_ZERO if skip_zero_page else 0
        while start < stop:
            argument = bytearray(
                _SCAN.pack(_SCAN.size, 0, start, stop, 0, ctypes.addressof(vector), _RUNS, 0, zero, zero,
                           categories, 0)
            )
            count = ioctl(self._descriptor, PAGEMAP_SCAN, argument)
            for first, last, _ in _RUN.iter_unpack(memoryview(vector)[: count * _RUN.size]):
                yield max(first, start), min(last, stop)
            walked = _SCAN.unpack(argument)[4]
            if walked <= start:
                return
            start = walked


def entry_runs(top: bytes, first: int, *, present: bool) -> list[Run]:
    """The runs of pages that are held (or present), of the top bytes of entries from page `first` on."""
    marks = top.translate(_PRESENT_TABLE if present else _HELD_TABLE)
    runs: list[Run] = []
    begin = marks.find(1)
    while begin >= 0:
        end = marks.find(0, begin)
        end = len(marks) if end < 0 else end
        runs.append(((first + begin) << PAGE_SHIFT, (first + end) << PAGE_SHIFT))
        begin = marks.find(1, end)
    return runs


def stream_runs(descriptor: int, start: int, stop: int) -> Iterator[Run]:
    """The runs of held pages in [start, stop) by reading all entries, half a megabyte of them at a time."""
    page, last = start >> PAGE_SHIFT, -(-stop >> PAGE_SHIFT)
    while page < last:
        count = min(last - page, _STREAM_PAGES)
        entries = os.pread(descriptor, count * 8, page * 8)
        yield from entry_runs(entries[TOP_BYTE::8], page, present=False)
        if len(entries) < count * 8:
            return
        page += count


def joined(runs: Iterator[Run]) -> Iterator[Run]:
    """Ascending runs that touch or overlap as one."""
    begin = end = -1
    for start, stop in runs:
        if start <= end:
            end = max(end, stop)
            continue
        if end > begin:
            yield begin, end
        begin, end = start, stop
    if end > begin:
        yield begin, end
