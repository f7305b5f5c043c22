"""The symbols of a kernel: by name, by address."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError, NotFoundError
from engine.formats.kallsyms.addresses import AddressMode, Candidate, candidates
from engine.formats.kallsyms.finding import Tables, find_tables, tokens_of
from engine.formats.kallsyms.names import expand
from engine.formats.name_column import NameColumn
from engine.memory import Memory

REQUIRED_SHARE = 0.75
"""Of the addresses known beforehand so many must come out: some in VMCOREINFO are values, and names repeat."""

ALIAS_LIMIT = 256
"""Names of one address that are looked at; kernels have a few dozen of some."""
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol: its name, nm's letter for its kind, its address."""

    name: str
    kind: str
    address: int


class Kallsyms:
    """The symbol table of a kernel, in the order of its addresses. Names repeat: a name has a list of addresses.

    Names stay bytes, addresses a column; nothing is made for a symbol before it is asked for.
    """

    def __init__(
        self, tables: Tables, block: bytes, begins: npt.NDArray[np.int32], read: Candidate, *, cleaned: bool = True
    ) -> None:
        """Symbols that begin at `begins` in the block, with addresses read in a way, the damaged ones left out."""
        self.tables = tables
        self.mode: AddressMode = read.mode
        self.word_size = read.word_size
        self.places = (read.address, read.base_address)
        """Where the addresses stand in the memory, and where their base does."""
        addresses = read.addresses[tables.starts.numbers]
        if cleaned and read.damaged:
            sound = read.sound()[tables.starts.numbers]
            addresses, begins = addresses[sound], begins[sound]
        self.addresses: npt.NDArray[np.uint64] = addresses
        """The address of every symbol, ascending."""
        self.skipped = tables.count - len(addresses)
        """Symbols that are left out, since their name or their address is damaged."""
        self._block = block
        self._begins = begins
        self._names = NameColumn(block, begins + np.int32(1))

    def __len__(self) -> int:
        return len(self.addresses)

    def __iter__(self) -> Iterator[Symbol]:
        return map(self.symbol, range(len(self)))

    def symbol(self, row: int) -> Symbol:
        """The symbol of a row. Raises IndexError where there is none."""
        address = int(self.addresses[row])
        return Symbol(self._names[row], chr(self._block[int(self._begins[row])]), address)

    def find(self, name: str) -> list[int]:
        """The addresses of all symbols with that name, ascending; empty where there is none."""
        rows = self._names.find(name.encode("utf-8", "surrogateescape"))
        found: list[int] = self.addresses[rows].tolist() if rows else []
        return found

    def first(self, *names: str) -> int | None:
        """The lowest address of the first of the names that exists; None where none does."""
        for name in names:
            found = self.find(name)
            if found:
                return found[0]
        return None

    def has(self, name: str, address: int) -> bool:
        """Whether a symbol of that name lies at that address: many times as fast as `find`."""
        if not 0 <= address < 1 << 64:
            return False
        wanted = name.encode("utf-8", "surrogateescape")
        low, high = (int(np.searchsorted(self.addresses, np.uint64(address), side)) for side in _SIDES)
        return any(self._names.bytes_at(row) == wanted for row in range(low, min(high, low + ALIAS_LIMIT)))

    def at(self, address: int) -> Symbol | None:
        """The symbol at or below an address, of several at one place the first; None where all lie above."""
        if not 0 <= address < 1 << 64:
            return None
        row = int(np.searchsorted(self.addresses, np.uint64(address), "right")) - 1
        if row < 0:
            return None
        return self.symbol(int(np.searchsorted(self.addresses, self.addresses[row], "left")))

    @property
    def written_out(self) -> tuple[bytes, npt.NDArray[np.int32]]:
        """All names in one block, NUL-terminated, and where each begins there, at its letter."""
        return self._block, self._begins

    @cached_property
    def has_data(self) -> bool:
        """Whether data symbols are there (KALLSYMS_ALL)."""
        return bool(self.find("init_task") and self.find("init_mm"))

    def agreement(self, references: Mapping[str, int]) -> tuple[int, int]:
        """How many of these names are there, and how many of those at the address given."""
        places = [(self.find(name), address) for name, address in references.items()]
        known = [(found, address) for found, address in places if found]
        return len(known), sum(address in found for found, address in known)


def load_kallsyms(
    memory: Memory,
    virtual_base: int = 0,
    *,
    references: Mapping[str, int] | None = None,
    word_size: int | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Kallsyms:
    """The symbols of the kernel whose image lies in [start, stop) of `memory`.

    `virtual_base` is the virtual address of the memory's address 0; without it kernels from 7.0 on give addresses
    relative to it. `references` are addresses known otherwise (VMCOREINFO): a way to read the addresses by which
    less than three quarters of them come out is wrong. Without them the way is chosen by its shape.
    Raises NotFoundError, saying what was tried, where there is no such table.
    """
    reasons: list[str] = []
    for tables in find_tables(memory, start, stop):
        try:
            block, begins = _names(memory, tables)
        except (BadDataError, FaultError) as error:
            reasons.append(f"tables at {tables.token_table:#x}: {error}")
            continue
        found = _choose(memory, tables, block, begins, virtual_base, word_size, references or {}, reasons)
        if found is not None:
            return found
    tried = "; ".join(reasons[:4]) if reasons else "no token table with names below it"
    raise NotFoundError(f"no kallsyms tables lie in this memory ({tried})")


def _names(memory: Memory, tables: Tables) -> tuple[bytes, npt.NDArray[np.int32]]:
    data = np.frombuffer(memory.read_padded(tables.names, tables.markers - tables.names), np.uint8)
    return expand(data, tables.starts, tokens_of(memory, tables))


def _choose(
    memory: Memory,
    tables: Tables,
    block: bytes,
    begins: npt.NDArray[np.int32],
    virtual_base: int,
    word_size: int | None,
    references: Mapping[str, int],
    reasons: list[str],
) -> Kallsyms | None:
    """The table with its addresses read in the way that agrees with the references, or looks best."""
    best: Candidate | None = None
    share = 0.0
    for way in candidates(memory, tables, virtual_base, word_size):
        known, equal = Kallsyms(tables, block, begins, way, cleaned=False).agreement(references)
        if known:
            share = max(share, equal / known)
            if equal >= REQUIRED_SHARE * known:
                return Kallsyms(tables, block, begins, way)
        elif best is None or way.rank < best.rank:
            best = way
    if best is None:
        why = f"at best {share:.0%} of the known addresses come out" if share else "no addresses that fit"
        reasons.append(f"tables at {tables.token_table:#x}: {tables.count} symbols, {why}")
        return None
    return Kallsyms(tables, block, begins, best)
