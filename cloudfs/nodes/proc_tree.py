"""`os/NAME/proc/`: a look-alike of /proc, on which ps, top, free, lsof and psutil run.

Each file is what the target's own /proc would show; what its memory does not tell is not there. Files are of size 0,
as in /proc, and links have the plain text that they have there: do not follow them.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator

from cloudfs.node import Node
from cloudfs.nodes.contexts import InstanceContext, ProcessContext, ThreadContext, os_entry
from cloudfs.nodes.directories import ContextDirectory, ContextLink
from cloudfs.nodes.files.text import TextFile
from cloudfs.nodes.kept import KEPT
from cloudfs.nodes.net import NetDirectory
from cloudfs.nodes.procfs import MODES, decimal, files_of, tells_link
from cloudfs.render import maps_text, symbol_line
from engine.errors import EngineError, NotFoundError, UnsupportedError
from engine.oslayer import KernelConfig, ProcFiles, Sockets, Symbols, SystemFiles

LINKS = ("cwd", "exe", "root")
SELF = "1"
"""Where `self` leads: no process of the target reads this tree, and tools ask no more than whether there is one."""


@os_entry("proc")
def proc(system: InstanceContext) -> Node | None:
    """A /proc for ps, top, lsof and psutil; of this host a link to its own."""
    try:
        layer = system.check().layer
        if layer.info.kind == "native":
            return ContextLink(system, "proc", "/proc")
        return None if layer.capability(SystemFiles) is None else ProcTree(system)
    except EngineError:
        return None


def _files(system: InstanceContext) -> SystemFiles:
    found = system.check().layer.capability(SystemFiles)
    if found is None:
        raise UnsupportedError("this OS layer no longer shows files of its system")
    return found


class SystemDirectory(ContextDirectory[InstanceContext]):
    """The files of the system below one directory of /proc."""

    __slots__ = ("_prefix",)

    def __init__(self, system: InstanceContext, prefix: str) -> None:
        super().__init__(system, f"proc/{prefix}")
        self._prefix = prefix

    def _names(self) -> tuple[str, ...]:
        system = self.context
        return KEPT.get(system.instance, ("proc names", system.key), lambda: _files(system).names())

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        below = (name[len(self._prefix) :] for name in self._names() if name.startswith(self._prefix))
        for name in dict.fromkeys(name.partition("/")[0] for name in below):
            node = self._named(name)
            if node is not None:
                yield name, node

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        return self._named(name)

    def _named(self, name: str) -> Node | None:
        path, names, system = self._prefix + name, self._names(), self.context
        if path in names:
            return _text(system, f"proc/{path}", lambda: _files(system).read(path))
        inside = any(one.startswith(f"{path}/") for one in names)
        return SystemDirectory(system, f"{path}/") if inside else None


class ProcTree(SystemDirectory):
    """The root of it: the system's files, and a directory for each process."""

    __slots__ = ()

    def __init__(self, system: InstanceContext) -> None:
        super().__init__(system, "")

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`; processes that end meanwhile are left out."""
        instance = self.context.check()
        yield from super().children()
        for name in ("config.gz", "kallsyms", "net", "self"):
            node = self._special(name)
            if node is not None:
                yield name, node
        for pid in instance.pids():
            try:
                yield str(pid), ProcProcess(ProcessContext.of(instance, pid))
            except EngineError:
                continue

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        pid = decimal(name)
        if pid is not None:
            try:
                return ProcProcess(ProcessContext.of(self.context.check(), pid))
            except NotFoundError:
                return None
        return self._special(name) or super().child(name)

    def _special(self, name: str) -> Node | None:
        system = self.context
        layer = system.check().layer
        if name == "self":
            return ContextLink(system, "proc/self", SELF)
        if name == "net" and layer.capability(Sockets) is not None:
            return NetDirectory(system, "proc/net")
        if name == "kallsyms" and layer.capability(Symbols) is not None:
            return _text(system, "proc/kallsyms", lambda: _symbols(system))
        if name == "config.gz" and layer.capability(KernelConfig) is not None:
            return _text(system, "proc/config.gz", lambda: gzip.compress(_config(system), mtime=0))
        return None


def _symbols(system: InstanceContext) -> str:
    found = system.check().layer.capability(Symbols)
    return "" if found is None else "".join(map(symbol_line, found.symbols()))


def _config(system: InstanceContext) -> bytes:
    found = system.check().layer.capability(KernelConfig)
    if found is None:
        raise UnsupportedError("this OS layer no longer shows its kernel's configuration")
    return found.config()


def _text(
    context: InstanceContext | ProcessContext | ThreadContext, name: str, make: Callable[[], str | bytes]
) -> TextFile:
    """A file of size 0, as /proc has them; rendered in a thread."""
    mode = MODES.get(name.rpartition("/")[2], 0o444)
    return TextFile(context, name, make, mode=mode, sized=False, may_block=True)


class _OfProcess(ContextDirectory[ProcessContext]):
    """A directory of a process of the look-alike."""

    __slots__ = ()

    def __init__(self, process: ProcessContext, name: str) -> None:
        super().__init__(process, f"proc/{name}", may_block=True)

    def _own(self) -> ProcFiles:
        """Raises NotFoundError, ProcessExitedError."""
        return files_of(self.context)


class ProcProcess(_OfProcess):
    """One process: /proc/PID."""

    __slots__ = ()

    def __init__(self, process: ProcessContext) -> None:
        super().__init__(process, "")

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name in (*self._names(), "maps", *LINKS, "fd", "fdinfo", "net", "task"):
            node = self.child(name)
            if node is not None:
                yield name, node

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        process = self.context
        if name == "maps":
            return _text(process, "proc/maps", lambda: maps_text(process.process().regions()))
        if process.capability(ProcFiles) is None:
            return None
        if name in LINKS:
            return ProcLink(process, name) if tells_link(process, name) else None
        if name in ("fd", "fdinfo"):
            return ProcDescriptors(process, name) if tells_link(process, "fd") else None
        if name == "task":
            return ProcThreads(process)
        if name == "net":
            there = process.check().layer.capability(Sockets) is not None
            return ContextLink(process, "proc/net", "../net") if there else None
        return _text(process, f"proc/{name}", lambda: self._own().read(name)) if name in self._names() else None

    def _names(self) -> tuple[str, ...]:
        files = self.context.capability(ProcFiles)
        return () if files is None else files.names()


class ProcLink(ContextLink):
    """A link of a process with the text that it has in the target; what cannot be told reads as in /proc: not there."""

    __slots__ = ("_name", "_process")

    def __init__(self, process: ProcessContext, name: str) -> None:
        super().__init__(process, f"proc/{name}", "")
        self._process = process
        self._name = name

    @property
    def may_block(self) -> bool:
        """See `Node.may_block`."""
        return True

    def target(self) -> str | bytes:
        """See `Link.target`."""
        return files_of(self._process).link(self._name)


class ProcDescriptors(_OfProcess):
    """What a process has open: links in `fd`, files in `fdinfo`."""

    __slots__ = ("_kind",)

    def __init__(self, process: ProcessContext, kind: str) -> None:
        super().__init__(process, kind)
        self._kind = kind

    def _node(self, number: int) -> Node:
        path, process = f"{self._kind}/{number}", self.context
        if self._kind == "fd":
            return ProcLink(process, path)
        return _text(process, f"proc/{path}", lambda: self._own().read(path))

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for number in self._own().descriptors():
            yield str(number), self._node(number)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        number = decimal(name)
        return self._node(number) if number is not None and number in self._own().descriptors() else None


class ProcThreads(_OfProcess):
    """The threads of a process: /proc/PID/task."""

    __slots__ = ()

    def __init__(self, process: ProcessContext) -> None:
        super().__init__(process, "task")

    def _threads(self) -> dict[int, ThreadContext]:
        process = self.context
        found = process.process().threads()
        return {one.tid: ThreadContext.of(process, one.tid, one.start_ticks) for one in found}

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for tid, thread in self._threads().items():
            yield str(tid), ProcThread(thread)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        tid = decimal(name)
        thread = None if tid is None else self._threads().get(tid)
        return None if thread is None else ProcThread(thread)


class ProcThread(ContextDirectory[ThreadContext]):
    """One thread: /proc/PID/task/TID."""

    __slots__ = ()

    def __init__(self, thread: ThreadContext) -> None:
        super().__init__(thread, "proc", may_block=True)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for name in files_of(self.context).names():
            yield name, self._file(name)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        return self._file(name) if name in files_of(self.context).names() else None

    def _file(self, name: str) -> Node:
        thread = self.context
        return _text(thread, f"proc/{name}", lambda: files_of(thread).read(name))
