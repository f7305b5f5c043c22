"""Types of a BTF blob of which pages are damaged: the others are found again, with the numbers that they had.

Where one type begins is known only from the one before, and its number is how many there were: one damaged page hides
all that follows. But types are easily told from anything else, so behind the damage the next one is found by its
shape; how many were lost shows in what the others refer to: with the right number members are as long as the room
that their structures have for them, and functions refer to their prototypes. What was lost stays without a name.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError
from engine.formats.btf.records import LAST_KIND, MODIFIERS, TYPE_WORDS, Kind, Words, kinds_of, parse_header, steps_of
from engine.records import dataclass

CHAIN = 6
"""A place begins types again if 2^6 follow one another from there on."""
WINDOW = 1 << 14
"""Words that are looked through at once for such a place."""
GAP_LIMIT = 64
GUESS_LIMIT = 20_000
"""Numbers of lost types that are tried in all: a page can hold 341 types, and takes some 20 ms."""
NEAR = 4000
"""Types on both sides of a gap whose references are looked at."""
EVIDENCE = 1200
REQUIRED, SHARE = 12, 0.8
"""So many references must tell, and so many of them agree, or the number of lost types stays unknown."""

_RESERVED = np.uint32(0x60FF0000)
_SIZED = np.isin(np.arange(32), (Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.FLOAT, Kind.ENUM64))
_MODIFIER = np.isin(np.arange(32), list(MODIFIERS))

Column = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Mended:
    """A blob in which every damaged type has become a nameless, incomplete one."""

    data: bytes
    starts: npt.NDArray[np.int32]
    lost: int
    """Types whose place in the blob is damaged; those behind the last that could be counted are left out besides."""


def mend(data: bytes, pointer_size: int = 8) -> Mended:
    """The types of a damaged blob. Raises BadDataError where it cannot be mended, else as `parse_header`."""
    header = parse_header(data[:24])
    start, size = header.types
    copy = bytearray(data)
    words: Words = np.frombuffer(data, header.order + "u4", size // 4, start).astype(np.uint32)
    runs = _runs(words, header.strings[1])
    if not runs:
        raise BadDataError(start, detail="there is nothing to be mended")
    starts = np.array(runs[0][0], np.int64)
    lost, budget = 0, GUESS_LIMIT
    for (_, stop), (behind, _) in pairwise(runs):
        rows = np.array(behind, np.int64)
        guesses = (int(rows[0]) - stop) // TYPE_WORDS
        budget -= guesses
        count = _missing(words, starts, rows, guesses, pointer_size) if budget >= 0 else None
        if count is None:
            break  # what follows has numbers that nobody knows
        # The first three words of the gap, whatever they were, stand for all that was in it.
        hole = np.array([0, Kind.FWD << 24, 0], header.order + "u4").tobytes()
        copy[start + 4 * stop : start + 4 * stop + len(hole)] = hole
        starts = np.concatenate((starts, np.full(count, stop, np.int64), rows))
        lost += count
    whole = lost == 0 and runs[-1][1] == len(words)
    return Mended(bytes(copy), starts.astype(np.int32), lost if lost or whole else 1)


def _runs(words: Words, strings: int) -> list[tuple[list[int], int]]:
    """Runs of sound types: where each begins, and the word behind the last."""
    total = len(words)
    info = np.append(words[1:], np.uint32(0))
    kinds = kinds_of(info)
    steps = steps_of(info)
    behind = np.arange(total, dtype=np.int64) + steps
    sound = (kinds > 0) & (kinds <= LAST_KIND) & (info & _RESERVED == 0) & (words < max(strings, 1)) & (behind <= total)
    ok, following = sound.tolist(), behind.tolist()
    runs: list[tuple[list[int], int]] = []
    at = 0
    while at < total:
        begins = []
        while at < total and ok[at]:
            begins.append(at)
            at = following[at]
        if begins:
            runs.append((begins, at))
        if at >= total:
            break
        found = _next_run(sound, behind, at + TYPE_WORDS, total)
        if found is None or len(runs) > GAP_LIMIT:
            break
        at = found
    return runs


def _next_run(sound: npt.NDArray[np.bool_], behind: Column, start: int, total: int) -> int | None:
    """The first word from `start` on at which a chain of types begins."""
    for low in range(start, total, WINDOW):
        at = np.arange(low, min(low + WINDOW, total))
        good = sound[at]
        for _ in range(1 << CHAIN):
            at = np.where(good, behind[np.minimum(at, total - 1)], at)
            ended = at >= total
            good = good & (ended | sound[np.minimum(at, total - 1)])
            at = np.minimum(at, total)
            if not good.any():
                break
        hits = np.flatnonzero(good)
        if len(hits):
            return low + int(hits[0])
    return None


def _missing(words: Words, before: Column, after: Column, guesses: int, pointer_size: int) -> int | None:
    """How many types were in a gap, of `guesses` at the most; None where that does not show."""
    first = len(before) + 1
    references, rooms = _references(words, np.concatenate((before[-NEAR:], after[:NEAR])), first)
    best, count = 0.0, None
    for guess in range(1, guesses + 1) if len(references) >= REQUIRED else ():
        told, agree = _agreement(words, before, after, guess, references, rooms, pointer_size)
        if told >= REQUIRED and agree / told > best:
            best, count = agree / told, guess
    return count if best >= SHARE else None


def _references(words: Words, starts: Column, first: int) -> tuple[Column, Column]:
    """What refers to types from number `first` on, and the bits that there are for it; of functions -1."""
    info = words[starts + 1]
    kinds = kinds_of(info)
    functions = words[starts[kinds == Kind.FUNC] + 2].astype(np.int64)
    found, rooms = [functions], [np.full(len(functions), -1, np.int64)]
    plain = starts[(kinds == Kind.STRUCT) & (info >> np.uint32(31) == 0)]
    for at in plain.tolist():
        count = int(words[at + 1]) & 0xFFFF
        rows = words[at + TYPE_WORDS : at + TYPE_WORDS + 3 * count].reshape(-1, 3).astype(np.int64)
        if len(rows) > 1:
            found.append(rows[:-1, 1])
            rooms.append(np.diff(rows[:, 2]))
    references, room = np.concatenate(found), np.concatenate(rooms)
    told = (references >= first) & ((room == -1) | (room > 0))
    references, room = references[told], room[told]
    step = max(1, len(references) // EVIDENCE)
    return references[::step], room[::step]


def _agreement(
    words: Words, before: Column, after: Column, count: int, references: Column, rooms: Column, pointer_size: int
) -> tuple[int, int]:
    """Of the references, if `count` types are lost: how many lead to a type that tells, and how many fit."""
    numbers = references
    base = len(before) + count
    kinds = np.zeros(len(numbers), np.int64)
    sizes = np.zeros(len(numbers), np.int64)
    known = np.ones(len(numbers), bool)
    for _ in range(6):
        row = numbers - 1
        later = row >= base
        known &= (row >= 0) & (row < base + len(after)) & (later | (row < len(before)))
        place = np.where(
            later, after[np.clip(row - base, 0, len(after) - 1)], before[np.clip(row, 0, len(before) - 1)]
        )  # fmt: skip
        kinds = kinds_of(words[place + 1]).astype(np.int64)
        sizes = words[place + 2].astype(np.int64)
        through = known & _MODIFIER[kinds] & (rooms >= 0)
        if not through.any():
            break
        numbers = np.where(through, sizes, numbers)
    # A reference that leads behind the last type cannot be right, one into the gap says nothing.
    beyond = numbers > base + len(after)
    function = rooms == -1
    sizes = np.where(kinds == Kind.PTR, pointer_size, sizes)
    sized = known & ~function & (_SIZED[kinds] | (kinds == Kind.PTR))
    fits = sized & (8 * sizes <= rooms) & (rooms - 8 * sizes < 64)
    no_data = known & ~function & np.isin(kinds, (Kind.FUNC, Kind.FUNC_PROTO, Kind.VAR, Kind.DATASEC, Kind.DECL_TAG))
    prototypes = known & function & (kinds == Kind.FUNC_PROTO)
    told = sized | no_data | (known & function) | beyond
    return int(told.sum()), int((fits | prototypes).sum())
