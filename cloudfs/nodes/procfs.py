"""The files of a process that /proc/PID has too, byte for byte in its formats (proc(5)).

A link of this host's process leads where it leads in /proc. One of any other target is `NAME:` and the
target's path: readable and dangling, so that nobody is led to a file of this host that only has that name.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloudfs import render
from cloudfs.entries import Entries
from cloudfs.node import Attributes, Link, Node
from cloudfs.nodes.contexts import ProcessContext, ThreadContext, process_entry, thread_entry
from cloudfs.nodes.directories import ContextDirectory, EntryDirectory
from cloudfs.nodes.files.text import TextFile
from cloudfs.nodes.kept import KEPT
from engine.errors import NotFoundError, ProcessExitedError
from engine.oslayer import ProcFiles
from engine.types import ThreadInfo

READ_ADDRESS_SPACE = frozenset({"cmdline", "environ", "maps"})
"""Files for which the kernel looks into the process's memory or its list of mappings."""
LIKE_PROC = frozenset(
    "cmdline environ comm stat status exe cwd root fd task cgroup limits io mounts mountinfo statm".split()
)
"""Entries of a process that README need not explain."""
DEAR = frozenset({"mounts", "mountinfo"})
"""Files that a machine may have thousands of lines of: they are not rendered for stat(2), and say size 0."""
MODES = {"environ": 0o400}
"""Permissions as in /proc; 0444 where nothing is said."""


def files_of(context: ProcessContext | ThreadContext) -> ProcFiles:
    """The files of a process or thread. Raises NotFoundError where they are not known."""
    process = context.process if isinstance(context, ThreadContext) else context
    files = process.capability(ProcFiles)
    if files is None:
        raise NotFoundError(f"the files in /proc of process {process.pid} are not known")
    return files.thread(context.tid) if isinstance(context, ThreadContext) else files


def _names(process: ProcessContext) -> frozenset[str]:
    """Which files the OS layer knows of a process."""

    def listed() -> frozenset[str]:
        files = process.capability(ProcFiles)
        return frozenset() if files is None else frozenset(files.names())

    return KEPT.get(process.instance, ("names", process.key), listed)


def proc_file(context: ProcessContext | ThreadContext, name: str) -> Node | None:
    """A text file of /proc, where the OS layer knows it."""
    process = context.process if isinstance(context, ThreadContext) else context
    if name not in _names(process):
        return None
    blocks = process.reads_block if name in READ_ADDRESS_SPACE else None
    return TextFile(
        context,
        name,
        lambda: files_of(context).read(name),
        mode=MODES.get(name, 0o444),
        sized=name not in DEAR,
        may_block=blocks,
    )


@process_entry("maps")
def maps(process: ProcessContext) -> Node | None:
    """Its mapped ranges, in the format of /proc/PID/maps."""

    def text() -> str | bytes:
        files = process.capability(ProcFiles)
        if files is not None:
            try:
                return files.read("maps")
            except ProcessExitedError:
                raise
            except NotFoundError:
                pass
        return render.maps_text(process.process().regions())

    return TextFile(process, "maps", text, may_block=process.reads_block)


def _register(entries: Entries[ProcessContext], name: str, summary: str) -> None:
    def make(process: ProcessContext) -> Node | None:
        return proc_file(process, name)

    make.__doc__ = summary
    entries(name)(make)


def _register_thread(name: str, summary: str) -> None:
    def make(thread: ThreadContext) -> Node | None:
        return proc_file(thread, name)

    make.__doc__ = summary
    thread_entry(name)(make)


for _name, _summary in {
    "cmdline": "Its arguments, each followed by NUL.",
    "environ": "Its environment as it was when the program began, each variable followed by NUL.",
    "comm": "Its name.",
    "stat": "Its state as numbers, in the format of /proc/PID/stat; what is not known is 0.",
    "status": "Its state for people, in the format of /proc/PID/status.",
    "statm": "Its sizes in pages, in the format of /proc/PID/statm.",
    "cgroup": "Its control groups, in the format of /proc/PID/cgroup.",
    "limits": "Its limits, in the format of /proc/PID/limits.",
    "io": "What it has read and written, in the format of /proc/PID/io.",
    "mounts": "The mounts that it sees, in the format of /proc/PID/mounts.",
    "mountinfo": "The mounts that it sees, in the format of /proc/PID/mountinfo.",
}.items():
    _register(process_entry, _name, _summary)

