"""Where QEMU's machines put their RAM: physical address, length, offset in the RAM as one piece.

Sources, QEMU 7.2 and 9.x: hw/i386/pc_piix.c and pc_q35.c (lowmem, gigabyte_align, max-ram-below-4g), hw/i386/pc.c
(the hole below 1 TiB of AMD's processors), hw/i386/microvm.c, hw/arm/virt.c, hw/arm/sbsa-ref.c, hw/riscv/virt.c,
hw/loongarch/virt.c, hw/ppc/spapr.c, hw/s390x/s390-virtio-ccw.c.
"""

from __future__ import annotations

import re

from engine.connectors.qemu.command_line import CommandLine
from engine.connectors.qemu.words import size_of
from engine.memory_map import MapRange

GIB = 1 << 30
FOUR_GIB = 4 * GIB
AMD_HOLE = 0xFD_0000_0000
"""From here to 1 TiB AMD's IOMMU reserves addresses: RAM that would reach it may lie above (QEMU 7.1 on)."""
BASES = {
    ("aarch64", "virt"): GIB,
    ("arm", "virt"): GIB,
    ("aarch64", "sbsa-ref"): 1 << 40,
    ("riscv64", "virt"): 2 * GIB,
    ("riscv32", "virt"): 2 * GIB,
    ("riscv64", "spike"): 2 * GIB,
    ("riscv64", "sifive_u"): 2 * GIB,
    ("ppc64", "pseries"): 0,
    ("ppc64", "powernv"): 0,
    ("s390x", "s390-ccw-virtio"): 0,
    ("arm", "vexpress-a9"): 0x6000_0000,
    ("arm", "vexpress-a15"): 0x8000_0000,
    ("aarch64", "raspi3b"): 0,
    ("aarch64", "raspi4b"): 0,
    ("arm", "raspi2b"): 0,
}
"""Machines whose RAM is one piece: (architecture, machine) → its address."""
_X86 = ("x86_64", "i386")


def ram_layout(line: CommandLine, architecture: str | None, size: int) -> list[MapRange] | None:
    """The RAM of a machine of this type with `size` bytes; None where it is not known, or depends on what is not seen.

    `architecture` is the emulator's.
    """
    if architecture in _X86:
        below = _below_4_gib(line, size)
        if below is None or FOUR_GIB + max(0, size - below) > AMD_HOLE:
            return None
        return _split(size, below, FOUR_GIB)
    if architecture == "loongarch64" and line.family == "virt":
        return _split(size, 256 << 20, 0x9000_0000)
    base = BASES.get((architecture or "", line.family))
    return None if base is None else [MapRange(base, size, 0)]


def _below_4_gib(line: CommandLine, size: int) -> int | None:
    """How much RAM an x86 machine has below 4 GiB, at the most."""
    limit = size_of(line.machine_options.get("max-ram-below-4g"))
    if line.family == "microvm":
        return 3 * GIB
    if line.family == "q35":
        below = 2 * GIB if size >= 0xB000_0000 else 0xB000_0000
        return min(below, limit or FOUR_GIB)
    if line.family in ("pc", "isapc"):
        below = limit or 0xE000_0000
        return min(below, 3 * GIB) if size >= below and not _before_alignment(line.machine) else below
    return None


def _before_alignment(machine: str) -> bool:
    """Machines up to version 1.7 do not cut at whole GiB."""
    version = re.fullmatch(r"pc-i440fx-([0-9]+)\.([0-9]+)", machine)
    return version is not None and (int(version[1]), int(version[2])) <= (1, 7)


def _split(size: int, below: int, above: int) -> list[MapRange]:
    if size <= below:
        return [MapRange(0, size, 0)]
    return [MapRange(0, below, 0), MapRange(above, size - below, below)]
