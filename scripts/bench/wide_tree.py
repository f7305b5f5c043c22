"""A mount of cloudfs with one large directory, for mount.py: nodes of our own under the public interface.

    python -P scripts/bench/wide_tree.py [--stock-loop] --entries COUNT MOUNTPOINT

`-P`: the directory of this file is none to import from. Nodes and attributes are made anew at every listing
and look-up, as the nodes of a live system are.
"""

from __future__ import annotations

import argparse
import stat
import sys
from collections.abc import Hashable, Iterator
from pathlib import Path

from cloudfs import shim
from cloudfs.node import Attributes, Directory, File, Node, OpenFile
from engine.errors import EngineError

PREFIX = "file-"


class Nothing(OpenFile):
    """An open file without bytes."""

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        """End of file."""
        return b""


class Entry(File):
    """An empty file."""

    __slots__ = ("_index",)

    def __init__(self, index: int) -> None:
        self._index = index

    @property
    def identity(self) -> Hashable:
        """Its number."""
        return "entry", self._index

    def attributes(self) -> Attributes:
        """Nothing in it; no two have the same time."""
        return Attributes(stat.S_IFREG | 0o444, mtime_ns=self._index)

    def open(self, flags: int) -> OpenFile:
        """See `File.open`."""
        return Nothing()


class Many(Directory):
    """The large directory."""

    __slots__ = ("_count",)

    def __init__(self, count: int) -> None:
        self._count = count

    @property
    def identity(self) -> Hashable:
        """There is one."""
        return "many"

    def children(self) -> Iterator[tuple[str, Node]]:
        """file-000000 and so on."""
        for index in range(self._count):
            yield f"{PREFIX}{index:06}", Entry(index)

    def child(self, name: str) -> Node | None:
        """By its number, without listing."""
        digits = name.removeprefix(PREFIX)
        if len(digits) == 6 and digits.isdecimal() and name != digits and int(digits) < self._count:
            return Entry(int(digits))
        return None


class Root(Directory):
    """The top of the tree."""

    __slots__ = ("_many",)

    def __init__(self, many: Many) -> None:
        self._many = many

    @property
    def identity(self) -> Hashable:
        """There is one."""
        return "root"

    def children(self) -> Iterator[tuple[str, Node]]:
        """The large directory."""
        yield "many", self._many


def main() -> int:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock-loop", action="store_true")
    parser.add_argument("--entries", type=int, required=True)
    parser.add_argument("mountpoint", type=Path)
    arguments = parser.parse_args()
    shim.load(wanted=True)  # before pyfuse3 is imported, as the command does
    from cloudfs.mount import MountOptions, mount

    try:
        mount(Root(Many(arguments.entries)), arguments.mountpoint, MountOptions(fast_loop=not arguments.stock_loop))
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
