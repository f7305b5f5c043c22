"""The vectorised walk: many addresses at once, or a whole tree, in memory of a size that the caller gives.

The rows of a mode are walked by numpy (`batch`, `tree`). What only the absent hook understands is asked for here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError, FaultKind, InvalidArgumentError, UnsupportedError
from engine.memory import Addresses, Memory
from engine.translate.batch import BatchWalk, Columns
from engine.translate.columns import ASK, BUFFER, Blocks, Translated, WalkReport
from engine.translate.listing import asked, clipped, filled, joined
from engine.translate.mmu import AbsentHook, Root, Translation, Walker, covered
from engine.translate.rows import SpecRows, rows_of
from engine.translate.tree import TreeWalk
from engine.types import ADDRESS_SPACE

__all__ = ["BUFFER", "Blocks", "Translated", "WalkReport", "blocks", "translate"]

_Index = npt.NDArray[np.intp]


def translate(
    physical: Memory,
    roots: Sequence[Root],
    addresses: Addresses,
    *,
    absent: AbsentHook | None = None,
    details: bool = False,
) -> Translated:
    """Where each of `addresses` lies; the first of `roots` whose mode translates an address is walked for it.

    `absent` is asked for non-zero absent entries, address by address. Rights and flags only with `details`.
    Nothing is raised for what is absent: `kinds` says why.
    """
    out = Columns(len(addresses), details=details)
    rest: _Index | None = None
    for spec, dtb in roots:
        column = addresses if rest is None else addresses[rest]
        if not len(column):
            break
        try:
            rows = rows_of(spec)
        except UnsupportedError:
            rest = _one_by_one(Walker(physical, spec, dtb, absent, keep=True), column, rest, out)
            continue
        canonical, good = rows.canonical(column)
        if good is not None:
            mine = np.flatnonzero(good)
            canonical = canonical[mine]
            places: _Index | None = mine if rest is None else rest[mine]
            rest = np.flatnonzero(~good) if rest is None else rest[~good]
        else:
            places, rest = rest, np.empty(0, np.intp)
        if len(canonical):
            _walk(physical, rows, dtb, canonical, out, places, ask=absent is not None)
            if absent is not None:
                _ask(absent, addresses, out)
    return out.translated()


def _walk(
    physical: Memory, rows: SpecRows, dtb: int, addresses: Addresses, out: Columns, places: _Index | None, *, ask: bool
) -> None:
    BatchWalk(physical, rows, dtb, details=out.rights is not None, ask=ask).walk(addresses, out, places)


def _ask(absent: AbsentHook, addresses: Addresses, out: Columns) -> None:
    """Let the hook say where pages are whose entries no row of the mode matches."""
    asked = np.flatnonzero(out.kinds == ASK)
    for row in asked.tolist():
        address = int(addresses[row])
        _answer(out, row, absent(address, int(out.physical[row]), int(out.page_bits[row])))


def _answer(out: Columns, row: int, answer: Translation | FaultKind) -> None:
    if not isinstance(answer, Translation):
        out.physical[row], out.page_bits[row], out.kinds[row] = 0, 0, answer
        return
    out.physical[row], out.page_bits[row], out.kinds[row] = answer.physical, answer.page_bits, 0
    if out.rights is not None and out.flags is not None:
        out.rights[row], out.flags[row] = answer.rights.value, answer.flags.value


def _one_by_one(walker: Walker, addresses: Addresses, places: _Index | None, out: Columns) -> _Index:
    """The scalar walk, for a mode that needs more than 64 bits; gives the rows that it does not translate."""
    rest = []
    for number, address in enumerate(addresses.tolist()):
        row = number if places is None else int(places[number])
        if walker.spec.canonical(address) is None:
            rest.append(row)
            continue
        try:
            found = walker.walk(address)
        except FaultError as error:
            out.kinds[row] = error.kind
            continue
        if found.physical < 1 << 64:
            _answer(out, row, found)
    return np.array(rest, np.intp)


def blocks(
    physical: Memory,
    root: Root,
    start: int = 0,
    stop: int | None = None,
    *,
    buffer: int = BUFFER,
    absent: AbsentHook | None = None,
    gaps: bool = False,
    report: WalkReport | None = None,
) -> Iterator[Blocks]:
    """What [start, stop) maps, in address order, in about `buffer` bytes of working memory whatever its size.

    One row for each leaf entry, those at the edges cut to the range; stretches that are absent for one reason are
    one row. With `gaps` rows of kind ABSENT fill what is left, so that the rows cover the range without a hole
    (`stop` is by default what the mode can translate). Tables that the tree leads to over and over, and more tables
    than memory has room for, are not walked but named NOT_WALKED; `report` is told.
    Raises InvalidArgumentError for a range that is none, UnsupportedError for a mode of more than 64 bits.
    """
    spec, dtb = root
    rows = rows_of(spec)
    stop = covered([root]) if stop is None else stop
    if start < 0 or stop > ADDRESS_SPACE:
        raise InvalidArgumentError(f"{start:#x}-{stop:#x} is no range of addresses")
    report = WalkReport() if report is None else report
    found = _raw(physical, rows, dtb, start, stop, buffer, absent is not None, report)
    if absent is not None:
        found = asked(found, absent)
    found = joined(found)
    return filled(found, start, stop) if gaps else found


def _raw(
    physical: Memory, rows: SpecRows, dtb: int, start: int, stop: int, buffer: int, ask: bool, report: WalkReport
) -> Iterator[Blocks]:
    """The raw rows of every half, each clipped to it."""
    walk = TreeWalk(physical, rows, dtb, buffer=buffer, ask=ask, report=report)
    for extent in rows.spec.extents():
        low, last = max(start, extent.start), min(stop, extent.stop) - 1
        if low <= last:
            yield from clipped(walk.walk(extent, low, last), low, last)
