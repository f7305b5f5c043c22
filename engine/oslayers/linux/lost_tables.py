"""Finding a Linux kernel whose page tables lead to its image no more: those in between are damaged.

VMCOREINFO says at which distance the image lies. Without page tables that is believed where all of this holds:

1. the walk of `swapper_pg_dir` ends in a table that is damaged, not in a hole or in another place;
2. the same top table maps RAM linearly, and translations of it agree on how; or lists that begin in the image run
   through RAM so, and the number of levels is told;
3. at the distance that is told `init_uts_ns` holds the word Linux, and heads of empty lists name themselves.

Sources: as of `finding` and `linear_maps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from engine.errors import EngineError, FaultError, NotRecognisedError
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.memory import Memory
from engine.oslayers.linux.architectures import TOP, Candidate
from engine.oslayers.linux.finding import UTS_SEARCH, Found, candidates, image_extent, kernel_memory
from engine.oslayers.linux.linear_maps import Ram, holds_an_image, maps_so, proved_map
from engine.oslayers.linux.ram import layouts
from engine.oslayers.linux.table_repair import lost_table


def with_lost_tables(memory: Memory, texts: Iterable[Vmcoreinfo], *, keep: bool) -> Iterator[Found]:
    """The kernels that the texts describe, and of whose page tables some are damaged. None in memory that changes."""
    for text in texts if keep else ():
        found = next(_found(memory, text), None)
        if found is not None:
            yield found


def _found(memory: Memory, text: Vmcoreinfo) -> Iterator[Found]:
    names, top = text.symbol("init_uts_ns"), text.symbol("swapper_pg_dir")
    for physical, first in layouts(memory) if names is not None and top is not None else ():
        for guess in candidates(text, first):
            distance = ((top or 0) - guess.dtb) % TOP
            with suppress(EngineError):
                if _is_named(physical, (names or 0) - distance) and 0 <= guess.dtb < physical.size:
                    yield _proved(physical, guess, text, distance)


def _is_named(physical: Memory, place: int) -> bool:
    return 0 <= place < physical.size and b"Linux\0" in physical.read_padded(place, UTS_SEARCH)


def _is_told(guess: Candidate, text: Vmcoreinfo) -> bool:
    """Whether the text names the size of addresses of this mode, or of its architecture none."""
    top = guess.spec.levels[0]
    return text.number("VA_BITS") in (None, top.shift + top.bits)


def _proved(physical: Memory, guess: Candidate, text: Vmcoreinfo, distance: int) -> Found:
    """Raises NotRecognisedError, or FaultError, where it is none."""
    space = kernel_memory(physical, guess, text, keep=True, distance=distance)
    top = text.symbol("swapper_pg_dir") or 0
    if lost_table(space.by_tables, top) is None:
        raise NotRecognisedError("its page tables are not damaged: they lead elsewhere")
    image = image_extent(space, text)
    ram = Ram(physical)
    of_ram = proved_map(space.by_tables, ram, space.claims)
    if of_ram is None or not (maps_so(space.by_tables, ram, of_ram.distance) or _is_told(guess, text)):
        raise NotRecognisedError("nothing proves where RAM is mapped, or by how many levels of tables")
    if not holds_an_image(physical, space.claims):
        raise FaultError(top, detail="no kernel's image lies there")
    return Found(guess, text, physical, space, image)


__all__ = ["with_lost_tables"]
