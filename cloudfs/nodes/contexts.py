"""What the entries of a directory are made from: an instance and the identity of a thing in it.

A context is small and frozen, and holds no Process: it asks the instance for the one that is there now, and
gets ProcessExitedError where that is another one. A node's identity is its name and its context's `key`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from itertools import count
from typing import TypeVar

from cloudfs.entries import Entries
from cloudfs.nodes.kept import KEPT
from cloudfs.nodes.results import Results
from cloudfs.render import file_name
from engine.errors import ConnectorClosedError, NotFoundError
from engine.machine import Instance, Kind, Machine
from engine.memory import Memory
from engine.oslayer import HostOwned, Module, Process
from engine.records import dataclass
from engine.types import ModuleInfo, Region

C = TypeVar("C")
N = TypeVar("N")

_trees = count(1)

Owner = tuple[int, int] | None
"""uid and gid; None: the mounting user."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a node belongs to; without an instance: to the tree itself."""

    instance: Instance | None
    key: Hashable
    """Tells this thing from every other, also from what had its name or number before."""

    @property
    def live(self) -> bool:
        """Whether what it tells may change."""
        return self.instance is None or self.instance.live

    @property
    def may_block(self) -> bool:
        """Whether asking the target for something may have to wait for more than memory."""
        instance = self.instance
        if instance is None or instance.closed:
            return False
        memory = instance.memory_view if instance.kind == "connector" else _base_memory(instance)
        if memory is None:
            return False
        return memory.may_block or (instance.kind == "oslayer" and instance.live)

    @property
    def at_hand(self) -> bool:
        """Whether the thing itself was found a moment ago, so that nothing has to be waited for to know it."""
        return False

    @property
    def reads_block(self) -> bool:
        """Whether asking for a process's address space (maps, arguments, modules) may have to wait.

        This host's kernel answers only while the process's mmap_lock is free; whoever holds it may wait for
        a page of a file on this very mount. So a live layer that stands on no connector always may.
        """
        instance = self.instance
        return self.may_block or (
            instance is not None and instance.kind == "oslayer" and instance.live and instance.parent is None
        )

    @property
    def thread_group(self) -> Hashable:
        """See `Node.thread_group`: one for each instance."""
        return None if self.instance is None else self.instance.identity

    def owner(self) -> Owner:
        """Whose files these are."""
        return None


def _base_memory(instance: Instance) -> Memory | None:
    return None if instance.parent is None else instance.parent.memory_view


def check_opening(instance: Instance, opening: Hashable) -> Instance:
    """The instance, if it is still the one with that identity. Raises ConnectorClosedError else."""
    if instance.closed or instance.identity != opening:
        raise ConnectorClosedError(f"{instance.name} was removed or opened anew")
    return instance


@dataclass(frozen=True, slots=True)
class TreeContext(Context):
    """The tree itself: what is open, and what stays when nodes are made anew."""

    machine: Machine
    results: Mapping[Kind, Results]
    """What the commands written to each `new` came to."""
    problems: tuple[PluginProblem, ...] = ()

    @classmethod
    def of(cls, machine: Machine, problems: tuple[PluginProblem, ...] = ()) -> TreeContext:
        """A tree of its own over what is open."""
        return cls(None, ("tree", next(_trees)), machine, {"connector": Results(), "oslayer": Results()}, problems)


@dataclass(frozen=True, slots=True)
class PluginProblem:
    """Why the entries of an installed package are missing."""

    name: str
    distribution: str
    problem: str


@dataclass(frozen=True, slots=True)
class InstanceContext(Context):
    """An opened connector or OS layer, as opened at one moment."""

    instance: Instance

    @classmethod
    def of(cls, instance: Instance) -> InstanceContext:
        """The instance as it is opened now."""
        return cls(instance, instance.identity)

    def check(self) -> Instance:
        """The instance. Raises ConnectorClosedError where it was removed, or opened anew since."""
        return check_opening(self.instance, self.key)

    def modules(self) -> dict[str, Module]:
        """The kernel's modules by file name."""
        instance = self.check()
        return KEPT.get(instance, ("modules", self.key), lambda: _by_name(instance.layer.modules()), _weigh_list)


