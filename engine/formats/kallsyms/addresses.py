"""The addresses of kallsyms: where they may lie, in which of four ways they may be written, and which way is right."""

from __future__ import annotations

import bisect
import enum
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError
from engine.formats.kallsyms.finding import Tables
from engine.memory import Memory
from engine.records import dataclass

Addresses = npt.NDArray[np.uint64]
DAMAGE_SHARE = 0.03
"""Of the addresses so many may lie below the one before: half of those on a page of junk do, or one on one of zeros."""
PAGE = 4096
_NEAR = 1 << 28
"""The lowest symbol lies at the relative base, or not far from it."""
_PER_CPU_AREA = 1 << 20
"""Symbols below are offsets into the per-CPU area, not addresses."""


class AddressMode(enum.Enum):
    """How a kernel writes the addresses of its symbols."""

    ABSOLUTE = "absolute"
    """A word each (before Linux 4.6, and where KALLSYMS_BASE_RELATIVE is off; 32-bit kernels from 7.0 on)."""
    RELATIVE = "relative"
    """A base + u32 each."""
    PER_CPU = "percpu"
    """s32 each: itself where it is not negative (per-CPU), else base - 1 - it (x86-64 up to 6.14)."""
    PLACE = "pcrel"
    """Its own address + s32 each; no base (64-bit kernels from 7.0 on)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to read the addresses of a table: where, how, with which base."""

    mode: AddressMode
    address: int
    word_size: int
    base: int
    addresses: Addresses
    damaged: bool
    """Whether some do not ascend with the others, or lie on wiped pages; `sound` tells which."""
    lost: npt.NDArray[np.bool_]
    base_address: int | None = None
    """Where the base stands; None where there is none."""

    @property
    def rank(self) -> tuple[bool, bool, bool]:
        """False where it looks as kernels do: sound, the lowest symbol begins a page, in the upper half."""
        lowest = self.base
        if self.mode in (AddressMode.ABSOLUTE, AddressMode.PLACE):
            row = int(np.searchsorted(self.addresses, np.uint64(_PER_CPU_AREA)))
            lowest = int(self.addresses[min(row, len(self.addresses) - 1)])
        upper = lowest >> (8 * self.word_size - 1) == 1
        return (self.damaged, lowest % 4096 != 0, not upper)

    def sound(self) -> npt.NDArray[np.bool_]:
        """Which of the addresses can be: of those on no wiped page the most that ascend together."""
        return _ascending(self.addresses, self.lost)


def candidates(memory: Memory, tables: Tables, virtual_base: int, word_size: int | None) -> Iterator[Candidate]:
    """The ways to read the addresses that give ascending ones, but for damage, the likelier places first.

    `virtual_base` is the virtual address of the memory's address 0. Without `word_size` both are tried, unless that
    address tells.
    """
    sizes = (8,) if virtual_base >> 32 else (8, 4)
    for word in sizes if word_size is None else (word_size,):
        for address, base_address in _places(tables, word):
            for mode in AddressMode:
                found = read_addresses(memory, tables, mode, address, base_address, word, virtual_base)
                if found is not None:
                    yield found


