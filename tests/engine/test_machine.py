"""Machine and Instance: names, chains, generations, ownership, and the order in which things close."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import as_nobody

from engine.bytes_memory import BytesMemory
from engine.chain import Spec
from engine.connector import Connector
from engine.errors import (
    AlreadyExistsError,
    ConnectorClosedError,
    InvalidArgumentError,
    NotFoundError,
    NotRecognisedError,
    PluginError,
    ProcessExitedError,
    TargetBusyError,
    UnsupportedError,
)
from engine.machine import Machine
from engine.memory_map import MemoryMap
from engine.oslayer import OsLayer, Process
from engine.targets import chain_of, open_target
from engine.types import ConnectorInfo, OsInfo, ProcessInfo

CLOSED: list[str] = []


class GuestProcess(Process):
    def __init__(self, pid, start):
        self._info = ProcessInfo(pid=pid, name=f"p{pid}", start_ticks=start)

    @property
    def info(self):
        return self._info

    @property
    def memory(self):
        return BytesMemory(b"guest")

    def regions(self):
        return iter(())


class GuestConnector(Connector):
    """Stands on an OS layer, as a hypervisor's guest stands on its host."""

    kind = "guest"
    summary = "a guest"
    default_parent = "guestos-host"
    options_help = {"fail": "yes: fail"}

    def __init__(self, target):
        self.target = target

    @classmethod
    def open(cls, target, options, *, parent, writable):
        assert isinstance(parent, OsLayer)
        return cls(target)

    memory = BytesMemory(b"RAM of a guest")
    memory_map = MemoryMap.whole(14)

    @property
    def info(self):
        return ConnectorInfo("guest", self.target, 14, 14, live=True, writable=False)

    def close(self):
        CLOSED.append(f"connector {self.target}")


class GuestLayer(OsLayer):
    kind = "guestos"
    start = 5

    def __init__(self, target):
        self.target = target
        self.listed = 0

    @classmethod
    def open(cls, base, options):
        assert base.memory is not None
        if base.memory.read(0, 3) != b"RAM":
            raise NotRecognisedError("no RAM here")
        return cls(base.target)

    @property
    def info(self):
        return OsInfo("guestos", live=True)

    def pids(self):
        self.listed += 1
        return [7]

    def process(self, pid):
        if pid != 7:
            raise ProcessExitedError(pid)
        return GuestProcess(pid, self.start)

    def close(self):
        CLOSED.append(f"os {self.target}")


class HostLayer(GuestLayer):
    kind = "guestos-host"
    needs_memory = False

    @classmethod
    def open(cls, base, options):
        return cls("host")


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    from engine import registry

    CLOSED.clear()
    monkeypatch.setitem(registry._BUILT_IN["connector"], "guest", "test_machine_leaves:GuestConnector")
    monkeypatch.setitem(registry._BUILT_IN["oslayer"], "guestos", "test_machine_leaves:GuestLayer")
    monkeypatch.setitem(registry._BUILT_IN["oslayer"], "guestos-host", "test_machine_leaves:HostLayer")
    import sys
    import types

    module = types.ModuleType("test_machine_leaves")
    vars(module).update(GuestConnector=GuestConnector, GuestLayer=GuestLayer, HostLayer=HostLayer)
    monkeypatch.setitem(sys.modules, "test_machine_leaves", module)


def test_a_chain_of_guests_in_guests_opens_by_lines_and_closes_in_reverse():
    with Machine() as machine:
        machine.run("oslayer", "host guestos-host")
        machine.run("connector", "vm -c host guest:outer")
        machine.run("oslayer", "web -c vm guestos:outer-os")
        machine.run("connector", "inner -c web guest:inner")
        machine.run("oslayer", "deep -c inner auto:inner-os")
        assert [i.name for i in machine.instances("oslayer")] == ["host", "web", "deep"]
        assert machine.get("oslayer", "deep").parent.parent.parent.name == "vm"
        assert machine.default_os.name == "host"
        assert machine.open("oslayer", "auto", parent=machine.get("connector", "inner")).name == "guestos"
    assert CLOSED == ["os ", "os inner-os", "connector inner", "os outer-os", "connector outer", "os host"]


