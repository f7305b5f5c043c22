"""What `connector/` and `os/` share: the file `new`, a directory for each instance, and rmdir."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from cloudfs.entries import Entries
from cloudfs.node import Node
from cloudfs.nodes.contexts import InstanceContext, TreeContext
from cloudfs.nodes.directories import ContextDirectory, EntryDirectory
from cloudfs.nodes.files.control import ControlFile
from cloudfs.nodes.kept import KEPT
from engine import chain, registry
from engine.errors import InvalidArgumentError, TargetBusyError
from engine.machine import Kind

OPENINGS = 12
"""Targets that may be opened at a time. Each holds a thread of `new`; the few that are left answer and refuse."""


class InstanceDirectory(EntryDirectory[InstanceContext]):
    """One opened connector or OS layer."""

    __slots__ = ()

    def check(self) -> None:
        """Raise ConnectorClosedError where it was removed."""
        self.context.check()


class InstancesDirectory(ContextDirectory[TreeContext]):
    """The instances of a kind."""

    __slots__ = ()

    kind: ClassVar[Kind]
    entries: ClassVar[Entries[InstanceContext]]
    example: ClassVar[str]

    def __init__(self, tree: TreeContext) -> None:
        # rmdir(2) asks for the right to write: without it the kernel refuses the mount's own user.
        super().__init__(tree, self.kind, mode=0o755)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        yield "new", self._new()
        for instance in self.context.machine.instances(self.kind):
            yield instance.name, InstanceDirectory(InstanceContext.of(instance), "instance", self.entries)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        if name == "new":
            return self._new()
        instance = self.context.machine.find(self.kind, name)
        if instance is None:
            return None
        return InstanceDirectory(InstanceContext.of(instance), "instance", self.entries)

    def remove_child(self, name: str) -> None:
        """See `Directory.remove_child`. Raises TargetBusyError naming what stands on it.

        rmdir(2) has only an errno to tell: `new` says the sentence.
        """
        machine = self.context.machine
        instance = machine.find(self.kind, name)
        if instance is None:
            raise PermissionError(f"{name} cannot be removed: it is no instance")
        results = self.context.results[self.kind]
        result = results.begin(f"rmdir {name}")
        try:
            machine.remove(self.kind, name)
        except BaseException as error:
            results.end(result, str(error) or type(error).__name__, failed=True)
            raise
        results.end(result, f"{name} is closed")
        KEPT.forget(instance)

    def _new(self) -> ControlFile:
        return ControlFile(self.context, self.kind, self._run, self._usage)

    def _run(self, line: str) -> str:
        command = chain.parse_command(line)
        if command.name in self.entries.names():
            raise InvalidArgumentError(f"{command.name!r} cannot name an instance: it stands in the tree already")
        waiting = self.context.machine.openings(self.kind)
        if len(waiting) >= OPENINGS:
            raise TargetBusyError(f"{command.name} is not opened while {len(waiting)} others are; {waiting[0]}")
        instance = self.context.machine.run(self.kind, line)
        word = "connector" if self.kind == "connector" else "os"
        return f"{word}/{instance.name} is open"

    def _usage(self) -> Iterator[str]:
        """What the file says of itself."""
        here = "connector" if self.kind == "connector" else "os"
        yield "One line written here opens one:"
        yield f"  {chain.USAGE}"
        yield "options stand last when they begin with KEY=; quote a value that holds : , or a space"
        yield f'  echo "{self.example}" > {here}/new'
        yield f"  rmdir {here}/NAME"
        yield ""
        yield "Installed:"
        for status in registry.statuses(self.kind):
            what = status.summary if status.problem is None else f"broken: {status.problem}"
            yield f"  {status.plugin.name:<12} {what}"
        if self.kind == "oslayer":
            yield f"  {registry.AUTO:<12} whichever recognises the memory of the connector"
        yield ""
        yield "Open:"
        for instance in self.context.machine.instances(self.kind):
            stands = f" on {instance.parent.name}" if instance.parent is not None else ""
            yield f"  {instance.name:<12} {instance.spec}{stands}"
        for opening in self.context.machine.openings(self.kind):
            yield f"  {opening}: {opening.spec}"
