"""Openings that take long, or never end: they hold their own name and what they stand on, and nothing else."""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from engine import registry
from engine.bytes_memory import BytesMemory
from engine.connector import Connector
from engine.errors import AlreadyExistsError, ConnectorClosedError, TargetBusyError
from engine.machine import Instance, Machine
from engine.memory_map import MemoryMap
from engine.oslayer import OsLayer
from engine.types import ConnectorInfo, OsInfo

SECONDS = 10


@dataclass
class Gate:
    """Where an opening waits."""

    begun: threading.Event = field(default_factory=threading.Event)
    free: threading.Event = field(default_factory=threading.Event)
    fails: bool = False

    def enter(self) -> None:
        self.begun.set()
        assert self.free.wait(SECONDS)
        if self.fails:
            raise OSError("the target is broken")


GATES: dict[str, Gate] = {}
CLOSED: list[str] = []


def pass_gate(name: str) -> None:
    if name in GATES:
        GATES[name].enter()


class SlowConnector(Connector):
    kind = "slow"
    summary = "opens when its gate is open"
    memory = BytesMemory(b"RAM")
    memory_map = MemoryMap.whole(3)

    def __init__(self, target):
        self.target = target

    @classmethod
    def open(cls, target, options, *, parent, writable):
        pass_gate(target)
        return cls(target)

    @property
    def info(self):
        return ConnectorInfo("slow", self.target, 3, 3, live=True, writable=False)

    def close(self):
        CLOSED.append(self.target)
        pass_gate(f"closing {self.target}")


class GuestConnector(SlowConnector):
    kind = "slow-guest"
    default_parent = "slow-host"


class SlowLayer(OsLayer):
    kind = "slow-os"
    needs_memory = True

    def __init__(self, target):
        self.target = target

    @classmethod
    def open(cls, base, options):
        pass_gate(base.target or cls.kind)
        return cls(base.target or cls.kind)

    @property
    def info(self):
        return OsInfo(self.kind, live=True)

    def pids(self):
        return []

    def process(self, pid):
        raise NotImplementedError

    def close(self):
        CLOSED.append(self.target)


class SlowHost(SlowLayer):
    kind = "slow-host"
    needs_memory = False


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    GATES.clear()
    CLOSED.clear()
    module = types.ModuleType("test_machine_openings_leaves")
    vars(module).update(SlowConnector=SlowConnector, GuestConnector=GuestConnector, SlowLayer=SlowLayer,
                        SlowHost=SlowHost)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for kind, leaf in (("connector", SlowConnector), ("connector", GuestConnector), ("oslayer", SlowLayer),
                       ("oslayer", SlowHost)):
        monkeypatch.setitem(registry._BUILT_IN[kind], leaf.kind, f"{module.__name__}:{leaf.__name__}")


@dataclass
class Begun:
    """An opening in a thread of its own."""

    gate: Gate
    thread: threading.Thread
    came: list[Instance | Exception]

    def finish(self) -> Instance | Exception:
        self.gate.free.set()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        return self.came[0]


@contextlib.contextmanager
def begun(act, gate: str, *, fails: bool = False) -> Iterator[Begun]:
    """`act`, which has come to its gate."""
    GATES[gate] = Gate(fails=fails)
    came: list[Instance | Exception] = []

    def run() -> None:
        try:
            came.append(act())
        except Exception as error:
            came.append(error)

    one = Begun(GATES[gate], threading.Thread(target=run, daemon=True), came)
    one.thread.start()
    try:
        assert one.gate.begun.wait(SECONDS)
        yield one
    finally:
        one.finish()


def opens(machine: Machine, kind: str, line: str):
    return lambda: machine.run(kind, line)


def test_while_one_opens_others_are_opened_and_removed_and_listed():
    with Machine() as machine, begun(opens(machine, "connector", "late slow:a"), "a") as late:
        machine.run("connector", "vm slow:b")
        assert [instance.name for instance in machine.instances("connector")] == ["vm"]
        machine.remove("connector", "vm")
        assert late.finish() is machine.get("connector", "late")
        assert CLOSED == ["b"]


def test_what_is_being_opened_is_shown_until_it_has_ended():
    with Machine() as machine, begun(opens(machine, "connector", "late slow:a"), "a") as late:
        (opening,) = machine.openings("connector")
        assert (opening.name, str(opening.spec)) == ("late", "slow:a")
        assert machine.openings("oslayer") == []
        late.finish()
        assert machine.openings("connector") == []


def test_the_name_of_what_is_being_opened_is_taken():
    with Machine() as machine, begun(opens(machine, "connector", "late slow:a"), "a"):
        with pytest.raises(AlreadyExistsError, match="late is being opened"):
            machine.run("connector", "late slow:b")
        for use in (lambda: machine.remove("connector", "late"), lambda: machine.get("connector", "late"),
                    lambda: machine.run("oslayer", "web -c late slow-os")):
            with pytest.raises(TargetBusyError, match="late is being opened"):
                use()


