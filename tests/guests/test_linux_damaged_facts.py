"""Facts of processes and of the system over damaged memory: what cannot be read is missing, and nothing breaks."""

from __future__ import annotations

import contextlib
import itertools
import random
import time

import pytest
from guests.opened import Copy

from engine.errors import EngineError
from engine.oslayer import Containers, KernelConfig, ProcFiles, Sockets, SystemFiles

PAGE = 4096
LIVE = 12
"""Processes that are asked where nothing read may be kept: each costs a walk of page tables for each page."""
LEFT = 20
"""Processes that such damage leaves whole for certain, of about seventy."""
SECONDS = 60
"""Of CPU: far more than anything here takes; a walk without an end takes for ever."""


def damaged(copy: Copy, seed: int, share: float) -> set[int]:
    """Wipe or randomise pages that hold something, but for the kernel's image: without types all is another matter.

    Gives their places.
    """
    chance, image = random.Random(seed), copy.original.kernel.found.image
    first, places = copy.place(image.start), set()
    for extent in copy.memory.extents():
        for at in range(extent.start, extent.stop - PAGE + 1, PAGE):
            if chance.random() < share and not first <= at < first + image.size:
                copy.memory.write(at, bytes(PAGE) if chance.random() < 0.5 else chance.randbytes(PAGE))
                places.add(at)
    return places


@pytest.mark.parametrize(("seed", "share"), [(1, 0.01), (2, 0.05), (4, 0.2)])
def test_no_error_but_the_engine_s_own_leaves(typed, seed, share):
    began = time.process_time()
    try:
        layer = Copy(typed).layer(lambda copy: damaged(copy, seed, share), live=seed % 2 == 1)
    except EngineError:
        return  # so much is gone that no kernel is found: said in a sentence
    with contextlib.suppress(EngineError):
        for process in itertools.islice(layer.processes(), LIVE if seed % 2 else None):
            ask_of_process(process)
    assert layer.info.hostname is None or isinstance(layer.info.hostname, str)
    ask_of_system(layer)
    assert time.process_time() - began < SECONDS


def ask_of_process(process) -> None:
    with contextlib.suppress(EngineError):
        assert process.info.extra["sources"]
    with contextlib.suppress(EngineError):
        list(process.threads())
    try:
        files = process.capability(ProcFiles)
        names = [*files.names(), *(f"fdinfo/{number}" for number in files.descriptors())]
    except EngineError:
        return
    for name in names:
        with contextlib.suppress(EngineError):
            assert isinstance(files.read(name), bytes)


def ask_of_system(layer) -> None:
    with contextlib.suppress(EngineError):
        files = layer.capability(SystemFiles)
        for name in files.names() if files else ():
            with contextlib.suppress(EngineError):
                assert files.read(name) or name in ("modules", "filesystems", "mounts")
    for kind, ask in ((Containers, "containers"), (KernelConfig, "config"), (Sockets, "sockets")):
        with contextlib.suppress(EngineError):
            found = layer.capability(kind)
            if found is not None:
                list(getattr(found, ask)())


def records(copy: Copy) -> dict[int, set[int]]:
    """The pages in which the record of each process lies, by PID."""
    size, found = copy.original.tasks.task.size, {}
    for process in copy.original.processes():
        start = process.record.address
        first = start & -PAGE
        found[process.info.pid] = {copy.place(at) for at in range(first, start + size, PAGE)}
    return found


def hold_to_what_is_left(recording, seed: int) -> None:
    """Of the processes whose own record was not hit, nine of ten at least are listed: whatever else was."""
    copy, hit = Copy(recording), set()
    layer = copy.layer(lambda copy: hit.update(damaged(copy, seed, 0.01)))
    whole = {pid for pid, pages in records(copy).items() if not pages & hit}
    assert len(whole) >= LEFT
    assert len(whole & set(layer.pids())) >= 0.9 * len(whole), (seed, layer.info.skipped, layer.info.notes)


@pytest.mark.parametrize("seed", range(1, 5))
def test_a_hundredth_of_damage_costs_few_processes(typed, seed):
    hold_to_what_is_left(typed, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 31))
def test_a_hundredth_of_damage_costs_few_processes_whatever_it_hits(typed, seed):
    hold_to_what_is_left(typed, seed)
