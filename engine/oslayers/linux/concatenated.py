"""Images in which the ranges of RAM follow one another without the holes, as LiME writes them in its format `raw`.

What is left out in front of a kernel moves it by any number of bytes, often not whole pages (a PC's first range stops
at 0x9fc00). So nothing is assumed: a kernel's names and its VMCOREINFO are found where they lie, and where they belong
follows from what VMCOREINFO says. That places one range; the nodes of `iomem_resource`, which all point to it, are
then found by that pointer wherever they lie, and tell all ranges.

Sources: Linux include/linux/ioport.h (struct resource), include/linux/utsname.h (struct uts_namespace: in releases
before 5.11 `name` stands behind a reference count); LiME's documentation of its formats.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from itertools import pairwise

from engine.errors import FaultError
from engine.formats.search import find_all
from engine.formats.vmcoreinfo import Vmcoreinfo, find_vmcoreinfo
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.oslayers.linux.claims import Lead
from engine.oslayers.linux.finding import Found, candidates, image_extent, kernel_memory, proves
from engine.oslayers.linux.resources import NAME_LIMIT, SYSTEM_RAM
from engine.types import Extent

PAGE = 4096
_NAME_LIMIT = 64
"""The names stand within so many bytes of init_uts_ns."""
_PLACE_LIMIT = 16
"""Places of names, and of texts, that are tried."""
_NODE_LIMIT = 4096


def concatenated(
    memory: Memory, claimed: Iterable[Lead], *, keep: bool, dtb: int | None = None
) -> Iterator[Found]:
    """The kernels of these leads that prove themselves where all in front of them is moved by what was left out."""
    for lead in claimed:
        for text, odd in _texts(memory, lead.release):
            for place in lead.names[:_PLACE_LIMIT]:
                found = next(_found(memory, text, odd, place.address, keep, dtb), None)
                if found is not None:
                    yield found


def _texts(memory: Memory, release: str) -> Iterator[tuple[Vmcoreinfo, int]]:
    """VMCOREINFO of a release, and by how many bytes the pages of the image are moved; it begins a page."""
    pattern = b"OSRELEASE=" + release.encode("ascii") + b"\n"
    tried = set()
    for address in find_all(memory, [pattern], alignment=4, limit=_PLACE_LIMIT):
        odd = address % PAGE
        if odd not in tried:
            tried.add(odd)
            rest = memory.window(address, min(PAGE * 2, memory.size - address))
            for text in find_vmcoreinfo(rest):
                yield text, odd


def _found(
    memory: Memory, text: Vmcoreinfo, odd: int, place: int, keep: bool, dtb: int | None
) -> Iterator[Found]:
    names, top = text.symbol("init_uts_ns"), text.symbol("swapper_pg_dir")
    if names is None or top is None:
        return
    for guess in candidates(text, 0):
        for behind in range(0, _NAME_LIMIT, 4):
            base = names + behind - (top - guess.dtb) - place
            if base <= 0 or (base + odd) % PAGE:
                continue
            physical = MappedMemory(memory, MemoryMap([MapRange(base, memory.size, 0)]))
            candidate = guess if dtb is None else guess.at(guess.spec.dtb(dtb))
            if proves(physical, candidate, text, given=dtb is not None):
                space = kernel_memory(physical, candidate, text, keep=keep)
                yield Found(candidate, text, physical, space, image_extent(space, text))


def ram_by_content(image: Memory, names: Memory, root: int, word: int) -> Iterator[list[Extent]]:
    """The ranges of RAM that nodes of the tree at `root` tell, found wherever they lie in the image.

    `names` is the kernel's memory, of which no more than its own image needs to be readable. One list for each width
    that physical addresses may have.
    """
    pattern = root.to_bytes(word, "little")
    for wide in (True, False) if word == 4 else (True,):
        shape = struct.Struct(f"<2{'Q' if wide else 'I'}{'6Q' if word == 8 else '6I'}")
        parent = shape.size - 3 * word
        found = set()
        for address in find_all(image, [pattern], alignment=4, limit=_NODE_LIMIT):
            node = _node(image, address - parent, shape)
            if node is not None and _is_ram(names, node[2]):
                found.add(Extent(node[0], node[1] + 1 - node[0]))
        ram = sorted(found)
        if ram and all(one.stop <= two.start for one, two in pairwise(ram)):
            yield ram


def _node(image: Memory, address: int, shape: struct.Struct) -> tuple[int, int, int] | None:
    """First and last address and the name of a resource; None where there can be none."""
    try:
        start, last, name = shape.unpack(image.read(address, shape.size))[:3] if address >= 0 else (1, 0, 0)
    except FaultError:
        return None
    return (start, last, name) if start <= last < (1 << 64) - 1 else None


def _is_ram(names: Memory, address: int) -> bool:
    try:
        return names.cstring(address, NAME_LIMIT).decode("latin-1") == SYSTEM_RAM[0]
    except FaultError:
        return False
