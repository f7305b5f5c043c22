"""Memory that a machine has beside its RAM from the start (pc-dimm, nvdimm, virtio-mem), where no monitor tells of it.

What is plugged in while the guest runs stands on no command line: QEMU's monitor alone knows of it.

Sources, QEMU 7.2 and 9.x: hw/i386/pc.c (pc_get_device_memory_range) and hw/arm/virt.c (virt_set_memmap): it begins at
the first GiB behind RAM; hw/mem/memory-device.c (each at the first free address), hw/mem/nvdimm.c (its label).
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.connectors.qemu.command_line import CommandLine
from engine.connectors.qemu.ram import ALIGNMENT, Block, Run, candidates
from engine.memory_map import MapRange

GIB = 1 << 30
PAGE = 4096
_FIRST = {"pc": 4 * GIB, "q35": 4 * GIB, "virt": GIB}
"""The least address of a machine's memory devices."""
_KNOWN = (("x86_64", "pc"), ("x86_64", "q35"), ("i386", "pc"), ("i386", "q35"), ("aarch64", "virt"))


def plugged_ranges(
    line: CommandLine, architecture: str | None, found: Sequence[Run], layout: Sequence[MapRange], ram: Sequence[Block]
) -> list[MapRange] | None:
    """Where that memory lies, by addresses of QEMU; None where it cannot be told of all of it.

    `layout` is that of RAM, which is mapped at `ram`.
    """
    if (architecture, line.family) not in _KNOWN:
        return None if line.plugged else []
    first = max(_FIRST[line.family], layout[-1].stop)
    following = -(-first // GIB) * GIB
    ranges: list[MapRange] = []
    taken = list(ram)
    for device in line.plugged:
        free = [block for block in candidates(device.backend, found) if not any(_overlap(block, one) for one in taken)]
        if len(free) != 1:
            return None
        taken += free
        alignment = ALIGNMENT if device.backend.kind == "ram" or device.driver.startswith("virtio") else PAGE
        size = (free[0].size - device.label) // alignment * alignment
        base = device.address or _first_fit(following, size, alignment, ranges)
        if size <= 0 or base < following or any(base < one.stop and one.base < base + size for one in ranges):
            return None
        ranges.append(MapRange(base, size, free[0].start))
    return sorted(ranges)


def _overlap(one: Block, two: Block) -> bool:
    return one.start < two.stop and two.start < one.stop


def _first_fit(start: int, size: int, alignment: int, taken: Sequence[MapRange]) -> int:
    """The first aligned address from `start` on from which `size` bytes are free."""
    for entry in sorted(taken):
        if start < entry.stop and entry.base < start + size:
            start = -(-entry.stop // alignment) * alignment
    return start
