"""`processes/`: PIDs, names out of hostile memory, identities, regions, what /proc has too."""

from __future__ import annotations

import os
import time

import pytest
from fake_os import READ, READ_WRITE, Files, Life, fake_machine
from hypothesis import given
from hypothesis import strategies as st
from support import calls_of
from tree import at, directory, names, open_at, read_all, text

from cloudfs import render
from cloudfs.node import check_name
from cloudfs.nodes.contexts import UniqueNames, region_name
from cloudfs.nodes.processes import links_by_name
from cloudfs.nodes.root import build_root
from engine.errors import AccessDeniedError, NotFoundError, ProcessExitedError
from engine.oslayer import Containers
from engine.types import Region, Rights, ThreadInfo


@pytest.fixture
def fake(monkeypatch):
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[1] = Life(name="init")
        yield build_root(machine), machine, layer


PROCESSES = "os/fake/processes"
LINKS = ("exe", "cwd", "root", "fd")
CALLS = 160
"""Of functions, for each process that is listed: counted 105."""


def test_there_is_a_directory_for_each_pid(fake):
    root, _, layer = fake
    layer.table[300] = Life()
    assert names(root, PROCESSES) == ["by-name", "by-pid-name", "1", "300"]


@pytest.mark.parametrize("name", ["01", "+1", "-1", "1 ", "١", "0x1", "2", "", "99999999999999999999999"])
def test_other_spellings_of_a_number_are_no_process(fake, name):
    root, *_ = fake
    assert directory(root, PROCESSES).child(name) is None


def test_a_process_that_began_is_found_and_one_that_ended_is_not(fake):
    root, _, layer = fake
    processes = directory(root, PROCESSES)
    assert processes.child("7") is None
    layer.table[7] = Life()
    node = processes.child("7")
    assert node is not None
    del layer.table[7]
    assert "7" not in names(root, PROCESSES)
    with pytest.raises(ProcessExitedError):
        read_all(node.child("info"))


def test_one_process_that_cannot_be_looked_at_hides_no_other(fake, monkeypatch):
    root, _, layer = fake
    layer.table.update({2: Life(), 3: Life()})
    whole = layer.process

    def process(pid):
        if pid == 2:
            raise AccessDeniedError("hidden")
        return whole(pid)

    monkeypatch.setattr(layer, "process", process)
    assert names(root, PROCESSES)[2:] == ["1", "3"]
    assert "3" in dict.fromkeys(link.split("(")[-1][:-1] for link in names(root, f"{PROCESSES}/by-pid-name"))
    with pytest.raises(AccessDeniedError):
        directory(root, PROCESSES).child("2")


@pytest.mark.parametrize("lost", ["exe", "cwd", "root", "fd"])
def test_a_link_that_is_not_known_is_not_there(fake, monkeypatch, lost):
    root, _, layer = fake
    layer.table[1].files = {}
    assert lost in names(root, f"{PROCESSES}/1")
    monkeypatch.setattr(Files, "links", lambda self: tuple(name for name in LINKS if name != lost))
    assert lost not in names(root, f"{PROCESSES}/1")
    assert directory(root, f"{PROCESSES}/1").child(lost) is None
    assert {*LINKS} - {lost} <= {*names(root, f"{PROCESSES}/1")}


def test_modules_that_are_not_known_have_no_directory(fake, monkeypatch):
    root, _, layer = fake
    assert "modules" in names(root, f"{PROCESSES}/1")
    assert "modules" in names(root, "os/fake")
    monkeypatch.setattr(type(layer.process(1)), "tells_modules", False)
    assert "modules" not in names(root, f"{PROCESSES}/1")
    assert "/modules" not in text(root, "README").partition("Here:")[0]
    monkeypatch.setattr(type(layer), "tells_modules", False)
    assert "modules" not in names(root, "os/fake")


# -- identity ---------------------------------------------------------------------------------------------


def identities(root, path):
    found = {"": at(root, path).identity}
    for name in names(root, path):
        found[name] = directory(root, path).child(name).identity
    return found


def test_a_process_is_the_same_file_whenever_it_is_looked_up(fake):
    root, machine, _ = fake
    first = identities(root, f"{PROCESSES}/1")
    machine.default_os.forget()
    assert identities(root, f"{PROCESSES}/1") == first
    listed = dict(directory(root, PROCESSES).children())
    assert listed["1"].identity == first[""]


