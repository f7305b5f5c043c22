"""Where virtual memory lies in physical memory: the lines of `phys_maps`, records of translations."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from typing import Any

from cloudfs.render.escaping import escape_terminal
from cloudfs.render.values import address_text
from engine.translate.mmu import Translation
from engine.types import ModuleInfo, PageFlags, PhysicalMap, Rights

Record = dict[str, Any]

_UNITS = ((30, "G"), (20, "M"), (10, "K"))


def page_size_text(size: int) -> str:
    """A page's size as people say it: 4K, 64K, 2M, 1G."""
    for shift, unit in _UNITS:
        if size >= 1 << shift and not size & (1 << shift) - 1:
            return f"{size >> shift}{unit}"
    return str(size)


def page_permissions(rights: Rights, flags: PageFlags) -> str:
    """Five characters: r, w, x (who may use the page: user, else kernel), u for user; g global, n inaccessible.

    `t` in the last place: a page in transition.
    """
    run = Rights.USER_EXECUTE if rights & Rights.USER else Rights.EXECUTE
    last = "n" if flags & PageFlags.INACCESSIBLE else "t" if flags & PageFlags.TRANSITION else ""
    return (
        ("r" if rights & Rights.READ else "-")
        + ("w" if rights & Rights.WRITE else "-")
        + ("x" if rights & run else "-")
        + ("u" if rights & Rights.USER else "-")
        + (last or ("g" if flags & PageFlags.GLOBAL else "-"))
    )


def flag_names(flags: PageFlags) -> list[str]:
    """The flags in lower case."""
    return [flag.name.lower() for flag in PageFlags if flag & flags and flag.name]


class ModuleNames:
    """Which module an address lies in, by the modules' bases and sizes."""

    def __init__(self, modules: Iterable[ModuleInfo]) -> None:
        known = sorted((m.base, m.size, m.name) for m in modules if m.base is not None and m.size)
        self._bases = [base for base, _, _ in known]
        self._known = known

    def at(self, address: int) -> str:
        """Its name, or nothing."""
        index = bisect.bisect_right(self._bases, address) - 1
        if index < 0:
            return ""
        base, size, name = self._known[index]
        return name if address < base + size else ""


def physical_maps_lines(maps: Iterable[PhysicalMap], modules: ModuleNames) -> Iterator[str]:
    """The lines of `phys_maps`: START-STOP perms PHYSICAL page-size module."""
    for one in maps:
        name = modules.at(one.start)
        yield (
            f"{one.start:016x}-{one.stop:016x} {page_permissions(one.rights, one.flags)} {one.physical:012x} "
            f"{page_size_text(one.page_size):>4}" + (f" {escape_terminal(name)}" if name else "") + "\n"
        )


def physical_map_record(one: PhysicalMap) -> Record:
    """One run of page frames."""
    return {
        "start": address_text(one.start),
        "stop": address_text(one.stop),
        "permissions": page_permissions(one.rights, one.flags),
        "physical": address_text(one.physical),
        "page_size": one.page_size,
    }


def translation_record(found: Translation) -> Record:
    """Where one address lies; `fault` is None."""
    return {
        "address": address_text(found.address),
        "physical": address_text(found.physical),
        "page_size": found.page_size,
        "permissions": page_permissions(found.rights, found.flags),
        "flags": flag_names(found.flags),
        "level": found.level,
        "entry": address_text(found.entry),
        "entry_address": address_text(found.entry_address),
        "fault": None,
    }


def untranslated_record(address: int, fault: str) -> Record:
    """An address that lies nowhere: the keys of `translation_record`."""
    record: Record = dict.fromkeys(
        ("address", "physical", "page_size", "permissions", "flags", "level", "entry", "entry_address", "fault")
    )
    return {**record, "address": address_text(address), "fault": fault}
