"""Finds the shapes of a kernel's structures, in the order in which one proof stands on another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.memory import Memory
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.shape.cred import find_cred
from engine.oslayers.linux.shape.pids import find_groups, find_pids
from engine.oslayers.linux.shape.ring import ROWS, TASK_BYTES, Ring, find_ring
from engine.oslayers.linux.shape.sample import Sample
from engine.oslayers.linux.shape.spaces import find_space
from engine.oslayers.linux.shape.tasks import (
    TaskColumns,
    find_exit,
    find_flags,
    find_parents,
    find_pid,
    find_start,
    find_state,
    mm_candidates,
)
from engine.oslayers.linux.shape.threads import find_threads
from engine.oslayers.linux.shape.types import Members, Shapes, characters, list_head, pointer

Search = Callable[[TaskColumns], dict[str, Members]]
"""Takes members of tasks, and gives those of other structures that it found on the way."""
FIRST = 8
"""Tasks that began with the kernel: the idle task, init, kthreadd and its first children."""


def find_shapes(found: Found, init_task: int) -> Shapes | None:
    """What tasks tell of their own structures; None where not even their ring and their PIDs can be told."""
    memory, start = found.memory.cached(), found.candidate.kernel_start
    ring = find_ring(memory, init_task, start)
    if ring is None:
        return None
    columns = TaskColumns(Sample.read(memory, _witnesses(ring), TASK_BYTES, start))
    columns.take("tasks", ring.link, list_head(columns.sample.word))
    columns.take("comm", ring.comm, characters(16))
    _ask(columns, "pid", find_pid)
    if "pid" not in columns.members:
        return None
    shapes = Shapes(columns.sample.word)
    for members, search in _searches(found, memory).items():
        for name, others in _ask(columns, members, search).items():
            shapes.add(name, others)
    _add_groups(shapes, columns, memory)
    shapes.add("task_struct", columns.members)
    return shapes


def _witnesses(ring: Ring) -> list[int]:
    """The first tasks, and of more than enough others every so many-th."""
    step = max(1, len(ring.tasks) // ROWS)
    return ring.tasks[:FIRST] + ring.tasks[FIRST::step]


def _ask(columns: TaskColumns, member: str, search: Search) -> dict[str, Members]:
    """Look for a proof by all rows; only where there is none for one from which few disagree."""
    strict = columns.sample
    for sample in (strict, strict.lenient()):
        columns.sample = sample
        others = search(columns)
        if member in columns.members:
            break
    columns.sample = strict
    return others


def _searches(found: Found, memory: Memory) -> dict[str, Search]:
    """By the member that tells whether it found anything, in order."""
    return {
        "real_parent": lambda columns: find_parents(columns, memory),
        "signal": lambda columns: find_threads(columns, memory),
        "thread_pid": lambda columns: find_pids(columns, memory),
        "real_cred": lambda columns: find_cred(columns, memory),
        "mm": lambda columns: _find_mm(found, memory, columns),
        "flags": find_flags,
        "__state": find_state,
        "exit_state": find_exit,
        "start_boottime": find_start,
    }


def _add_groups(shapes: Shapes, columns: TaskColumns, memory: Memory) -> None:
    """Process groups and sessions, where `struct pid` and `signal_struct` are known."""
    pid, signal = shapes.struct("pid"), shapes.struct("signal_struct")
    if pid is not None and signal is not None:
        groups = find_groups(columns, memory, pid["numbers"].offset)
        known = {member.name: (member.offset, member.type) for member in signal}
        shapes.add("signal_struct", {**known, **groups})


def _find_mm(found: Found, memory: Memory, columns: TaskColumns) -> dict[str, Members]:
    """`mm` and `active_mm` of tasks, and `mm_struct`: what the words lead to decides."""
    good = []
    for offset in mm_candidates(columns):
        spaces = np.unique(columns.sample.column(offset))
        members = find_space(found, memory, [int(space) for space in spaces if space])
        if members:
            good.append((offset, members))
    if len(good) != 1:
        return {}
    word = columns.sample.word
    columns.take("mm", good[0][0], pointer(word))
    columns.take("active_mm", good[0][0] + word, pointer(word))
    return {"mm_struct": good[0][1]}
