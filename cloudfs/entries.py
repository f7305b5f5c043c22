"""Entries: what stands in a directory of a given type. A file in a directory is one function.

    @process_entry("quota")
    def quota(process: ProcessContext) -> Node | None:
        source = process.capability(ProcFiles)
        return None if source is None else TextFile(…)

The function is asked at every listing and look-up, so it tests a capability and reads no memory; None hides
the entry. Its docstring's first line is what the tree's README says of the file. Third parties use the same
door: import the `Entries` object of the directory (from an entry point of the group `cloudfs.nodes`, which is
loaded at start) and decorate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from cloudfs.node import Node, check_name

T = TypeVar("T")
Make = Callable[[T], Node | None]


class Entries(Generic[T]):
    """The registered entries of one type of directory, by name."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._made: dict[str, Make[T]] = {}

    def __call__(self, name: str) -> Callable[[Make[T]], Make[T]]:
        """Register the decorated function under `name`. Raises ValueError where the name is taken or no name."""
        check_name(name)

        def register(make: Make[T]) -> Make[T]:
            if name in self._made:
                raise ValueError(f"{self.what} has an entry {name!r} already")
            self._made[name] = make
            return make

        return register

    def child(self, context: T, name: str) -> Node | None:
        """The entry of that name for one object, or None."""
        make = self._made.get(name)
        return None if make is None else make(context)

    def children(self, context: T) -> Iterator[tuple[str, Node]]:
        """All entries that the object has."""
        for name, make in self._made.items():
            node = make(context)
            if node is not None:
                yield name, node

    def names(self) -> tuple[str, ...]:
        """The names that are registered."""
        return tuple(self._made)

    def describe(self) -> Iterator[tuple[str, str]]:
        """Each name with the first line of its docstring."""
        for name, make in self._made.items():
            yield name, (make.__doc__ or "").strip().split("\n", 1)[0]
