"""The symbols of a kernel: by name, by address."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, FaultError, NotFoundError
from engine.formats.kallsyms.addresses import AddressMode, Candidate, candidates
from engine.formats.kallsyms.finding import Tables, find_tables, tokens_of
from engine.formats.kallsyms.names import expand
from engine.formats.symbol_table import SymbolTable
from engine.memory import Memory

REQUIRED_SHARE = 0.75
"""Of the addresses known beforehand so many must come out: some in VMCOREINFO are values, and names repeat."""


class Kallsyms(SymbolTable):
    """The symbol table that a kernel carries of itself."""

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
        super().__init__(addresses, block, begins)
        self.skipped = tables.count - len(addresses)
        """Symbols that are left out, since their name or their address is damaged."""


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
