"""What a machine's RAM says of itself: whether a mapping is the RAM of a PC, of a board with a device tree.

It decides between mappings of one size, and confirms a layout that the machine's type gave. A guest that runs has
overwritten some of it: that nothing is found proves nothing.

Sources: ACPI 6.5, 5.2.5 (RSDP: on 16 bytes in 0xe0000-0xfffff, 20 bytes that sum up to 0; tables sum up to 0 too);
SeaBIOS src/fw/paravirt.c (tables at the top of the RAM below 4 GiB); devicetree specification 0.4, chapter 5.
"""

from __future__ import annotations

import struct

import numpy as np

from engine.errors import FaultError
from engine.formats.vmcoreinfo import find_vmcoreinfo
from engine.memory import Memory
from engine.memory_map import MapRange

BIOS, BIOS_SIZE = 0xE_0000, 0x2_0000
TABLE_MOST = 1 << 20
TREE_MOST = 2 << 20
TREES_MOST = 64
_STEP = 1 << 20
_RSDP = b"RSD PTR "
_TREE = b"\xd0\x0d\xfe\xed"
_PAGE = 4096
_BEHIND = 128 << 20
"""QEMU puts a device tree at the start of RAM, or behind the initramfs, which stands in the middle of RAM or here
(hw/arm/boot.c)."""
_INITRAMFS_MOST = 256 << 20
KERNEL = "a Linux kernel in it"


def holds_kernel(memory: Memory, layout: list[MapRange]) -> str | None:
    """Whether a Linux kernel describes itself there: in any order of the pieces, but not in other memory."""
    del layout
    return KERNEL if find_vmcoreinfo(memory) else None


def evidence(memory: Memory, layout: list[MapRange]) -> str | None:
    """What confirms that `memory` is laid out so, as words for a person; None where nothing does."""
    if layout and layout[0].base == 0:
        return _of_pc(memory)
    return _of_board(memory, layout) if layout else None


def _of_pc(memory: Memory) -> str | None:
    bios = memory.read_padded(BIOS, BIOS_SIZE)
    at = bios.find(_RSDP)
    while at >= 0:
        if at % 16 == 0 and _root_table(memory, bios[at : at + 36]):
            return "its ACPI tables"
        at = bios.find(_RSDP, at + 1)
    if b"SeaBIOS" in bios[0x1_0000:]:
        return "its BIOS"
    return None


def _root_table(memory: Memory, pointer: bytes) -> bool:
    """Whether a root pointer leads to a root table."""
    if len(pointer) < 36 or sum(pointer[:20]) & 0xFF:
        return False
    places = [(b"RSDT", struct.unpack_from("<I", pointer, 16)[0])]
    if pointer[15] >= 2:
        places.append((b"XSDT", struct.unpack_from("<Q", pointer, 24)[0]))
    for name, address in places:
        try:
            head = memory.read(address, 8) if address else b""
            size = struct.unpack_from("<I", head, 4)[0] if head[:4] == name else 0
            if 36 <= size <= TABLE_MOST and not sum(memory.read(address, size)) & 0xFF:
                return True
        except FaultError:
            continue
    return False


def _of_board(memory: Memory, layout: list[MapRange]) -> str | None:
    """A device tree in RAM that names this very RAM."""
    first, last = layout[0], layout[-1]
    behind = first.base + min(_BEHIND, first.length // 2 // _PAGE * _PAGE)
    top = min(last.stop, first.base + (3 << 30))
    places = [first.base, *range(behind, min(behind + _INITRAMFS_MOST, first.stop), _PAGE)]
    places += range(max(first.base, (top - 64 * _STEP)) // _STEP * _STEP, top, _STEP)
    heads = np.zeros((len(places), 8), np.uint8)
    memory.gather(np.array(places, np.uint64), heads)
    for row in np.flatnonzero((heads[:, :4] == np.frombuffer(_TREE, np.uint8)).all(axis=1))[:TREES_MOST].tolist():
        try:
            size = struct.unpack(">I", heads[row, 4:].tobytes())[0]
            if 40 <= size <= TREE_MOST and _names(memory.read(places[row], size), first.base):
                return "its device tree"
        except FaultError:
            continue
    return None


def _names(tree: bytes, base: int) -> bool:
    """Whether the device tree has the node that says where RAM begins."""
    return f"memory@{base:x}".encode() + b"\0" in tree
