"""Many rows in few calls: gather and scatter by process_vm_readv and process_vm_writev.

A call takes 1024 rows and stops at the first bad piece. Rows that it will not do are done one by one, and
the call goes on behind them. Whether pages are held is asked once for pages that lie close together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError
from engine.memory import Addresses, Rows
from engine.oslayers.native import usual, vectors
from engine.oslayers.native.descriptors import Descriptors, Walk
from engine.oslayers.native.mappings import AddressSpaceGoneError
from engine.oslayers.native.pagemap import HELD, LEAST_HELD, PAGE_SHIFT, SCAN_PAGES, TOP_BYTE
from engine.oslayers.native.storage import Storage
from engine.oslayers.native.transfer import read, write, zero

WIDEST_ROW = 64 << 10
"""Wider rows gain nothing by being gathered."""
NEAR_PAGES = 48
"""Pages so far apart are looked up together: one costs 0.01 to 0.03 us, a call 1 us (measured)."""

LEAST_ROWS = 4
"""Rows for which C is asked to look their pages up."""
BLOCK_ROWS = 1 << 14
"""Rows that are looked up together: bounds what one call holds of pagemap to some megabytes."""

Indices = npt.NDArray[np.intp]
Found = list[tuple[int, int, int]]


def _top_bytes(files: Descriptors, first: int, count: int) -> bytes:
    """The top bytes of the entries of `count` pages, or as good as those."""
    if count >= SCAN_PAGES and files.scanner is not None:
        with contextlib.suppress(OSError):  # part of the range lies beyond any process's addresses
            if files.scanner.covers(first << PAGE_SHIFT, first + count << PAGE_SHIFT, HELD.categories):
                return bytes((LEAST_HELD,)) * count
    return os.pread(files.pagemap, count * 8, first * 8)[TOP_BYTE::8].ljust(count, b"\0")


def held_pages(files: Descriptors, addresses: Addresses, width: int) -> tuple[Indices, Indices]:
    """For each row how many of its pages are held, and how many there are; all where nobody can tell."""
    first = addresses >> np.uint64(PAGE_SHIFT)
    last = (addresses + np.uint64(width - 1)) >> np.uint64(PAGE_SHIFT)
    last = np.maximum(first, last)  # a row that runs over 2^64: it faults in its first page or behind
    if files.pagemap < 0:
        pages = (last - first).astype(np.intp) + 1
        return pages, pages
    found = usual.library() if len(addresses) >= LEAST_ROWS else None
    if found is not None:
        return usual.held_pages(found, files, addresses, width), (last - first).astype(np.intp) + 1
    order = np.argsort(first, kind="stable")
    begin, reach = first[order], np.maximum.accumulate(last[order])
    cuts = np.flatnonzero(begin[1:] > reach[:-1] + np.uint64(NEAR_PAGES)) + 1
    starts = begin[np.concatenate(([0], cuts))]
    counts = (reach[np.concatenate((cuts - 1, [len(begin) - 1]))] - starts).astype(np.intp) + 1
    groups = zip(starts.tolist(), counts.tolist(), strict=True)
    held = np.frombuffer(b"".join([_top_bytes(files, start, count) for start, count in groups]), np.uint8) >= LEAST_HELD
    before = np.zeros(len(held) + 1, np.intp)
    np.cumsum(held, out=before[1:])
    # Where in `held` the group of a row begins, less the page with which it begins.
    bases = np.concatenate(([0], np.cumsum(counts[:-1])))
    group = np.searchsorted(starts, first, side="right") - 1
    low = (first - starts[group]).astype(np.intp) + bases[group]
    pages = (last - first).astype(np.intp) + 1
    return before[low + pages] - before[low], pages


def _ascending(addresses: Addresses, rows: Indices) -> Indices:
    return rows[np.argsort(addresses[rows], kind="stable")]


def _gather_held(files: Descriptors, addresses: Addresses, out: Rows, one: Callable[[int], None]) -> None:
    """Rows whose pages are all held; `one` does the row that a call stopped at."""
    count, width = out.shape
    done = 0
    while done < count:
        stop = min(count, done + vectors.MOST_ROWS)
        got = vectors.read_rows(files.pid, addresses[done:stop], out[done:stop]) if files.vectors else 0
        if got < 0 and vectors.refused(-got):
            files.vectors = False
        rows = max(got, 0) // width
        done += rows
        if rows == 0 or done < stop:
            one(done)
            done += 1


def _zero_untouched(walk: Walk, addresses: Addresses, out: Rows, rows: Indices) -> Indices:
    """Answer rows of `rows`, none of whose pages is held, that lie in anonymous memory; gives the others.

    `rows` ascend by address.
    """
    width = out.shape[1]
    at = addresses[rows]
    others: list[int] = []
    done = 0
    while done < len(rows):
        address = int(at[done])
        mapping = walk.at(address)
        if mapping is None or mapping.storage is not Storage.ANONYMOUS or address + width > mapping.stop:
            others.append(done)
            done += 1
            continue
        stop = int(np.searchsorted(at, np.uint64(mapping.stop - width), side="right"))
        out[rows[done:stop]] = 0
        done = stop
    return rows[others]


def gather(files: Descriptors, addresses: Addresses, out: Rows) -> Found:
    """Fill `out`, row by row where no call can. Gives (row, address, kind) of those that failed.

    Raises AddressSpaceGoneError where the process may not have been the same all the time.
    """
    found: Found = []
    width = out.shape[1]
    flat = out.data.cast("B")
    walk = Walk(files)

    def one(row: int) -> None:
        address = int(addresses[row])
        try:
            read(files, address, flat[row * width : (row + 1) * width], walk=walk)
        except FaultError as error:
            found.append((row, error.address, error.kind))
            zero(flat[row * width + max(0, error.address - address) : (row + 1) * width])

    held, pages = held_pages(files, addresses, width)
    good = held == pages
    if good.all():
        _gather_held(files, addresses, out, one)
    else:
        rows = np.flatnonzero(good)
        if len(rows):
            part = np.empty((len(rows), width), np.uint8)
            late: list[int] = []
            _gather_held(files, addresses[rows], part, late.append)
            out[rows] = part
            for index in late:
                one(int(rows[index]))
        # Ascending, since the walk starts anew for every step down.
        untouched = _zero_untouched(walk, addresses, out, _ascending(addresses, np.flatnonzero(held == 0)))
        others = np.concatenate((untouched, np.flatnonzero((held > 0) & ~good)))
        for row in _ascending(addresses, others).tolist():
            one(row)
    if not files.same():
        raise AddressSpaceGoneError
    return sorted(found)


def _runs(good: npt.NDArray[np.bool_]) -> Iterator[tuple[bool, int, int]]:
    """Rows cut where `good` changes: (good, start, stop)."""
    cuts = [0, *(np.flatnonzero(good[1:] != good[:-1]) + 1).tolist(), len(good)]
    for start, stop in pairwise(cuts):
        yield bool(good[start]), start, stop


def scatter(files: Descriptors, addresses: Addresses, rows: Rows) -> Found:
    """Store `rows`, in their order, one by one where no call can. Gives those that failed.

    process_vm_writev goes by PID: that it is still this process is made sure right before each call.
    """
    found: Found = []
    width = rows.shape[1]
    walk = Walk(files)

    def one(row: int) -> None:
        try:
            write(files, int(addresses[row]), memoryview(rows[row].tobytes()), walk=walk)
        except FaultError as error:
            found.append((row, error.address, error.kind))

    held, pages = held_pages(files, addresses, width)
    for good, start, stop in _runs(held == pages):
        done = start
        while done < stop:
            last = min(stop, done + vectors.MOST_ROWS)
            if good and files.vectors:
                if not files.same():
                    raise AddressSpaceGoneError
                got = vectors.write_rows(files.pid, addresses[done:last], rows[done:last])
                if got < 0 and vectors.refused(-got):
                    files.vectors = False
                done += max(got, 0) // width
            if done < last:
                one(done)
                done += 1
    if not files.same():
        raise AddressSpaceGoneError
    return found

