"""The kernel's own map of physical addresses: the tree of `iomem_resource`, as /proc/iomem prints it.

Source: Linux include/linux/ioport.h (struct resource: start, end, name, flags, desc, parent, sibling, child; the same
order in all releases), kernel/resource.c. `end` is the last address, not the one behind it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

from engine.errors import FaultError
from engine.memory import Memory
from engine.records import dataclass
from engine.types import ADDRESS_SPACE, Extent

RESOURCE_LIMIT = 1 << 16
DEPTH_LIMIT = 16
NAME_LIMIT = 128
SYSTEM_RAM = ("System RAM", "System RAM (boot alias)", "persistent memory")


@dataclass(frozen=True, slots=True)
class Resource:
    """One line of /proc/iomem."""

    start: int
    size: int
    name: str
    depth: int

    @property
    def stop(self) -> int:
        """First address behind it."""
        return self.start + self.size


def read_resources(memory: Memory, root: int, word: int, wide: bool) -> Iterator[Resource]:
    """The tree below the `struct resource` at `root`, depth first; `wide`: physical addresses have 64 bits.

    Ends where a record cannot be read, or is none: the caller sees whether it makes sense.
    """
    address = "Q" if wide else "I"
    shape = struct.Struct(f"<2{address}{'6Q' if word == 8 else '6I'}")
    budget = [RESOURCE_LIMIT]
    try:
        first = shape.unpack(memory.read(root, shape.size))[7]
    except FaultError:
        return
    yield from _siblings(memory, first, shape, 0, budget)


def _siblings(memory: Memory, at: int, shape: struct.Struct, depth: int, budget: list[int]) -> Iterator[Resource]:
    while at and budget[0] > 0 and depth < DEPTH_LIMIT:
        budget[0] -= 1
        try:
            start, last, name, _, _, _, sibling, child = shape.unpack(memory.read(at, shape.size))
            text = memory.cstring(name, NAME_LIMIT).decode("utf-8", "surrogateescape") if name else ""
        except FaultError:
            return
        if not start <= last < ADDRESS_SPACE:
            return
        yield Resource(start, last + 1 - start, text, depth)
        yield from _siblings(memory, child, shape, depth + 1, budget)
        at = sibling


def system_ram(memory: Memory, root: int, word: int) -> list[Extent]:
    """The ranges of RAM that the kernel has; empty where the tree cannot be read or makes no sense."""
    for wide in (True, False) if word == 4 else (True,):
        found = list(read_resources(memory, root, word, wide))
        tops = [one for one in found if one.depth == 0]
        in_order = all(one.stop <= two.start for one, two in pairwise(tops))
        ram = [Extent(one.start, one.size) for one in tops if one.name == SYSTEM_RAM[0]]
        if ram and in_order:
            return ram
    return []
