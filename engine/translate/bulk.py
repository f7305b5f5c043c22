"""The vectorised walk: many addresses at once, or a whole tree, in memory of a size that the caller gives.

The rows of a mode are walked by numpy (`batch`, `tree`). What only the absent hook understands is asked for here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from engine import accelerator
from engine.errors import FaultError, FaultKind, InvalidArgumentError, UnsupportedError
from engine.memory import Addresses, Memory
from engine.translate.accelerated import Answers, NativeTreeWalk, mode_of, walk
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
    if len(roots) == 1:
        found, other = _walked(physical, roots[0], addresses, absent, details=details)
        del other
        return found
    out = _nothing(len(addresses), details=details)
    rest = np.arange(len(addresses))
    for root in roots:
        found, other = _walked(physical, root, addresses[rest], absent, details=details)
        if other is None:
            _put(out, rest, found)
            break
        _put(out, rest[~other], found, ~other)
        rest = rest[other]
        if not len(rest):
            break
    return out


def _nothing(count: int, *, details: bool) -> Translated:
    return Columns(count, details=details).translated()


def _put(out: Translated, rows: _Index, found: Translated, which: npt.NDArray[np.bool_] | None = None) -> None:
    """Put `which` of the rows of an answer in their places."""
    picked = slice(None) if which is None else which
    out.physical[rows], out.page_bits[rows] = found.physical[picked], found.page_bits[picked]
    out.kinds[rows] = found.kinds[picked]
    if out.rights is not None and out.flags is not None and found.rights is not None and found.flags is not None:
        out.rights[rows], out.flags[rows] = found.rights[picked], found.flags[picked]


def _walked(
    physical: Memory, root: Root, addresses: Addresses, absent: AbsentHook | None, *, details: bool
) -> tuple[Translated, npt.NDArray[np.bool_] | None]:
    """The answers of one root, and which addresses its mode does not translate, if any."""
    spec, dtb = root
    try:
        rows = rows_of(spec)
    except UnsupportedError:
        return _one_by_one(Walker(physical, spec, dtb, absent, keep=True), addresses, details=details)
    ask = absent is not None
    found = _natively(physical, rows, dtb, addresses, details=details, ask=ask)
    if found is None:
        found = _by_numpy(physical, rows, dtb, addresses, details=details, ask=ask)
    if absent is not None:
        _ask(absent, addresses, found[0])
    return found


def _natively(
    physical: Memory, rows: SpecRows, dtb: int, addresses: Addresses, *, details: bool, ask: bool
) -> tuple[Translated, npt.NDArray[np.bool_] | None] | None:
    """The walk in C; None where it cannot be done so."""
    found = accelerator.library()
    pieces = physical.pieces() if found is not None else None
    if found is None or pieces is None or not pieces.parts or not len(addresses):
        return None
    mode = mode_of(found, rows)
    if mode is None:
        return None
    out = Answers(len(addresses), details=details)
    other = walk(found, pieces, mode, dtb, addresses, out, ask=ask)
    more = (out.small(2), out.small(3)) if details else (None, None)
    return Translated(out.physical, out.small(0), out.small(1), *more), other


def _by_numpy(
    physical: Memory, rows: SpecRows, dtb: int, addresses: Addresses, *, details: bool, ask: bool
) -> tuple[Translated, npt.NDArray[np.bool_] | None]:
    out = Columns(len(addresses), details=details)
    if not len(addresses):
        return out.translated(), None
    canonical, good = rows.canonical(addresses)
    places = None if good is None else np.flatnonzero(good)
    batch = BatchWalk(physical, rows, dtb, details=details, ask=ask)
    batch.walk(canonical if places is None else canonical[places], out, places)
    return out.translated(), None if good is None else ~good


def _ask(absent: AbsentHook, addresses: Addresses, out: Translated) -> None:
    """Let the hook say where pages are whose entries no row of the mode matches."""
    for row in np.flatnonzero(out.kinds == ASK).tolist():
        address = int(addresses[row])
        _answer(out, row, absent(address, int(out.physical[row]), int(out.page_bits[row])))


def _answer(out: Translated, row: int, answer: Translation | FaultKind) -> None:
    if not isinstance(answer, Translation):
        out.physical[row], out.page_bits[row], out.kinds[row] = 0, 0, answer
        return
    out.physical[row], out.page_bits[row], out.kinds[row] = answer.physical, answer.page_bits, 0
    if out.rights is not None and out.flags is not None:
        out.rights[row], out.flags[row] = answer.rights.value, answer.flags.value


def _one_by_one(
    walker: Walker, addresses: Addresses, *, details: bool
) -> tuple[Translated, npt.NDArray[np.bool_] | None]:
    """The scalar walk, for a mode that needs more than 64 bits."""
    out = _nothing(len(addresses), details=details)
    other = np.zeros(len(addresses), bool)
    for row, address in enumerate(addresses.tolist()):
        other[row] = walker.spec.canonical(address) is None
        if other[row]:
            continue
        try:
            found = walker.walk(address)
        except FaultError as error:
            out.kinds[row] = error.kind
            continue
        if found.physical < ADDRESS_SPACE:
            _answer(out, row, found)
    return out, other


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
    tree = _tree(physical, rows, dtb, buffer, ask, report)
    for extent in rows.spec.extents():
        low, last = max(start, extent.start), min(stop, extent.stop) - 1
        if low <= last:
            yield from clipped(tree.walk(extent, low, last), low, last)


def _tree(
    physical: Memory, rows: SpecRows, dtb: int, buffer: int, ask: bool, report: WalkReport
) -> TreeWalk | NativeTreeWalk:
    found = accelerator.library()
    pieces = physical.pieces() if found is not None else None
    if found is not None and pieces is not None and pieces.parts:
        mode = mode_of(found, rows)
        if mode is not None:
            return NativeTreeWalk(
                found, physical, pieces, rows, mode, dtb, buffer=buffer, ask=ask, report=report
            )
    return TreeWalk(physical, rows, dtb, buffer=buffer, ask=ask, report=report)
