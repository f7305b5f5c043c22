"""What a Linux guest's memory tells of processes beyond their list: names, numbers, cgroups, mounts, two sources."""

from __future__ import annotations

import re

import pytest
from guests.opened import Copy, opened

from engine.oslayer import Containers, ProcFiles
from engine.oslayers.linux.listing import NUMBERS, RING, find_process, pid_numbers

MAY_MOVE = {3, 10, 11, 14, 15, 16, 17, 35, 39}
"""Fields of stat of the few processes that still ran between the guest's words and its stop: what grows with that."""
MOVING = 6
"""How many processes at the most that are: init, the keeper, RCU's thread, a worker or two."""
WORKER = re.compile(r"kworker/[^-+]+")


@pytest.fixture
def layer(typed):
    return opened(typed)


def files(layer, pid) -> ProcFiles:
    found = layer.process(pid).capability(ProcFiles)
    assert found is not None
    return found


def test_kernel_threads_are_called_as_the_guest_calls_them(typed, layer):
    """In full: `comm` holds 15 characters. What a worker worked for last may be another queue by the stop."""
    moved = 0
    for pid in typed.truth.pids:
        expected, found = typed.truth.text(f"/proc/{pid}/comm").rstrip("\n"), layer.process(pid).name
        if expected != found:
            assert WORKER.match(expected)[0] == WORKER.match(found)[0]
            moved += 1
    assert moved <= 3