def test_a_connector_opens_its_default_parent_once():
    with Machine() as machine:
        machine.open("connector", Spec("guest", "a"))
        machine.open("connector", Spec("guest", "b"))
        assert [i.name for i in machine.instances("oslayer")] == ["guestos-host"]
        assert [i.name for i in machine.instances("connector")] == ["guest", "guest-2"]


def test_the_default_os_is_a_guests_and_not_the_one_that_its_connector_opened_to_stand_on():
    with Machine() as machine:
        vm = machine.open("connector", Spec("guest", "a"))
        assert machine.default_os is vm.parent
        guest = machine.open("oslayer", "guestos:a-os", parent=vm)
        assert machine.default_os is guest
    with Machine() as machine:
        asked = machine.open("oslayer", "guestos-host")
        machine.open("oslayer", "guestos:a-os", parent=machine.open("connector", Spec("guest", "a"), parent=asked))
        assert machine.default_os is asked


def test_what_something_stands_on_cannot_be_removed_and_says_who():
    with Machine() as machine:
        machine.run("connector", "vm guest:a")
        machine.run("oslayer", "web -c vm guestos")
        with pytest.raises(TargetBusyError, match="web"):
            machine.remove("connector", "vm")
        machine.remove("oslayer", "web")
        machine.remove("connector", "vm")
        assert machine.find("connector", "vm") is None


def test_a_removed_instance_says_so():
    with Machine() as machine:
        instance = machine.run("connector", "vm guest:a")
        machine.remove("connector", "vm")
        for ask in (lambda: instance.memory, lambda: instance.connector, lambda: instance.layer):
            with pytest.raises(ConnectorClosedError):
                ask()


def test_reopened_it_is_another_generation_with_other_identities():
    with Machine() as machine:
        machine.run("connector", "vm guest:a")
        instance = machine.run("oslayer", "web -c vm guestos")
        before = instance.identity
        machine.reopen(instance)
        assert instance.generation == 2
        assert instance.identity != before
        assert CLOSED == ["os "]


def test_a_process_that_reuses_a_pid_is_not_the_one_known():
    with Machine() as machine:
        machine.run("connector", "vm guest:a")
        instance = machine.run("oslayer", "web -c vm guestos")
        known = instance.process(7).identity
        assert instance.open_process(7, known).info.pid == 7
        instance.layer.start = 6
        instance.forget()
        with pytest.raises(ProcessExitedError):
            instance.process_of(7, known)
        with pytest.raises(ProcessExitedError):
            instance.open_process(7, known)


def test_lists_are_kept_for_a_second_and_no_longer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("engine.machine.time.monotonic", lambda: now[0])
    with Machine() as machine:
        machine.run("connector", "vm guest:a")
        instance = machine.run("oslayer", "web -c vm guestos")
        for _ in range(3):
            instance.pids()
        assert instance.layer.listed == 1
        now[0] += 1.01
        instance.pids()
        assert instance.layer.listed == 2


def test_a_list_that_tells_of_the_processes_too_is_asked_for_them_alone(monkeypatch):
    with Machine() as machine:
        machine.run("connector", "vm guest:a")
        instance = machine.run("oslayer", "web -c vm guestos")
        found = {pid: GuestProcess(pid, 5) for pid in (7, 9)}
        monkeypatch.setattr(instance.layer, "listing", lambda: found)
        assert not instance.at_hand(9, found[9].identity)
        assert instance.pids() == [7, 9]
        assert instance.process(9) is found[9]
        assert instance.at_hand(9, found[9].identity)
        assert not instance.at_hand(9, found[7].identity)
        monkeypatch.setattr(instance.layer, "listing", lambda: {7: found[7]})
        instance._pids = (0.0, [])
        assert instance.pids() == [7]
        with pytest.raises(ProcessExitedError):
            instance.process(9)


