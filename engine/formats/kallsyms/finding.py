r"""Finding the tables of kallsyms in a kernel's image by their shape alone (kernel/kallsyms.c, scripts/kallsyms.c).

Each step stands on the one before, and leaves one place where there could have been thousands:

    token_table     256 strings, of which the digits stand for themselves: "0\0" "1\0" … "9\0"
    token_index     256 u16 behind it: where each string begins
    markers         below it, 0 and then growing: where in `names` every 256th symbol begins
    num_syms, names below them: a number that fits the count of markers, then as many symbols as it says

Since Linux 6.4 the addresses stand behind token_index, before that in front of num_syms: that is no concern here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError
from engine.formats.kallsyms.names import STEP, Starts, symbol_starts, walk
from engine.formats.search import find_all
from engine.memory import Memory
from engine.records import dataclass

TOKENS = 256
SYMBOL_LIMIT = 1 << 22
"""Symbols of a kernel; the largest have half a million."""
LONGEST_STEP = STEP * 514
"""Bytes that 256 symbols can take: KSYM_NAME_LEN is 512 at the most."""

_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
_FIRST_DIGIT = ord("0")
_TABLE_LIMIT = 1 << 14
"""Bytes of the token table; kernels need one to three thousand."""
_MARKER_ROOM = (1 << 20, 8 << 20)
"""How far below the token table markers are looked for: at first, then."""
_HIT_LIMIT = 4096
_TABLE_COUNT_LIMIT = 32
"""Token tables below which others are looked for; a kernel has one, and leaves a few dead ones."""
_GUESS_LIMIT = 1024
"""Places tried for the number of symbols below one token table; the first is right but by chance."""
_SAMPLE = 16
"""Markers that are tried before all are."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tables:
    """Where the tables lie, as addresses of the memory they were found in."""

    order: str
    count: int
    """Symbols."""
    count_address: int
    """Where the 32-bit word lies that says so."""
    names: int
    markers: int
    marker_size: int
    """4; 8 on 64-bit kernels before Linux 4.20."""
    token_table: int
    token_index: int
    starts: Starts = field(compare=False, repr=False)
    """Where in `names` each symbol begins."""

    @property
    def behind(self) -> int:
        """The first address behind token_index."""
        return self.token_index + 2 * TOKENS


def find_tables(memory: Memory, start: int = 0, stop: int | None = None) -> Iterator[Tables]:
    """The sets of tables in [start, stop), ascending; dead copies of single tables are passed over."""
    hits = find_all(memory, [_DIGITS], start, stop, limit=_HIT_LIMIT)
    token_tables = (each for hit in hits for each in _token_tables(memory, hit))
    for order, table, index in itertools.islice(token_tables, _TABLE_COUNT_LIMIT):
        for room in _MARKER_ROOM:
            found = _tables_below(memory, order, table, index, max(start, table - room))
            if found is not None:
                yield found
                break


def tokens_of(memory: Memory, tables: Tables) -> list[bytes]:
    """The 256 tokens. Raises FaultError, or BadDataError where they are no longer as they were found."""
    size = tables.token_index - tables.token_table
    found = memory.read(tables.token_table, size).split(b"\0", TOKENS)
    if len(found) <= TOKENS:
        raise BadDataError(tables.token_table, detail="fewer than 256 tokens")
    return found[:TOKENS]


def _token_tables(memory: Memory, hit: int) -> Iterator[tuple[str, int, int]]:
    """Byte order, start of the token table and of its index, where the digits at `hit` belong to one."""
    low = max(0, hit - _TABLE_LIMIT)
    data = memory.read_padded(low, min(hit + _TABLE_LIMIT + 1024, memory.size) - low)
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == 0)
    first = int(np.searchsorted(ends, hit - low))
    behind = TOKENS - _FIRST_DIGIT
    if first + behind > len(ends):
        return
    stop = int(ends[first + behind - 1]) + 1
    digits = np.concatenate(([hit - low], ends[first : first + behind - 1] + 1))
    for at in range(stop + (stop + low & 1), stop + 16, 2):
        for order in "<>":
            if at + 2 * TOKENS > len(data):
                continue
            index = np.frombuffer(data, order + "u2", TOKENS, at).astype(np.int64)
            table = hit - low - int(index[_FIRST_DIGIT])
            if index[0] == 0 <= table and np.array_equal(index[_FIRST_DIGIT:] + table, digits):
                starts = np.concatenate(([table], ends[np.searchsorted(ends, table) :][: TOKENS - 1] + 1))
                if np.array_equal(starts, index + table):
                    yield order, low + table, low + at
                    return


