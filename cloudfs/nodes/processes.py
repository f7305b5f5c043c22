"""`processes/`: the processes of an OS by PID, and links to them by name and by container."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cloudfs.node import Node
from cloudfs.nodes.contexts import InstanceContext, ProcessContext
from cloudfs.nodes.directories import ContextDirectory, ContextLink
from cloudfs.nodes.kept import KEPT
from cloudfs.nodes.process import ProcessDirectory
from cloudfs.nodes.procfs import decimal
from cloudfs.render import file_name
from engine.errors import EngineError, NotFoundError
from engine.oslayer import Containers

_LIKE_A_SUFFIX = re.compile(r"#[0-9]+$").search


class ProcessesDirectory(ContextDirectory[InstanceContext]):
    """The processes of an OS."""

    __slots__ = ()

    def __init__(self, context: InstanceContext) -> None:
        super().__init__(context, "processes")

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`; those that end meanwhile are left out."""
        instance = self.context.check()
        pids = instance.pids()  # first: an error behind a name would be taken for the end of the list
        yield "by-name", ByNameDirectory(self.context)
        yield "by-pid-name", ByPidNameDirectory(self.context)
        if instance.layer.capability(Containers) is not None:
            yield "by-container", ByContainerDirectory(self.context)
        for pid in pids:
            try:
                node = ProcessDirectory(ProcessContext.of(instance, pid))
            except EngineError:
                continue
            yield str(pid), node

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        instance = self.context.check()
        if name == "by-name":
            return ByNameDirectory(self.context)
        if name == "by-pid-name":
            return ByPidNameDirectory(self.context)
        if name == "by-container" and instance.layer.capability(Containers) is not None:
            return ByContainerDirectory(self.context)
        pid = decimal(name)
        if pid is None:
            return None
        try:
            return ProcessDirectory(ProcessContext.of(instance, pid))
        except NotFoundError:
            return None


def process_names(context: InstanceContext) -> dict[int, str]:
    """PID → name of all processes, ascending; those of which it cannot be told are left out."""
    instance = context.check()
    names = {}
    for pid in instance.pids():
        try:
            names[pid] = instance.process(pid).name
        except EngineError:
            continue
    return names


class ByNameDirectory(ContextDirectory[InstanceContext]):
    """Links to processes by name: `NAME`, and of several with one name each is `NAME#PID`."""

    __slots__ = ()

    def __init__(self, context: InstanceContext) -> None:
        super().__init__(context, "by-name", may_block=context.reads_block)

    def _links(self) -> dict[str, int]:
        return KEPT.get(
            self.context.instance,
            ("by name", self.context.key),
            lambda: links_by_name(process_names(self.context)),
            lambda links: 150 * len(links),
        )

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name, pid in self._links().items():
            yield name, ContextLink(self.context, name, f"../{pid}")

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        pid = self._links().get(name)
        return None if pid is None else ContextLink(self.context, name, f"../{pid}")


def links_by_name(names: dict[int, str]) -> dict[str, int]:
    """File name → PID; a name that looks as if it had a `#PID` gets one of its own, so that it takes nobody's."""
    found = [(pid, raw, file_name(raw)) for pid, raw in names.items()]
    uses: dict[str, int] = {}
    for _, _, name in found:
        uses[name] = uses.get(name, 0) + 1
    return {
        name if uses[name] == 1 and not _LIKE_A_SUFFIX(name) else file_name(raw, f"#{pid}"): pid
        for pid, raw, name in found
    }


class ByPidNameDirectory(ContextDirectory[InstanceContext]):
    """Links to processes as `NAME (PID)`."""

    __slots__ = ()

    def __init__(self, context: InstanceContext) -> None:
        super().__init__(context, "by-pid-name", may_block=context.reads_block)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for pid, raw in process_names(self.context).items():
            name = file_name(raw, f" ({pid})")
            yield name, ContextLink(self.context, name, f"../{pid}")

    def child(self, name: str) -> Node | None:
        """See `Directory.child`; asks for the one process alone."""
        pid = decimal(name[name.rfind("(") + 1 : -1])
        if pid is None:
            return None
        try:
            raw = self.context.check().process(pid).name
        except NotFoundError:
            return None
        return ContextLink(self.context, name, f"../{pid}") if name == file_name(raw, f" ({pid})") else None


def containers_of(context: InstanceContext) -> dict[str, tuple[str, tuple[int, ...]]]:
    """File name → (identifier, PIDs) of each container."""
    instance = context.check()

    def listed() -> dict[str, tuple[str, tuple[int, ...]]]:
        source = instance.layer.capability(Containers)
        found = {} if source is None else source.containers()
        return {file_name(identifier): (identifier, pids) for identifier, pids in found.items()}

    return KEPT.get(instance, ("containers", context.key), listed, lambda found: 300 * len(found))


class ByContainerDirectory(ContextDirectory[InstanceContext]):
    """A directory for each container."""

    __slots__ = ()

    def __init__(self, context: InstanceContext) -> None:
        super().__init__(context, "by-container", may_block=context.reads_block)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name, (identifier, _) in containers_of(self.context).items():
            yield name, ContainerDirectory(self.context, identifier, name)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        found = containers_of(self.context).get(name)
        return None if found is None else ContainerDirectory(self.context, found[0], name)


class ContainerDirectory(ContextDirectory[InstanceContext]):
    """Links to the processes of one container, by PID."""

    __slots__ = ("_name",)

    def __init__(self, context: InstanceContext, identifier: str, name: str) -> None:
        super().__init__(context, f"by-container/{identifier}", may_block=context.reads_block)
        self._name = name

    def _pids(self) -> tuple[int, ...]:
        found = containers_of(self.context).get(self._name)
        return () if found is None else found[1]

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for pid in self._pids():
            yield str(pid), self._link(pid)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        pid = decimal(name)
        return self._link(pid) if pid is not None and pid in self._pids() else None

    def _link(self, pid: int) -> Node:
        return ContextLink(self.context, f"by-container/{self._name}/{pid}", f"../../{pid}")