def test_a_reused_pid_is_another_file_in_all_its_parts(fake):
    root, machine, layer = fake
    old = identities(root, f"{PROCESSES}/1")
    layer.table[1] = Life(name="init", start=2)
    machine.default_os.forget()
    new = identities(root, f"{PROCESSES}/1")
    assert old.keys() == new.keys()
    assert not set(old.values()) & set(new.values())


def test_an_instance_opened_anew_has_other_files(fake):
    root, machine, layer = fake
    old = identities(root, PROCESSES)
    machine.reopen(machine.default_os)
    machine.default_os.layer.table.update(layer.table)
    new = identities(root, PROCESSES)
    assert old.keys() == new.keys()
    assert not set(old.values()) & set(new.values())


def test_identities_are_hashable_and_unlike_within_a_directory(fake):
    root, _, layer = fake
    layer.table[1].files = {"comm": b"x", "stat": b"", "status": b"", "cmdline": b"", "environ": b""}
    for path in ("", "os", "os/fake", PROCESSES, f"{PROCESSES}/1", f"{PROCESSES}/1/regions"):
        found = identities(root, path)
        assert len(set(found.values())) == len(found), path


# -- names ------------------------------------------------------------------------------------------------


def test_links_by_name_and_by_pid_and_name_lead_to_the_process(fake):
    root, *_ = fake
    assert names(root, f"{PROCESSES}/by-name") == ["init"]
    assert at(root, f"{PROCESSES}/by-name/init").target() == "../1"
    assert at(root, f"{PROCESSES}/by-pid-name/init (1)").target() == "../1"
    assert text(root, f"{PROCESSES}/by-name/init/info").startswith("pid:")
    assert text(root, "os/processes/by-pid-name/init (1)/info").startswith("pid:")


class InBoxes(Containers):
    """What a layer that knows containers tells; names out of hostile memory."""

    def containers(self):
        return {"web": (1,), "../etc": (300, 301)}


def test_processes_of_a_container_stand_together(fake, monkeypatch):
    root, _, layer = fake
    layer.table |= {300: Life(), 301: Life()}
    monkeypatch.setattr(type(layer), "capability", lambda self, kind: InBoxes() if kind is Containers else None)
    assert names(root, PROCESSES)[:3] == ["by-name", "by-pid-name", "by-container"]
    assert names(root, f"{PROCESSES}/by-container") == ["web", "..%2Fetc"]
    assert names(root, f"{PROCESSES}/by-container/..%2Fetc") == ["300", "301"]
    assert at(root, f"{PROCESSES}/by-container/web/1").target() == "../../1"
    assert text(root, f"{PROCESSES}/by-container/web/1/info").startswith("pid:")
    for wrong in ("by-container/none", "by-container/web/300", "by-container/web/01"):
        with pytest.raises(FileNotFoundError):
            at(root, f"{PROCESSES}/{wrong}")


def test_of_several_with_one_name_each_has_its_pid(fake):
    root, _, layer = fake
    layer.table.update({2: Life(name="sh"), 3: Life(name="sh"), 4: Life(name="init#1")})
    assert names(root, f"{PROCESSES}/by-name") == ["init", "sh#2", "sh#3", "init#1#4"]
    with pytest.raises(FileNotFoundError):
        at(root, f"{PROCESSES}/by-name/sh")


@given(st.dictionaries(st.integers(1, 2**31), st.text(max_size=20) | st.sampled_from(["a", "a#1", "a#2", "a#1#2"])))
def test_no_process_takes_the_name_of_another(found):
    links = links_by_name(found)
    assert sorted(links.values()) == sorted(found)
    for name in links:
        check_name(name)


def test_hostile_names_stay_in_their_directory(fake):
    root, _, layer = fake
    hostile = ["../../etc", ".", "..", "", "a\nb", "\x1b[2J", "\udcff\udcfe", "x" * 300, "100%", "init (1)"]
    for pid, name in enumerate(hostile, 10):
        layer.table[pid] = Life(name=name)
    for where in ("by-name", "by-pid-name"):
        links = directory(root, f"{PROCESSES}/{where}")
        listed = dict(links.children())
        assert len(listed) == len(hostile) + 1
        for name, node in listed.items():
            check_name(name)
            assert name.isprintable()
            again = links.child(name)
            assert again is not None
            assert (again.identity, again.target()) == (node.identity, node.target())
    assert names(root, f"{PROCESSES}/by-name")[1:5] == ["..%2F..%2Fetc", "%2E", "%2E%2E", "%"]


