"""`connector/`: the opened connectors, and the file `new` that opens more."""

from __future__ import annotations

from cloudfs import render
from cloudfs.node import Node
from cloudfs.nodes.contexts import InstanceContext, connector_entry
from cloudfs.nodes.files.memory import MemoryFile, Opened
from cloudfs.nodes.files.text import TextFile, info_file, json_file
from cloudfs.nodes.instances import InstancesDirectory


class ConnectorsDirectory(InstancesDirectory):
    """The opened connectors."""

    __slots__ = ()

    kind = "connector"
    entries = connector_entry
    example = "vm raw:/path/to/memory.img"


@connector_entry("info")
def info(connector: InstanceContext) -> Node | None:
    """What it is, how it was opened, and what was done with it."""
    return info_file(connector, "info", lambda: render.instance_record(connector.check()))


@connector_entry("info.json")
def info_json(connector: InstanceContext) -> Node | None:
    """The same as JSON."""
    return json_file(connector, "info.json", lambda: render.instance_record(connector.check()))


@connector_entry("phys_mem")
def phys_mem(connector: InstanceContext) -> Node | None:
    """Physical memory; offset = physical address; holes read as zeros."""
    instance = connector.check()
    return MemoryFile(
        connector,
        "phys_mem",
        lambda: Opened(connector.check().memory),
        whole=True,
        writable=instance.writable and instance.memory.writable,
        size=lambda: connector.check().memory.size,
        immutable=not instance.live,
    )


@connector_entry("memory_map")
def memory_map(connector: InstanceContext) -> Node | None:
    """Where there is memory: ranges as TOML, base, length, real_base."""
    return TextFile(connector, "memory_map", lambda: connector.check().connector.memory_map.to_toml())