@dataclass(frozen=True, slots=True)
class ProcessContext(Context):
    """A process, told by its PID and by what tells it from others with that PID."""

    instance: Instance
    pid: int
    identity: Hashable
    """`Process.identity`."""
    opening: Hashable
    """`Instance.identity` as it was."""

    @classmethod
    def of(cls, instance: Instance, pid: int) -> ProcessContext:
        """The process that has that PID now. Raises ProcessExitedError."""
        opening, identity = instance.identity, instance.process(pid).identity
        return cls(instance, (opening, pid, identity), pid, identity, opening)

    @property
    def thread_group(self) -> Hashable:
        """See `Node.thread_group`: one for each process where each is asked by itself.

        A process of this host whose mmap_lock is held for ever takes the threads of its own group alone.
        """
        return self.key if self.reads_block and not self.may_block else self.instance.identity

    @property
    def at_hand(self) -> bool:
        """See `Context.at_hand`: never where its memory may have to be waited for, nor of a process of this host."""
        instance = self.instance
        memory = None if instance.closed else _base_memory(instance)
        return memory is not None and not memory.may_block and instance.at_hand(self.pid, self.identity)

    def check(self) -> Instance:
        """The instance. Raises ConnectorClosedError where it was removed, or opened anew since."""
        return check_opening(self.instance, self.opening)

    def process(self) -> Process:
        """The process, for facts; shared. Raises ProcessExitedError where it has ended."""
        return self.check().process_of(self.pid, self.identity)

    def open_process(self) -> Process:
        """A Process of one's own, to be closed. Raises ProcessExitedError where it has ended."""
        return self.check().open_process(self.pid, self.identity)

    def capability(self, kind: type[C]) -> C | None:
        """The object that does `kind` for this process, or None; reads no memory."""
        return self.process().capability(kind)

    def owner(self) -> Owner:
        """As /proc shows it for a process of this host, at most a second old; else None."""
        return KEPT.get(self.instance, ("owner", self.key), self._owner)

    def _owner(self) -> Owner:
        source = self.capability(HostOwned)
        return None if source is None else source.owner()

    def is_host(self) -> bool:
        """Whether it is a process of the host on which this program runs."""
        return self.capability(HostOwned) is not None

    def regions(self) -> dict[str, Region]:
        """Its mapped ranges by file name."""
        return KEPT.get(
            self.instance,
            ("regions", self.key),
            lambda: {region_name(region): region for region in self.process().regions()},
            _weigh_list,
        )

    def modules(self) -> dict[str, Module]:
        """Its modules by file name."""
        return KEPT.get(self.instance, ("modules", self.key), lambda: _by_name(self.process().modules()), _weigh_list)


@dataclass(frozen=True, slots=True)
class ThreadContext(Context):
    """A thread of a process."""

    instance: Instance
    process: ProcessContext
    tid: int

    @classmethod
    def of(cls, process: ProcessContext, tid: int, start_ticks: int | None) -> ThreadContext:
        """The thread that has that number and started then."""
        return cls(process.instance, (process.key, tid, start_ticks), process, tid)

    @property
    def thread_group(self) -> Hashable:
        """As the process."""
        return self.process.thread_group

    def owner(self) -> Owner:
        """As the process."""
        return self.process.owner()


@dataclass(frozen=True, slots=True)
class ModuleContext(Context):
    """A module of a process or of a kernel."""

    instance: Instance
    parent: ProcessContext | InstanceContext
    name: str
    """Its file name among the modules of its parent."""
    info: ModuleInfo

    @classmethod
    def of(cls, parent: ProcessContext | InstanceContext, name: str, info: ModuleInfo) -> ModuleContext:
        """The module of that file name."""
        return cls(parent.instance, (parent.key, "module", name, info.base, info.size), parent, name, info)

    @property
    def thread_group(self) -> Hashable:
        """As the process."""
        return self.parent.thread_group

    def module(self) -> Module:
        """The module. Raises NotFoundError where it is mapped no more, or elsewhere."""
        found = self.parent.modules().get(self.name)
        if found is None or found.info.base != self.info.base:
            raise NotFoundError(f"module {self.info.name!r} is no longer at {self.info.base or 0:#x}")
        return found

    def owner(self) -> Owner:
        """As the process; a kernel's are the mounting user's."""
        return self.parent.owner()


def _weigh_list(found: dict[str, N]) -> int:
    return 500 * len(found)


# -- names of things that may be called alike ----------------------------------------------------------


def region_name(region: Region) -> str:
    """`START-STOP.PERMS.NAME`: addresses as in maps, the file's base name or the kernel's word for it."""
    path = region.shown_path or "[anon]"
    name = path.rsplit("/", 1)[1] if path.startswith("/") else path
    return file_name(f"{region.start:08x}-{region.stop:08x}.{region.permissions}.{name}")


_LIKE_A_SUFFIX = re.compile(r"@[0-9a-f]+(#[0-9]+)?$").search


class UniqueNames:
    """Gives file names to things that may be called alike: `NAME` to the first, `NAME@ADDRESS` to further ones.

    A name that looks as if it had such a suffix gets one of its own, so that it can take nobody else's.
    """

    def __init__(self) -> None:
        self._uses: dict[str, int] = {}

    def name(self, raw: str, address: int | None) -> str:
        """A file name that was not given before; the same for the same calls in the same order."""
        wanted = file_name(raw)
        if not _LIKE_A_SUFFIX(wanted) and self._uses.setdefault(wanted, 0) == 0:
            self._uses[wanted] = 1
            return wanted
        suffix = f"@{address or 0:x}"
        wanted = file_name(raw, suffix)
        count = self._uses[wanted] = self._uses.get(wanted, 0) + 1
        return wanted if count == 1 else file_name(raw, f"{suffix}#{count}")


def _by_name(modules: Iterable[Module]) -> dict[str, Module]:
    names = UniqueNames()
    return {names.name(module.info.name, module.info.base): module for module in modules}


# -- what stands in the directories --------------------------------------------------------------------

root_entry: Entries[TreeContext] = Entries("the root")
connector_entry: Entries[InstanceContext] = Entries("a connector's directory")
os_entry: Entries[InstanceContext] = Entries("an OS's directory")
process_entry: Entries[ProcessContext] = Entries("a process's directory")
thread_entry: Entries[ThreadContext] = Entries("a thread's directory")
"""Below task/, as in /proc."""
thread_facts_entry: Entries[ThreadContext] = Entries("a thread's directory of facts")
"""Below threads/: what /proc does not have."""
module_entry: Entries[ModuleContext] = Entries("a module's directory")
