"""`os/`: the opened OS layers, the file `new` that opens more, and links into the default one."""

from __future__ import annotations

from collections.abc import Iterator

from cloudfs import render
from cloudfs.node import Node, TextLink
from cloudfs.nodes.contexts import InstanceContext, os_entry
from cloudfs.nodes.directories import entries_of
from cloudfs.nodes.files.memory import KERNEL_BASE, MemoryFile, Opened
from cloudfs.nodes.files.text import info_file, json_file
from cloudfs.nodes.instances import InstancesDirectory
from cloudfs.nodes.modules import ModulesDirectory
from cloudfs.nodes.processes import ProcessesDirectory
from engine.errors import UnsupportedError
from engine.memory import Memory


class OsLayersDirectory(InstancesDirectory):
    """The opened OS layers."""

    __slots__ = ()

    kind = "oslayer"
    entries = os_entry
    example = "machine native"

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        names = set()
        for name, node in super().children():
            names.add(name)
            yield name, node
        for name, node in self._links():
            if name not in names:
                yield name, node

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        found = super().child(name)
        return found if found is not None else next((node for link, node in self._links() if link == name), None)

    def _links(self) -> Iterator[tuple[str, Node]]:
        """Links to what the default OS has, so that os/processes/PID works with no name to know."""
        default = self.context.machine.default_os
        if default is None:
            return
        for name, _ in entries_of(self.entries, InstanceContext.of(default)):
            yield name, TextLink(("default", name, default.name, self.context.key), f"{default.name}/{name}")


@os_entry("info")
def info(system: InstanceContext) -> Node | None:
    """What it is, how it was opened, and what was done with it."""
    return info_file(system, "info", lambda: render.instance_record(system.check()))


@os_entry("info.json")
def info_json(system: InstanceContext) -> Node | None:
    """The same as JSON."""
    return json_file(system, "info.json", lambda: render.instance_record(system.check()))


def _memory(memory: Memory | None) -> Memory:
    if memory is None:
        raise UnsupportedError("this OS layer no longer shows that memory")
    return memory


@os_entry("phys_mem")
def phys_mem(system: InstanceContext) -> Node | None:
    """Physical memory as the OS has it; offset = physical address; holes read as zeros."""
    instance = system.check()
    memory = instance.layer.physical_memory
    if memory is None:
        return None
    return MemoryFile(
        system,
        "phys_mem",
        lambda: Opened(_memory(system.check().layer.physical_memory)),
        whole=True,
        writable=instance.writable and memory.writable,
        size=lambda: _memory(system.check().layer.physical_memory).size,
        immutable=not instance.live,
    )


@os_entry("mem")
def mem(system: InstanceContext) -> Node | None:
    """Kernel virtual memory; offset = address without its top bit (7… for f…)."""
    instance = system.check()
    memory = instance.layer.kernel_memory
    if memory is None:
        return None
    return MemoryFile(
        system,
        "mem",
        lambda: Opened(_memory(system.check().layer.kernel_memory), KERNEL_BASE),
        whole=False,
        writable=instance.writable and memory.writable,
    )


@os_entry("modules")
def modules(system: InstanceContext) -> Node | None:
    """The kernel's modules (drivers), each a directory."""
    return ModulesDirectory(system) if system.check().layer.tells_modules else None


@os_entry("processes")
def processes(system: InstanceContext) -> Node | None:
    """The processes by PID; by-name/ and by-pid-name/ lead to them."""
    return ProcessesDirectory(system)
