"""Finding BTF in a kernel's image: by its magic number, then by what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engine.errors import BadDataError, FaultError, NotFoundError, NotRecognisedError
from engine.formats.btf.mending import mend
from engine.formats.btf.records import HEADER_SIZE, Header, parse_header
from engine.formats.btf.types import Btf
from engine.formats.search import find_all
from engine.memory import Memory
from engine.records import dataclass

_MAGICS = (b"\x9f\xeb\x01\x00\x18\x00\x00\x00", b"\xeb\x9f\x01\x00\x00\x00\x00\x18")
CANDIDATE_LIMIT = 4096
"""Blobs looked at; a kernel has one, and one for each of some hundred modules."""
_TRIED_LIMIT = 64
MENDED_LIMIT = 2
"""Damaged blobs that are mended; modules' are too small to be a kernel's."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """What begins like BTF: where it lies, and its header."""

    address: int
    header: Header
    damaged: bool = False
    """Of what `load_btf` gave: whether its `check` raises."""
    lost: int = 0
    """Types that are gone with pages of it; the others have their numbers."""


def find_btf(memory: Memory, start: int = 0, stop: int | None = None, *, alignment: int = 4) -> Iterator[Candidate]:
    """What begins like BTF in [start, stop), ascending; stale copies and modules' BTF among them."""
    for address in find_all(memory, _MAGICS, start, stop, alignment=alignment, limit=CANDIDATE_LIMIT):
        try:
            header = parse_header(memory.read(address, HEADER_SIZE))
        except (FaultError, NotRecognisedError):
            continue
        if address + header.size <= memory.size:
            yield Candidate(address, header)


def load_btf(
    memory: Memory, start: int = 0, stop: int | None = None, *, member: str = "task_struct.comm"
) -> tuple[Btf, Candidate]:
    """The largest BTF in [start, stop) that is sound to its last byte and has `member` (`struct.path`).

    Where only damaged ones have it, the largest whose types can at least be told apart: its `check` raises; else one
    whose damaged pages can be passed over.
    Raises NotFoundError where none has it.
    """
    damaged: tuple[Btf, Candidate] | None = None
    reasons: list[str] = []
    broken: list[Candidate] = []
    for alignment in (4, 1):  # linkers ask for no alignment, yet all kernels seen have it
        begun = find_btf(memory, start, stop, alignment=alignment)
        found = [each for each in begun if alignment == 4 or each.address % 4]
        for candidate in sorted(found, key=lambda each: -each.header.size)[:_TRIED_LIMIT]:
            try:
                btf = Btf(memory.read_padded(candidate.address, candidate.header.size))
                if not _has(btf, member):
                    reasons.append(f"at {candidate.address:#x}: no {member}")
                    continue
                damaged = damaged or (btf, replace(candidate, damaged=True))
                btf.check()
            except BadDataError as error:
                reasons.append(f"at {candidate.address:#x}: {error}")
                broken.append(candidate)
                continue
            return btf, candidate
        if damaged is not None:
            return damaged
    for candidate in sorted(broken, key=lambda each: -each.header.size)[:MENDED_LIMIT]:
        try:
            mended = mend(memory.read_padded(candidate.address, candidate.header.size))
            btf = Btf(mended.data, starts=mended.starts)
        except BadDataError:
            continue
        if _has(btf, member):
            return btf, replace(candidate, damaged=True, lost=mended.lost)
    tried = "; ".join(reasons[:4]) if reasons else "nothing begins like it"
    raise NotFoundError(f"no BTF with {member} lies in this memory ({tried})")


def _has(btf: Btf, member: str) -> bool:
    name, _, path = member.partition(".")
    layout = btf.struct(name)
    return layout is not None and path in layout
