"""Top page tables by what they do: which pages of memory, taken for one, lead an address to where it must lie.

    mapping_roots(physical, spec, pages, va, pa)      those of many pages that do; all are walked at once
    addresses_of(physical, spec, root, region, pas)   the addresses of a region at which a table maps places

One pair of addresses leaves, of a hundred thousand pages, the tables of the kernel and of its processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import UnsupportedError
from engine.memory import Addresses, Memory
from engine.translate.batch import TableReader
from engine.translate.mmu import MmuSpec
from engine.translate.rows import LevelRows, rows_of
from engine.types import Extent

PAGE = 4096
"""Top tables begin at a multiple (of their own size where that is more)."""
TABLE_LIMIT = 1 << 13
"""Tables of one level that are looked through for a place."""
LARGEST_PAGE = 25
"""Log2 of the largest page by which kernels map their images (32 MiB with granules of 16 KiB); the word 1 alone would
be one of 1 GiB to some modes."""
_SAMPLED = 4
"""Entries at both ends of a page that are looked at first."""
_BATCH = 1 << 10
"""Pages that are looked at whole at a time."""

Mask = npt.NDArray[np.bool_]


def pages_of(physical: Memory, start: int = 0, stop: int | None = None) -> Addresses:
    """The pages of [start, stop) that hold data."""
    parts = []
    for extent in physical.extents(max(0, start), stop):
        first = -(-extent.start // PAGE) * PAGE
        if first + PAGE <= extent.stop:
            parts.append(np.arange(first, extent.stop - PAGE + 1, PAGE, dtype=np.uint64))
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def aligned(pages: Addresses, spec: MmuSpec) -> Addresses:
    """Where top tables of this mode can begin that have one of the pages: of a large one the first may be a hole."""
    size = spec.entry_size << spec.levels[0].bits
    if size <= PAGE or size & (size - 1):
        return pages
    found: Addresses = np.unique(pages & ~np.uint64(size - 1))
    return found


def mapping_roots(physical: Memory, spec: MmuSpec, pages: Addresses, address: int, place: int) -> Addresses:
    """Those of `pages` that, taken for top tables, lead `address` to the physical address `place`."""
    if spec.canonical(address) is None:
        return pages[:0]
    try:
        levels = rows_of(spec).levels
    except UnsupportedError:
        return pages[:0]
    reader = TableReader(physical, spec.entry_size)
    tables, owners = pages, np.arange(len(pages))
    good = np.zeros(len(pages), np.bool_)
    for level in levels:
        if not len(tables):
            break
        index = np.uint64(address >> int(level.shift)) & level.index_mask
        entries, bad = reader.words(tables + (index << level.entry_bits))
        if bad is not None:
            entries[bad] = 0
        codes, bases, inside, leads_on = _told(level, entries)
        leaf = (codes > 0) & ~leads_on
        lies = (bases & ~inside) | (np.uint64(address) & inside)
        good[owners[leaf & (lies == np.uint64(place))]] = True
        tables, owners = bases[leads_on], owners[leads_on]
    found: Addresses = pages[good]
    return found


def _told(level: LevelRows, entries: Addresses) -> tuple[Any, Addresses, Addresses, Mask]:
    """Codes of entries (0: absent, or a fault), what they name, the bits inside of a page, which lead to a table."""
    codes = level.codes(entries)
    codes[level.faults[codes] != 0] = 0
    leads_on: Mask = level.tables[codes] & (codes > 0)
    codes[~leads_on & (level.page_bits[codes] > LARGEST_PAGE)] = 0
    bits = np.where(leads_on | (codes == 0), 0, level.page_bits[codes]).astype(np.uint64)
    return codes, level.bases(codes, entries), (np.uint64(1) << bits) - np.uint64(1), leads_on


def addresses_of(
    physical: Memory, spec: MmuSpec, root: int, region: Extent, places: Sequence[int]
) -> list[tuple[int, int]]:
    """(address, place): where in the region this top table maps the physical addresses `places`, ascending.

    Each table is looked through once, however often it is named: loops and aliases end here. So do tables in which
    there are entries that no processor takes, but for those of the last level, where kernels leave some.
    """
    try:
        levels = rows_of(spec).levels
    except UnsupportedError:
        return []
    reader = TableReader(physical, spec.entry_size)
    tables, parents = np.array([root], np.uint64), np.array([_first(region, levels[0])], np.uint64)
    found: list[tuple[int, int]] = []
    for number, level in enumerate(levels):
        entries, starts = _entries(reader, level, tables, parents, region)
        codes, bases, inside, leads_on = _told(level, entries)
        if number < len(levels) - 1:
            wrong = (entries != 0) & ((codes == 0) | (leads_on & (bases >= np.uint64(physical.size))))
            leads_on &= np.repeat(~wrong.reshape(-1, level.count).any(axis=1), level.count)
        outside = (starts < np.uint64(_first(region, level))) | (starts > np.uint64(region.stop - 1))
        leads_on &= ~outside
        leaves = np.flatnonzero((codes > 0) & ~leads_on & ~outside)
        for place in places:
            within = inside[leaves]
            hits = leaves[bases[leaves] & ~within == np.uint64(place) & ~within]
            found += [(int(starts[row]) + (place & int(inside[row])), place) for row in hits.tolist()]
        tables, rows = np.unique(bases[leads_on], return_index=True)
        tables, parents = tables[:TABLE_LIMIT], starts[leads_on][rows][:TABLE_LIMIT]
        if not len(tables):
            break
    return sorted(pair for pair in found if pair[0] in region)


def _first(region: Extent, level: LevelRows) -> int:
    return region.start & -level.span


def _entries(
    reader: TableReader, level: LevelRows, tables: Addresses, parents: Addresses, region: Extent
) -> tuple[Addresses, Addresses]:
    """All entries of tables of one level, and the addresses from which on they translate.

    A top table's are turned so that they begin with the region's: the high half comes first then.
    """
    matrix, bad = reader.rows(tables, level.width)
    if bad is not None:
        matrix[bad] = 0
    steps = np.arange(level.count, dtype=np.uint64) << level.shift
    if level.number == 0:
        turn = (region.start >> int(level.shift)) & (level.count - 1)
        matrix = np.roll(matrix, -turn, axis=1)
    with np.errstate(over="ignore"):
        starts = parents[:, None] + steps[None, :]
    return np.ascontiguousarray(matrix).reshape(-1), starts.reshape(-1)


def table_like(memory: Memory, spec: MmuSpec, pages: Addresses, region: Extent, size: int) -> Addresses:
    """Those of the pages that look like a top table with entries for the region: all lead to tables below `size`."""
    try:
        level = rows_of(spec).levels[0]
    except UnsupportedError:
        return pages[:0]
    reader = TableReader(memory, spec.entry_size)
    first = (region.start >> int(level.shift)) & (level.count - 1)
    found = [pages[:0]]
    pages = _begin_so(reader, level, pages, size)
    for start in range(0, len(pages), _BATCH):
        some = pages[start : start + _BATCH]
        matrix, bad = reader.rows(some, level.width)
        if bad is not None:
            matrix[bad] = 0
        entries = np.ascontiguousarray(matrix).reshape(-1)
        _, bases, _, leads_on = _told(level, entries)
        good = leads_on & (bases < np.uint64(size))
        shape = (len(some), level.count)
        wrong = ((entries != 0) & ~good).reshape(shape).any(axis=1)
        some = some[~wrong & good.reshape(shape)[:, first:].any(axis=1)]
        if level.width < PAGE and len(some):  # a small table has its page for itself
            rest, bad = reader.rows(some + np.uint64(level.width), PAGE - level.width)
            some = some[~rest.any(axis=1)]
        found.append(some)
    return np.concatenate(found)


def _begin_so(reader: TableReader, level: LevelRows, pages: Addresses, size: int) -> Addresses:
    """Those of the pages whose first and last entries could be a top table's: of most that hold else, one is not."""
    for entry in sorted({*range(_SAMPLED), *range(level.count - _SAMPLED, level.count)} & {*range(level.count)}):
        entries, bad = reader.words(pages + (np.uint64(entry) << level.entry_bits))
        if bad is not None:
            entries[bad] = 0
        _, bases, _, leads_on = _told(level, entries)
        pages = pages[(entries == 0) | (leads_on & (bases < np.uint64(size)))]
    return pages


def entry_counts(physical: Memory, spec: MmuSpec, root: int, kernel_start: int) -> tuple[int, int]:
    """How many entries a top table has for addresses below `kernel_start`, and how many from there on."""
    level = rows_of(spec).levels[0]
    matrix, _ = TableReader(physical, spec.entry_size).rows(np.array([root], np.uint64), level.width)
    used = matrix.reshape(-1) != 0
    first = (kernel_start >> int(level.shift)) & (level.count - 1)
    return int(np.count_nonzero(used[:first])), int(np.count_nonzero(used[first:]))


__all__ = ["addresses_of", "aligned", "entry_counts", "mapping_roots", "pages_of", "table_like"]