@pytest.mark.parametrize("name", ["init (2)", "init (1", "init", "(1)", "init (01)", "init  (1)", ""])
def test_a_link_that_is_not_listed_is_not_found(fake, name):
    root, *_ = fake
    assert directory(root, f"{PROCESSES}/by-pid-name").child(name) is None


# -- regions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "name"),
    [
        (Region(0x1000, 0x2000, READ, path="/usr/lib/libc.so.6"), "00001000-00003000.r--p.libc.so.6"),
        (Region(0x7F00_0000_0000, 0x1000, READ_WRITE), "7f0000000000-7f0000001000.rw-p.[anon]"),
        (Region(0x1000, 0x1000, Rights.NONE, True, path="[heap]"), "00001000-00002000.---s.[heap]"),
        (Region(0x1000, 0x1000, READ, path="[anon:dalvik/x]"), "00001000-00002000.r--p.[anon:dalvik%2Fx]"),
        (Region(0x1000, 0x1000, READ, path="/memfd:a b (deleted)"), "00001000-00002000.r--p.memfd:a b (deleted)"),
        (Region(0x1000, 0x1000, READ, path="/a\n/b\nc"), "00001000-00002000.r--p.b%0Ac"),
        (Region(0x1000, 0x1000, READ, path="anon_inode:[perf]"), "00001000-00002000.r--p.anon_inode:[perf]"),
    ],
)
def test_a_region_is_called_by_its_range_its_permissions_and_its_file(region, name):
    assert region_name(region) == name


def test_a_region_that_is_unmapped_is_gone(fake):
    root, _, layer = fake
    (name,) = names(root, f"{PROCESSES}/1/regions")
    layer.table[1].regions = []
    deadline = time.monotonic() + 5
    while names(root, f"{PROCESSES}/1/regions"):
        assert time.monotonic() < deadline
    assert directory(root, f"{PROCESSES}/1/regions").child(name) is None


# -- unique names ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["a", "a@1", "a@1#2", "b", "a@1@1", ""]), st.integers(0, 3) | st.none())))
def test_things_that_are_called_alike_get_unlike_names(things):
    unique = UniqueNames()
    found = [unique.name(name, address) for name, address in things]
    assert len(set(found)) == len(found)
    again = UniqueNames()
    assert [again.name(name, address) for name, address in things] == found


def test_the_first_keeps_its_name_and_others_have_their_address():
    unique = UniqueNames()
    assert [unique.name("a", 16), unique.name("a", 32), unique.name("a@10", 48)] == ["a", "a@20", "a@10@30"]


# -- what /proc has too ---------------------------------------------------------------------------------------

FILES = {
    "cmdline": b"a\0b\0",
    "environ": b"X=\xff\0",
    "comm": b"init\n",
    "stat": b"1 (init)",
    "status": b"Name:\tinit\n",
    "maps": b"the kernel's\n",
    "5/comm": b"worker\n",
    "5/stat": b"5 (worker)",
    "5/status": b"Name:\tworker\n",
}


@pytest.fixture
def proc(fake):
    root, _, layer = fake
    layer.table[1] = Life(
        name="init",
        start=9,
        files=dict(FILES),
        links={"exe": "/sbin/init", "cwd": "/", "root": "/", "fd/0": "/dev/null", "fd/10": "pipe:[7]"},
        threads=[ThreadInfo(1, "init", "S", 9), ThreadInfo(5, "worker", "R", 12)],
    )
    return root, layer


@pytest.mark.parametrize("name", ["cmdline", "environ", "comm", "stat", "status", "maps"])
def test_a_file_of_proc_is_byte_for_byte_what_the_layer_gives_and_has_its_size(proc, name):
    root, _ = proc
    node = at(root, f"{PROCESSES}/1/{name}")
    assert read_all(node) == FILES[name]
    assert node.attributes().size == len(FILES[name])


def test_only_its_owner_reads_the_environment(proc):
    root, _ = proc
    assert at(root, f"{PROCESSES}/1/environ").attributes().mode & 0o777 == 0o400
    assert at(root, f"{PROCESSES}/1/comm").attributes().mode & 0o777 == 0o444


