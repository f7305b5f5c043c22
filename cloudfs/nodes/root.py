"""The root of the tree: `build_root(machine)` is what a mount serves."""

from __future__ import annotations

from collections.abc import Iterator

from cloudfs.node import Directory, Node
from cloudfs.nodes.connectors import ConnectorsDirectory
from cloudfs.nodes.contexts import TreeContext, root_entry
from cloudfs.nodes.directories import EntryDirectory, entries_of
from cloudfs.nodes.files.text import FixedText, TextFile
from cloudfs.nodes.kept import KEPT
from cloudfs.nodes.oslayers import OsLayersDirectory
from cloudfs.nodes.plugins_file import load_entries, plugins_file
from cloudfs.nodes.readme import readme_text
from engine.machine import Machine

IGNORE = """\
# For rg, fd and ag: memory is searched only where you name it.
phys_mem
mem
image
regions/
sections/
"""
CACHEDIR_TAG = """\
Signature: 8a477f597d28d172789f06886806bc55
# Made by cloudfs, so that backups leave this tree out (https://bford.info/cachedir/).
"""


class RootDirectory(EntryDirectory[TreeContext]):
    """The root: what is registered for it, and two files that programs look for."""

    __slots__ = ()

    def __init__(self, tree: TreeContext) -> None:
        super().__init__(tree, "root", root_entry)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        yield from entries_of(self.entries, self.context)
        yield ".ignore", self._fixed(".ignore")
        yield "CACHEDIR.TAG", self._fixed("CACHEDIR.TAG")

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        return self._fixed(name) if name in (".ignore", "CACHEDIR.TAG") else super().child(name)

    def rest(self) -> None:
        """See `Directory.rest`: facts of live targets are too old to be of use, and they hold processes' files."""
        machine = self.context.machine
        for instance in (*machine.instances("connector"), *machine.instances("oslayer")):
            if instance.live:
                KEPT.forget(instance)
                instance.forget()

    def _fixed(self, name: str) -> Node:
        return FixedText(self.context, name, IGNORE if name == ".ignore" else CACHEDIR_TAG)


@root_entry("README")
def readme(tree: TreeContext) -> Node | None:
    """How to use this tree."""
    return TextFile(tree, "README", lambda: readme_text(tree))


@root_entry("connector")
def connector(tree: TreeContext) -> Node | None:
    """Sources of physical memory, each a directory; write to new, rmdir."""
    return ConnectorsDirectory(tree)


@root_entry("os")
def oslayers(tree: TreeContext) -> Node | None:
    """Operating systems found in them, each a directory; write to new, rmdir."""
    return OsLayersDirectory(tree)


@root_entry("plugins")
def plugins(tree: TreeContext) -> Node | None:
    """What is installed, its version, and why a broken one is broken."""
    return plugins_file(tree)


def build_root(machine: Machine) -> Directory:
    """The tree over what is open, with the entries of all installed packages."""
    return RootDirectory(TreeContext.of(machine, load_entries()))
