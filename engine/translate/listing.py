"""From the raw rows of a tree's walk to a listing: clipped to a range, the hook asked, faults joined, gaps filled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.errors import FaultKind
from engine.translate.columns import ASK, Blocks, absent_rows
from engine.translate.mmu import AbsentHook, Translation

HALF = 1 << 63
"""Bytes of the longest row: a gap of the whole address space has two."""


def clipped(chunks: Iterator[Blocks], low: int, last: int) -> Iterator[Blocks]:
    """The rows cut to [`low`, `last`]."""
    first, end = np.uint64(low), np.uint64(last)
    for chunk in chunks:
        if int(chunk.starts[0]) >= low and int(chunk.starts[-1]) + int(chunk.sizes[-1]) - 1 <= last:
            yield chunk
            continue
        ends = chunk.starts + (chunk.sizes - np.uint64(1))
        inside = (ends >= first) & (chunk.starts <= end)
        if not inside.all():
            chunk, ends = chunk.take(inside), ends[inside]
            if not len(chunk):
                continue
        starts = np.maximum(chunk.starts, first)
        physical = np.where(chunk.kinds == 0, chunk.physical + (starts - chunk.starts), chunk.physical)
        sizes = np.minimum(ends, end) - starts + np.uint64(1)
        yield Blocks(starts, sizes, physical, chunk.page_bits, chunk.rights, chunk.flags, chunk.kinds)


def asked(chunks: Iterator[Blocks], absent: AbsentHook) -> Iterator[Blocks]:
    """The rows of kind ASK as the hook answers them.

    Where it answers with a page that is smaller than what the entry covers, the rest was not walked.
    """
    for chunk in chunks:
        where = np.flatnonzero(chunk.kinds == ASK)
        rests: list[tuple[int, int]] = []
        for row in where.tolist():
            start, size = int(chunk.starts[row]), int(chunk.sizes[row])
            answer = absent(start, int(chunk.physical[row]), int(chunk.page_bits[row]))
            inside = _answer(chunk, row, start, size, answer)
            if inside < size:
                rests.append((start + inside, size - inside))
        if len(where):
            chunk = chunk.take(chunk.kinds != FaultKind.ABSENT)
        if rests:
            starts, sizes = (np.array(column, np.uint64) for column in zip(*rests, strict=True))
            chunk = chunk.among(absent_rows(starts, sizes, FaultKind.NOT_WALKED))
        if len(chunk):
            yield chunk


def _answer(chunk: Blocks, row: int, start: int, size: int, answer: Translation | FaultKind) -> int:
    """Put an answer in its row; gives how many bytes it is about."""
    if not isinstance(answer, Translation):
        chunk.physical[row], chunk.page_bits[row], chunk.kinds[row] = 0, 0, answer
        return size
    whole = 1 << answer.page_bits
    inside = min(size, whole - (start & whole - 1))
    chunk.sizes[row], chunk.physical[row], chunk.page_bits[row] = inside, answer.physical, answer.page_bits
    chunk.rights[row], chunk.flags[row], chunk.kinds[row] = answer.rights.value, answer.flags.value, 0
    return inside


def joined(chunks: Iterator[Blocks]) -> Iterator[Blocks]:
    """Rows absent for the same reason that follow one another, as one."""
    held: Blocks | None = None
    for chunk in chunks:
        if held is not None:
            chunk = held.then(chunk)
            held = None
        if chunk.kinds.any():
            chunk = _joined(chunk)
            if chunk.kinds[-1]:
                held = chunk.take(slice(len(chunk) - 1, None))
                chunk = chunk.take(slice(len(chunk) - 1))
        if len(chunk):
            yield chunk
    if held is not None:
        yield held


def _joined(chunk: Blocks) -> Blocks:
    kinds = chunk.kinds
    same = (kinds[1:] == kinds[:-1]) & (kinds[1:] != 0) & (chunk.starts[1:] == chunk.starts[:-1] + chunk.sizes[:-1])
    # No joined row is longer than half the address space, nor does it cross its middle.
    same &= (chunk.starts[1:] >> np.uint64(63)) == (chunk.starts[:-1] >> np.uint64(63))
    if not same.any():
        return chunk
    begins = np.flatnonzero(np.concatenate(([True], ~same)))
    sizes = np.add.reduceat(chunk.sizes, begins)
    runs = chunk.take(begins)
    return Blocks(runs.starts, sizes, runs.physical, runs.page_bits, runs.rights, runs.flags, runs.kinds)


def filled(chunks: Iterator[Blocks], start: int, stop: int) -> Iterator[Blocks]:
    """With rows of kind ABSENT wherever there are none from `start` to `stop`."""
    at = start
    for chunk in chunks:
        begins = chunk.starts
        # Where the row before stops; it cannot wrap, since another row follows.
        before = np.concatenate((np.array([at], np.uint64), begins[:-1] + chunk.sizes[:-1]))
        holes = np.flatnonzero(begins != before)
        if len(holes):
            yield chunk.among(absent_rows(before[holes], begins[holes] - before[holes], FaultKind.ABSENT))
        else:
            yield chunk
        at = int(begins[-1]) + int(chunk.sizes[-1])
    if at < stop:
        sizes = [HALF, stop - at - HALF] if stop - at > HALF else [stop - at]
        starts = [at, at + HALF][: len(sizes)]
        yield absent_rows(np.array(starts, np.uint64), np.array(sizes, np.uint64), FaultKind.ABSENT)