def test_without_files_of_proc_there_are_none_but_maps_is_made_from_the_regions(fake):
    root, *_ = fake
    assert not {"cmdline", "environ", "stat", "exe", "fd", "task"} & set(names(root, f"{PROCESSES}/1"))
    assert text(root, f"{PROCESSES}/1/maps") == render.maps_text([Region(0x1000, 0x1000, READ_WRITE)])


def test_a_layer_that_knows_some_files_shows_those(fake):
    root, _, layer = fake
    layer.table[2] = Life(files={"comm": b"x\n"})
    assert "comm" in names(root, f"{PROCESSES}/2")
    assert "cmdline" not in names(root, f"{PROCESSES}/2")
    assert text(root, f"{PROCESSES}/2/maps") == render.maps_text([Region(0x1000, 0x1000, READ_WRITE)])


def test_links_of_a_target_are_readable_and_lead_nowhere_on_this_host(proc):
    root, _ = proc
    for name, target in (("exe", "/sbin/init"), ("root", "/"), ("fd/0", "/dev/null"), ("fd/10", "pipe:[7]")):
        assert at(root, f"{PROCESSES}/1/{name}").target() == f"fake:{target}"


def test_links_of_this_hosts_processes_lead_where_they_lead_in_proc(proc):
    root, layer = proc
    layer.table[1].owner = (0, 0)
    assert at(root, f"{PROCESSES}/1/exe").target() == "/sbin/init"
    assert at(root, f"{PROCESSES}/1/fd/0").target() == "/dev/null"


def test_descriptors_are_listed_by_number_and_asked_for_one_by_one(proc):
    root, _ = proc
    assert names(root, f"{PROCESSES}/1/fd") == ["0", "10"]
    fd = directory(root, f"{PROCESSES}/1/fd")
    assert fd.child("10") is not None
    for name in ("1", "00", "x", ""):
        assert fd.child(name) is None
    assert fd.attributes().mode & 0o777 == 0o500


def test_a_link_that_is_not_there_says_so_when_it_is_read(fake):
    root, _, layer = fake
    layer.table[2] = Life(files={})
    with pytest.raises(NotFoundError):
        at(root, f"{PROCESSES}/2/exe").target()


def test_threads_have_their_files(proc):
    root, _ = proc
    assert names(root, f"{PROCESSES}/1/task") == ["1", "5"]
    assert names(root, f"{PROCESSES}/1/task/5") == ["comm", "stat", "status"]
    assert text(root, f"{PROCESSES}/1/task/5/comm") == "worker\n"
    assert directory(root, f"{PROCESSES}/1/task").child("7") is None
    assert directory(root, f"{PROCESSES}/1/task").child("05") is None


def test_a_reused_thread_number_is_another_file(proc):
    root, layer = proc
    old = at(root, f"{PROCESSES}/1/task/5/comm").identity
    layer.table[1].threads = [ThreadInfo(5, "worker", "R", 13)]
    deadline = time.monotonic() + 5
    while at(root, f"{PROCESSES}/1/task/5/comm").identity == old:
        assert time.monotonic() < deadline


# -- cost -----------------------------------------------------------------------------------------------------


def test_a_process_is_listed_with_its_attributes_in_few_calls_however_many_there_are(fake):
    root, machine, layer = fake

    def listed() -> None:
        for name, node in directory(root, PROCESSES).children():
            assert name
            assert node.identity
            assert node.attributes()

    def cost(count: int) -> float:
        layer.table.update({pid: Life(owner=(0, 0)) for pid in range(len(layer.table) + 1, count + 1)})
        machine.default_os.forget()
        return calls_of(listed) / count

    few, many = cost(200), cost(2000)
    assert many < 1.2 * few
    assert few < CALLS


def test_listing_processes_reads_no_regions_and_no_names(fake):
    root, _, layer = fake
    layer.listed_regions = 0
    for _, node in directory(root, PROCESSES).children():
        node.attributes()
    for _, node in directory(root, f"{PROCESSES}/1").children():
        assert node.identity
    assert layer.listed_regions == 0


def test_a_look_up_of_one_process_does_not_list_the_others(fake, monkeypatch):
    root, _, layer = fake

    def pids():
        raise AssertionError("listed")

    monkeypatch.setattr(layer, "pids", pids)
    assert open_at(root, f"{PROCESSES}/1/info", os.O_RDONLY)
    assert at(root, f"{PROCESSES}/by-pid-name/init (1)").target() == "../1"