def test_a_name_is_free_again_when_its_opening_fails():
    with Machine() as machine, begun(opens(machine, "connector", "late slow:a"), "a", fails=True) as late:
        assert isinstance(late.finish(), OSError)
        del GATES["a"]
        assert machine.run("connector", "late slow:a").name == "late"


def test_unnamed_ones_get_different_names_though_none_has_come_yet():
    with (
        Machine() as machine,
        begun(lambda: machine.open("connector", "slow:a"), "a") as first,
        begun(lambda: machine.open("connector", "slow:b"), "b") as second,
    ):
        assert {first.finish().name, second.finish().name} == {"slow", "slow-2"}


def test_what_something_is_about_to_stand_on_cannot_be_removed():
    with Machine() as machine:
        machine.run("connector", "vm slow:a")
        with (
            begun(opens(machine, "oslayer", "web -c vm slow-os:web"), "web"),
            pytest.raises(TargetBusyError, match="vm is in use: web is being opened"),
        ):
            machine.remove("connector", "vm")
        with pytest.raises(TargetBusyError, match="web stands on it"):
            machine.remove("connector", "vm")


def test_what_comes_after_all_was_closed_is_closed_at_once():
    with Machine() as machine, begun(opens(machine, "connector", "late slow:a"), "a") as late:
        machine.run("connector", "vm slow:b")
        machine.close()
        assert CLOSED == ["b"]
        assert isinstance(late.finish(), ConnectorClosedError)
        assert CLOSED == ["b", "a"]
        assert machine.instances("connector") == machine.openings("connector") == []


def test_a_layer_that_comes_after_all_was_closed_is_closed_at_once():
    with Machine() as machine:
        machine.run("connector", "vm slow:a")
        with begun(opens(machine, "oslayer", "web -c vm slow-os:web"), "web") as late:
            machine.close()
            assert isinstance(late.finish(), ConnectorClosedError)
            assert CLOSED == ["a", "web"]


def test_closing_one_that_takes_long_holds_up_no_other():
    with Machine() as machine:
        machine.run("connector", "vm slow:a")
        with begun(lambda: machine.remove("connector", "vm"), "closing a"):
            assert machine.instances("connector") == []
            machine.run("connector", "vm slow:b")
            machine.remove("connector", "vm")
            assert CLOSED == ["a", "b"]


def test_all_are_closed_though_one_fails_to():
    with Machine() as machine:
        machine.run("connector", "first slow:a")
        machine.run("connector", "second slow:b")
        GATES["closing b"] = Gate(fails=True)
        GATES["closing b"].free.set()
        with pytest.raises(OSError, match="broken"):
            machine.close()
        assert CLOSED == ["b", "a"]


def test_two_that_need_the_same_parent_open_it_once():
    with (
        Machine() as machine,
        begun(opens(machine, "connector", "one slow-guest:a"), "slow-host") as first,
    ):
        second = threading.Thread(target=machine.run, args=("connector", "two slow-guest:b"), daemon=True)
        second.start()
        assert isinstance(first.finish(), Instance)
        second.join(SECONDS)
        (host,) = machine.instances("oslayer")
        assert {child.name for child in host.children} == {"one", "two"}


def test_a_parent_opened_for_one_that_fails_stays_where_another_stands_on_it_by_then():
    with Machine() as machine, begun(opens(machine, "connector", "one slow-guest:a"), "a", fails=True) as first:
        machine.run("connector", "two slow-guest:b")
        assert isinstance(first.finish(), OSError)
        (host,) = machine.instances("oslayer")
        assert [child.name for child in host.children] == ["two"]
        machine.remove("connector", "two")
        machine.remove("oslayer", "slow-host")


def test_while_one_is_opened_anew_it_is_read_as_before_and_cannot_be_removed():
    with Machine() as machine:
        instance = machine.run("connector", "vm slow:a")
        old = instance.connector
        with begun(lambda: machine.reopen(instance), "a") as late:
            assert instance.connector is old
            with pytest.raises(TargetBusyError, match="vm is being opened"):
                machine.remove("connector", "vm")
            late.finish()
            assert instance.connector is not old
            assert CLOSED == ["a"]
            assert instance.generation == 2


def test_one_that_is_opened_anew_after_all_was_closed_is_closed_at_once():
    with Machine() as machine:
        instance = machine.run("connector", "vm slow:a")
        with begun(lambda: machine.reopen(instance), "a") as late:
            machine.close()
            assert isinstance(late.finish(), ConnectorClosedError)
            assert CLOSED == ["a", "a"]
            assert instance.closed
