"""Processes that change while they are looked at: facts of one are never its successor's; who ends is not skipped.

Over copies of recorded guests that are taken for live, in which words are changed in the midst of a look.
"""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
from guests.opened import Copy
from tree import at

from cloudfs.nodes.root import build_root
from engine.errors import FaultError, NotFoundError, ProcessExitedError
from engine.oslayer import ProcFiles
from engine.oslayers.linux import listing
from engine.oslayers.linux.cgroups import cgroups_of
from engine.oslayers.linux.listing import list_processes
from engine.oslayers.linux.swap_cache import swap_cache_of
from engine.targets import open_target


@pytest.fixture
def copy(typed) -> Copy:
    return Copy(typed)


@pytest.fixture
def layer(copy):
    return copy.layer(lambda _: None, live=True)


@pytest.fixture
def keeper(copy, layer):
    return layer.process(copy.keeper)


def task(copy: Copy, process, member: str) -> int:
    """The address of a member of a process's task."""
    return process.identity[2] + copy.original.tasks.task.first(*member.split("|")).offset


def end(copy: Copy, process) -> None:
    """As when another process begins at the same place: with the same PID, and another start."""
    at = task(copy, process, "start_boottime|real_start_time")
    copy.set_word(at, copy.word(at) + 1_000_000_000)


def exec_(copy: Copy, process, other) -> None:
    """It has the mm of another from now on."""
    copy.set_word(task(copy, process, "mm"), copy.word(task(copy, other, "mm")))


def test_facts_are_told_only_of_who_is_there_before_and_after(copy, keeper):
    def tell(_):
        end(copy, keeper)
        return "another's"

    assert keeper.steady(lambda record: record.pid) == copy.keeper
    with pytest.raises(ProcessExitedError):
        keeper.steady(tell)


def test_what_fails_of_one_that_has_ended_fails_for_that(copy, keeper):
    def tell(_):
        end(copy, keeper)
        raise FaultError(0x1000)

    with pytest.raises(ProcessExitedError):
        keeper.steady(tell)


def test_what_fails_of_one_that_is_there_fails_as_it_does(keeper):
    def tell(_):
        raise NotFoundError("no such thing")

    with pytest.raises(NotFoundError, match="no such thing"):
        keeper.steady(tell)


def test_what_is_left_out_of_one_that_ends_is_not_counted(copy, layer, keeper):
    def tell(_):
        layer.kernel.objects().skipped["VMA"] += 1
        end(copy, keeper)

    with pytest.raises(ProcessExitedError):
        keeper.steady(tell)
    assert layer.info.skipped == {}


def test_what_is_torn_is_read_again_and_counted_once_if_it_stays_so(layer, keeper):
    looks = []

    def tell(_):
        looks.append(1)
        if len(looks) < 3:
            layer.kernel.objects().skipped["VMA"] += 1
        return len(looks)

    assert keeper.steady(tell) == 3
    assert (layer.info.skipped, layer.info.retried) == ({}, {"process": 2})
    layer.kernel.retried.clear()

    def torn(_):
        layer.kernel.objects().skipped["VMA"] += 1

    keeper.steady(torn)
    assert (layer.info.skipped, layer.info.retried) == ({"VMA": 1}, {"process": 2})


def test_who_calls_exec_has_the_arguments_of_his_new_program_at_once(copy, layer, keeper):
    init = layer.process(1)
    before, other = keeper.info.command_line, init.info.command_line
    assert keeper.arguments()
    assert before != other
    exec_(copy, keeper, init)
    assert keeper.info.command_line == other
    files = keeper.capability(ProcFiles)
    assert files is not None
    assert files.read("cmdline") == b"".join(word.encode() + b"\0" for word in other)


def test_memory_that_is_held_is_not_that_of_the_next_program(copy, layer, keeper):
    start = next(region.start for region in keeper.regions() if region.rights)
    memory = keeper.memory
    assert memory.read(start, 16)
    exec_(copy, keeper, layer.process(1))
    for read in (lambda: memory.read(start, 16), lambda: memory.read_nowait(start, 16), lambda: list(memory.extents())):
        with pytest.raises(ProcessExitedError):
            read()
    assert keeper.again().memory.read(next(keeper.regions()).start, 16)


