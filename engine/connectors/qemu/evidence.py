"""What a machine's RAM says of itself: whether a mapping is the RAM of a PC, of a board with a device tree.

It decides between mappings of one size, and confirms a layout that the machine's type gave. A guest that runs has
overwritten some of it: that nothing is found proves nothing.

Sources: ACPI 6.5, 5.2.5 (RSDP: on 16 bytes in 0xe0000-0xfffff, 20 bytes that sum up to 0; tables sum up to 0 too);
SeaBIOS src/fw/paravirt.c (tables at the top of the RAM below 4 GiB); devicetree specification 0.4, chapter 5.
"""

from __future__ import annotations

import struct

from engine.errors import FaultError
from engine.memory import Memory
from engine.memory_map import MapRange

BIOS, BIOS_SIZE = 0xE_0000, 0x2_0000
TABLE_MOST = 1 << 20
TREE_MOST = 2 << 20
_STEP = 1 << 20
_RSDP = b"RSD PTR "
_TREE = b"\xd0\x0d\xfe\xed"
_PLACES = (0, 128 << 20)
"""Where QEMU puts a device tree: at the start of RAM, or behind the kernel (hw/arm/boot.c)."""


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
    places = [first.base + offset for offset in _PLACES]
    top = min(last.stop, first.base + (3 << 30))
    places += range(max(first.base, (top - 64 * _STEP)) // _STEP * _STEP, top, _STEP)
    for place in places:
        try:
            head = memory.read(place, 8)
            size = struct.unpack(">I", head[4:])[0]
            if head[:4] == _TREE and 40 <= size <= TREE_MOST and _names(memory.read(place, size), first.base):
                return "its device tree"
        except FaultError:
            continue
    return None


def _names(tree: bytes, base: int) -> bool:
    """Whether the device tree has the node that says where RAM begins."""
    return f"memory@{base:x}".encode() + b"\0" in tree