def test_what_is_at_hand_is_opened_by_another_object_for_it_where_there_is_one(monkeypatch):
    with Machine() as machine:
        machine.run("connector", "vm guest:a")
        instance = machine.run("oslayer", "web -c vm guestos")
        known = instance.process(7)
        assert instance.open_process(7, known.identity) is not known
        other = GuestProcess(7, 5)
        monkeypatch.setattr(known, "again", lambda: other)
        assert instance.open_process(7, known.identity) is other
        instance.forget()
        assert instance.open_process(7, known.identity) is not other


def test_those_who_ask_for_a_list_while_it_is_made_get_that_one(monkeypatch):
    made, begun, go_on = [], threading.Event(), threading.Event()

    def listing():
        made.append(1)
        begun.set()
        assert go_on.wait(10)
        return {7: GuestProcess(7, 5)}

    with Machine() as machine:
        machine.run("connector", "vm guest:a")
        instance = machine.run("oslayer", "web -c vm guestos")
        monkeypatch.setattr(instance.layer, "listing", listing)
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(instance.pids) for _ in range(4)]
            assert begun.wait(10)
            go_on.set()
            assert [one.result(10) for one in asked] == [[7]] * 4
    assert len(made) == 1


def test_a_connector_that_fails_to_open_is_closed_and_leaves_no_parent_behind(monkeypatch):
    def broken(self):
        raise OSError("broken")

    monkeypatch.setattr(GuestConnector, "info", property(broken))
    with Machine() as machine:
        with pytest.raises(OSError, match="broken"):
            machine.open("connector", "guest:a")
        assert CLOSED == ["connector a", "os host"]
        assert machine.instances("oslayer") == []


def test_what_was_removed_cannot_be_reopened():
    with Machine() as machine:
        instance = machine.run("connector", "vm guest:a")
        machine.remove("connector", "vm")
        with pytest.raises(ConnectorClosedError):
            machine.reopen(instance)


def test_a_process_met_before_a_reopening_is_not_kept_after_it(monkeypatch):
    with Machine() as machine:
        machine.run("connector", "vm guest:a")
        instance = machine.run("oslayer", "web -c vm guestos")
        layer = instance.layer
        meet = layer.process

        def slowly(pid):
            process = meet(pid)
            machine.reopen(instance)
            return process

        monkeypatch.setattr(layer, "process", slowly)
        old = instance.process(7)
        assert instance.process(7) is not old


def test_an_os_instance_says_where_its_memory_is():
    with Machine() as machine:
        instance = machine.open("oslayer", "guestos-host")
        with pytest.raises(UnsupportedError, match="layer"):
            _ = instance.memory


def test_what_is_neither_a_connector_nor_an_os_is_refused():
    with Machine() as machine, pytest.raises(InvalidArgumentError, match="oslayer"):
        machine.open("os", "native")


def test_records_can_be_kept_in_a_set():
    with Machine() as machine:
        instance = machine.open("oslayer", "guestos-host")
        layer = instance.layer
        assert len({layer.info, layer.info, instance.process(7).info, Spec("raw", "", {"a": "b"})}) == 3