def test_all_52_fields_of_stat_equal_the_guest_s_own(typed, layer):
    moved = set()
    for pid in typed.truth.pids:
        expected = typed.truth.text(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()
        found = files(layer, pid).read("stat").decode().rsplit(")", 1)[1].split()
        assert len(found) == len(expected) == 50
        other = {index for index, pair in enumerate(zip(expected, found, strict=True), 3) if pair[0] != pair[1]}
        assert other <= MAY_MOVE, (pid, other)
        moved |= {pid} if other else set()
    assert len(moved) <= MOVING


def test_threads_have_a_stat_of_their_own(typed, layer):
    moved, looked = 0, 0
    for name in typed.truth:
        place = re.fullmatch(r"/proc/(\d+)/task/(\d+)/stat", name)
        if place is None:
            continue
        expected = typed.truth.text(name).rsplit(")", 1)[1].split()
        found = files(layer, int(place[1])).thread(int(place[2])).read("stat").decode().rsplit(")", 1)[1].split()
        other = {index for index, pair in enumerate(zip(expected, found, strict=True), 3) if pair[0] != pair[1]}
        assert other <= MAY_MOVE, (name, other)
        moved, looked = moved + bool(other), looked + 1
    assert looked > len(typed.truth.pids)
    assert moved <= MOVING


def test_every_line_of_status_equals_the_guest_s_own(typed, layer):
    """What is not known is left out; what is told is right, and most of what there is."""
    moving = {"Name", "State", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"}
    for pid in typed.truth.pids:
        expected = dict(line.split(":\t", 1) for line in typed.truth.text(f"/proc/{pid}/status").splitlines())
        found = dict(line.split(":\t", 1) for line in files(layer, pid).read("status").decode().splitlines())
        assert found.keys() <= expected.keys()
        assert {key: value for key, value in found.items() if key not in moving} == {
            key: value for key, value in expected.items() if key in found and key not in moving
        }
        assert {"CapEff", "NSpid", "NStgid", "Uid", "Groups", "SigCgt", "Seccomp", "Cpus_allowed"} <= found.keys()
        assert [key for key in expected if key in found] == list(found)


@pytest.mark.parametrize("name", ["auxv", "cgroup", "limits", "oom_score_adj", "statm", "uid_map"])
def test_a_file_of_each_process_equals_the_guest_s_own(typed, layer, name):
    for pid in typed.truth.pids:
        if f"/proc/{pid}/{name}" in typed.truth:
            assert files(layer, pid).read(name) == typed.truth[f"/proc/{pid}/{name}"], pid


def test_mounts_are_those_of_each_process_s_namespace_and_root(typed, layer):
    """All but the options which only the file system's own code knows: they stand last, behind rw or ro."""
    jailed = 0
    for pid in typed.truth.pids:
        lines = typed.truth.get(f"/proc/{pid}/mountinfo", b"").decode().splitlines()
        found = files(layer, pid).read("mountinfo").decode().splitlines()
        assert [line.rsplit(" ", 1)[0] for line in found] == [line.rsplit(" ", 1)[0] for line in lines]
        assert [line.rsplit(" ", 1)[1] for line in found] == [line.rsplit(" ", 1)[1].split(",")[0] for line in lines]
        jailed += not lines
    assert jailed  # the one in a jail sees none


def test_the_system_s_mounts_equal_proc_mounts(typed, layer):
    expected = [line.split() for line in typed.truth.text("/proc/mounts").splitlines()]
    found = [line.split() for line in files(layer, 1).read("mounts").decode().splitlines()]
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    for (*_, options, _, _), (*_, all_options, _, _) in zip(found, expected, strict=True):
        assert all_options.startswith(options)


def test_the_cgroup_is_told_and_no_container_where_there_is_none(typed, layer):
    for pid in typed.truth.pids:
        info = layer.process(pid).info
        assert f"0::{info.extra['cgroup']}\n" == typed.truth.text(f"/proc/{pid}/cgroup")
        assert info.extra["container"] is None


def test_a_container_is_told_by_its_cgroup(typed, layer):
    """The guest's cgroup `box`, renamed as Docker would name it."""
    boxed = next(pid for pid in typed.truth.pids if typed.truth.text(f"/proc/{pid}/cgroup") == "0::/box\n")
    identifier = "0123456789abcdef" * 4

    def rename(copy: Copy) -> None:
        kernel, task = copy.original.kernel, copy.original.process(boxed).info.object
        types = kernel.types
        group = copy.word(copy.word(task + types.require("task_struct")["cgroups"].offset)
                          + types.require("css_set")["dfl_cgrp"].offset)  # fmt: skip
        node = copy.word(group + types.require("cgroup")["kn"].offset)
        names = kernel.profile.symbol("init_uts_ns") + types.require("uts_namespace")["name"].offset
        room = names + types.require("new_utsname")["machine"].offset  # and domainname behind it
        copy.set_bytes(room, f"docker-{identifier}.scope\0".encode())
        copy.set_word(node + types.require("kernfs_node")["name"].offset, room)

    changed = Copy(typed).layer(rename)
    info = changed.process(boxed).info
    assert info.extra["cgroup"] == f"/docker-{identifier}.scope"
    assert info.extra["container"] == identifier
    assert changed.capability(Containers).containers() == {identifier: (boxed,)}
    assert layer.process(boxed).info.extra["cgroup"] == "/box"


def test_namespaces_equal_the_links_in_ns(typed, layer):
    for pid in typed.truth.pids:
        namespaces = layer.process(pid).info.extra["namespaces"]
        for kind in ("pid", "mnt", "net", "uts", "ipc", "user", "cgroup"):
            if f"/proc/{pid}/ns/{kind}" in typed.truth:
                assert f"{kind}:[{namespaces[kind]}]" == typed.truth.text(f"/proc/{pid}/ns/{kind}")


def test_a_removed_program_is_told_from_one_that_is_there(typed, layer):
    for pid in typed.truth.pids:
        info, link = layer.process(pid).info, typed.truth.get(f"/proc/{pid}/exe")
        if link:
            assert info.extra["executable_deleted"] == link.endswith(b" (deleted)")


def test_a_process_is_found_by_its_number_alone_as_in_the_list(typed, layer):
    """As over live memory, where nothing is kept."""
    numbers = pid_numbers(layer.tasks, layer.kernel.objects())
    assert numbers is not None
    for one in layer.processes():
        found = find_process(layer.tasks, layer.kernel.objects(), numbers, one.info.pid)
        assert found is not None
        assert [found.record.address, list(found.sources)] == [one.info.object, one.info.extra["sources"]]
    threads = {thread.tid for one in layer.processes() for thread in one.threads()}
    for pid in (0, 39_999, 1 << 30, *sorted(threads - set(layer.pids()))):
        assert find_process(layer.tasks, layer.kernel.objects(), numbers, pid) is None


def test_a_process_hidden_from_the_ring_is_found_by_its_number(typed):
    layer = Copy(typed).layer(unlink_from_ring, live=True)
    assert layer.process(typed.truth.keeper).info.extra["sources"] == [NUMBERS]
    assert layer.process(1).info.extra["sources"] == [RING, NUMBERS]


# -- two sources ---------------------------------------------------------------------------------------


def sources(layer) -> dict[int, list[str]]:
    return {process.info.pid: process.info.extra["sources"] for process in layer.processes()}


def test_every_process_is_found_in_both_sources(layer):
    assert set(map(tuple, sources(layer).values())) == {(RING, NUMBERS)}


def unlink_from_ring(copy: Copy) -> None:
    """As a rootkit does: its neighbours lead past the keeper."""
    tasks = copy.original.tasks
    at = copy.original.process(copy.keeper).info.object + tasks.link.offset
    following, previous = copy.word(at), copy.word(at + 8)
    copy.set_word(previous, following)
    copy.set_word(following + 8, previous)


def remove_its_number(copy: Copy) -> None:
    """No task stands at the keeper's `struct pid` any more."""
    tasks = copy.original.tasks
    pid = copy.word(copy.original.process(copy.keeper).info.object + tasks.task["thread_pid"].offset)
    layout = copy.original.kernel.types.require("pid")
    copy.set_word(pid + layout["tasks[1].first"].offset, 0)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(("change", "left"), [(unlink_from_ring, NUMBERS), (remove_its_number, RING)])
def test_a_process_hidden_from_one_source_is_listed_and_marked(typed, layer, change, left, live):
    keeper = typed.truth.keeper
    before = sources(layer)
    changed = Copy(typed)
    found = sources(changed.layer(change, live=live))
    assert found.keys() == before.keys()
    assert found.pop(keeper) == [left]
    assert set(map(tuple, found.values())) == {(RING, NUMBERS)}


def test_a_hidden_process_has_all_its_facts(typed):
    changed = Copy(typed)
    process = changed.layer(unlink_from_ring).process(typed.truth.keeper)
    expected = typed.truth.text(f"/proc/{typed.truth.keeper}/cmdline").split("\0")[:-1]
    assert process.info.command_line == tuple(expected)
    assert len(list(process.threads())) == 3


@pytest.mark.parametrize("directions", [(0, 8), (0,), (8,)])
def test_a_ring_that_is_cut_is_walked_from_both_ends(typed, layer, directions):
    """Where neither way leads around it is counted as broken."""

    def cut(copy: Copy) -> None:
        at = copy.original.process(copy.keeper).info.object + copy.original.tasks.link.offset
        for direction in directions:
            copy.set_word(at + direction, 0x10)

    cut_layer = Copy(typed).layer(cut)
    assert sources(cut_layer) == sources(layer)
    assert cut_layer.info.skipped == ({"broken task list": 1} if len(directions) == 2 else {})


def test_a_ring_that_runs_in_a_circle_past_its_head_ends(typed, layer):
    def bend(copy: Copy) -> None:
        link = copy.original.tasks.link.offset
        one, two = (copy.original.process(pid).info.object + link for pid in typed.truth.pids[-2:])
        copy.set_word(two, one)
        copy.set_word(one + 8, two)

    bent = Copy(typed).layer(bend)
    assert bent.pids() == layer.pids()
    assert bent.info.skipped == {"broken task list": 1}
