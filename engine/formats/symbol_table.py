"""Symbols by name and by address, whatever told them: kallsyms, an ELF file, System.map.

Names stay bytes, addresses a column; nothing is made for a symbol before it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from engine.formats.name_column import NameColumn
from engine.records import dataclass

ALIAS_LIMIT = 256
"""Names of one address that are looked at; kernels have a few dozen of some."""
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol: its name, nm's letter for its kind, its address."""

    name: str
    kind: str
    address: int


class SymbolTable:
    """Symbols in the order of their addresses. Names repeat: a name has a list of addresses."""

    def __init__(self, addresses: npt.NDArray[np.uint64], block: bytes, begins: npt.NDArray[np.int32]) -> None:
        """Addresses, ascending; at `begins` of the block nm's letter, then the name, then a NUL."""
        self.addresses = addresses
        """The address of every symbol, ascending."""
        self._block = block
        self._begins = begins
        self._names = NameColumn(block, begins + np.int32(1))

    @classmethod
    def of(cls, symbols: Iterable[tuple[int, bytes, bytes]]) -> SymbolTable:
        """The table of (address, letter, name), in any order."""
        rows = sorted(symbols, key=lambda row: row[0])
        texts = [letter[:1] + name for _, letter, name in rows]
        sizes = np.array([len(text) + 1 for text in texts], np.int64)
        begins = (np.cumsum(sizes) - sizes).astype(np.int32)
        addresses = np.array([row[0] for row in rows], np.uint64)
        return SymbolTable(addresses, b"\0".join(texts) + b"\0", begins)

    def moved(self, delta: int, start: int) -> SymbolTable:
        """The same where KASLR has moved what lies from `start` on; what lies below are values, not addresses."""
        first = int(np.searchsorted(self.addresses, np.uint64(start)))
        addresses = self.addresses.copy()
        addresses[first:] += np.uint64(delta % (1 << 64))
        return SymbolTable(addresses, self._block, self._begins)

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
