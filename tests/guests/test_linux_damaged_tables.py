"""Kernels of which page tables are damaged: what is mapped linearly is read without them, and told so."""

from __future__ import annotations

import random

import pytest
from guests.opened import WORD, Copy, opened

from engine.errors import FaultError
from engine.oslayer import KernelLog

PAGE = 4096
WIPES = {"zeros": bytes(PAGE), "noise": random.Random(1).randbytes(PAGE)}


def tables_to(copy: Copy, address: int) -> list[int]:
    """Places in the image file of the tables that lead to an address of the kernel, but for those in its own image."""
    found, offset = copy.original.kernel.found, copy.place(copy.original.kernel.found.image.start)
    places = []
    for _, entry, _, _ in found.memory.by_tables.path(address):
        physical = entry & -PAGE
        place = next((o + physical - s for s, size, o in copy._extents if s <= physical < s + size), None)
        if place is not None and not offset <= place < offset + found.image.size:
            places.append(place)
    return places


def a_task(copy: Copy) -> int:
    """The address of the first process's record, in RAM's linear map."""
    return copy.original.tasks.addresses(copy.original.kernel.objects())[1]


@pytest.mark.parametrize("wipe", WIPES)
@pytest.mark.parametrize("level", range(4))
@pytest.mark.parametrize("what", ["image", "RAM"])
def test_any_one_table_may_be_lost(typed, what, level, wipe):
    copy = Copy(typed)
    top = copy.original.kernel.found.vmcoreinfo.symbol("swapper_pg_dir")
    places = tables_to(copy, top if what == "image" else a_task(copy))
    if level >= len(places):
        return  # a mode of fewer levels, or larger pages, or tables in the image itself
    layer = copy.layer(lambda copy: copy.memory.write(places[level], WIPES[wipe]))
    assert layer.pids() == opened(typed).pids()
    assert layer.capability(KernelLog) is not None
    assert layer.info.skipped["damaged page table"] >= 1
    assert any("damaged" in note for note in layer.info.notes)


def test_the_kernel_s_memory_shows_the_hole_that_its_tables_have(typed):
    copy = Copy(typed)
    address = a_task(copy)
    places = tables_to(copy, address)
    if not places:
        return  # all of them in the kernel's own image
    layer = copy.layer(lambda copy: copy.memory.write(places[-1], bytes(PAGE)))
    assert layer.kernel.objects().pointer(address) == copy.original.kernel.objects().pointer(address)
    with pytest.raises(FaultError):
        layer.kernel_memory.u64(address)


def test_live_memory_is_what_its_page_tables_say(typed):
    copy = Copy(typed)
    address = a_task(copy)
    places = tables_to(copy, address)
    if not places:
        return
    layer = copy.layer(lambda copy: copy.memory.write(places[-1], bytes(PAGE)), live=True)
    with pytest.raises(FaultError):
        layer.kernel.objects().pointer(address)


def test_sound_tables_are_never_mended(recording):
    layer = opened(recording)
    layer.kernel.found.memory.mend()
    assert layer.kernel.found.memory.damaged_tables == 0
    assert layer.kernel.found.memory.roots == layer.kernel_memory.roots


def test_processes_between_two_gaps_of_all_lists_are_found_by_their_kin(typed):
    copy = Copy(typed)
    layer = copy.original
    tasks = layer.tasks
    listed, leaders = layer.pids(), tasks.addresses(layer.kernel.objects())[1:]
    gaps = leaders[len(leaders) // 4], leaders[3 * len(leaders) // 4]

    def cut(copy: Copy) -> None:
        spaces = layer.kernel.objects().struct("pid_namespace")
        root = tasks.profile.require("init_pid_ns") + spaces["idr.idr_rt"].offset
        head = layer.kernel.objects().struct("xarray", "radix_tree_root").first("xa_head", "rnode").offset
        copy.set_word(root + head, 0)
        for gap in gaps:
            for side in (0, WORD):
                copy.set_word(gap + tasks.link.offset + side, 0)

    damaged = copy.layer(cut)
    assert len(set(listed) - set(damaged.pids())) <= len(gaps)
    sources = {source for process in damaged.processes() for source in process.info.extra["sources"]}
    assert sources == {"task ring", "lists of kin"}