for _name, _summary in {
    "comm": "Its name.",
    "stat": "Its state as numbers, in the format of /proc/PID/task/TID/stat.",
    "status": "Its state for people, in the format of /proc/PID/task/TID/status.",
}.items():
    _register_thread(_name, _summary)


class TargetLink(Link):
    """A link of a process: exe, cwd, root, fd/N."""

    __slots__ = ("_identity", "_name", "_process")

    def __init__(self, process: ProcessContext, name: str) -> None:
        self._process = process
        self._name = name
        self._identity = (name, process.key)

    @property
    def identity(self) -> object:
        """See `Node.identity`."""
        return self._identity

    @property
    def may_block(self) -> bool:
        """See `Node.may_block`."""
        return self._process.may_block

    @property
    def thread_group(self) -> object:
        """See `Node.thread_group`."""
        return self._process.thread_group

    def attributes(self) -> Attributes:
        """See `Node.attributes`."""
        plain = super().attributes()
        owner = self._process.owner()
        return plain if owner is None else Attributes(plain.mode, 0, *owner)

    def target(self) -> str | bytes:
        """See `Link.target`."""
        text = files_of(self._process).link(self._name)
        return text if self._process.is_host() else f"{self._process.instance.name}:{text}"


def tells_link(process: ProcessContext, name: str) -> bool:
    """Whether the OS layer knows a link of a process, or, by `fd`, what it has open."""
    files = process.capability(ProcFiles)
    return files is not None and name in files.links()


def _register_link(name: str, summary: str) -> None:
    def make(process: ProcessContext) -> Node | None:
        return TargetLink(process, name) if tells_link(process, name) else None

    make.__doc__ = summary
    process_entry(name)(make)


_register_link("exe", "Its program.")
_register_link("cwd", "Its working directory.")
_register_link("root", "Its root directory.")


@process_entry("fd")
def descriptors(process: ProcessContext) -> Node | None:
    """What it has open: a link for each descriptor."""
    return DescriptorsDirectory(process) if tells_link(process, "fd") else None


class DescriptorsDirectory(ContextDirectory[ProcessContext]):
    """The descriptors of a process."""

    __slots__ = ()

    def __init__(self, process: ProcessContext) -> None:
        super().__init__(process, "fd", mode=0o500)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for number in files_of(self.context).descriptors():
            yield str(number), TargetLink(self.context, f"fd/{number}")

    def child(self, name: str) -> Node | None:
        """See `Directory.child`; asks for the one link alone."""
        if decimal(name) is None:
            return None
        link = TargetLink(self.context, f"fd/{name}")
        try:
            link.target()
        except ProcessExitedError:
            raise
        except NotFoundError:
            return None
        return link


@process_entry("task")
def task(process: ProcessContext) -> Node | None:
    """Its threads."""
    return None if process.capability(ProcFiles) is None else ThreadsDirectory(process, "task", thread_entry)


class ThreadsDirectory(ContextDirectory[ProcessContext]):
    """The threads of a process."""

    __slots__ = ("_entries", "_name")

    def __init__(self, process: ProcessContext, name: str, entries: Entries[ThreadContext]) -> None:
        super().__init__(process, name, may_block=True)
        self._name = name
        self._entries = entries

    def _found(self) -> dict[int, ThreadInfo]:
        process = self.context
        return KEPT.get(
            process.instance,
            ("threads", process.key),
            lambda: {thread.tid: thread for thread in process.process().threads()},
            lambda found: 200 * len(found),
        )

    def _directory(self, thread: ThreadInfo) -> Node:
        context = ThreadContext.of(self.context, thread.tid, thread.start_ticks)
        return EntryDirectory(context, self._name, self._entries)

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        for tid, thread in self._found().items():
            yield str(tid), self._directory(thread)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        number = decimal(name)
        thread = None if number is None else self._found().get(number)
        return None if thread is None else self._directory(thread)


def decimal(name: str) -> int | None:
    """The number that a name spells as listings do: no sign, no leading zeros, no other digits than ASCII."""
    if not (name.isascii() and name.isdigit()) or len(name) > 20 or (name[0] == "0" and name != "0"):
        return None
    return int(name)