def _places(tables: Tables, word: int) -> Iterator[tuple[int, int | None]]:
    """Where the addresses may begin, and where their base may stand."""

    def up(size: int) -> int:
        return -(-size // word) * word

    behind = tables.behind
    for start in sorted({behind, up(behind)}):
        yield start, up(start + 4 * tables.count)
    stop = tables.count_address // word * word  # a big-endian 64-bit count has its low half behind
    yield stop - word - up(4 * tables.count), stop - word
    for size in sorted({up(4 * tables.count), word * tables.count}):
        yield stop - size, None


def read_addresses(
    memory: Memory, tables: Tables, mode: AddressMode, address: int, base_address: int | None, word: int, virtual: int
) -> Candidate | None:
    """The addresses at `address`, read in that way; None where they cannot be right."""
    relative = mode in (AddressMode.RELATIVE, AddressMode.PER_CPU)
    entry = word if mode is AddressMode.ABSOLUTE else 4
    if address < 0 or (relative and base_address is None):
        return None
    try:
        raw = memory.read_padded(address, entry * tables.count)
        base = _word(memory, base_address, tables.order, word) if relative and base_address is not None else 0
    except FaultError:
        return None
    signed = mode in (AddressMode.PER_CPU, AddressMode.PLACE)
    stored = np.frombuffer(raw, f"{tables.order}{'i' if signed else 'u'}{entry}")
    values = stored.astype(np.int64 if signed else np.uint64)
    if not _could_be(values, mode):
        return None
    addresses = _addresses(values, mode, base, address + virtual)
    if word == 4:
        addresses &= np.uint64(0xFFFFFFFF)
    descents = int(np.count_nonzero(addresses[1:] < addresses[:-1]))
    if descents > DAMAGE_SHARE * tables.count:
        return None
    lost = _lost_pages(raw, address, entry)
    return Candidate(mode, address, word, base, addresses, bool(descents or lost.any()), lost, base_address)


def _lost_pages(raw: bytes, address: int, entry: int) -> npt.NDArray[np.bool_]:
    """Which entries lie on a page of nothing but zeros: it could not be read, or was wiped."""
    lost = np.zeros(len(raw) // entry, np.bool_)
    at = 0
    while at < len(raw):
        stop = min(len(raw), at + PAGE - (address + at) % PAGE)
        if stop - at >= PAGE // 8 and not any(raw[at:stop]):
            lost[at // entry : -(-stop // entry)] = True
        at = stop
    return lost


def _ascending(addresses: Addresses, lost: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The most of the addresses, the lost ones left out, that ascend together."""
    tails: list[int] = []  # the least last address of an ascending choice of that length
    rows: list[int] = []
    before = [0] * len(addresses)
    for row, (address, gone) in enumerate(zip(addresses.tolist(), lost.tolist(), strict=True)):
        if gone:
            continue
        length = bisect.bisect_right(tails, address)
        before[row] = rows[length - 1] if length else -1
        if length == len(tails):
            tails.append(address)
            rows.append(row)
        else:
            tails[length] = address
            rows[length] = row
    found = np.zeros(len(addresses), np.bool_)
    row = rows[-1] if rows else -1
    while row >= 0:
        found[row] = True
        row = before[row]
    return found


def _could_be(values: npt.NDArray[Any], mode: AddressMode) -> bool:
    """Whether raw values can mean addresses: most differ from their neighbours, and are of the size they should be."""
    half = len(values) // 2
    if np.count_nonzero(values[1:] != values[:-1]) < half:
        return False
    if mode is AddressMode.RELATIVE:
        return int(np.count_nonzero(values < _NEAR)) > half
    if mode is AddressMode.ABSOLUTE:
        return int(np.count_nonzero(values >= _NEAR)) > half
    if mode is AddressMode.PER_CPU:
        return bool((values < 0).any())
    return bool((values[: max(1, half // 4)] < 0).any())  # the tables lie behind the text


def _addresses(values: npt.NDArray[Any], mode: AddressMode, base: int, virtual: int) -> Addresses:
    whole: Addresses = values.view(np.uint64)
    with np.errstate(over="ignore"):
        if mode is AddressMode.RELATIVE:
            return whole + np.uint64(base)
        if mode is AddressMode.PER_CPU:
            return np.where(values >= 0, whole, np.uint64((base - 1) % (1 << 64)) - whole)
        if mode is AddressMode.PLACE:
            places = np.arange(len(values), dtype=np.uint64) * np.uint64(4) + np.uint64(virtual % (1 << 64))
            return whole + places
    return whole


def _word(memory: Memory, address: int, order: str, size: int) -> int:
    return int.from_bytes(memory.read(address, size), "little" if order == "<" else "big")
