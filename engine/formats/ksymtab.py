"""The symbols that a Linux kernel exports to its modules, found in its image: data among them, whatever kallsyms has.

    exports = load_ksymtab(memory, virtual_base)
    exports.find("init_task")              its addresses

A kernel without KALLSYMS_ALL tells no data symbols but those that it exports: init_task, iomem_resource, init_pid_ns …
An entry of __ksymtab names a symbol by a pointer, so one comparison over the image finds every entry of a name; around
the entries so found the table goes on as long as its pointers lead to names.

An entry is (value, name, namespace), before Linux 5.4 (value, name); each is a pointer, or, with
HAVE_ARCH_PREL32_RELOCATIONS, the s32 distance from its own place (include/linux/export-internal.h, kernel/module).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import BadDataError, NotFoundError
from engine.formats.name_column import NameColumn
from engine.formats.search import chunks, find_all
from engine.memory import Memory
from engine.records import dataclass
from engine.types import Extent

SEEDS = ("iomem_resource", "init_task", "jiffies", "kfree")
"""Exported by every kernel: the table is looked for around their entries."""
SHORTEST_TABLE = 32
"""Entries; kernels that have a table have thousands."""
NAMES_LIMIT = 4 << 20
"""Bytes over which the names of one table are spread; they stand in one section of half a megabyte."""

_NEAR = 4 << 20
"""Bytes around a name in which its entry is looked for at first."""
_SEED_LIMIT = 32
_POINTER_LIMIT = 256
"""Pointers to a name that are looked at; the first is an entry, if not a driver's table of names."""
_WINDOWS = (1 << 17, 1 << 20, 1 << 22)
"""Bytes looked at on both sides of an entry: more only where the table fills them."""
_NAME_LIMIT = 512
_HEAD = 8
_IN_NAMES = np.zeros(256, np.bool_)
_IN_NAMES[list(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.$")] = True

Column = npt.NDArray[Any]


class Form(enum.Enum):
    """How entries point."""

    PLACE = "prel32"
    """s32 distances from the place where they stand."""
    POINTER32 = "u32"
    POINTER64 = "u64"

    @property
    def size(self) -> int:
        """Bytes of one field."""
        return 8 if self is Form.POINTER64 else 4


@dataclass(frozen=True, slots=True)
class Export:
    """An exported symbol."""

    name: str
    address: int


@dataclass(frozen=True, slots=True)
class _Table:
    """A run of entries: where it begins, its form, fields of an entry, the addresses (in memory) of the names."""

    address: int
    form: Form
    fields: int
    order: str
    names: npt.NDArray[np.int64]

    @property
    def size(self) -> int:
        """Bytes of the table."""
        return len(self.names) * self.fields * self.form.size


class Ksymtab:
    """The exported symbols of a kernel, in the order of the table. Nothing is made for one before it is asked for."""

    def __init__(self, table: _Table, block: bytes, values: npt.NDArray[np.uint64]) -> None:
        self.table = table
        self.address = table.address
        """Where in the memory the table begins."""
        self.form = table.form
        self.fields = table.fields
        self.addresses = values
        """The address of every symbol."""
        self._names = NameColumn(block, table.names - int(table.names.min()))

    def __len__(self) -> int:
        return len(self.addresses)

    def __iter__(self) -> Iterator[Export]:
        for row, address in enumerate(self.addresses.tolist()):
            yield Export(self._names[row], address)

    def find(self, name: str) -> list[int]:
        """The addresses exported under that name: one, or none."""
        rows = self._names.find(name.encode("utf-8", "surrogateescape"))
        found: list[int] = self.addresses[rows].tolist() if rows else []
        return found

    def first(self, *names: str) -> int | None:
        """The address of the first of the names that is exported; None where none is."""
        for name in names:
            found = self.find(name)
            if found:
                return found[0]
        return None


def load_ksymtab(
    memory: Memory,
    virtual_base: int = 0,
    *,
    word_size: int | None = None,
    order: str | None = None,
    start: int = 0,
    stop: int | None = None,
) -> Ksymtab:
    """The exported symbols of the kernel whose image lies in [start, stop) of `memory`.

    `virtual_base` is the virtual address of the memory's address 0; tables of pointers are found only with it.
    Addresses have `word_size` bytes: 4 where that base is below 4 GiB and not 0, else 8, unless it is given. Without
    `order` (`<` or `>`) both byte orders are tried.
    Raises NotFoundError where there is no table (a kernel without modules has none).
    """
    word = word_size or (4 if 0 < virtual_base < 1 << 32 else 8)
    stop = memory.size if stop is None else min(stop, memory.size)
    orders = order or "<>"
    strings: list[int] = []
    for seed in SEEDS:  # the table stands right in front of its names
        targets = list(find_all(memory, [seed.encode() + b"\0"], start, stop, limit=_SEED_LIMIT))
        strings += targets
        for target in targets:
            near = max(start, target - _NEAR), min(stop, target + _NEAR)
            table = _best_table(memory, [target], virtual_base, orders, word, *near)
            if table is not None:
                return _loaded(memory, table, virtual_base, word)
    table = _best_table(memory, strings, virtual_base, orders, word, start, stop)
    if table is not None:
        return _loaded(memory, table, virtual_base, word)
    raise NotFoundError(
        f"no table of exported symbols lies in this memory ({len(strings)} strings end with {' or '.join(SEEDS)})"
    )


def _best_table(
    memory: Memory, targets: list[int], base: int, orders: str, word: int, start: int, stop: int
) -> _Table | None:
    """The longest table with an entry in [start, stop) that has one of the targets for a name."""
    best: _Table | None = None
    for order in orders:
        for count, (form, place) in enumerate(_pointers(memory, targets, base, order, word, start, stop)):
            if count == _POINTER_LIMIT:
                break
            if best is not None and best.form is form and 0 <= place - best.address < best.size:
                continue  # an entry of the table that is known already
            for fields in (3, 2):
                table = _table_around(memory, place, form, fields, order, base)
                if table is not None and (best is None or len(table.names) > len(best.names)):
                    best = table
        if best is not None:
            break
    return best


def _pointers(
    memory: Memory, targets: list[int], base: int, order: str, word: int, start: int, stop: int
) -> Iterator[tuple[Form, int]]:
    """Where something points to one of the targets, in one of the forms."""
    pointers = [(target + base) % (1 << 8 * word) for target in targets]
    for address, data, size, _ in chunks(memory, start, stop, _HEAD) if targets else ():
        first = -address % 4
        words = np.frombuffer(data, f"{order}u4", (size - first) // 4, first).astype(np.uint32, copy=False)
        places = np.arange(len(words), dtype=np.uint32) * np.uint32(4) + np.uint32((address + first) % (1 << 32))
        places += words  # where each word would lead as a distance from its place
        for target, pointer in zip(targets, pointers, strict=True):
            for row in np.flatnonzero(places == np.uint32(target % (1 << 32))).tolist():
                yield Form.PLACE, address + first + 4 * row
            for row in np.flatnonzero(words == np.uint32(pointer % (1 << 32))).tolist():
                at = address + first + 4 * row
                if word == 4:
                    yield Form.POINTER32, at
                    continue
                at -= 4 if order == ">" else 0
                whole = memory.read_padded(max(at, 0), 8) if at >= 0 else b""
                if int.from_bytes(whole, "little" if order == "<" else "big") == pointer:
                    yield Form.POINTER64, at


def _table_around(memory: Memory, place: int, form: Form, fields: int, order: str, base: int) -> _Table | None:
    """The table in which the field at `place` is a name; None where its neighbours are none."""
    stride = fields * form.size
    for window in _WINDOWS:
        before = min(window // stride, (place - form.size) // stride)
        after = min(window // stride, (memory.size - place) // stride)
        if before < 0 or before + after < SHORTEST_TABLE:
            return None  # too near to an end of the memory
        low = place - before * stride
        raw = memory.read_padded(low, (before + after) * stride)
        fields_read = np.frombuffer(raw, _dtype(form, order)).reshape(-1, fields)[:, 0]
        targets = _targets(fields_read, low + np.arange(before + after, dtype=np.int64) * stride, form, base)
        bad = np.flatnonzero(~_are_names(memory, targets, before))
        first = int(bad[bad < before].max(initial=-1)) + 1
        last = int(bad[bad > before].min(initial=before + after))
        if before in bad or last - first < SHORTEST_TABLE:
            return None
        if (first > 0 and last < before + after) or window == _WINDOWS[-1]:
            break
    return _Table(low + first * stride - form.size, form, fields, order, targets[first:last])


def _dtype(form: Form, order: str) -> str:
    return f"{order}i4" if form is Form.PLACE else f"{order}u{form.size}"


def _targets(values: Column, places: Column, form: Form, base: int) -> npt.NDArray[np.int64]:
    """Where in the memory fields lead; what leads outside of all is negative or too large."""
    if form is Form.PLACE:
        return values.astype(np.int64) + places
    return (values.astype(np.uint64) - np.uint64(base)).view(np.int64)


def _are_names(memory: Memory, targets: npt.NDArray[np.int64], place: int) -> npt.NDArray[np.bool_]:
    """Which of the addresses hold what begins as a name, as far as their first eight bytes tell.

    They must not be far from the one of row `place`: the names of a table stand together.
    """
    low = max(0, int(targets[place]) - NAMES_LIMIT // 2)
    block = np.frombuffer(memory.read_padded(low, max(_HEAD, min(NAMES_LIMIT, memory.size - low))), np.uint8)
    windows: npt.NDArray[Any] = np.ndarray((len(block) - _HEAD + 1,), f"V{_HEAD}", block.data, strides=(1,))
    inside = (targets >= low) & (targets < low + len(windows))
    rows = windows[np.where(inside, targets - low, 0)].view(np.uint8).reshape(-1, _HEAD)
    ended = np.logical_or.accumulate(rows == 0, axis=1)
    found: npt.NDArray[np.bool_] = inside & ~ended[:, 0] & (_IN_NAMES[rows] | ended).all(axis=1)
    return found


def _loaded(memory: Memory, table: _Table, base: int, word: int) -> Ksymtab:
    form, stride = table.form, table.fields * table.form.size
    low, high = int(table.names.min()), int(table.names.max())
    block = memory.read_padded(low, min(high - low + _NAME_LIMIT, memory.size - low)) + b"\0"
    raw = memory.read_padded(table.address, len(table.names) * stride)
    values = np.frombuffer(raw, _dtype(form, table.order)).reshape(-1, table.fields)[:, 0]
    if form is Form.PLACE:
        places = np.arange(len(values), dtype=np.uint64) * np.uint64(stride)
        places += np.uint64((table.address + base) % (1 << 64))
        found = values.astype(np.int64).view(np.uint64) + places
    else:
        found = values.astype(np.uint64)
    return Ksymtab(table, block, found & np.uint64((1 << 8 * word) - 1))


def kept_form(exports: Ksymtab) -> tuple[list[Extent], dict[str, Any], dict[str, Column]] | None:
    """What the symbols were made of (extents of the memory), facts and columns, to be kept: nothing that KASLR moves.

    None for a table of whole 64-bit addresses, of which each boot has others.
    """
    table = exports.table
    if table.form is Form.POINTER64:
        return None
    low, high = int(table.names.min()), int(table.names.max())
    facts = {"address": table.address, "form": table.form.value, "fields": table.fields, "order": table.order}
    return [Extent(table.address, table.size), Extent(low, high - low + 1)], facts, {"names": table.names}


def from_kept(
    memory: Memory, virtual_base: int, word: int, facts: Mapping[str, Any], columns: Mapping[str, Column]
) -> Ksymtab:
    """The symbols again, from memory that holds the very same table; `word` is the size of an address.

    Raises BadDataError where that cannot be.
    """
    names = columns["names"].astype(np.int64, copy=False)
    table = _Table(int(facts["address"]), Form(facts["form"]), int(facts["fields"]), str(facts["order"]), names)
    inside = len(names) and names.min() >= 0 and names.max() < memory.size and names.max() - names.min() <= NAMES_LIMIT
    if not inside or table.fields not in (2, 3) or not 0 <= table.address <= memory.size - table.size:
        raise BadDataError(table.address, detail="a kept table of exported symbols does not fit this memory")
    return _loaded(memory, table, virtual_base, word)


__all__ = ["Export", "Form", "Ksymtab", "from_kept", "kept_form", "load_ksymtab"]
