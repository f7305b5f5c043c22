"""What a directory lists: a snapshot of its children, cleaned of what cannot be a directory entry.

One bad entry never hides the rest. Knows nodes, nothing of FUSE.
"""

from __future__ import annotations

import stat as st
from collections.abc import Iterator, Sequence
from typing import Any

from cloudfs.node import Attributes, BrokenNodeError, Directory, Link, Node, check_name
from engine.errors import InvalidArgumentError
from engine.records import dataclass

MAX_CHILDREN = 1_000_000
"""Of one directory; a listing that goes on is one that does not end."""


@dataclass(slots=True)
class Snapshot:
    """The children of a directory at one moment."""

    children: list[tuple[bytes, Node]]
    skipped: int = 0
    error: Exception | None = None
    """What ended the listing before its time."""

    def take_error(self) -> Exception | None:
        """`error`, which is then None: whoever raised it would stand in its traceback, and it in him, in a cycle."""
        error, self.error = self.error, None
        return error


def snapshot(directory: Directory) -> Snapshot:
    """The children that can be listed: a bad name, a name given twice and a node that is none are left out.

    An error ends the listing, and what came before it counts.
    """
    found: dict[bytes, Any] = {}
    classes: set[type] = set()
    skipped = 0
    error: Exception | None = None
    try:
        children: Iterator[tuple[str, object]] = directory.children()
        for name, node in children:
            try:
                raw = check_name(name)
            except (InvalidArgumentError, UnicodeEncodeError, TypeError, AttributeError):
                skipped += 1
                continue
            if type(node) not in classes:  # isinstance of an ABC for each child would cost as much as the rest
                if not isinstance(node, Node):
                    skipped += 1
                    continue
                classes.add(type(node))
            if raw in found:
                skipped += 1
                continue
            found[raw] = node
            if len(found) > MAX_CHILDREN:
                raise BrokenNodeError(
                    f"{type(directory).__name__} {directory.identity!r} has more than {MAX_CHILDREN} children"
                )
    except Exception as raised:
        error = raised
    try:
        return Snapshot(list(found.items()), skipped, error)
    finally:
        del error  # its traceback holds this frame: together they would keep what was listed until the next collection


_DIRECTORY = Attributes(st.S_IFDIR)
_LINK = Attributes(st.S_IFLNK)
_FILE = Attributes(st.S_IFREG)


def only_type(node: Node) -> Attributes:
    """Attributes of a node of which nothing is known but what it is."""
    if isinstance(node, Directory):
        return _DIRECTORY
    return _LINK if isinstance(node, Link) else _FILE


def attributes_of(nodes: Sequence[Node]) -> list[Attributes | Exception]:
    """The attributes of each node, or the error that it raised."""
    return [_attributes_or_error(node) for node in nodes]  # no name for the list: errors hold this frame


def _attributes_or_error(node: Node) -> Attributes | Exception:
    try:
        return node.attributes()
    except Exception as error:
        return error
