"""Machine: what is open, by name — connectors and OS layers, each standing on another.

    native (OS) ← qemu (connector) ← linux (OS) ← qemu (connector) ← …

`Machine` opens, names and closes; `Instance` is one opened thing with its place in the chain. What stands on
something is closed before it; what readers still hold lives on until they drop it.

Opening may wait for ever, as for a file on a filesystem that does not answer, and so may closing: both are done
without the lock. `Opening` holds the name meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import field
from itertools import islice
from typing import Literal, Self

from engine import chain, middleware, registry
from engine.connector import Connector
from engine.errors import (
    AlreadyExistsError,
    ConnectorClosedError,
    EngineError,
    InvalidArgumentError,
    NotFoundError,
    NotRecognisedError,
    PluginError,
    ProcessExitedError,
    TargetBusyError,
    UnsupportedError,
)
from engine.leases import Lease
from engine.memory import Memory
from engine.oslayer import Base, OsLayer, Process
from engine.records import dataclass

Kind = Literal["connector", "oslayer"]

RESERVED_NAMES = frozenset(
    "auto config images info info.json keyboard log mem modules net new phys_mem proc processes symbols".split()
)
"""Names that stand in the tree beside instances."""
LIST_LIFETIME = 1.0
"""Seconds for which a list of processes and their records are kept over a live target, at the most."""
LIST_SHARE = 20
"""A list is kept for no more than so many times what it took to make: what is cheap is fresh, as in /proc."""
AT_HAND = 0.1
"""Seconds for which what is at hand has to stay so: what is done without a thread then does not wait."""
PROCESS_LIMIT = 4096
"""Processes whose objects an instance keeps."""


@dataclass(slots=True)
class Counters:
    """What was done through an instance; shown in `info`."""

    reads: int = 0
    bytes_read: int = 0
    writes: int = 0
    bytes_written: int = 0
    faults: int = 0
    errors: int = 0


@dataclass(slots=True, eq=False)
class Instance:
    """One opened connector or OS layer: its name, its place in the chain, what is opened."""

    kind: Kind
    name: str
    spec: chain.Spec
    parent: Instance | None
    current_layer: OsLayer | None = None
    current_connector: Connector | None = None
    memory_view: Memory | None = None
    """Of a connector: its memory behind the middleware."""
    opened_live: bool = False
    writable: bool = False
    implied: bool = False
    """Whether a connector that stands on it opened it, and nobody asked for it."""
    children: list[Instance] = field(default_factory=list)
    generation: int = 1
    opened_at: float = field(default_factory=time.time)
    counters: Counters = field(default_factory=Counters)
    last_error: str | None = None
    _processes: OrderedDict[int, tuple[float, Process]] = field(default_factory=OrderedDict)
    _pids: tuple[float, list[int]] = (float("-inf"), [])
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listing: threading.Lock = field(default_factory=threading.Lock)
    """Held by who makes a list, which the others wait for."""

    @property
    def identity(self) -> tuple[str, str, float, int]:
        """Tells this opening from any other, also of one name and after a reopening."""
        return self.kind, self.name, self.opened_at, self.generation

    @property
    def lease(self) -> Lease | None:
        """What it hangs on that nothing changes, its own or of what it stands on; None: on nothing that could end."""
        connector, parent = self.current_connector, self.parent
        if self.opened_live:
            return None
        own = None if connector is None else connector.lease
        return parent.lease if own is None and parent is not None else own

    @property
    def live(self) -> bool:
        """Whether it may change from one moment to the next; may turn true while it is open, and stays so."""
        return self.opened_live or ((lease := self.lease) is not None and not lease.held)

    @property
    def layer(self) -> OsLayer:
        """The OS layer. Raises ConnectorClosedError after it was removed."""
        if self.current_layer is None:
            raise ConnectorClosedError(f"{self.name} was removed")
        return self.current_layer

    @property
    def connector(self) -> Connector:
        """The connector. Raises ConnectorClosedError after it was removed."""
        if self.current_connector is None:
            raise ConnectorClosedError(f"{self.name} was removed")
        return self.current_connector

    @property
    def memory(self) -> Memory:
        """Physical memory of a connector. Raises UnsupportedError of an OS, ConnectorClosedError once removed."""
        if self.memory_view is None:
            if self.current_layer is not None:
                raise UnsupportedError(f"{self.name} is an OS: `layer` has its processes and what memory it shows")
            raise ConnectorClosedError(f"{self.name} was removed")
        return self.memory_view

    @property
    def closed(self) -> bool:
        """Whether it was removed."""
        return self.current_layer is None and self.current_connector is None

    def _fresh(self, since: float) -> bool:
        return not self.live or time.monotonic() - since < LIST_LIFETIME

    def pids(self) -> list[int]:
        """The PIDs of an OS layer, ascending; over a live target at most a second old, less where that is cheap."""
        known = self._known_pids()
        if known is not None:
            return known
        with self._listing:
            known = self._known_pids()
            return self._list() if known is None else known

    def _known_pids(self) -> list[int] | None:
        """Those of the last list, if it is fresh."""
        expires, pids = self._pids
        return pids if pids and not (self.live and time.monotonic() > expires) else None

    def _list(self) -> list[int]:
        """Make a list; where it tells of the processes too, these are kept."""
        layer, generation, began = self.layer, self.generation, time.monotonic()
        try:
            found = layer.listing()
            pids = layer.pids() if found is None else list(found)
        except EngineError as error:
            self.last_error = str(error)
            raise
        now = time.monotonic()
        with self._lock:
            if generation == self.generation and self.current_layer is layer:
                self._pids = (now + min(LIST_LIFETIME, LIST_SHARE * (now - began)), pids)
                if found is not None and len(found) <= PROCESS_LIMIT:
                    self._processes = OrderedDict((pid, (now, process)) for pid, process in found.items())
        return pids

    def process(self, pid: int) -> Process:
        """The process with that PID, for facts; over a live target at most a second old.

        One object for all who ask: its records are shared, so do not close it. To read memory for longer,
        open one of your own with `layer.process(pid)`.
        """
        layer = self.layer
        with self._lock:
            known = self._processes.get(pid)
        if known is not None and self._fresh(known[0]):
            return known[1]
        now, generation = time.monotonic(), self.generation
        process = layer.process(pid)
        with self._lock:
            if generation != self.generation or self.current_layer is not layer:
                return process  # of what was opened before: for this caller alone
            self._processes[pid] = (now, process)
            self._processes.move_to_end(pid)
            for old, (since, _) in list(islice(self._processes.items(), 8)):
                if len(self._processes) > PROCESS_LIMIT or not self._fresh(since):
                    del self._processes[old]
        return process

    def at_hand(self, pid: int, identity: Hashable) -> bool:
        """Whether `process_of` would give that process without asking the target, for some time to come."""
        known = self._processes.get(pid)
        return known is not None and self._fresh(known[0] - AT_HAND) and known[1].identity == identity

    def process_of(self, pid: int, identity: Hashable) -> Process:
        """The process with that PID, if it is still the one known by `identity`; else ProcessExitedError."""
        process = self.process(pid)
        if process.identity != identity:
            raise ProcessExitedError(pid)
        return process

    def open_process(self, pid: int, identity: Hashable) -> Process:
        """A Process object of one's own, for an open file: close it when done."""
        process = self.process_of(pid, identity).again() if self.at_hand(pid, identity) else None
        if process is None:
            process = self.layer.process(pid)
        if process.identity != identity:
            process.close()
            raise ProcessExitedError(pid)
        return process

    def forget(self) -> None:
        """Drop cached lists: the next question is asked anew."""
        with self._lock:
            self._processes.clear()
        self._pids = (float("-inf"), [])


