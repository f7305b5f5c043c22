"""`os/NAME/net/`: sockets, in the formats of /proc/net."""

from __future__ import annotations

from collections.abc import Iterator

from cloudfs.node import Node
from cloudfs.nodes.contexts import InstanceContext, os_entry
from cloudfs.nodes.directories import ContextDirectory
from cloudfs.nodes.files.text import TextFile
from cloudfs.render import escape_terminal
from cloudfs.render.net import FILES, net_lines
from engine.oslayer import Sockets


@os_entry("net")
def net(system: InstanceContext) -> Node | None:
    """The sockets of its processes, in the formats of /proc/net."""
    return None if system.check().layer.capability(Sockets) is None else NetDirectory(system)


class NetDirectory(ContextDirectory[InstanceContext]):
    """A file for each kind of socket."""

    __slots__ = ()

    def __init__(self, system: InstanceContext, name: str = "net") -> None:
        super().__init__(system, name)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name in FILES:
            yield name, self._file(name)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        return self._file(name) if name in FILES else None

    def _file(self, name: str) -> Node:
        def text() -> str:
            source = self.context.check().layer.capability(Sockets)
            lines = net_lines(name, source.sockets() if source is not None else ())
            return "".join(escape_terminal(line[:-1]) + "\n" for line in lines)

        return TextFile(self.context, f"net/{name}", text, sized=False, may_block=True)
