"""Page tables for tests: built from (address, page, rights), and what was built is kept as the truth.

    builder = PageTableBuilder(mode("x86-64"))
    page = builder.map(0xFFFF_8000_0000_0000, 0x20_0000, "2M", rights=Rights.READ | Rights.EXECUTE)
    walker = Walker(builder.memory, builder.spec, builder.dtb)
    assert builder.find(page.address + 5) is page and walker.walk(page.address + 5).physical == 0x20_0005

The builder reads the rows of a mode against the grain of a walk: it looks for bits that say what is asked for. What
a mode leaves to software, or ignores, it fills with random bits, so that a walk which looks at them goes wrong.
A row that is wrong itself is wrong here too: entries written by hand after a manual must stand beside it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache

from engine.bytes_memory import BytesMemory
from engine.errors import InvalidArgumentError
from engine.memory import Memory
from engine.memory_map import MappedMemory, MemoryMap
from engine.records import dataclass
from engine.translate.mmu import ALL_RIGHTS, EntryKind, MmuSpec, Parts
from engine.types import PageFlags, Rights

TRIES = 64
"""Attempts of `populate` to find free room before it takes what it has."""


@dataclass(frozen=True, slots=True)
class MappedPage:
    """One page that was mapped: what every walk must say of its addresses."""

    address: int
    physical: int
    page_bits: int
    rights: Rights
    flags: PageFlags

    @property
    def size(self) -> int:
        """Bytes of the page."""
        return 1 << self.page_bits


@lru_cache
def _said(kind: EntryKind) -> dict[int, tuple[Rights, PageFlags]]:
    """Every entry of this kind, without an address → (rights, flags) that it states; of a table there are no flags."""
    bits = [1 << bit for bit in range(_stating(kind).bit_length()) if (_stating(kind) & ~kind.mask) >> bit & 1]
    found = {}
    for number in range(1 << len(bits)):
        entry = kind.value | sum(bit for place, bit in enumerate(bits) if number >> place & 1)
        rights = Rights.NONE if kind.page_bits is not None else ALL_RIGHTS
        for right in {right for right, _, _ in kind.rights}:
            given = any(entry & mask == value for other, mask, value in kind.rights if other is right)
            rights = rights | right if given else rights & ~right
        flags = PageFlags.NONE
        for flag, mask, value in kind.flags:
            flags |= flag if entry & mask == value else PageFlags.NONE
        found[entry] = rights, flags
    return found


@lru_cache
def _stating(kind: EntryKind) -> int:
    """The bits of an entry that say anything but where it leads."""
    bits = kind.mask
    for _, mask, _ in (*kind.rights, *kind.flags):
        bits |= mask
    return bits & ~(_stored(kind.address) & ~kind.mask)


@lru_cache
def _denying(kinds: tuple[EntryKind, ...], rights: Rights) -> tuple[int, EntryKind]:
    """The entry of a table that grants what comes next to `rights`."""
    every = [(entry, kind) for kind in kinds for entry in _said(kind)]
    return min(every, key=lambda row: (_said(row[1])[row[0]][0] ^ rights).value.bit_count())


def _stored(parts: Parts) -> int:
    """The bits of an entry in which an address stands."""
    bits = 0
    for mask, _ in parts:
        bits |= mask
    return bits


def _reach(parts: Parts) -> int:
    """The bits that an address may have."""
    bits = 0
    for mask, shift in parts:
        bits |= mask << shift if shift >= 0 else mask >> -shift
    return bits


def _scattered(parts: Parts, address: int) -> int:
    """The bits of an entry that name `address`."""
    entry = 0
    for mask, shift in parts:
        entry |= (address >> shift if shift >= 0 else address << -shift) & mask
    return entry


def _leads(kind: EntryKind) -> bool:
    return kind.page_bits is None and kind.fault is None


class PageTableBuilder:
    """A tree of page tables in memory of its own, and the record of all that was mapped."""

    def __init__(self, spec: MmuSpec, *, base: int = 0x1000, seed: int = 0, noise: bool = True) -> None:
        """Tables are laid out from the physical address `base` on; `noise`: random bits where none matter."""
        self.spec = spec
        self.base = base
        self.random = random.Random(seed)  # noqa: S311 - a test is to fail again with the same seed
        self.noise = noise
        self.data = bytearray()
        self.mappings: dict[int, MappedPage] = {}
        """By address."""
        self.raw: dict[tuple[int, int], int] = {}
        """Entries of `put`, by (level, first address that the entry covers)."""
        self._sizes: set[int] = set()
        self._top_bits = spec.levels[0].shift + spec.levels[0].bits
        self._tables: dict[tuple[int, int], tuple[int, Rights]] = {}
        self._taken: set[tuple[int, int]] = set()
        least = _reach(spec.root) & -_reach(spec.root)
        self.dtb = self.allocate(self._table_size(0), max(least, self._table_size(0)))

    def _table_size(self, number: int) -> int:
        return self.spec.entry_size << self.spec.levels[number].bits

    @property
    def memory(self) -> Memory:
        """Physical memory with the tables, as they are now; writing to it changes a copy."""
        source = BytesMemory(bytes(self.data))
        return MappedMemory(source, MemoryMap.whole(len(self.data), self.base)) if self.base else source

    @property
    def register(self) -> int:
        """A value of the register that names the top table, with noise in the bits that name nothing."""
        noise = self.random.getrandbits(64) if self.noise else 0
        return _scattered(self.spec.root, self.dtb) | noise & ~_stored(self.spec.root)

    def allocate(self, size: int, alignment: int) -> int:
        """Physical address of `size` fresh zeros."""
        address = -(-(self.base + len(self.data)) // alignment) * alignment
        self.data.extend(bytes(address - self.base - len(self.data) + size))
        return address

    def pages(self) -> list[tuple[int, EntryKind]]:
        """(level, kind) of every page that this mode knows."""
        levels = enumerate(self.spec.levels)
        return [(number, kind) for number, level in levels for kind in level.kinds
                if kind.page_bits is not None and kind.fault is None]  # fmt: skip

    def can_grant(self, name: str) -> set[tuple[Rights, PageFlags]]:
        """(rights, flags) that an entry of that name can express."""
        return set(_said(self._page(name)[1]).values())

    def _page(self, name: str | None) -> tuple[int, EntryKind]:
        found = [page for page in self.pages() if name in (None, page[1].name)]
        if not found:
            names = ", ".join(sorted({kind.name for _, kind in self.pages()}))
            raise InvalidArgumentError(f"{self.spec.name} has no page {name}, only {names}")
        return found[-1] if name else min(found, key=lambda page: page[1].page_bits or 0)

    def map(
        self,
        address: int,
        physical: int,
        name: str | None = None,
        *,
        rights: Rights | None = None,
        flags: PageFlags | None = None,
        tables: Rights = ALL_RIGHTS,
    ) -> MappedPage:
        """Map a page, by default the smallest, with exactly these rights and flags in its entry (None: any).

        Tables that are made on the way grant `tables`, as far as they can deny at all; the record has what is left.
        Raises InvalidArgumentError where the mode cannot express this, or the place is taken.
        """
        level, kind = self._page(name)
        assert kind.page_bits is not None
        size = 1 << kind.page_bits
        canonical = self.spec.canonical(address)
        if canonical is None or address % size or physical % size or physical & ~_reach(kind.address):
            raise InvalidArgumentError(f"{self.spec.name}: no {kind.name} page can map {address:#x} to {physical:#x}")
        fitting = [entry for entry, (right, flag) in _said(kind).items()
                   if (rights is None or right == rights) and (flags is None or flag == flags)]  # fmt: skip
        if not fitting:
            raise InvalidArgumentError(f"no {kind.name} page of {self.spec.name} has {rights} and {flags}")
        step = 1 << self.spec.levels[level].shift
        slots = [self._slot(level, canonical + offset) for offset in range(0, size, step)]
        if any(slot in self._taken for slot in slots):
            raise InvalidArgumentError(f"{address:#x} is mapped already")
        table, granted = self._descend(canonical, level, tables)
        entry = self.random.choice(fitting) if self.noise else fitting[0]
        said = _said(kind)[entry]
        for slot in slots:
            self._store(table, level, slot, entry | _scattered(kind.address, physical), kind)
        page = MappedPage(canonical, physical, kind.page_bits, granted & said[0], said[1])
        self.mappings[canonical] = page
        self._sizes.add(kind.page_bits)
        return page

    def put(self, address: int, level: int, entry: int, tables: Rights = ALL_RIGHTS) -> int:
        """Store any entry where `address` is translated on `level`; returns the entry's physical address.

        For swapped pages, garbage, tables that lead back. The record knows such entries as `raw` only.
        """
        canonical = self.spec.canonical(address)
        slot = None if canonical is None else self._slot(level, canonical)
        if canonical is None or slot is None or slot in self._taken or entry & ~self.spec.entry_mask:
            raise InvalidArgumentError(f"{self.spec.name}: {entry:#x} cannot stand at {address:#x}, level {level}")
        table, _ = self._descend(canonical, level, tables)
        self.raw[level, canonical >> self.spec.levels[level].shift << self.spec.levels[level].shift] = entry
        return self._store(table, level, slot, entry)

    def table_entry(self, level: int, table: int, rights: Rights = ALL_RIGHTS) -> int:
        """An entry of `level` that leads to the table at the physical address `table`, denying what it can."""
        kinds = tuple(filter(_leads, self.spec.levels[level].kinds))
        if not kinds or table & ~_reach(kinds[0].address):
            raise InvalidArgumentError(f"{self.spec.name}: no entry of level {level} leads to a table at {table:#x}")
        entry, kind = _denying(kinds, rights)
        return self._noisy(entry | _scattered(kind.address, table), kind)

    def find(self, address: int) -> MappedPage | None:
        """The page that `address` lies in, if it was mapped."""
        canonical = self.spec.canonical(address)
        if canonical is None:
            return None
        starts = (canonical >> bits << bits for bits in self._sizes)
        pages = (page for page in map(self.mappings.get, starts) if page and canonical < page.address + page.size)
        return next(pages, None)

    def record(self) -> list[MappedPage]:
        """All pages, in the order of their addresses."""
        return [self.mappings[address] for address in sorted(self.mappings)]

    def _slot(self, level: int, canonical: int) -> tuple[int, int]:
        return level, (canonical & (1 << self._top_bits) - 1) >> self.spec.levels[level].shift

    def _descend(self, canonical: int, level: int, rights: Rights) -> tuple[int, Rights]:
        """(table, rights that are left) of `level` for an address; makes the tables that are missing."""
        table, granted = self.dtb, ALL_RIGHTS
        for number in range(level):
            slot = self._slot(number, canonical)
            if slot in self._tables:
                table, allowed = self._tables[slot]
            elif slot in self._taken:
                raise InvalidArgumentError(f"{canonical:#x} is mapped already")
            else:
                size = self._table_size(number + 1)
                below = self.allocate(size, size)
                entry = self.table_entry(number, below, rights)
                allowed = self._granted(number, entry)
                self._store(table, number, slot, entry)
                self._tables[slot] = below, allowed
                table = below
            granted &= allowed
        return table, granted

    def _granted(self, level: int, entry: int) -> Rights:
        """What a table's entry lets pass, from the choices that it was made of."""
        kind = next(kind for kind in self.spec.levels[level].kinds if _leads(kind) and kind.matches(entry))
        return _said(kind)[entry & _stating(kind)][0]

    def _noisy(self, entry: int, kind: EntryKind) -> int:
        noise = self.random.getrandbits(8 * self.spec.entry_size) if self.noise else 0
        return (entry | noise & ~(_stating(kind) | _stored(kind.address))) ^ kind.invert

    def _store(self, table: int, level: int, slot: tuple[int, int], entry: int, kind: EntryKind | None = None) -> int:
        if kind is not None:
            entry = self._noisy(entry, kind)
        index = slot[1] & (1 << self.spec.levels[level].bits) - 1
        size = self.spec.entry_size
        place = table + index * size
        self.data[place - self.base : place - self.base + size] = entry.to_bytes(size, "little")
        self._taken.add(slot)
        return place

    # -- whole trees -------------------------------------------------------------------------------------------

    def populate(self, count: int) -> None:
        """Map up to `count` random pages: of all kinds, some side by side in both spaces, in a few neighbourhoods."""
        places = [self._anywhere() for _ in range(3)]
        for _ in range(count):
            for _ in range(TRIES):
                try:
                    self._random_page(places)
                except InvalidArgumentError:
                    continue
                break

    def _anywhere(self) -> int:
        extent = self.random.choice(self.spec.extents())
        edge = self.random.random()
        if edge < 0.1:
            return extent.start
        return extent.stop - 1 if edge < 0.2 else self.random.randrange(extent.start, extent.stop)

    def _random_page(self, places: list[int]) -> None:
        _, kind = self.random.choice(self.pages())
        size = 1 << (kind.page_bits or 0)
        last = next(reversed(self.mappings.values())) if self.mappings else None
        if last and last.size == size and self.random.random() < 0.5:
            address, physical = last.address + size, last.physical + size * self.random.randrange(2)
        else:
            near = self.random.choice(places) + self.random.randrange(-4, 5) * size
            address = near // size * size
            physical = self.random.getrandbits(8 * self.spec.entry_size) & _reach(kind.address) & ~(size - 1)
        denied = Rights(self.random.getrandbits(5)) if self.random.random() < 0.3 else Rights.NONE
        self.map(address, physical, kind.name, tables=ALL_RIGHTS & ~denied)

    def addresses(self, count: int) -> Iterator[int]:
        """Addresses that are worth a look: edges of pages, inside of them, beside them, anywhere; 0 to 2^n - 1."""
        top = (1 << self.spec.address_bits) - 1
        pages = self.record()
        for _ in range(count):
            if pages and self.random.random() < 0.8:
                page = self.random.choice(pages)
                offsets = (0, page.size - 1, page.size, -1, self.random.randrange(page.size))
                yield max(0, min(top, page.address + self.random.choice(offsets)))
            else:
                yield self.random.choice((0, top, self._anywhere(), self.random.randrange(top + 1)))