@dataclass(slots=True, eq=False)
class Opening:
    """What is being opened, or opened anew: its name is taken, and what it stands on cannot be removed."""

    kind: Kind
    name: str
    spec: chain.Spec
    parent: Instance | None
    begun: float = field(default_factory=time.monotonic)
    given_up: bool = False
    """All was closed meanwhile: what comes of it is closed at once."""
    ended: threading.Event = field(default_factory=threading.Event)

    def __str__(self) -> str:
        return f"{self.name} is being opened, for {time.monotonic() - self.begun:.0f} s so far"


class Machine:
    """All that is open. Use it as a context manager; not tied to a thread.

    No method waits for what another thread opens or closes, except for a default parent that both need.
    """

    def __init__(self, *, writable: bool = False) -> None:
        self.writable = writable
        self._instances: dict[tuple[Kind, str], Instance] = {}
        self._openings: dict[tuple[Kind, str], Opening] = {}
        self._lock = threading.Lock()
        """Of both tables and of what stands on what; never held while a target is opened, asked or closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def instances(self, kind: Kind) -> list[Instance]:
        """The instances of a kind, oldest first; without those that are being opened."""
        return [instance for (found, _), instance in list(self._instances.items()) if found == kind]

    def openings(self, kind: Kind) -> list[Opening]:
        """What of a kind is being opened, oldest first."""
        return [opening for (found, _), opening in list(self._openings.items()) if found == kind]

    def find(self, kind: Kind, name: str) -> Instance | None:
        """The instance of that name, or None."""
        return self._instances.get((kind, name))

    def get(self, kind: Kind, name: str) -> Instance:
        """The instance of that name. Raises NotFoundError that says which there are, TargetBusyError as it opens."""
        opening = self._openings.get((kind, name))
        instance = self.find(kind, name)
        if instance is None:
            if opening is not None:
                raise TargetBusyError(f"{opening}: it can be used when that has ended")
            word = "connector" if kind == "connector" else "OS"
            names = ", ".join(i.name for i in self.instances(kind)) or "none"
            raise NotFoundError(f"no {word} instance is called {name!r}; there are: {names}")
        return instance

    @property
    def default_os(self) -> Instance | None:
        """The oldest OS instance still standing that was asked for; else one that a connector opened to stand on."""
        return min(self.instances("oslayer"), key=lambda instance: instance.implied, default=None)

    def run(self, kind: Kind, line: str) -> Instance:
        """Carry out one line of `new`."""
        command = chain.parse_command(line)
        other: Kind = "oslayer" if kind == "connector" else "connector"
        parent = None if command.parent is None else self.get(other, command.parent)
        return self.open(kind, command.spec, name=command.name, parent=parent)

    def open(
        self, kind: Kind, spec: chain.Spec | str, *, name: str | None = None, parent: Instance | None = None
    ) -> Instance:
        """Open a connector or OS layer, on `parent` where it stands on one; `spec` may be written as in a chain.

        Raises AlreadyExistsError, InvalidArgumentError, PluginError, NotRecognisedError or what opening raises,
        TargetBusyError where `parent` is being opened anew, ConnectorClosedError where all was closed meanwhile;
        nothing is left open then.
        """
        if kind not in ("connector", "oslayer"):
            raise InvalidArgumentError(f"{kind!r} cannot be opened: want 'connector' or 'oslayer'")
        if isinstance(spec, str):
            spec = chain.parse_spec(spec)
        with self._reserved(kind, spec, name, parent) as opening:
            instance = self._build(opening)
            with self._lock:
                if not opening.given_up:
                    if name is None and instance.current_layer is not None and spec.plugin == registry.AUTO:
                        instance.name = self._free_name(kind, instance.current_layer.kind)
                    if instance.parent is not None:
                        instance.parent.children.append(instance)
                    self._instances[kind, instance.name] = instance
                    return instance
            self._shut(instance)
            raise ConnectorClosedError(f"{opening.name} was opened too late: all was closed meanwhile")

    @contextlib.contextmanager
    def _reserved(
        self, kind: Kind, spec: chain.Spec, name: str | None, parent: Instance | None
    ) -> Iterator[Opening]:
        """The name taken for as long as the context, or until all is closed."""
        if name is not None:
            chain.check_name(name)
        with self._lock:
            name = self._free_name(kind, spec.plugin) if name is None else name
            self._check_name(kind, name)
            if parent is not None:
                self._check_parent(parent)
            opening = self._openings[kind, name] = Opening(kind, name, spec, parent)
        try:
            yield opening
        finally:
            self._end(opening)

    def _check_name(self, kind: Kind, name: str) -> None:
        if name in RESERVED_NAMES:
            raise InvalidArgumentError(f"{name!r} cannot name an instance: it stands in the tree already")
        if (kind, name) in self._instances:
            raise AlreadyExistsError(f"there is an instance called {name!r} already")
        if (other := self._openings.get((kind, name))) is not None:
            raise AlreadyExistsError(f"{other}: take another name")

    def _check_parent(self, parent: Instance) -> None:
        if parent.closed:
            raise ConnectorClosedError(f"{parent.name} was removed")
        if (other := self._openings.get((parent.kind, parent.name))) is not None:
            raise TargetBusyError(f"{other}: nothing can stand on it before that has ended")

    def _end(self, opening: Opening) -> None:
        with self._lock:
            if self._openings.get((opening.kind, opening.name)) is opening:
                del self._openings[opening.kind, opening.name]
        opening.ended.set()

    def _free_name(self, kind: Kind, plugin: str) -> str:
        taken = {name for found, name in (*self._instances, *self._openings) if found == kind} | RESERVED_NAMES
        names = [plugin, *(f"{plugin}-{number}" for number in range(2, len(taken) + 3))]
        return next(name for name in names if name not in taken)

    def _build(self, opening: Opening) -> Instance:
        return self._open_connector(opening) if opening.kind == "connector" else self._open_os(opening, opening.spec)

    def _open_connector(self, opening: Opening) -> Instance:
        spec = opening.spec
        plugin = registry.load_connector(spec.plugin)
        check_options(spec, {**plugin.options_help, **middleware.OPTIONS_HELP})
        middleware.check(spec.options)
        overlaid = middleware.overlaid(spec.options)
        own = {key: value for key, value in spec.options.items() if key not in middleware.OPTIONS_HELP}
        with contextlib.ExitStack() as failed:
            if opening.parent is None and plugin.default_parent is not None:
                failed.callback(self._leave_parent, opening, self._stand_on_default(opening, plugin.default_parent))
            layer = None if opening.parent is None else opening.parent.layer
            opened = plugin.open(spec.target, own, parent=layer, writable=self.writable and not overlaid)
            failed.callback(opened.close)
            memory = middleware.wrap(opened.memory, spec.options)
            info = opened.info
            failed.pop_all()
        made = Instance("connector", opening.name, spec, opening.parent, None, opened, memory)
        made.opened_live, made.writable = info.live or overlaid, info.writable or overlaid
        return made

    def _stand_on_default(self, opening: Opening, plugin: str) -> Instance | None:
        """Stand on the OS of that name, opened now where there is none; gives it where that was done.

        Waits for another thread that opens it already.
        """
        made = None
        while True:
            with self._lock:
                parent, other = self._instances.get(("oslayer", plugin)), self._openings.get(("oslayer", plugin))
                if opening.given_up:
                    raise ConnectorClosedError(f"{opening.name} is not opened: all was closed meanwhile")
                if parent is not None and other is None:
                    opening.parent = parent
                    return parent if parent is made else None
            if other is not None:
                other.ended.wait()
                continue
            with contextlib.suppress(AlreadyExistsError):  # another thread came first
                made = self.open("oslayer", chain.Spec(plugin), name=plugin)
                made.implied = True

    def _leave_parent(self, opening: Opening, made: Instance | None) -> None:
        """Stand on nothing, and close the parent that was opened for this alone."""
        opening.parent = None
        if made is not None and self.find("oslayer", made.name) is made:
            with contextlib.suppress(TargetBusyError, NotFoundError):  # others stand on it by now
                self.remove("oslayer", made.name)

    def _open_os(self, opening: Opening, spec: chain.Spec) -> Instance:
        if spec.plugin == registry.AUTO:
            return self._recognise(opening)
        parent = opening.parent
        plugin = registry.load_oslayer(spec.plugin)
        check_options(spec, plugin.options_help)
        if plugin.needs_memory and parent is None:
            raise InvalidArgumentError(f"{spec.plugin} stands on a connector: name one with -c")
        if not plugin.needs_memory and parent is not None:
            raise InvalidArgumentError(f"{spec.plugin} stands on no connector: leave -c {parent.name} out")
        base = self._base(spec, parent)
        layer = plugin.open(base, spec.options)
        try:
            info = layer.info
        except BaseException:
            layer.close()
            raise
        live = info.live and base.lease is None  # else it was told so, and `Instance.live` asks the lease
        return Instance("oslayer", opening.name, spec, parent, layer, opened_live=live, writable=info.writable)

    def _base(self, spec: chain.Spec, parent: Instance | None) -> Base:
        if parent is None:
            return Base(target=spec.target, writable=self.writable, live=True)
        connector, lease = parent.connector, parent.lease
        live = parent.live or lease is not None
        again = connector.hints if parent.live else None
        return Base(parent.memory, connector.hints(), spec.target, parent.writable, live, lease, again, connector.ask)

    def _recognise(self, opening: Opening) -> Instance:
        parent, spec = opening.parent, opening.spec
        if parent is None:
            raise InvalidArgumentError("auto stands on a connector: name one with -c")
        reasons = []
        for plugin in registry.plugins("oslayer"):
            try:
                if not registry.load_oslayer(plugin.name).needs_memory:
                    continue
                return self._open_os(opening, chain.Spec(plugin.name, spec.target, spec.options))
            except (NotRecognisedError, PluginError) as error:
                reasons.append(f"{plugin.name}: {error}")
        tried = "; ".join(reasons) or "no OS layer for memory is installed"
        raise NotRecognisedError(f"no OS was recognised in {parent.spec} ({tried})")

    def remove(self, kind: Kind, name: str) -> None:
        """Close an instance. Raises TargetBusyError naming what stands on it, or where it is being opened."""
        with self._lock:
            instance = self.get(kind, name)
            self._check_idle(instance, "remove that first")
            del self._instances[kind, name]
            opened = self._detach(instance)
        _close_all(opened)

    def _check_idle(self, instance: Instance, advice: str) -> None:
        """Raise TargetBusyError where something stands on it, or is about to, or where it is being opened anew."""
        if (other := self._openings.get((instance.kind, instance.name))) is not None:
            raise TargetBusyError(f"{other}: wait until that has ended")
        if instance.children:
            names = ", ".join(child.name for child in instance.children)
            raise TargetBusyError(f"{instance.name} is in use: {names} stands on it; {advice}")
        for opening in self._openings.values():
            if opening.parent is instance:
                raise TargetBusyError(f"{instance.name} is in use: {opening}, on it; wait until that has ended")

    @staticmethod
    def _detach(instance: Instance) -> list[OsLayer | Connector]:
        """Take from an instance what it has opened, to be closed without the lock."""
        if instance.parent is not None and instance in instance.parent.children:
            instance.parent.children.remove(instance)
        opened = [one for one in (instance.current_layer, instance.current_connector) if one is not None]
        instance.current_layer = instance.current_connector = instance.memory_view = None
        instance.forget()
        return opened

    def _shut(self, instance: Instance) -> None:
        _close_all(self._detach(instance))

    def reopen(self, instance: Instance) -> None:
        """Open an instance's target anew, in place: its generation grows by one, old nodes are gone.

        Raises TargetBusyError where something stands on it, ConnectorClosedError where it was removed, and what
        opening raises; it stays as it was then.
        """
        with self._lock:
            if instance.closed:
                raise ConnectorClosedError(f"{instance.name} was removed")
            self._check_idle(instance, "remove that first")
            opening = Opening(instance.kind, instance.name, instance.spec, instance.parent)
            self._openings[instance.kind, instance.name] = opening
        try:
            fresh = self._build(opening)
            with self._lock:
                if opening.given_up:
                    old = self._detach(fresh)
                else:
                    old = [one for one in (instance.current_layer, instance.current_connector) if one is not None]
                    instance.current_layer, instance.current_connector = fresh.current_layer, fresh.current_connector
                    instance.memory_view, instance.opened_live = fresh.memory_view, fresh.opened_live
                    instance.generation += 1
                    instance.forget()
            _close_all(old)
            if opening.given_up:
                raise ConnectorClosedError(f"{instance.name} was removed while it was opened anew")
        finally:
            self._end(opening)

    def close(self) -> None:
        """Close everything, the last opened first; what is being opened is closed when it comes."""
        with self._lock:
            for opening in self._openings.values():
                opening.given_up = True
            self._openings.clear()
            instances = list(reversed(self._instances.values()))
            self._instances.clear()
            opened = [one for instance in instances for one in self._detach(instance)]
        _close_all(opened)


def _close_all(opened: Sequence[OsLayer | Connector]) -> None:
    """Close them in this order, all of them also where one fails."""
    with contextlib.ExitStack() as stack:
        for one in reversed(opened):
            stack.callback(one.close)


def check_options(spec: chain.Spec, known: Mapping[str, str]) -> None:
    """Refuse options that a plugin does not know. Raises InvalidArgumentError that lists those it does."""
    for key in spec.options:
        if key not in known:
            names = ", ".join(f"{name}=" for name in sorted(known)) or "none"
            raise InvalidArgumentError(f"{spec.plugin} has no option {key}=; it knows: {names}")
