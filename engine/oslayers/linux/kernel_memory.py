"""A kernel's memory as it names its own objects: through its page tables, mended where they are damaged.

Only what is mapped linearly can be mended (`table_repair`), once a read has met a fault there, and only in memory that
does not change: over live memory it is the page tables' word, and nothing else. What page tables really say, holes and
all, is `by_tables`: what is shown as the kernel's memory is that.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError
from engine.layout import TypeSource
from engine.memory import Addresses, Faults, Memory
from engine.oslayers.linux.linear_maps import Claims, LinearMap, Ram, Symbols, proved_map
from engine.records import dataclass
from engine.translate.mmu import Root
from engine.translate.virtual import BULK_PAGES, VirtualMemory

if TYPE_CHECKING:
    from engine.memory import Rows
    from engine.oslayers.linux.table_repair import Repair


FAULTS_LOOKED_AT = 64
"""Of many rows that faulted so many are asked about: where tables are damaged, most of them lie there."""


class KernelMemory(VirtualMemory):
    """A kernel's address space through its page tables, and what is known of its linear maps."""

    def __init__(self, physical: Memory, roots: Sequence[Root], claims: Claims, *, keep: bool = False) -> None:
        super().__init__(physical, roots, keep=keep)
        self.claims = claims

    @property
    def by_tables(self) -> VirtualMemory:
        """The same through its page tables alone."""
        return self

    @property
    def damaged_tables(self) -> int:
        """Page tables that were found damaged and are mended."""
        return 0

    def cached(self) -> KernelMemory:
        """See `Memory.cached`."""
        return self._shared(type(self)(self.physical.cached(), self.roots, self.claims, keep=True))

    def over(self, physical: Memory) -> KernelMemory:
        """The same kernel in another layout of RAM."""
        return type(self)(physical, self.roots, self.claims, keep=self.keep)

    def mend(self) -> None:
        """Mend the tables now; anew where that was done, since more is known by now. Nothing over live memory."""

    def learn(self, symbols: Symbols, types: TypeSource | None) -> None:
        """What more is known of the kernel; where tables were mended, they are anew."""
        self.claims.symbols, self.claims.types = symbols, types


@dataclass(slots=True)
class _Mended:
    """What came of mending."""

    maps: tuple[LinearMap, ...]
    repair: Repair
    memory: VirtualMemory | None
    """The address space through mended tables; None where all were sound."""


class MendedMemory(KernelMemory):
    """A kernel's address space in memory that does not change.

    It is read as every other; what faults, is read once more through mended tables, if there are any. From then on all
    is read through these at once.
    """

    def __init__(self, physical: Memory, roots: Sequence[Root], claims: Claims, *, keep: bool = True) -> None:
        super().__init__(physical, roots, claims, keep=keep)
        self._by_tables = VirtualMemory(physical, roots, keep=keep)
        self._mended: _Mended | None = None
        self._lock = threading.Lock()

    @property
    def by_tables(self) -> VirtualMemory:
        """See `KernelMemory.by_tables`."""
        return self._by_tables

    @property
    def damaged_tables(self) -> int:
        """See `KernelMemory.damaged_tables`."""
        return len(self._mended.repair.damaged) if self._mended is not None else 0

    def cached(self) -> KernelMemory:
        """See `Memory.cached`."""
        return self._as_mended(super().cached())

    def over(self, physical: Memory) -> KernelMemory:
        """See `KernelMemory.over`."""
        return self._as_mended(super().over(physical))

    def _as_mended(self, other: KernelMemory) -> KernelMemory:
        """Another view, mended if this one is: it might never meet a fault, where it is asked what there is to read."""
        if self.damaged_tables:
            other.mend()
        return other

    def mend(self) -> None:
        """See `KernelMemory.mend`."""
        with self._lock:
            self._mend()

    def learn(self, symbols: Symbols, types: TypeSource | None) -> None:
        """See `KernelMemory.learn`."""
        super().learn(symbols, types)
        if self._mended is not None:
            self.mend()

    def _mend(self) -> None:
        from engine.oslayers.linux.table_repair import PatchedTables, repaired  # rarely needed

        self._use(self._by_tables)
        ram = Ram(self.physical)
        found = proved_map(self._by_tables, ram, self.claims)
        maps = (*self.claims.image_maps(), *(() if found is None else (found,)))
        repair = repaired(self._by_tables, ram, maps)
        memory = None
        if repair.damaged:
            tables = PatchedTables(self.physical, repair.pages)
            memory = VirtualMemory(self.physical, self.roots, keep=True, tables=tables)
            self._use(memory)
        self._mended = _Mended(maps, repair, memory)

    def _use(self, space: VirtualMemory) -> None:
        """Read through the tables of another address space from now on."""
        self._tables, self._ranges, self._tower = space._tables, space._ranges, None

    def _other(self, *addresses: int) -> VirtualMemory:
        """The address space to read anew what faulted: the mended one, where it knows better of one of them."""
        start = self.claims.candidate.kernel_start
        if all(address < start for address in addresses):
            return self._by_tables
        with self._lock:
            if self._mended is None:
                self._mend()
        mended = self._mended
        if mended is None or mended.memory is None:
            return self._by_tables
        known = any(address in one.region for address in addresses for one in mended.maps)
        return mended.memory if known else self._by_tables

    # -- reading -----------------------------------------------------------------------------------------

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        try:
            if len(buffer) >= BULK_PAGES * self._step or self._constants is not None:
                super().readinto(address, buffer)
                return
            for offset, physical, step in self._pieces(address, len(buffer)):
                self.physical.readinto(physical, buffer[offset : offset + step])
        except FaultError:
            self._other(address, address + max(0, len(buffer) - 1)).readinto(address, buffer)

    def u8(self, address: int) -> int:
        """See `Memory.u8`."""
        try:
            return self.physical.u8(self._walker(address).find(address)[0])
        except FaultError:
            return self._other(address).u8(address)

    def u32(self, address: int) -> int:
        """See `Memory.u32`."""
        try:
            if address & self._step - 1 <= self._step - 4:
                return self.physical.u32(self._walker(address).find(address)[0])
        except FaultError:
            return self._other(address).u32(address)
        return Memory.u32(self, address)

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        try:
            if address & self._step - 1 <= self._step - 8:
                return self.physical.u64(self._walker(address).find(address)[0])
        except FaultError:
            return self._other(address).u64(address)
        return Memory.u64(self, address)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        faults = super().gather(addresses, out)
        other = self._other_of(faults) if faults else None
        return faults if other is None else other.gather(addresses, out)

    def virt_to_phys(self, address: int) -> int:
        """See `VirtualMemory.virt_to_phys`."""
        try:
            return self._walker(address).find(address)[0]
        except FaultError:
            return self._other(address).virt_to_phys(address)

    def virt_to_phys_many(self, addresses: npt.ArrayLike) -> tuple[Addresses, Faults]:
        """See `VirtualMemory.virt_to_phys_many`."""
        found, faults = super().virt_to_phys_many(addresses)
        other = self._other_of(faults) if faults else None
        return (found, faults) if other is None else other.virt_to_phys_many(addresses)

    def _other_of(self, faults: Faults) -> VirtualMemory | None:
        """`_other` for a column; None where what faulted stays so."""
        found = self._other(*np.unique(faults.addresses)[:: max(1, len(faults.rows) // FAULTS_LOOKED_AT)].tolist())
        return None if found is self._by_tables else found


__all__ = ["KernelMemory", "MendedMemory"]
