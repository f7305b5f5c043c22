"""The memory engine: connectors, virtual address translation, OS layers.

The map of the package (every name here is imported on first use):

- `Memory`, `Faults`, `MemoryWindow` (engine.memory): bytes with holes, scalar and column doors.
- `BytesMemory` (engine.bytes_memory), `FileMemory` (engine.file_memory), `MemoryMap`,
  `MappedMemory` (engine.memory_map): bytes of this program, files, remapped memory.
- `VirtualMemory` (engine.translate.virtual): virtual address translation; the paging modes (engine.translate.modes).
- `Connector` (engine.connector), `OsLayer`, `Process`, `Module` (engine.oslayer): what plugins subclass.
- `Machine`, `Instance` (engine.machine): what is open, by name; `open_target` (engine.targets): one call to begin with.
- `Extent`, `Region`, `Rights` and the info records (engine.types); the errors (engine.errors).
- `engine.testing`: fakes and contract suites for your own connectors and layers.

    >>> import engine, os
    >>> with engine.open_target("native") as machine:
    ...     machine.default_os.layer.process(os.getpid()).info.pid == os.getpid()
    True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "engine.errors": (
        "AccessDeniedError AlreadyExistsError BadDataError ConnectorClosedError EngineError FaultError FaultKind "
        "InvalidArgumentError NotFoundError NotRecognisedError PagedOutError PluginError ProcessExitedError "
        "ReadOnlyError ReadOnlyFaultError SourceFaultError TargetBusyError TargetGoneError TargetTimeoutError "
        "UnsupportedError UnusableTargetError"
    ),
    "engine.types": (
        "CachedFileInfo ConnectorInfo ExportInfo Extent ImportInfo LogRecord ModuleInfo OpenFileInfo OsInfo PageFlags "
        "PhysicalMap ProcessInfo Region Rights SectionInfo SocketInfo SymbolInfo TargetHints ThreadInfo"
    ),
    "engine.bytes_memory": "BytesMemory",
    "engine.memory": "Faults Memory MemoryWindow",
    "engine.file_memory": "FileMemory",
    "engine.memory_map": "MapRange MappedMemory MemoryMap",
    "engine.translate.virtual": "VirtualMemory",
    "engine.connector": "Connector Target",
    "engine.oslayer": (
        "Base CachedFiles Containers HostOwned KernelConfig KernelLog Module OpenFiles OsLayer PhysicalMaps ProcFiles "
        "Process Sockets Symbols SystemFiles ThreadRegisters"
    ),
    "engine.machine": "Instance Machine",
    "engine.targets": "open_target",
}
_ROOMS = {name: room for room, names in _WHERE.items() for name in names.split()}

__all__ = sorted(_ROOMS)
__version__ = "0.1.0"

if TYPE_CHECKING:
    from engine.bytes_memory import BytesMemory as BytesMemory
    from engine.connector import Connector as Connector
    from engine.connector import Target as Target
    from engine.errors import *  # noqa: F403 - all of its names are public
    from engine.file_memory import FileMemory as FileMemory
    from engine.machine import Instance as Instance
    from engine.machine import Machine as Machine
    from engine.memory import Faults as Faults
    from engine.memory import Memory as Memory
    from engine.memory import MemoryWindow as MemoryWindow
    from engine.memory_map import MappedMemory as MappedMemory
    from engine.memory_map import MapRange as MapRange
    from engine.memory_map import MemoryMap as MemoryMap
    from engine.oslayer import Base as Base
    from engine.oslayer import CachedFiles as CachedFiles
    from engine.oslayer import Containers as Containers
    from engine.oslayer import HostOwned as HostOwned
    from engine.oslayer import KernelConfig as KernelConfig
    from engine.oslayer import KernelLog as KernelLog
    from engine.oslayer import Module as Module
    from engine.oslayer import OpenFiles as OpenFiles
    from engine.oslayer import OsLayer as OsLayer
    from engine.oslayer import PhysicalMaps as PhysicalMaps
    from engine.oslayer import Process as Process
    from engine.oslayer import ProcFiles as ProcFiles
    from engine.oslayer import Sockets as Sockets
    from engine.oslayer import Symbols as Symbols
    from engine.oslayer import SystemFiles as SystemFiles
    from engine.oslayer import ThreadRegisters as ThreadRegisters
    from engine.targets import open_target as open_target
    from engine.translate.virtual import VirtualMemory as VirtualMemory
    from engine.types import *  # noqa: F403 - as above


def __getattr__(name: str) -> Any:
    room = _ROOMS.get(name)
    if room is None:
        raise AttributeError(f"engine has no {name!r}")
    value = getattr(importlib.import_module(room), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_ROOMS]
