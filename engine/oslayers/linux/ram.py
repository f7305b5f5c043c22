"""How a machine's RAM may lie in an image: as it is addressed, or concatenated without the holes.

An image of `memory-backend-file`, of a hypervisor's `.vmem` or of LiME's raw format has no holes, and a machine's RAM
does not begin at 0 on ARM and RISC-V. The layouts here are guesses to be proved by a kernel's page tables; what the
kernel's own `iomem_resource` says replaces them (`by_resources`).

Sources: QEMU hw/i386/pc_piix.c and pc_q35.c (where RAM is split below 4 GiB), hw/arm/virt.c, hw/riscv/virt.c.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.errors import InvalidArgumentError
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.types import Extent

FOUR_GIB = 4 << 30
SPLITS = (0xC000_0000, 0xE000_0000, 0x8000_0000, 0xB000_0000)
"""How much RAM a PC may have below 4 GiB when it has more: QEMU's pc, its q35, others."""
BASES = (0x4000_0000, 0x8000_0000, 0x6000_0000, 0x2000_0000, 0x1000_0000, 0x1_0000_0000)
"""Where the RAM of boards with ARM or RISC-V begins."""
NOTED_RANGES = 6
BASE_STEP = 16 << 20
"""RAM begins at a multiple of this, though the first page that holds data may lie higher."""


def layouts(memory: Memory) -> Iterator[tuple[Memory, int]]:
    """(physical memory, where RAM begins): as it is, then as if it were an image without its hole, or its base."""
    first = next((extent.start for extent in memory.extents()), 0)
    yield memory, first & ~(BASE_STEP - 1)
    for split in SPLITS:
        if memory.size > split:
            yield split_layout(memory, split), 0
    for base in BASES:
        yield MappedMemory(memory, MemoryMap.whole(memory.size, base)), base


def place_in(layout: Memory, image: Memory, offset: int) -> int | None:
    """The physical address at which a layout of the image has what lies at `offset` of it; None where it has it not."""
    if layout is image or not isinstance(layout, MappedMemory):
        return offset
    for piece in layout.memory_map.coalesced():
        if piece.real_base <= offset < piece.real_base + piece.length:
            return piece.base + offset - piece.real_base
    return None


def layout_note(image: Memory, physical: Memory) -> str | None:
    """A sentence on where an image's RAM lies; None where it lies as it is addressed."""
    if physical is image or not isinstance(physical, MappedMemory):
        return None
    ranges = physical.memory_map.coalesced()
    places = ", ".join(f"{one.base:#x}-{one.stop:#x}" for one in ranges[:NOTED_RANGES])
    more = f" and {len(ranges) - NOTED_RANGES} more" if len(ranges) > NOTED_RANGES else ""
    return f"the image holds RAM without what lies between and before its ranges, which are at {places}{more}"


def split_layout(memory: Memory, split: int) -> Memory:
    """An image of a PC: what exceeds `split` lies at 4 GiB."""
    ranges = [MapRange(0, split, 0), MapRange(FOUR_GIB, memory.size - split, split)]
    return MappedMemory(memory, MemoryMap(ranges))


def by_resources(image: Memory, ram: Sequence[Extent]) -> MemoryMap | None:
    """How an image of this size holds the RAM that a kernel's `iomem_resource` lists; None where it holds it as it is.

    Either every range lies where it is addressed, or all are concatenated, exactly (LiME's raw format) or as blocks
    below and above the hole (an emulator's RAM file, which also holds what firmware keeps for itself).
    """
    if not ram or ram[-1].stop <= image.size:
        return None
    size = image.size
    if sum(extent.size for extent in ram) == size:
        offset, ranges = 0, []
        for extent in ram:
            ranges.append(MapRange(extent.start, extent.size, offset))
            offset += extent.size
        return _map(ranges)
    high = [extent for extent in ram if extent.start >= FOUR_GIB]
    low = [extent for extent in ram if extent.start < FOUR_GIB]
    if high and low and low[0].start < 16 << 20:
        above = high[-1].stop - FOUR_GIB
        below = size - above
        if low[-1].stop <= below <= FOUR_GIB:
            return _map([MapRange(0, below, 0), MapRange(FOUR_GIB, above, below)])
    if ram[-1].stop - ram[0].start <= size:
        return _map([MapRange(ram[0].start, size, 0)])
    return None


def _map(ranges: list[MapRange]) -> MemoryMap | None:
    try:
        return MemoryMap(ranges)
    except InvalidArgumentError:
        return None
