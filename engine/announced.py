"""What other distributions announce: their entry points, asked for without importing what finds them where none is.

importlib.metadata takes 15 ms to import and to search, more than a whole look at most targets; on nearly every machine
all that comes of it is «none». So the files that it would read are looked through for our groups first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from engine.records import dataclass

_GROUP = b"[cloudfs."
"""How the section of each of our groups begins in entry_points.txt."""
_FOLDERS = (".dist-info", ".egg-info")


@dataclass(frozen=True, slots=True)
class Announced:
    """One entry point: its name, what it names, and the name and version of what brings it."""

    name: str
    value: str
    distribution: str


def announced(group: str) -> Iterator[Announced]:
    """The entry points of a group (`cloudfs.…`)."""
    if not any(map(_may_announce, sys.path)) and not _others_find():
        return
    from importlib.metadata import entry_points

    for entry in entry_points(group=group):
        brought_by = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
        yield Announced(entry.name, entry.value, brought_by)


def _may_announce(folder: str) -> bool:
    """Whether a distribution in a folder of sys.path, or an archive there, may have one of our entry points."""
    try:
        with os.scandir(folder or ".") as entries:
            for entry in entries:
                if entry.name.endswith(".egg") or (entry.name.endswith(_FOLDERS) and _mentions(entry.path)):
                    return True
    except NotADirectoryError:
        return True  # an archive, into which importlib.metadata can look
    except OSError:
        return False
    return False


def _mentions(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "entry_points.txt"), "rb") as file:
            return _GROUP in file.read()
    except OSError:
        return False


def _others_find() -> bool:
    """Whether somebody else than Python itself tells which distributions there are."""
    return any(
        hasattr(finder, "find_distributions") and getattr(finder, "__module__", "") != "_frozen_importlib_external"
        for finder in sys.meta_path
    )


__all__ = ["Announced", "announced"]
