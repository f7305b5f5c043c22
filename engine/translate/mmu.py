"""A paging mode as rows of data, and the walk of one address through any of them.

A mode has no functions: the scalar walk here, the vectorised one in `bulk` and the one in C read the same rows.
To add a mode: write its levels in a module of this package, top level first, cite manual and section in `source`,
name it in `modes`, and run the properties of `tests/engine/translate` on it, which find it there.

How an entry is read: zero is absent. Else the one row of its level that matches (`entry & mask == value`) says
what it is: a next table, a leaf, or an absent page with a reason. Where no row matches, the page is absent, and
the `absent` hook, if any, is asked (swapped pages, Windows' prototype entries: what only an OS layer understands).
Rights are grants, AND-ed over the levels; global, accessed and dirty come from the leaf alone.

What is not here: no cache but the walker's own of last tables, no protection keys, no check of reserved bits
beyond what a mode's rows state, no shadow stacks. Reading through a mapping needs none of its rights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import ClassVar

from engine.errors import FaultError, FaultKind, InvalidArgumentError
from engine.memory import Memory, fault
from engine.records import dataclass
from engine.types import ADDRESS_SPACE, Extent, PageFlags, Rights

Parts = tuple[tuple[int, int], ...]
"""(mask, shift): bits of an entry or a register, shifted left (negative: right); several are OR-ed."""
RightRow = tuple[Rights, int, int]
"""(right, mask, value): granted iff `entry & mask == value`; of several rows for one right one is enough."""
FlagRow = tuple[PageFlags, int, int]

ALL_RIGHTS = Rights.READ | Rights.WRITE | Rights.EXECUTE | Rights.USER | Rights.USER_EXECUTE
PREPARED_MOST = 64
"""Modes of which it is kept what walks need of them."""
LAST_TABLES = 1024
"""Last tables that a walker remembers; then it begins anew."""


@dataclass(frozen=True, slots=True)
class EntryKind:
    """One kind of page-table entry of a level: the row that such an entry matches, and how it is read."""

    name: str
    """For reports: `table`, `4K`, `2M`, `swap` …"""
    mask: int
    value: int
    page_bits: int | None = None
    """Log2 of the page that a leaf maps, which may exceed the level's own step (ARM's 64K page in a 4K table:
    sixteen equal entries); None: the entry leads to the next table."""
    address: Parts = ()
    """Where page or table begins: parts of the entry, after `invert`."""
    rights: tuple[RightRow, ...] = ()
    """What is not listed is denied by a leaf and granted by a table."""
    flags: tuple[FlagRow, ...] = ()
    """Of a leaf: global, accessed, dirty …; set iff a row matches."""
    invert: int = 0
    """Bits that are stored inverted (x86's PROT_NONE entries since L1TF)."""
    fault: FaultKind | None = None
    """Set: the page is absent for this reason, and `page_bits` and `address` say nothing."""

    def matches(self, entry: int) -> bool:
        """Whether `entry` is of this kind."""
        return entry & self.mask == self.value

    def base(self, entry: int) -> int:
        """Physical address of the page or table that `entry` names."""
        return take_parts(self.address, entry ^ self.invert)

    def grants(self, entry: int) -> Rights:
        """The rights that this entry lets pass."""
        listed, granted = Rights.NONE, Rights.NONE
        for right, mask, value in self.rights:
            listed |= right
            if entry & mask == value:
                granted |= right
        return granted if self.page_bits is not None else granted | (ALL_RIGHTS & ~listed)

    def flags_of(self, entry: int) -> PageFlags:
        """The flags of a leaf."""
        found = PageFlags.NONE
        for flag, mask, value in self.flags:
            if entry & mask == value:
                found |= flag
        return found


@dataclass(frozen=True, slots=True)
class Level:
    """One level of tables: an entry covers 2^`shift` bytes, a table has 2^`bits` entries."""

    shift: int
    bits: int
    kinds: tuple[EntryKind, ...]


@dataclass(frozen=True, slots=True)
class MmuSpec:
    """A paging mode: levels from the top to the leaves, and which addresses it translates."""

    name: str
    source: str
    """Manual and section."""
    entry_size: int
    levels: tuple[Level, ...]
    low_bits: int
    """Addresses [0, 2^low_bits) are translated; 0: none of the low half."""
    high_bits: int = 0
    """Addresses [2^address_bits - 2^high_bits, 2^address_bits) are translated; 0: none."""
    address_bits: int = 64
    ignored_bits: int = 0
    """Bits of an address that carry a tag (ARM's top byte): read as the half's own."""
    elsewhere: Extent | None = None
    """What another root translates of these, from one edge on (ARM's TTBCR cuts 4 GiB into 1 and 3)."""
    root: Parts = ((0x000F_FFFF_FFFF_F000, 0),)
    """Where in the register (CR3, TTBR, satp) the DTB stands; what is not in it (PCID, ASID, mode) is dropped."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def page_bits(self) -> int:
        """Log2 of the smallest step."""
        return self.levels[-1].shift

    @property
    def entry_mask(self) -> int:
        """All bits of an entry."""
        return (1 << 8 * self.entry_size) - 1

    def dtb(self, register: int) -> int:
        """The physical address of the top table that a value of the register names."""
        return take_parts(self.root, register)

    def extents(self) -> tuple[Extent, ...]:
        """The ranges of addresses that this mode translates, ascending."""
        top = 1 << self.address_bits
        low = [Extent(0, 1 << self.low_bits)] if self.low_bits else []
        high = [Extent(top - (1 << self.high_bits), 1 << self.high_bits)] if self.high_bits else []
        cut = self.elsewhere
        if cut is None:
            return tuple(low + high)
        parts = [(max(one.start, cut.stop), one.stop) for one in low + high if one.start >= cut.start]
        parts += [(one.start, min(one.stop, cut.start)) for one in low + high if one.start < cut.start]
        return tuple(Extent(start, stop - start) for start, stop in sorted(parts) if start < stop)

    def canonical(self, address: int) -> int | None:
        """The address without its tag, or None where this mode does not translate it."""
        if not 0 <= address < 1 << self.address_bits or (self.elsewhere and address in self.elsewhere):
            return None
        low = address & ~self.ignored_bits
        if self.low_bits and low < 1 << self.low_bits:
            return low
        high = address | self.ignored_bits
        if self.high_bits and high >= (1 << self.address_bits) - (1 << self.high_bits):
            return high
        return None

    def with_kinds(self, added: Mapping[int, tuple[EntryKind, ...]], name: str | None = None) -> MmuSpec:
        """The mode with more rows: level → kinds. An OS layer's own (PROT_NONE, swap, transition).

        Raises InvalidArgumentError where a row overlaps one that is there.
        """
        levels = tuple(replace(level, kinds=level.kinds + added.get(i, ())) for i, level in enumerate(self.levels))
        return replace(self, levels=levels, name=name or self.name)

    def without_bits(self, bits: int, name: str | None = None) -> MmuSpec:
        """The mode with `bits` of entries and register taken for no part of an address.

        For memory encryption (AMD's C-bit, NUMBER(sme_mask) of a Linux kernel; AMD64 manual vol. 2, 7.10).
        """

        def cut(parts: Parts) -> Parts:
            return tuple((mask & ~bits, shift) for mask, shift in parts)

        levels = tuple(
            replace(level, kinds=tuple(replace(kind, address=cut(kind.address)) for kind in level.kinds))
            for level in self.levels
        )
        return replace(self, levels=levels, root=cut(self.root), name=name or self.name)


def take_parts(parts: Parts, value: int) -> int:
    """The bits of `value` that `parts` name, each moved to its place."""
    found = 0
    for mask, shift in parts:
        found |= (value & mask) << shift if shift >= 0 else (value & mask) >> -shift
    return found


def _check(spec: MmuSpec) -> None:
    """Raise InvalidArgumentError where the rows of a mode contradict one another."""

    def wrong(what: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"paging mode {spec.name}: {what}")

    if not spec.levels or spec.entry_size not in (1, 2, 4, 8, 16):
        raise wrong("no levels, or an entry size that is no power of two up to 16")
    for above, below in pairwise(spec.levels):
        if above.shift != below.shift + below.bits:
            raise wrong(f"the level above {below.shift} bits begins at {above.shift}")
    _check_ranges(spec, wrong)
    for number, level in enumerate(spec.levels):
        last = number == len(spec.levels) - 1
        for kind in level.kinds:
            if kind.value & ~kind.mask or (kind.mask | kind.invert) & ~spec.entry_mask:
                raise wrong(f"row {kind.name} of level {number} has bits outside of its mask or entry")
            if kind.fault is None and last and kind.page_bits is None:
                raise wrong(f"row {kind.name} leads from the last level to a table")
            if kind.page_bits is not None and kind.page_bits < level.shift:
                raise wrong(f"row {kind.name} maps less than an entry of its level covers")
        for one, two in combinations(level.kinds, 2):
            if not (one.value ^ two.value) & one.mask & two.mask:
                raise wrong(f"rows {one.name} and {two.name} of level {number} overlap")


def _check_ranges(spec: MmuSpec, wrong: Callable[[str], InvalidArgumentError]) -> None:
    """What `_check` says of the addresses that are translated."""
    top = spec.levels[0].shift + spec.levels[0].bits
    if not 0 < max(spec.low_bits, spec.high_bits) <= min(top, spec.address_bits):
        raise wrong(f"{top} bits are indexed, {spec.low_bits} low and {spec.high_bits} high ones translated")
    if spec.elsewhere:
        edges = {edge for one in replace(spec, elsewhere=None).extents() for edge in (one.start, one.stop)}
        if not edges & {spec.elsewhere.start, spec.elsewhere.stop} or not spec.extents():
            raise wrong("what another root translates lies at no edge, or is all")


@dataclass(frozen=True, slots=True)
class Translation:
    """Where one virtual address lies, and what its page-table entries say of the page."""

    address: int
    physical: int
    page_bits: int
    """Log2 of the page's size."""
    rights: Rights
    flags: PageFlags
    entry: int
    """The leaf entry as it stands in memory."""
    entry_address: int
    level: int
    """Of the leaf; 0 is the top."""

    @property
    def page_size(self) -> int:
        """Bytes of the page."""
        return 1 << self.page_bits


AbsentHook = Callable[[int, int, int], Translation | FaultKind]
"""(address, entry, level) → where the page is after all, or why it is not; asked for non-zero absent entries."""

_Row = tuple[int, int, int, int, int]
"""mask, value, address mask, mask of the bits inside the page (0: a table), log2 of the page: of a plain row."""
_Step = tuple[int, int, int, int, int, int, int, tuple[_Row, ...]]
"""A level for the quick walk: where an entry stands in its table (address >> shift & mask), its first plain row, the
others."""
_NO_ROW: _Row = (0, 1, 0, 0, 0)


def _plain(kind: EntryKind) -> _Row | None:
    """The row for the quick walk; None where reading it takes more than two masks, or 0 would match it."""
    if kind.fault is not None or kind.invert or len(kind.address) != 1 or kind.address[0][1] or not kind.value:
        return None
    bits = kind.page_bits or 0
    inside = (1 << bits) - 1
    return kind.mask, kind.value, kind.address[0][0] & ~inside, inside, bits


def _step(level: Level, entry_size: int) -> _Step:
    scale = entry_size.bit_length() - 1
    if level.shift < scale:
        return 0, 0, *_NO_ROW, ()
    first, *others = [row for row in map(_plain, level.kinds) if row] or [_NO_ROW]
    return level.shift - scale, ((1 << level.bits) - 1) << scale, *first, tuple(others)


_Moved = tuple[int, int, Parts, int, int]
"""mask, value, parts of the address, invert, log2 of the page or 0: of any row without a fault."""


def _moved(level: Level) -> tuple[int, int, tuple[_Moved, ...]]:
    """A level for the walk in between: shift, mask of the index, rows that say where a page or table lies."""
    kinds = (kind for kind in level.kinds if kind.fault is None)
    rows = tuple((kind.mask, kind.value, kind.address, kind.invert, kind.page_bits or 0) for kind in kinds)
    return level.shift, (1 << level.bits) - 1, rows


class _Prepared:
    """What a walk needs of a mode, made of its rows once: views for one operation make walkers by the thousand."""

    __slots__ = ("extents", "last", "moved", "ranges", "shift", "spec", "upper")
    _made: ClassVar[dict[int, _Prepared]] = {}
    """By the mode's id, which is nobody else's for as long as it stands here."""

    def __init__(self, spec: MmuSpec) -> None:
        self.spec = spec
        self.extents = spec.extents()
        first, last = self.extents[0], self.extents[-1]
        self.ranges = (0 if first.start else first.stop, last.start or last.stop, last.stop)
        *upper, self.last = (_step(level, spec.entry_size) for level in spec.levels)
        self.upper = tuple(upper)
        plain = all(_plain(kind) for level in spec.levels for kind in level.kinds if kind.fault is None)
        self.moved = () if plain else tuple(map(_moved, spec.levels))
        self.shift = spec.levels[-1].shift + spec.levels[-1].bits

    @classmethod
    def of(cls, spec: MmuSpec) -> _Prepared:
        """What was made for that mode."""
        found = cls._made.get(id(spec))
        if found is None:
            if len(cls._made) >= PREPARED_MOST:
                cls._made.clear()
            found = cls._made[id(spec)] = cls(spec)
        return found


class _NotPlainError(Exception):
    """The quick walk does not know; the other one does."""


class Walker:
    """Walks of one tree of page tables: (physical memory, mode, DTB).

    With `keep` the walker remembers last tables: right for immutable memory, and elsewhere for one operation only.
    Safe for concurrent readers.
    """

    __slots__ = ("_last", "_moved", "_ranges", "_read", "_shift", "_size", "_tables", "_upper", "absent", "dtb",
                 "extents", "keep", "physical", "spec")  # fmt: skip

    def __init__(
        self, physical: Memory, spec: MmuSpec, dtb: int, absent: AbsentHook | None = None, *, keep: bool = False
    ) -> None:
        self.physical = physical
        self.spec = spec
        self.dtb = dtb
        self.absent = absent
        self.keep = keep
        self._size = spec.entry_size
        self._read = {1: physical.u8, 2: physical.u16, 4: physical.u32, 8: physical.u64, 16: physical.u128}[self._size]
        made = _Prepared.of(spec)
        self.extents = made.extents
        """What it translates."""
        self._ranges, self._upper, self._last = made.ranges, made.upper, made.last
        self._moved, self._shift = made.moved, made.shift
        self._tables: dict[int, int] = {}

    def find(self, address: int) -> tuple[int, int]:
        """(physical address, log2 of the page) of `address`: `walk` without its record. Raises as `walk`."""
        low, high, top = self._ranges
        if 0 <= address < low or high <= address < top:
            try:
                table = self._tables.get(address >> self._shift)
                if table is None:
                    table, inside, bits = self._quick(address)
                    if bits:
                        return table | address & inside, bits
                shift, index, mask, value, address_mask, inside, bits, others = self._last
                entry = self._read(table + (address >> shift & index))
                if entry & mask == value:
                    return entry & address_mask | address & inside, bits
                for mask, value, address_mask, inside, bits in others:
                    if entry & mask == value:
                        return entry & address_mask | address & inside, bits
            except _NotPlainError:
                pass
            except FaultError:
                return self._by_walk(address)
            found = self._by_rows(address)
            if found is not None:
                return found
        return self._by_walk(address)

    def _by_rows(self, address: int) -> tuple[int, int] | None:
        """The walk over rows of any kind (addresses in several parts, inverted); None where it finds no page."""
        read, size, page = self._read, self._size, address >> self._shift
        known = self._tables.get(page)
        table, levels = (self.dtb, self._moved) if known is None else (known, self._moved[-1:])
        try:
            for level in levels:
                shift, index, rows = level
                if self.keep and known is None and level is levels[-1]:
                    self._remember(page, table)
                entry = read(table + (address >> shift & index) * size)
                for mask, value, parts, invert, bits in rows:  # noqa: B007  (as in `_quick`)
                    if entry & mask == value and entry:
                        break
                else:
                    return None
                table = take_parts(parts, entry ^ invert)
                if bits:
                    inside = (1 << bits) - 1
                    return table & ~inside | address & inside, bits
        except FaultError:
            pass
        return None

    def _by_walk(self, address: int) -> tuple[int, int]:
        """The walk that tells all, faults too."""
        translation = self.walk(address)
        return translation.physical, translation.page_bits

    def _quick(self, address: int) -> tuple[int, int, int]:
        """The walk over plain rows down to the last table: (where it is, 0, 0); of a page above it, the page.

        Raises _NotPlainError where a row is not plain, or none matches.
        """
        table, read = self.dtb, self._read
        for shift, index, mask, value, address_mask, inside, bits, others in self._upper:
            entry = read(table + (address >> shift & index))
            if entry & mask != value:
                for mask, value, address_mask, inside, bits in others:  # noqa: B007  (what was found is used behind the loop)
                    if entry & mask == value:
                        break
                else:
                    raise _NotPlainError
            table = entry & address_mask
            if inside:
                return table, inside, bits
        if self.keep:
            self._remember(address >> self._shift, table)
        return table, 0, 0

    def _remember(self, page: int, table: int) -> None:
        """Note the last table of the addresses that begin with these bits."""
        if len(self._tables) >= LAST_TABLES:
            self._tables.clear()
        self._tables[page] = table

    def walk(self, address: int) -> Translation:
        """Where `address` lies.

        Raises FaultError with the kind of its absence: ABSENT, PAGED_OUT, MIGRATING, TABLE where a table
        lies outside of physical memory, MALFORMED where an entry is none of this mode.
        """
        steps = list(self.path(address))
        level, entry_address, entry, kind = steps[-1]
        if kind is None or kind.fault is not None:
            return self._absent(address, entry, level, kind.fault if kind and kind.fault else FaultKind.ABSENT)
        rights = ALL_RIGHTS
        for _, _, above, table in steps:
            rights &= table.grants(above) if table else Rights.NONE
        assert kind.page_bits is not None  # of a path that ends without a fault the last kind is a leaf
        inside = (1 << kind.page_bits) - 1
        return Translation(
            address,
            kind.base(entry) & ~inside | address & inside,
            kind.page_bits,
            rights,
            kind.flags_of(entry),
            entry,
            entry_address,
            level,
        )

    def _absent(self, address: int, entry: int, level: int, why: FaultKind) -> Translation:
        """What the hook knows of an absent entry; a row that says why is not asked about."""
        if entry and self.absent is not None and why is FaultKind.ABSENT:
            answer = self.absent(address, entry, level)
            if isinstance(answer, Translation):
                return answer
            why = answer
        raise fault(address, why)

    def path(self, address: int) -> Iterator[tuple[int, int, int, EntryKind | None]]:
        """(level, entry address, entry, its kind or None) from the top down to the last entry of the walk.

        Raises FaultError where this mode does not translate the address, or (kind TABLE) a table cannot be read.
        """
        canonical = self.spec.canonical(address)
        if canonical is None:
            raise FaultError(address, detail=f"{self.spec.name} does not translate it")
        table = self.dtb
        for number, level in enumerate(self.spec.levels):
            index = canonical >> level.shift & (1 << level.bits) - 1
            entry_address = table + index * self._size
            try:
                entry = self._read(entry_address)
            except FaultError:
                detail = f"its page table's entry at {entry_address:#x} cannot be read"
                raise FaultError(address, FaultKind.TABLE, detail) from None
            kind = next((kind for kind in level.kinds if entry and kind.matches(entry)), None)
            yield number, entry_address, entry, kind
            if kind is None or kind.fault is not None or kind.page_bits is not None:
                return
            table = kind.base(entry)


Root = tuple[MmuSpec, int]
"""A mode and the physical address of its top table; an address space has one or two (TTBR0 and TTBR1)."""


def covered(roots: Sequence[Root]) -> int:
    """First address behind all that these trees translate, at most 2^64."""
    return min(ADDRESS_SPACE, max(extent.stop for spec, _ in roots for extent in spec.extents()))
