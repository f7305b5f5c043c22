"""Which plugins there are: the built-in ones by name, others through entry points.

A distribution offers a connector with an entry point of the group `cloudfs.connectors`, an OS layer with one of
`cloudfs.oslayers`; its name is the plugin's. Nothing is imported before it is asked for: a broken plugin breaks
itself alone, and `statuses` says why.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Literal

from engine.announced import announced
from engine.connector import Connector
from engine.errors import PluginError
from engine.oslayer import OsLayer
from engine.records import dataclass

Kind = Literal["connector", "oslayer"]

_BUILT_IN: dict[Kind, dict[str, str]] = {
    "connector": {
        "dummy": "engine.connectors.dummy:DummyConnector",
        "elfcore": "engine.connectors.elfcore:ElfCoreConnector",
        "gdb": "engine.connectors.gdb:GdbConnector",
        "kcore": "engine.connectors.elfcore:KcoreConnector",
        "kdump": "engine.connectors.kdump:KdumpConnector",
        "lime": "engine.connectors.lime:LimeConnector",
        "qemu": "engine.connectors.qemu:QemuConnector",
        "raw": "engine.connectors.raw:RawConnector",
        "vmware": "engine.connectors.vmware:VmwareConnector",
    },
    "oslayer": {
        "linux": "engine.oslayers.linux:LinuxLayer",
        "native": "engine.oslayers.native:NativeLayer",
        "raw-dtb": "engine.oslayers.raw_dtb:RawDtbLayer",
    },
}
_GROUPS: dict[Kind, str] = {"connector": "cloudfs.connectors", "oslayer": "cloudfs.oslayers"}
_BASES: dict[str, type] = {"connector": Connector, "oslayer": OsLayer}
AUTO = "auto"
"""The name that stands for «whichever OS layer recognises it»."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plugin as it is announced."""

    name: str
    kind: Literal["connector", "oslayer", "entries"]
    """`entries`: files for the tree of the mount, which the engine knows nothing of."""
    where: str
    """module:Class."""
    distribution: str
    """Name and version of what brings it."""


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """One plugin as it is: `problem` is None where it loads."""

    plugin: Plugin
    summary: str
    problem: str | None


def _built_in(kind: Kind) -> Iterator[Plugin]:
    for name, where in _BUILT_IN[kind].items():
        yield Plugin(name, kind, where, "built in")


def _announced(kind: Kind) -> tuple[Plugin, ...]:
    return _entry_points(kind, tuple((path, _changed(path)) for path in sys.path))


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except (OSError, ValueError):
        return 0


@functools.lru_cache(maxsize=len(_GROUPS))
def _entry_points(kind: Kind, where: tuple[tuple[str, int], ...]) -> tuple[Plugin, ...]:
    """Kept for as long as nothing is installed or removed `where` Python looks."""
    del where
    return tuple(Plugin(each.name, kind, each.value, each.distribution) for each in announced(_GROUPS[kind]))


def plugins(kind: Kind) -> list[Plugin]:
    """All plugins of a kind, by name; a built-in one wins over an entry point of its name."""
    found = {plugin.name: plugin for plugin in _announced(kind)}
    found.update((plugin.name, plugin) for plugin in _built_in(kind))
    return [found[name] for name in sorted(found)]


def find(name: str) -> Plugin | None:
    """The plugin of that name, connectors first, or None; imports nothing of it."""
    for source in (_built_in, _announced):
        for kind in _GROUPS:
            for plugin in source(kind):
                if plugin.name == name:
                    return plugin
    return None


def load_connector(name: str) -> type[Connector]:
    """The class of the connector. Raises PluginError with what to do."""
    return _load("connector", name)


def load_oslayer(name: str) -> type[OsLayer]:
    """The class of the OS layer. Raises PluginError with what to do."""
    return _load("oslayer", name)


def _load(kind: Kind, name: str) -> type:
    for source in (_built_in, _announced):
        for plugin in source(kind):
            if plugin.name == name:
                return _import(plugin)
    raise PluginError(name, _unknown(kind, name))


def _unknown(kind: Kind, name: str) -> str:
    word, other = ("connector", "an OS layer") if kind == "connector" else ("OS layer", "a connector")
    other_kind: Kind = "oslayer" if kind == "connector" else "connector"
    if any(plugin.name == name for plugin in plugins(other_kind)):
        return f"is {other}, no {word}"
    names = [plugin.name for plugin in plugins(kind)]
    import difflib

    close = difflib.get_close_matches(name, names, 1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"no such {word}; installed are {', '.join(names)}{meant}"


def _import(plugin: Plugin) -> type:
    module, _, attribute = plugin.where.partition(":")
    try:
        loaded = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise PluginError(plugin.name, f"cannot be loaded: {error}; install what it needs") from error
    except Exception as error:
        raise PluginError(plugin.name, f"fails while it loads: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, _BASES[plugin.kind])):
        raise PluginError(plugin.name, f"{plugin.where} is not a subclass of {_BASES[plugin.kind].__name__}")
    missing = sorted(getattr(loaded, "__abstractmethods__", ()))
    if missing:
        raise PluginError(plugin.name, f"{plugin.where} of {plugin.distribution} lacks {', '.join(missing)}")
    return loaded


def statuses(kind: Kind) -> Iterator[PluginStatus]:
    """Every plugin with what is wrong with it; loads them all."""
    for plugin in plugins(kind):
        try:
            summary = str(getattr(_import(plugin), "summary", ""))
        except PluginError as error:
            yield PluginStatus(plugin, "", error.hint)
        else:
            yield PluginStatus(plugin, summary, None)