@pytest.mark.parametrize(
    ("kind", "line", "error"),
    [
        ("connector", "vm nosuch", PluginError),
        ("connector", "vm native", PluginError),
        ("oslayer", "vm raw:x", PluginError),
        ("connector", "vm guest:a:nosuch=1", InvalidArgumentError),
        ("connector", "vm -c nobody guest:a", NotFoundError),
        ("connector", "new dummy", InvalidArgumentError),
        ("oslayer", "web guestos", InvalidArgumentError),
        ("oslayer", "web auto", InvalidArgumentError),
        ("oslayer", "x -c d auto", NotRecognisedError),
        ("oslayer", "x -c d guestos", NotRecognisedError),
        ("oslayer", "x -c d native", InvalidArgumentError),
        ("oslayer", "x native:somewhere", InvalidArgumentError),
        ("connector", "d dummy", AlreadyExistsError),
        ("connector", "x raw", InvalidArgumentError),
        ("connector", "x raw:/no/such/file", NotFoundError),
        ("connector", "x raw:/", IsADirectoryError),
        ("connector", "x dummy:size=5", InvalidArgumentError),
        ("connector", "x dummy:metrics=perhaps", InvalidArgumentError),
    ],
)
def test_a_line_that_cannot_be_carried_out_leaves_nothing_behind(kind, line, error):
    with Machine() as machine:
        machine.run("connector", "d dummy")
        with pytest.raises(error) as caught:
            machine.run(kind, line)
        assert len(str(caught.value)) > 10
        assert [i.name for i in machine.instances("connector")] == ["d"]
        assert machine.instances("oslayer") == []


def test_metrics_count_what_is_read_through_an_instance():
    with Machine() as machine:
        instance = machine.run("connector", "d dummy:metrics=yes")
        instance.memory.read(0, 100)
        figures = instance.memory.figures()
        assert figures["reads"] == 1
        assert figures["bytes_read"] == 100
        assert figures["seconds"] > 0


# -- TARGET, -c and -o -----------------------------------------------------------------------------------


def test_nothing_said_is_this_machine():
    assert [str(spec) for _, spec in chain_of(None).links] == ["native"]


def test_a_chain_that_stops_at_a_connector_gets_auto(tmp_path):
    (tmp_path / "image").write_bytes(b"\1" * 4096)
    wanted = chain_of(str(tmp_path / "image"))
    assert [(kind, spec.plugin) for kind, spec in wanted.links] == [("connector", "raw"), ("oslayer", "auto")]
    assert wanted.implied


def test_a_word_that_names_a_plugin_is_the_plugin_and_a_path_is_written_with_a_slash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dummy").write_bytes(b"\1" * 4096)
    assert chain_of("dummy").links[0][1] == Spec("dummy")
    assert chain_of("./dummy").links[0][1] == Spec("raw", "./dummy")


def test_a_chain_in_order_alternates():
    words = [("connector", "guest:a"), ("oslayer", "guestos"), ("connector", "guest:b"), ("oslayer", "guestos")]
    with open_target(None, words) as machine:
        assert len(machine.instances("connector")) == 2
        assert machine.get("oslayer", "guestos-2").parent.parent.name == "guestos"
    with pytest.raises(InvalidArgumentError, match="alternates"):
        chain_of(None, [("connector", "dummy"), ("connector", "dummy")])


def test_a_file_of_a_known_other_format_is_not_taken_for_memory(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(b"QFI\xfb" + bytes(100))
    with pytest.raises(NotRecognisedError, match="qcow2"):
        chain_of(str(path))


@pytest.mark.parametrize("target", ["/no/such/image", "no-such-plugin:x"])
def test_a_target_that_is_nothing_says_so(target):
    with pytest.raises((NotFoundError, InvalidArgumentError), match="no"):
        chain_of(target)


def test_memory_without_a_known_os_opens_where_none_is_needed():
    with open_target("dummy", need_os=False) as machine:
        assert machine.default_os is None
        assert "no OS was recognised" in machine.get("connector", "dummy").last_error
    with pytest.raises(NotRecognisedError, match="guestos: no RAM here"):
        open_target("dummy", need_os=True)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidArgumentError, match="empty"):
        open_target(str(tmp_path / "empty"), need_os=False)


def test_an_unreadable_file_is_the_hosts_error(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0)
    code = """
        from engine import open_target
        try:
            open_target(sys.argv[1], need_os=False)
        except PermissionError as error:
            print("refused", error.filename)
    """
    assert as_nobody(code, str(tmp_path / "secret")) == f"refused {tmp_path / 'secret'}\n"
