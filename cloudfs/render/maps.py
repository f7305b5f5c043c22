"""The format of /proc/PID/maps, byte for byte."""

from __future__ import annotations

from collections.abc import Iterable

from engine.types import Region

MAPS_PATH_COLUMN = 73
"""Where paths begin: seq_setwidth(m, 25 + sizeof(void *) * 6 - 1) of fs/proc/task_mmu.c, and one space (Linux 6.x)."""


def maps_line(region: Region) -> str:
    r"""One line of /proc/PID/maps as show_map_vma() of fs/proc/task_mmu.c prints it, with its newline.

    A newline in a path is `\012`, nothing else is escaped; a line without path ends in a space.
    """
    line = (
        f"{region.start:08x}-{region.stop:08x} {region.permissions} {region.offset:08x} "
        f"{region.device_text} {region.inode} "
    )
    path = region.shown_path
    if path:
        line = line.ljust(MAPS_PATH_COLUMN - 1) + " " + path.replace("\n", "\\012")
    return line + "\n"


def maps_text(regions: Iterable[Region]) -> str:
    """All of /proc/PID/maps. Encode it with os.fsencode: paths may hold any byte."""
    return "".join(map(maps_line, regions))
