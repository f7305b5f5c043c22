"""The engine's records as dicts of JSON-able values, under the keys that every OS layer gives."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cloudfs.render.values import address_text, plain, time_text
from engine import middleware
from engine.connector import Target
from engine.errors import NotRecognisedError, TargetGoneError
from engine.machine import Instance
from engine.registry import PluginStatus
from engine.types import (
    ConnectorInfo,
    ExportInfo,
    ImportInfo,
    ModuleInfo,
    OpenFileInfo,
    OsInfo,
    ProcessInfo,
    Region,
    SectionInfo,
    SocketInfo,
    ThreadInfo,
)

Record = dict[str, Any]


def process_record(info: ProcessInfo) -> Record:
    """The keys of `ps`; those that only some OS layers know follow."""
    record: Record = {
        "pid": info.pid,
        "ppid": info.ppid,
        "name": info.name,
        "state": info.state,
        "uid": info.uid,
        "gid": info.gid,
        "threads": info.threads,
        "start_time": time_text(info.start_time),
        "command_line": None if info.command_line is None else list(info.command_line),
        "executable": info.executable,
        "architecture": info.architecture,
        "kernel_thread": info.kernel_thread,
        "dtb": address_text(info.dtb),
        "object": address_text(info.object),
    }
    for key, value in info.extra.items():
        record.setdefault(key, plain(value))
    return record


def thread_record(info: ThreadInfo) -> Record:
    """One thread."""
    return {"tid": info.tid, "name": info.name, "state": info.state}


def region_record(region: Region) -> Record:
    """The keys of `maps`. `offset` is hexadecimal too: of /dev/mem it is a physical address.

    `source` is null for mappings that the OS lists; of others `offset`, `device` and `inode` are not known.
    """
    listed = region.source is None
    return {
        "start": address_text(region.start),
        "stop": address_text(region.stop),
        "permissions": region.permissions,
        "offset": address_text(region.offset) if listed else None,
        "device": region.device_text if listed else None,
        "inode": region.inode if listed else None,
        "path": region.path if listed else region.path or None,
        "source": region.source,
    }


def module_record(info: ModuleInfo) -> Record:
    """The keys of `modules`."""
    return {
        "name": info.name,
        "path": info.path,
        "base": address_text(info.base),
        "size": info.size,
        "architecture": info.architecture,
        "build_id": info.build_id,
    }


def socket_record(socket: SocketInfo) -> Record:
    """One socket of a process."""
    return {
        "pid": socket.pid,
        "descriptor": socket.descriptor,
        "family": socket.family,
        "kind": socket.kind,
        "protocol": socket.protocol,
        "state": socket.state,
        "local": socket.local,
        "remote": socket.remote,
        "inode": socket.inode,
        "uid": socket.uid,
        "object": address_text(socket.object),
        **{key: plain(value) for key, value in socket.extra.items()},
    }


def open_file_record(file: OpenFileInfo) -> Record:
    """One open descriptor of a process."""
    return {
        "descriptor": file.descriptor,
        "kind": file.kind,
        "path": file.path,
        "flags": None if file.flags is None else f"{file.flags:#o}",
        "position": file.position,
        "size": file.size,
        "inode": file.inode,
        "device": None if file.device is None else f"{file.device[0]:02x}:{file.device[1]:02x}",
    }


def section_record(section: SectionInfo) -> Record:
    """One section of a module."""
    return {"name": section.name, "base": address_text(section.base), "size": section.size}


def export_record(symbol: ExportInfo, base: int | None = None) -> Record:
    """One symbol that a module offers; its address where the module's base is known."""
    address = None if base is None else base + symbol.offset
    return {
        "name": symbol.name,
        "offset": address_text(symbol.offset),
        "address": address_text(address),
        "size": symbol.size,
        "kind": symbol.kind,
    }


def import_record(symbol: ImportInfo) -> Record:
    """One symbol that a module wants of others."""
    return {"name": symbol.name, "library": symbol.library, "version": symbol.version}


def connector_record(info: ConnectorInfo) -> Record:
    """What a connector says of what it has opened."""
    return {
        "kind": info.kind,
        "target": info.target,
        "size": info.size,
        "real_size": info.real_size,
        "live": info.live,
        "state": info.state,
        "freshness": info.freshness,
        "writable": info.writable,
        "notes": list(info.notes),
    }


def os_record(info: OsInfo, processes: int | None = None) -> Record:
    """What an OS layer says of the system it has recognised; `processes` counts them."""
    return {
        "kind": info.kind,
        "version": info.version,
        "architecture": info.architecture,
        "page_size": info.page_size,
        "kernel_base": address_text(info.kernel_base),
        "dtb": address_text(info.dtb),
        "boot_time": time_text(info.boot_time),
        "time": time_text(info.time),
        "uptime": info.uptime,
        "hostname": info.hostname,
        "command_line": info.command_line,
        "processes": processes,
        "skipped": dict(info.skipped),
        "retried": dict(info.retried),
        "listed": dict(info.listed),
        "live": info.live,
        "state": info.state,
        "writable": info.writable,
        "notes": list(info.notes),
    }


def process_count(instance: Instance) -> int | None:
    """How many processes an OS layer lists; None where they cannot be: of a kernel without types, or that is gone."""
    try:
        return len(instance.pids())
    except (NotRecognisedError, TargetGoneError):
        return None


def instance_record(instance: Instance) -> Record:
    """An opened connector or OS layer: its own record, its name and place in the chain, what was done with it.

    Raises ConnectorClosedError after it was removed.
    """
    if instance.kind == "connector":
        own = connector_record(instance.connector.info)
        if instance.memory_view is not None:
            own["writable"] = own["writable"] or instance.writable
            own["notes"] = [*own["notes"], *middleware.notes(instance.memory_view)]
    else:
        own = {**os_record(instance.layer.info, process_count(instance)), "live": instance.live}
    record: Record = {"name": instance.name, **own}
    record["spec"] = str(instance.spec)
    record["options"] = dict(instance.spec.options)
    record["parent"] = None if instance.parent is None else instance.parent.name
    record["children"] = [child.name for child in instance.children]
    record["generation"] = instance.generation
    record["opened_at"] = time_text(instance.opened_at)
    record["counters"] = asdict(instance.counters)
    figures = getattr(instance.memory_view, "figures", None)
    if figures is not None:
        record["metrics"] = figures()
    record["last_error"] = instance.last_error
    return record


def target_record(target: Target, plugin: str) -> Record:
    """Something that the connector `plugin` could open here."""
    return {"plugin": plugin, "target": target.name, "description": target.description}


def plugin_record(status: PluginStatus) -> Record:
    """One plugin; `problem` is None where it loads."""
    plugin = status.plugin
    return {
        "name": plugin.name,
        "kind": plugin.kind,
        "summary": status.summary,
        "where": plugin.where,
        "distribution": plugin.distribution,
        "problem": status.problem,
    }
