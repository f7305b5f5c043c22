"""What a stream of translation blocks says: runs that follow one another, extents, the mappings of a page frame.

Everything here takes blocks chunk by chunk, in address order, and holds one row over from chunk to chunk: memory
stays bounded by the chunks, whatever the size of the address space.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from engine.memory import Addresses
from engine.translate.bulk import Blocks
from engine.types import ADDRESS_SPACE, PAGE_TABLES, Extent, PageFlags, PhysicalMap, Region, Rights

REGION_LIMIT = 1 << 20
"""Ranges that are told one by one."""

_KEPT_FLAGS = np.uint8((PageFlags.GLOBAL | PageFlags.INACCESSIBLE | PageFlags.TRANSITION).value)
"""Flags by which runs are told apart; accessed and dirty change from page to page."""
_INACCESSIBLE = np.uint8(PageFlags.INACCESSIBLE.value)


def mapped(chunks: Iterable[Blocks]) -> Iterator[Blocks]:
    """The blocks that are mapped."""
    for chunk in chunks:
        good = chunk.kinds == 0
        if good.all():
            yield chunk
        elif good.any():
            yield take(chunk, np.flatnonzero(good))


def take(chunk: Blocks, rows: npt.NDArray[np.intp]) -> Blocks:
    """Some rows of a chunk."""
    return Blocks(
        chunk.starts[rows],
        chunk.sizes[rows],
        chunk.physical[rows],
        chunk.page_bits[rows],
        chunk.rights[rows],
        chunk.flags[rows],
        chunk.kinds[rows],
    )


def coalesced(chunks: Iterable[Blocks], *, frames: bool = True) -> Iterator[Blocks]:
    """The mapped blocks, those joined that follow one another in both address spaces with equal rights and page size.

    A run's `flags` are those by which runs are told apart: global, inaccessible, transition. Without `frames`
    rights and inaccessibility alone count, not where the page frames lie: the ranges as a process sees them.
    """
    kept = _KEPT_FLAGS if frames else _INACCESSIBLE
    last: Blocks | None = None
    for chunk in mapped(chunks):
        rows = chunk if last is None else _concatenated(last, chunk)
        flags = np.bitwise_and(rows.flags, kept)
        joined = rows.starts[1:] == rows.starts[:-1] + rows.sizes[:-1]
        joined &= (rows.rights[1:] == rows.rights[:-1]) & (flags[1:] == flags[:-1])
        if frames:
            joined &= rows.physical[1:] == rows.physical[:-1] + rows.sizes[:-1]
            joined &= rows.page_bits[1:] == rows.page_bits[:-1]
        begins = np.flatnonzero(np.concatenate(([True], ~joined)))
        sizes = np.add.reduceat(rows.sizes, begins)
        runs = take(rows, begins)
        runs = Blocks(runs.starts, sizes, runs.physical, runs.page_bits, runs.rights, flags[begins], runs.kinds)
        if len(runs) > 1:
            yield take(runs, np.arange(len(runs) - 1))
        last = take(runs, np.array([len(runs) - 1]))
    if last is not None:
        yield last


def _concatenated(one: Blocks, two: Blocks) -> Blocks:
    return Blocks(
        np.concatenate((one.starts, two.starts)),
        np.concatenate((one.sizes, two.sizes)),
        np.concatenate((one.physical, two.physical)),
        np.concatenate((one.page_bits, two.page_bits)),
        np.concatenate((one.rights, two.rights)),
        np.concatenate((one.flags, two.flags)),
        np.concatenate((one.kinds, two.kinds)),
    )


def physical_maps(chunks: Iterable[Blocks]) -> Iterator[PhysicalMap]:
    """The coalesced runs as records, for who wants few of them one by one."""
    for runs in coalesced(chunks):
        columns = zip(
            runs.starts.tolist(),
            runs.sizes.tolist(),
            runs.physical.tolist(),
            runs.page_bits.tolist(),
            runs.rights.tolist(),
            runs.flags.tolist(),
            strict=True,
        )
        for start, size, physical, bits, rights, flags in columns:
            yield PhysicalMap(start, size, physical, 1 << bits, Rights(rights), PageFlags(flags))


def regions(chunks: Iterable[Blocks], limit: int = REGION_LIMIT) -> Iterator[Region]:
    """The ranges of an address space by its page tables alone, joined where rights are equal.

    At most `limit`: hostile page tables may hold more. Rights are as /proc/PID/maps has them.
    """
    count = 0
    for runs in coalesced(chunks, frames=False):
        columns = (runs.starts.tolist(), runs.sizes.tolist(), runs.rights.tolist(), runs.flags.tolist())
        for start, size, rights, flags in zip(*columns, strict=True):
            visible = Rights.NONE if flags & PageFlags.INACCESSIBLE.value else seen(Rights(rights))
            yield Region(start, size, visible, shared=None, source=PAGE_TABLES)
            count += 1
            if count >= limit:
                return


def seen(rights: Rights) -> Rights:
    """Rights as /proc/PID/maps has them: who runs in user mode asks for user execution, a kernel for its own."""
    run = Rights.USER_EXECUTE if rights & Rights.USER else Rights.EXECUTE
    return rights & (Rights.READ | Rights.WRITE) | (Rights.EXECUTE if rights & run else Rights.NONE)


def mapped_extents(chunks: Iterable[Blocks], gap: int = 0, size: int = ADDRESS_SPACE) -> Iterator[Extent]:
    """The mapped ranges of addresses, ascending; holes of at most `gap` bytes are passed over.

    What is mapped from `size` on, behind the end of physical memory, counts as a hole.
    """
    start = stop = -1
    for chunk in mapped(chunks):
        starts, sizes = chunk.starts, chunk.sizes
        if size < ADDRESS_SPACE and not (there := chunk.physical < np.uint64(size)).all():
            starts, sizes = starts[there], sizes[there]
            if not len(starts):
                continue
        stops = starts + sizes  # the last may wrap to 0: the one stop that is 2^64
        distance = starts[1:] - stops[:-1]
        cuts = np.flatnonzero(distance > gap) + 1
        begins = [int(starts[0]), *starts[cuts].tolist()]
        ends = [*stops[cuts - 1].tolist(), int(stops[-1]) or ADDRESS_SPACE]
        for begin, end in zip(begins, ends, strict=True):
            if stop >= 0 and begin - stop <= gap:
                stop = end
                continue
            if stop >= 0:
                yield Extent(start, stop - start)
            start, stop = begin, end
    if stop >= 0:
        yield Extent(start, stop - start)


def mappings_of(chunks: Iterable[Blocks], frames: Addresses) -> Iterator[tuple[npt.NDArray[np.intp], Addresses]]:
    """For each chunk, (rows of `frames`, virtual addresses): every mapping of each physical address.

    Right inside large pages too. Ascending by virtual address within a row over the whole stream.
    """
    order = np.argsort(frames, kind="stable")
    wanted = frames[order]
    for chunk in mapped(chunks):
        low = np.searchsorted(wanted, chunk.physical, "left")
        high = np.searchsorted(wanted, chunk.physical + (chunk.sizes - np.uint64(1)), "right")
        counts = high - low
        hit = np.flatnonzero(counts)
        if not len(hit):
            continue
        blocks = np.repeat(hit, counts[hit])
        within = np.arange(len(blocks)) - np.repeat(np.cumsum(counts[hit]) - counts[hit], counts[hit])
        found = low[blocks] + within
        yield order[found], chunk.starts[blocks] + (wanted[found] - chunk.physical[blocks])
