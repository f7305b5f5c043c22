"""`connector/` and `os/`: what stands in them, rmdir, links into the default OS."""

from __future__ import annotations

import json
import tomllib

import pytest
from fake_os import Life, Pieces, fake_machine
from tree import at, directory, names, open_at, read_all, text

from cloudfs.nodes.root import build_root
from engine.bytes_memory import BytesMemory
from engine.chain import Spec
from engine.errors import TargetBusyError
from engine.machine import Machine


@pytest.fixture
def machine():
    with Machine() as machine:
        yield machine


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a,b c.raw"
    path.write_bytes(b"x" * 8192)
    return path


def test_a_connector_has_info_memory_and_its_map(machine, image):
    machine.open("connector", Spec("raw", str(image)), name="vm")
    root = build_root(machine)
    assert names(root, "connector") == ["new", "vm"]
    assert names(root, "connector/vm") == ["info", "info.json", "phys_mem", "memory_map"]
    assert tomllib.loads(text(root, "connector/vm/memory_map")) == {
        "range": [{"base": 0, "length": 8192, "real_base": 0}]
    }
    record = json.loads(text(root, "connector/vm/info.json"))
    assert (record["kind"], record["size"], record["target"]) == ("raw", 8192, str(image))
    assert "size:       8192 (8.0 KiB)\n" in text(root, "connector/vm/info")


def test_info_counts_what_was_read_and_the_holes_that_were_met(machine):
    machine.open("connector", Spec("dummy", "", {"size": "1M", "holes": "yes"}), name="vm")
    root = build_root(machine)
    assert len(read_all(at(root, "connector/vm/phys_mem"))) == 1 << 20
    counters = json.loads(text(root, "connector/vm/info.json"))["counters"]
    assert counters["bytes_read"] == 1 << 20
    assert counters["faults"] == 16


def test_holes_of_physical_memory_are_zeros_and_the_rest_is_right(machine):
    from engine.connectors.dummy import made_bytes

    machine.open("connector", Spec("dummy", "", {"size": "1M", "holes": "yes"}), name="vm")
    data = read_all(at(build_root(machine), "connector/vm/phys_mem"))
    for page in range(256):
        expected = bytes(4096) if page % 16 == 15 else made_bytes(page * 4096, 4096)
        assert data[page * 4096 : (page + 1) * 4096] == expected


@pytest.mark.parametrize("name", ["connector", "os"])
def test_the_user_of_the_mount_may_write_where_instances_are_removed(machine, name):
    assert at(build_root(machine), name).attributes().mode & 0o777 == 0o755


def test_rmdir_removes_an_instance(machine, image):
    machine.open("connector", Spec("raw", str(image)), name="vm")
    root = build_root(machine)
    directory(root, "connector").remove_child("vm")
    assert names(root, "connector") == ["new"]
    assert directory(root, "connector").child("vm") is None


@pytest.mark.parametrize("path", ["", "connector", "os"])
@pytest.mark.parametrize("name", ["new", "README", "processes", "nothing"])
def test_nothing_else_can_be_removed(machine, path, name):
    with pytest.raises(PermissionError):
        directory(build_root(machine), path).remove_child(name)


def test_what_something_stands_on_is_busy_and_the_error_says_who_holds_it(monkeypatch):
    with fake_machine(monkeypatch) as (machine, _):
        from engine.machine import Instance

        parent = machine.default_os
        child = Instance("connector", "inner", Spec("qemu"), parent)
        parent.children.append(child)
        with pytest.raises(TargetBusyError, match="inner"):
            directory(build_root(machine), "os").remove_child("fake")
        parent.children.clear()


def test_os_links_to_what_the_oldest_has_and_to_nothing_else(monkeypatch):
    with fake_machine(monkeypatch) as (machine, layer):
        root = build_root(machine)
        machine.open("oslayer", Spec("fake"), name="second")
        assert names(root, "os") == ["new", "fake", "second", "info", "info.json", "modules", "processes"]
        assert at(root, "os/processes").target() == "fake/processes"
        layer.kernel = Pieces({0xFFFF_8880_0000_0000: bytes(4096)})
        layer.physical = BytesMemory(b"x" * 100)
        assert {"mem", "phys_mem"} <= set(names(root, "os"))
        assert read_all(at(root, "os/fake/phys_mem")) == b"x" * 100
        old = at(root, "os/processes").identity
        directory(root, "os").remove_child("fake")
        assert at(root, "os/processes").target() == "second/processes"
        assert at(root, "os/processes").identity != old
        directory(root, "os").remove_child("second")
        assert names(root, "os") == ["new"]


def test_listing_does_not_wait_for_what_is_being_opened(machine):
    import threading

    root = build_root(machine)
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with machine._lock:
            held.set()
            go_on.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    try:
        assert names(root, "connector") == ["new"]
        assert names(root, "os") == ["new"]
        assert "cat connector/new" in text(root, "README")
    finally:
        go_on.set()
        thread.join(10)


def test_a_whole_session_of_new_and_rmdir(machine, image):
    root = build_root(machine)
    open_at(root, "connector/new").write(0, f'vm raw:"{image}"\n'.encode())
    assert read_all(at(root, "connector/vm/phys_mem")) == b"x" * 8192
    open_at(root, "os/new").write(0, b"host native\n")
    assert at(root, "os/host/proc").target() == "/proc"
    directory(root, "os").remove_child("host")
    directory(root, "connector").remove_child("vm")
    assert names(root, "connector") == names(root, "os") == ["new"]


def test_an_instance_that_comes_again_under_its_name_is_another_file(machine, image):
    root = build_root(machine)
    seen = set()
    for _ in range(3):
        open_at(root, "connector/new").write(0, b"vm dummy:size=4K\n")
        seen.add(at(root, "connector/vm").identity)
        seen.add(at(root, "connector/vm/phys_mem").identity)
        directory(root, "connector").remove_child("vm")
    assert len(seen) == 6


def test_a_node_of_a_removed_instance_opens_no_more(monkeypatch):
    from engine.errors import ConnectorClosedError

    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[1] = Life()
        root = build_root(machine)
        nodes = [at(root, f"os/fake/processes/1/{name}") for name in ("mem", "info", "regions", "maps")]
        directory(root, "os").remove_child("fake")
        for node in nodes:
            with pytest.raises(ConnectorClosedError):
                list(node.children()) if hasattr(node, "children") else node.open(0)
