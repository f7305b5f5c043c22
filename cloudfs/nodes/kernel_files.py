"""`os/NAME/log`, `symbols` and `config`: what a kernel tells of itself."""

from __future__ import annotations

from collections.abc import Hashable

from cloudfs.node import Attributes, File, Node, OpenFile
from cloudfs.nodes.contexts import InstanceContext, os_entry
from cloudfs.nodes.files.text import TextFile
from cloudfs.render import escape_terminal, log_lines, symbol_line
from engine.errors import UnsupportedError
from engine.oslayer import KernelConfig, KernelLog, Symbols


def _log_of(system: InstanceContext) -> KernelLog:
    log = system.check().layer.capability(KernelLog)
    if log is None:
        raise UnsupportedError("this OS layer no longer shows a log")
    return log


@os_entry("log")
def log(system: InstanceContext) -> Node | None:
    """The kernel's log (dmesg); of a live machine it grows, and `tail -f` follows."""
    if system.check().layer.capability(KernelLog) is None:
        return None
    if system.live:
        return GrowingLog(system)
    return TextFile(system, "log", lambda: _text(_log_of(system)), sized=False, may_block=True)


def _text(source: KernelLog, after: int = -1) -> str:
    parts = []
    for record in source.records():
        if record.sequence > after:
            parts += [escape_terminal(line[:-1]) + "\n" for line in log_lines(record)]
    return "".join(parts)


@os_entry("symbols")
def symbols(system: InstanceContext) -> Node | None:
    """The kernel's symbols and its modules', in the format of /proc/kallsyms."""
    if system.check().layer.capability(Symbols) is None:
        return None

    def text() -> str:
        source = system.check().layer.capability(Symbols)
        if source is None:
            raise UnsupportedError("this OS layer no longer shows symbols")
        return "".join(map(symbol_line, source.symbols()))

    return TextFile(system, "symbols", text, sized=False, may_block=True)


@os_entry("config")
def config(system: InstanceContext) -> Node | None:
    """The configuration that the kernel was built with, where it carries it."""
    if system.check().layer.capability(KernelConfig) is None:
        return None

    def text() -> bytes:
        source = system.check().layer.capability(KernelConfig)
        if source is None:
            raise UnsupportedError("this OS layer no longer shows a configuration")
        return source.config()

    return TextFile(system, "config", text)


class GrowingLog(File):
    """The log of a live machine: what is appended while it is open is read too."""

    __slots__ = ("_identity", "_system")

    def __init__(self, system: InstanceContext) -> None:
        self._system = system
        self._identity = ("log", system.key)

    @property
    def identity(self) -> Hashable:
        """See `Node.identity`."""
        return self._identity

    @property
    def may_block(self) -> bool:
        """See `Node.may_block`: it is read whole."""
        return True

    @property
    def thread_group(self) -> Hashable:
        """See `Node.thread_group`."""
        return self._system.thread_group

    def attributes(self) -> Attributes:
        """See `Node.attributes`: its size is not known before it is read."""
        return Attributes(0o100444, 0)

    def open(self, flags: int) -> OpenFile:
        """See `File.open`."""
        return _OpenLog(self._system)


class _OpenLog(OpenFile):
    """The log from the moment it was opened on: records that came before stay where they are in the file.

    It is the log of one kernel: where another one runs, opening by name gives that one's, and this one fails.
    """

    __slots__ = ("_data", "_last", "_source", "_system")

    def __init__(self, system: InstanceContext) -> None:
        self._system = system
        self._source = _log_of(system)
        self._data = bytearray()
        self._last = -1
        self._refresh()

    def _refresh(self) -> None:
        self._system.check()
        for record in self._source.records():
            if record.sequence > self._last:
                self._last = record.sequence
                for line in log_lines(record):
                    self._data += (escape_terminal(line[:-1]) + "\n").encode("utf-8", "surrogateescape")

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        """See `OpenFile.read`."""
        if offset + size > len(self._data):
            self._refresh()
        return bytes(self._data[offset : offset + size])
