"""Which piece of a guest's physical memory lies where in its QEMU: asked of its monitor, else concluded.

The ways, in this order: what the options say (`map=`, `base=`, `size=`); QEMU's monitor, where one answers; virsh,
where libvirt holds the monitor; the machine's type and size, confirmed by what stands in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field

from engine.connectors.qemu.asking import Human, ask
from engine.connectors.qemu.evidence import evidence
from engine.connectors.qemu.finding import Guest
from engine.connectors.qemu.layouts import ram_layout
from engine.connectors.qemu.monitor import MonitorError
from engine.connectors.qemu.ram import Block, Run, assignments, expected, region_at
from engine.errors import EngineError, NotFoundError, UnusableTargetError
from engine.formats.qemu_monitor import View, host_address, memory_backends, ram_views
from engine.memory import Memory
from engine.memory_map import MapRange, MemoryMap
from engine.records import dataclass

FIRST_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Placed:
    """Physical memory in QEMU's address space: `real_base` of a range is an address there."""

    ranges: tuple[MapRange, ...]
    notes: tuple[str, ...] = field(default_factory=tuple)


def by_monitor(guest: Guest, found: Sequence[Run]) -> Placed:
    """What QEMU itself tells. Raises UnsupportedError with the reasons where it cannot be asked."""
    return ask(guest, lambda human, source: _asked(human, found, source))


def _asked(human: Human, found: Sequence[Run], source: str) -> Placed:
    """The flat view of physical memory, each block at the address at which QEMU has it. Raises MonitorError."""
    views = ram_views(human("info mtree -f"), memory_backends(human("info memdev")))
    if not views:
        raise MonitorError(f"{source} shows no RAM")
    bases: dict[str, int] = {}
    for view in views:
        if view.block not in bases:
            bases[view.block] = _host_base(human, view, found, source)
    ranges = [MapRange(view.address, view.size, bases[view.block] + view.offset) for view in views]
    return Placed(_joined(_whole_first_mib(ranges)), (f"the layout of its RAM is told by {source}",))


def _whole_first_mib(ranges: Sequence[MapRange]) -> list[MapRange]:
    """The RAM of a PC with what lies under ROM or a graphics card in its first MiB: either may go at any moment."""
    first = ranges[0]
    others = [entry for entry in ranges if entry.base >= FIRST_MIB]
    if first.base or not others or any(
        entry.real_base - entry.base != first.real_base for entry in ranges if entry.base < FIRST_MIB
    ) or others[0].real_base - others[0].base != first.real_base:  # fmt: skip
        return list(ranges)
    return [MapRange(0, FIRST_MIB, first.real_base), *_above(ranges, FIRST_MIB)]


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
        )
    laid_out = [(_laid_out(guest, blocks, memory_map, size), blocks) for blocks in ways]
    proofs = [(ranges, blocks, _proof(view, ranges)) for ranges, blocks in laid_out]
    proved = [one for one in proofs if one[2]]
    if len(proofs) > 1 and len(proved) != 1:
        there = "; ".join(", ".join(map(str, blocks)) for _, blocks, _ in proofs[:8])
        raise UnusableTargetError(
            f"several mappings may be the RAM of {guest}: {there}; say which: base=ADDRESS,size=BYTES, or make QEMU's "
            "monitor reachable (-qmp unix:PATH,server=on,wait=off)"
        )
    ranges, _, proof = (proved or proofs)[0]
    told = "map=" if memory_map is not None else f"concluded from its machine ({guest.line.machine or '?'}) and size"
    note = f"the layout of its RAM is {told}" + (f", confirmed by {proof}" if proof else ", confirmed by nothing in it")
    return Placed(tuple(ranges), (note,))


def _proof(view: Callable[[Sequence[MapRange]], Memory], ranges: Sequence[MapRange]) -> str | None:
    with contextlib.suppress(EngineError):
        return evidence(view(ranges), list(ranges))
    return None


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
