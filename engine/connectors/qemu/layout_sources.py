"""Which piece of a guest's physical memory lies where in its QEMU: asked of its monitor, else concluded.

The ways, in this order: what the options say (`map=`, `base=`, `size=`); QEMU's monitor, where one answers; virsh,
where libvirt holds the monitor; the machine's type and size, confirmed by what stands in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import field
from itertools import islice

from engine.connectors.qemu.asking import Human, ask
from engine.connectors.qemu.command_line import Backend
from engine.connectors.qemu.evidence import KERNEL, evidence, holds_kernel
from engine.connectors.qemu.finding import Guest
from engine.connectors.qemu.layouts import ram_layout
from engine.connectors.qemu.monitor import MonitorError
from engine.connectors.qemu.plugged import plugged_ranges
from engine.connectors.qemu.ram import Block, Run, assignments, expected, in_order_of_making, region_at
from engine.errors import EngineError, NotFoundError, UnusableTargetError
from engine.formats.qemu_monitor import View, host_address, memory_backends, memory_devices, ram_views
from engine.memory import Memory
from engine.memory_map import MapRange, MemoryMap
from engine.records import dataclass

FIRST_MIB = 1 << 20
NOT_SHOWN = "memory plugged in beside its RAM is not shown: QEMU's monitor would tell where it is"
LATER = "memory that is plugged in while it runs is not shown: QEMU's monitor would tell of it"
THREADS_OF_ALL = 3
"""A QEMU that has begun has so many: its main loop, that of RCU, and its processors'."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Physical memory in QEMU's address space: `real_base` of a range is an address there."""

    ranges: tuple[MapRange, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)


def by_monitor(guest: Guest, found: Sequence[Run]) -> Placed:
    """What QEMU itself tells. Raises UnsupportedError with the reasons where it cannot be asked.

    Raises UnusableTargetError where it waits with its start until somebody connects: whoever started it is to do that.
    """
    waiting = next((address for address in guest.line.monitors if address.waits), None)
    if waiting is not None and _has_not_begun(guest, found):
        raise UnusableTargetError(
            f"{guest} has no memory yet: its QEMU waits with its start until somebody connects to {waiting} (wait=on)"
        )
    return ask(guest, lambda human, source: _asked(guest.line.others, human, found, source))


def _has_not_begun(guest: Guest, found: Sequence[Run]) -> bool:
    """Whether QEMU has neither RAM nor processors: it makes its character devices first, and waits there (vl.c)."""
    if next(assignments(expected(guest.line), found), None) is not None:
        return False
    try:
        return len(list(islice(guest.process.threads(), THREADS_OF_ALL))) < THREADS_OF_ALL
    except EngineError:
        return False


def _asked(others: Collection[str], human: Human, found: Sequence[Run], source: str) -> Placed:
    """The flat view of physical memory, each block at the address at which QEMU has it. Raises MonitorError.

    `others` are memory backends that are no RAM.
    """
    backends = memory_backends(human("info memdev"))
    if not backends.isdisjoint(others):
        backends -= frozenset(others) - memory_devices(human("info memory-devices"))
    views = ram_views(human("info mtree -f"), backends)
    if not views:
        raise MonitorError(f"{source} shows no RAM")
    bases: dict[str, int] = {}
    for view in views:
        if view.block not in bases:
            bases[view.block] = _host_base(human, view, found, source)
    ranges = [MapRange(view.address, view.size, bases[view.block] + view.offset) for view in views]
    return Placed(_joined(whole_first_mib(ranges)), (f"the layout of its RAM is told by {source}",))


def whole_first_mib(ranges: Sequence[MapRange]) -> list[MapRange]:
    """The RAM of a PC with what lies under ROM or a graphics card in its first MiB: either may go at any moment."""
    first, above = ranges[0], list(_above(ranges, FIRST_MIB))
    below = [entry for entry in ranges if entry.base < FIRST_MIB]
    if first.base or not above or any(
        entry.real_base - entry.base != first.real_base for entry in (*below, above[0])
    ):  # fmt: skip
        return list(ranges)
    return [MapRange(0, FIRST_MIB, first.real_base), *above]


def _above(ranges: Sequence[MapRange], address: int) -> Iterator[MapRange]:
    """The parts of ranges from an address on."""
    for entry in ranges:
        cut = max(0, address - entry.base)
        if cut < entry.length:
            yield MapRange(entry.base + cut, entry.length - cut, entry.real_base + cut)


def _host_base(human: Human, view: View, found: Sequence[Run], source: str) -> int:
    told = host_address(human(f"gpa2hva {view.address:#x}"))
    if told is None or region_at(found, told) is None:
        raise MonitorError(f"{source} does not tell where {view.block} lies in QEMU's memory")
    return told - view.offset


def _joined(ranges: Sequence[MapRange]) -> tuple[MapRange, ...]:
    return MemoryMap(ranges).coalesced()


def by_options(guest: Guest, base: int | None, size: int | None, memory_map: MemoryMap | None) -> Placed | None:
    """What the options say alone; None where they do not say where RAM lies."""
    if base is None:
        return None
    if size is None:
        size = guest.line.size if memory_map is None else max(r.real_base + r.length for r in memory_map.ranges)
    ranges = _laid_out(guest, [Block(base, size)], memory_map, size)
    return Placed(tuple(ranges), ("where its RAM lies is told by base=",))


def by_machine(
    guest: Guest, found: Sequence[Run], memory_map: MemoryMap | None, view: Callable[[Sequence[MapRange]], Memory],
) -> Placed:
    """What the machine's type, the size of its RAM and QEMU's mappings tell.

    `view` gives the memory that such ranges would be, to be looked at. Raises UnusableTargetError that says what to
    pass where that is not enough.
    """
    wanted = expected(guest.line)
    size = sum(backend.size or 0 for backend in wanted)
    ways = list(assignments(wanted, found))
    if not ways:
        sizes = " + ".join(f"{(backend.size or 0) >> 20} MiB" for backend in wanted)
        raise UnusableTargetError(
            f"the RAM of {guest} is not found: no mapping of {sizes} is read and written but not executed; "
            "say where it lies: base=ADDRESS,size=BYTES"
            + (f"; its configuration file {guest.line.unread!r} cannot be read" if guest.line.unread else "")
        )
    proofs = [_Way(blocks, _laid_out(guest, blocks, memory_map, size), view) for blocks in ways]
    way = _chosen(guest, wanted, proofs)
    told = "map=" if memory_map is not None else f"concluded from its machine ({guest.line.machine or '?'}) and size"
    note = f"the layout of its RAM is {told}, confirmed by {way.proof or 'nothing in it'}"
    if memory_map is not None:
        return Placed(tuple(way.ranges), (note,))
    plugged = plugged_ranges(guest.line, guest.architecture, found, way.ranges, way.blocks)
    notes = [note]
    if plugged is None:
        notes.append(NOT_SHOWN)
    elif guest.line.most > size + sum(device.backend.size or 0 for device in guest.line.plugged):
        notes.append(LATER)
    return Placed((*way.ranges, *(plugged or ())), tuple(notes))


class _Way:
    """One way to say which mapping is which piece of RAM."""

    def __init__(
        self, blocks: Sequence[Block], ranges: list[MapRange], view: Callable[[Sequence[MapRange]], Memory]
    ) -> None:
        self.blocks = blocks
        self.ranges = ranges
        self.view = view
        self.proof = self._proof(evidence)

    def _proof(self, look: Callable[[Memory, list[MapRange]], str | None]) -> str | None:
        with contextlib.suppress(EngineError):
            return look(self.view(self.ranges), self.ranges)
        return None

    def look_for_kernel(self) -> None:
        """Go through all of it, which takes a second for some GiB."""
        self.proof = self._proof(holds_kernel)


def _chosen(guest: Guest, wanted: Sequence[Backend], ways: list[_Way]) -> _Way:
    """The only way, or the only one that memory confirms. Raises UnusableTargetError that names those there are.

    Nodes of one size in the wrong order may be confirmed too: then it is the order in which QEMU makes them.
    """
    if len(ways) == 1:
        return ways[0]
    if not any(way.proof for way in ways):
        for way in ways:
            way.look_for_kernel()
    proved = [way for way in ways if way.proof]
    if len(proved) > 1:
        proved = [way for way in proved if way.proof != KERNEL and in_order_of_making(wanted, way.blocks)]
    if len(proved) == 1:
        return proved[0]
    there = "; ".join(", ".join(map(str, way.blocks)) for way in ways[:8])
    raise UnusableTargetError(
        f"several mappings may be the RAM of {guest}: {there}; say which: base=ADDRESS,size=BYTES, or make QEMU's "
        "monitor reachable (-qmp unix:PATH,server=on,wait=off)"
    )


def _laid_out(guest: Guest, blocks: Sequence[Block], memory_map: MemoryMap | None, size: int) -> list[MapRange]:
    """RAM in one piece, as the machine or `map=` lays it out, at where its blocks lie.

    Raises UnusableTargetError where the layout is not known, NotFoundError where a range lies outside of RAM.
    """
    layout = memory_map.ranges if memory_map is not None else ram_layout(guest.line, guest.architecture, size)
    if layout is None:
        raise UnusableTargetError(
            f"where a machine of type {guest.line.machine or '?'} ({guest.architecture or 'architecture unknown'}) has "
            "its RAM is not known; say it: map=FILE, ranges with base (physical address), length and real_base "
            "(offset in its RAM)"
        )
    return [part for entry in layout for part in _parts(entry, blocks)]


def _parts(entry: MapRange, blocks: Sequence[Block]) -> list[MapRange]:
    """A range of RAM in one piece, cut at the blocks that it is made of."""
    found, begin = [], 0
    for block in blocks:
        low, high = max(entry.real_base, begin), min(entry.real_base + entry.length, begin + block.size)
        if low < high:
            found.append(MapRange(entry.base + low - entry.real_base, high - low, block.start + low - begin))
        begin += block.size
    if sum(part.length for part in found) != entry.length:
        raise NotFoundError(f"map=: the range at {entry.base:#x} lies outside of the {begin >> 20} MiB of RAM")
    return found