def _tables_below(memory: Memory, order: str, table: int, index: int, low: int) -> Tables | None:
    """The tables that stand below a token table, their markers from `low` on; None where there are none."""
    low += -low % 8
    data = memory.read_padded(low, (table - low) // 8 * 8 + 4)
    tried = 0
    for marker_size in (4, 8):
        for at, run in _marker_runs(data, order, marker_size):
            for count_address, names, count, markers in _guesses(memory, order, low + at, run):
                tried += 1
                if tried > _GUESS_LIMIT:
                    return None
                starts = _fit(memory, names, low + at, count, markers)
                if starts is not None:
                    return Tables(order, count, count_address, names, low + at, marker_size, table, index, starts)
    return None


def _marker_runs(data: bytes, order: str, size: int) -> Iterator[tuple[int, Array]]:
    """Runs of words that begin with 0 and grow as markers do, the longest first: offset, values."""
    words = np.frombuffer(data, f"{order}u{size}", len(data) // size).astype(np.int64)
    steps = np.diff(words)
    grows = (steps >= 2 * STEP) & (steps <= LONGEST_STEP)
    heads = np.flatnonzero((words[:-1] == 0) & grows)
    breaks = np.append(np.flatnonzero(~grows), len(grows))
    lengths = breaks[np.searchsorted(breaks, heads)] - heads + 1
    for row in np.argsort(-lengths, kind="stable")[:64].tolist():
        head, length = int(heads[row]), int(lengths[row])
        if length >= 3:
            yield head * size, words[head : head + length]


def _guesses(memory: Memory, order: str, markers_at: int, run: Array) -> Iterator[tuple[int, int, int, Array]]:
    """Where the number of symbols may stand, where their names may begin, that number, and the markers it means."""
    for markers in (run, run[:-1], run[:-2]):  # by chance what follows may look like one more
        length = len(markers)
        stop = markers_at - int(markers[-1])
        low = max(0, (stop - LONGEST_STEP - 16) // 4 * 4)
        if length < 2 or stop <= low:
            continue
        words = np.frombuffer(memory.read_padded(low, (stop - low) // 4 * 4), order + "u4")
        fits = np.flatnonzero((words > STEP * (length - 1)) & (words <= min(STEP * length, SYMBOL_LIMIT)))
        for row in fits.tolist():
            for gap in (4, 8):
                yield low + 4 * row, low + 4 * row + gap, int(words[row]), markers


def _fit(memory: Memory, names: int, stop: int, count: int, markers: Array) -> Starts | None:
    """Where each symbol begins, if the names from an address on lead to the markers and end before the first."""
    size = stop - names
    if size <= int(markers[-1]) or size > int(markers[-1]) + LONGEST_STEP:
        return None
    if not any(_leads(memory, names, markers, lane) for lane in {0, (len(markers) - 1) // 2, len(markers) - 2}):
        return None
    data = np.frombuffer(memory.read_padded(names, size), np.uint8)
    some = np.arange(0, len(markers) - 1, max(1, len(markers) // _SAMPLE))
    ends = walk(data, markers[some].astype(np.int64), STEP)[1]
    if 2 * np.count_nonzero(ends == markers[some + 1]) < len(some):
        return None
    try:
        return symbol_starts(data, markers, count)
    except BadDataError:
        return None


def _leads(memory: Memory, names: int, markers: Array, lane: int) -> bool:
    """Whether 256 symbols lead from one marker to the next: cheap, for what is most often wrong."""
    at, stop = int(markers[lane]), int(markers[lane + 1])
    data = memory.read_padded(names + at, min(stop - at + 2, memory.size - names - at))
    place = 0
    for _ in range(STEP):
        if place + 1 >= len(data):
            return False
        length = data[place]
        place += 2 + ((length & 0x7F) | data[place + 1] << 7) if length & 0x80 else 1 + length
    return place == stop - at