def test_memory_that_is_held_is_not_that_of_a_program_whose_mm_lies_where_the_first_one_did(copy, layer, keeper):
    """As after two calls of exec: the mm that was freed last is given out next."""
    start, field = next(keeper.regions()).start, copy.original.kernel.types.require("mm_struct")["pgd"]
    memory, mm = keeper.memory, copy.word(task(copy, keeper, "mm"))
    other = copy.word(task(copy, layer.process(1), "mm"))
    assert memory.read(start, 16)
    copy.set_word(mm + field.offset, copy.word(other + field.offset))
    with pytest.raises(ProcessExitedError):
        memory.read(start, 16)
    with pytest.raises(ProcessExitedError):
        list(memory.extents())
    assert keeper.again().memory.roots != memory.roots


def test_another_object_of_a_process_that_has_ended_is_not_made(copy, keeper):
    end(copy, keeper)
    with pytest.raises(ProcessExitedError):
        keeper.again()


def test_who_is_being_freed_is_there_no_more(copy, keeper):
    at = task(copy, keeper, "exit_state")
    copy.memory.write(copy.place(at), (0x10).to_bytes(4, "little"))  # EXIT_DEAD
    with pytest.raises(ProcessExitedError):
        _ = keeper.info


# -- lists ------------------------------------------------------------------------------------------------


def look(layer, monkeypatch, between):
    """The list, where `between` is done after both sources were read and before the records are."""
    records = layer.tasks.records
    done = []

    def late(*arguments, **keywords):
        if not done:
            done.append(between())
        return records(*arguments, **keywords)

    monkeypatch.setattr(layer.tasks, "records", late)
    return list_processes(layer.tasks, layer.kernel.objects, layer._numbers, live=True)


def test_whose_record_became_another_s_in_the_midst_of_a_list_is_gone_and_not_skipped(
    copy, layer, keeper, monkeypatch
):
    """As a task_struct that was freed and is being filled by fork: it is a copy of the parent's, with its PID."""

    def reused() -> None:
        link = task(copy, keeper, "tasks")
        following, previous = copy.word(link), copy.word(link + 8)
        copy.set_word(previous, following)
        copy.set_word(following + 8, previous)
        init = copy.original.process(1).info.object
        offset = copy.original.tasks.task["pid"].offset
        copy.set_bytes(keeper.identity[2] + offset, copy.memory.read(copy.place(init + offset), 8))

    found = look(layer, monkeypatch, reused)
    assert copy.keeper not in found
    assert found[1].record.address == copy.original.process(1).info.object
    assert layer.info.skipped == {}
    assert layer.info.retried["task"] >= 1


def test_who_is_in_one_source_alone_for_good_is_listed_after_some_looks(copy, layer, keeper, monkeypatch):
    def hidden() -> None:
        link = task(copy, keeper, "tasks")
        following, previous = copy.word(link), copy.word(link + 8)
        copy.set_word(previous, following)
        copy.set_word(following + 8, previous)

    hidden()
    found = look(layer, monkeypatch, lambda: None)
    assert found[copy.keeper].sources == (listing.NUMBERS,)
    assert layer.info.retried == {"task": listing.LOOKS - 1}


# -- what needs no thread -----------------------------------------------------------------------------------


def test_what_was_listed_a_moment_ago_is_asked_without_a_thread(typed):
    with open_target(f"raw:{typed.image}:live=yes") as machine:
        root = build_root(machine)
        processes = at(root, "os/linux/processes")
        assert processes.may_block
        keeper = dict(processes.children())[str(typed.truth.keeper)]
        memory, stat = keeper.child("mem"), keeper.child("stat")
        assert [keeper.may_block, memory.may_block, stat.may_block] == [False, False, True]
        assert stat.attributes().size
        assert not stat.may_block
        machine.default_os.forget()
        assert keeper.may_block
        assert memory.may_block


def test_what_was_read_of_a_process_does_not_wait_for_the_garbage_collector(layer, copy):
    """Which looks seldom at what lived for a second: where thousands come and go that would grow for minutes."""

    def read() -> list[weakref.ref[object]]:
        keeper = layer.process(copy.keeper).again()
        region = next(region for region in keeper.regions() if region.rights)
        assert keeper.memory.read(region.start, 16)
        files = keeper.capability(ProcFiles)
        assert all(files.read(name) for name in ("stat", "status", "cmdline", "limits"))
        assert keeper.info.pid == copy.keeper
        objects = layer.kernel.objects()
        cgroups_of(objects, layer.tasks, keeper.identity[2], keeper.record.flags)
        swap_cache_of(layer.kernel, objects)
        for address in (16, 0xFFFF_8000_0000_0000):
            with contextlib.suppress(FaultError):
                keeper.memory.read(address, 16)
        return [weakref.ref(one) for one in (keeper, keeper.memory, files, objects.memory)]

    gc.disable()
    try:
        assert [one() for one in read()] == [None] * 4
    finally:
        gc.enable()
