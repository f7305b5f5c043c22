"""A kernel's memory made by hand: types with members at places of our choice, and words put where we like."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from engine.bytes_memory import BytesMemory
from engine.layout import DataType, Field, StructLayout, TypeKind, TypeSource
from engine.memory import Memory
from engine.oslayers.linux.objects import Objects

BASE = 0xFFFF_8880_0000_0000
"""Where the kernel's half of these tests begins."""
SLOTS = 64


class Types(TypeSource):
    """Structures by name: member → (offset, size)."""

    def __init__(self, structures: dict[str, tuple[int, dict[str, tuple[int, int]]]], enums=None) -> None:
        self._structures = {
            name: StructLayout(name, size, [Field(member, offset, length, DataType(TypeKind.INTEGER, length))
                                            for member, (offset, length) in members.items()])
            for name, (size, members) in structures.items()
        }  # fmt: skip
        self._enums = enums or {}

    def struct(self, *names: str) -> StructLayout | None:
        return next((self._structures[name] for name in names if name in self._structures), None)

    def enum(self, name: str) -> dict[str, int] | None:
        return self._enums.get(name)


TYPES = Types(
    {
        "xarray": (16, {"xa_head": (8, 8)}),
        "xa_node": (8 + 8 * SLOTS, {"shift": (0, 1), "slots": (8, 8 * SLOTS)}),
        "address_space": (64, {"host": (0, 8), "i_pages": (8, 16)}),
        "inode": (64, {"i_size": (8, 8)}),
        "page": (64, {"flags": (0, 8)}),
        "folio": (64, {"flags": (0, 8), "mapping": (24, 8), "index": (32, 8), "private": (40, 8)}),
    },
    {"pageflags": {"PG_uptodate": 2, "PG_swapcache": 10}},
)


class Shifted(Memory):
    """Bytes that lie at BASE."""

    def __init__(self, data: bytearray) -> None:
        self._inner = BytesMemory(data)

    @property
    def size(self) -> int:
        return 1 << 64

    def readinto(self, address: int, buffer: memoryview) -> None:
        from engine.errors import FaultError

        try:
            self._inner.readinto(address - BASE, buffer)
        except FaultError as error:
            raise error.moved(BASE) from None


class Ground:
    """Memory to build in: `room` gives a place, `put` writes words."""

    def __init__(self, size: int = 1 << 22) -> None:
        self.data = bytearray(size)
        self._next = 0x1000
        self.skipped: Counter[str] = Counter()

    def room(self, size: int) -> int:
        """An aligned place that nobody else has."""
        at = self._next
        self._next += (size + 63) // 64 * 64
        return BASE + at

    def put(self, address: int, value: int, size: int = 8) -> None:
        start = address - BASE
        self.data[start : start + size] = value.to_bytes(size, "little")

    @property
    def objects(self) -> Objects:
        return Objects(Shifted(self.data), TYPES, BASE, self.skipped)

    def xarray(self, head: int, entries: dict[int, tuple[int, int]]) -> None:
        """An xarray at `head`: index → (entry, order), as lib/xarray.c would lay it out."""
        last = max((index + (1 << order) - 1 for index, (_, order) in entries.items()), default=0)
        shift = 0
        while last >> shift >= SLOTS:
            shift += 6
        self.put(head + 8, self._node(entries, 0, shift) | 2 if entries else 0)

    def _node(self, entries: dict[int, tuple[int, int]], base: int, shift: int) -> int:
        node = self.room(8 + 8 * SLOTS)
        self.put(node, shift, 1)
        for slot in range(SLOTS):
            low, high = base + (slot << shift), base + (slot + 1 << shift)
            inside = {index: found for index, found in entries.items() if low <= index < high}
            whole = next((found for index, found in inside.items() if index == low and found[1] >= shift), None)
            at = node + 8 + 8 * slot
            if whole is not None:
                entry, order = whole
                self.put(at, entry)
                for sibling in range(1, 1 << order - shift):
                    self.put(at + 8 * sibling, slot << 2 | 2)
            elif inside:
                self.put(at, self._node(inside, low, shift - 6) | 2)
        return node


def kernel_over(ground: Ground, physical: bytes, frames: int, *, live: bool = False):
    """What stands for a Kernel: one whose array of page structures begins at `frames`."""
    return SimpleNamespace(
        objects=lambda: ground.objects, live=live, types=TYPES, skipped=ground.skipped, check=lambda: None,
        is_check_due=lambda: False,
        found=SimpleNamespace(
            physical=BytesMemory(physical),
            vmcoreinfo=SimpleNamespace(symbol=lambda name: frames if name == "vmemmap" else None),
            candidate=SimpleNamespace(user=SimpleNamespace(page_bits=12)),
        ),
        profile=SimpleNamespace(symbol=lambda *names: None, known=lambda name: None),
        swap_areas=lambda objects: SimpleNamespace(place=lambda number, offset: f"in swap: {number} {offset}"),
    )  # fmt: skip
