"""`struct pid`, and by it process groups and sessions.

`thread_pid` is a pointer of its own in every task, and leads to a record that has the task's PID at one place and
behind it the one namespace that all tasks have a number in; the depth of the task's own, which is 0 of the idle task,
stands in front. In `signal_struct` the same pointer stands between an unused one and those of process group and
session.

Sources: Linux include/linux/pid.h (struct pid, struct upid), sched/signal.h (pids), releases 5.10 to 7.x.
"""

from __future__ import annotations

import numpy as np

from engine.memory import Memory
from engine.oslayers.linux.shape.sample import Column, Sample, one
from engine.oslayers.linux.shape.tasks import PID_LIMIT, TaskColumns
from engine.oslayers.linux.shape.types import Members, array, number, pointer, structure

PID_BYTES = 192
SIGNAL_BYTES = 1024
LEVEL = 4
"""Behind the count of references."""
LEVELS = 32
"""MAX_PID_NS_LEVEL of include/linux/pid_namespace.h."""
GROUP_IN_KINDS, KINDS = 1, 4
"""PIDTYPE_TGID and PIDTYPE_MAX of include/linux/pid_types.h."""


def find_pids(columns: TaskColumns, memory: Memory) -> dict[str, Members]:
    """`thread_pid` of tasks, `pid` and `upid`."""
    sample, pid, idle = columns.sample, columns.of("pid"), columns.idle
    if pid is None or idle is None:
        return {}
    words = sample.words().astype(np.uint64)
    found: list[tuple[int, int]] = []
    for index in sample.agreed(sample.pointers(words)).tolist():
        values = words[:, index]
        if min(len(np.unique(values)), len(np.unique(values - sample.addresses))) < len(pid) - sample.slack:
            continue
        records = Sample.read(memory, values.tolist(), PID_BYTES, sample.kernel_start)
        if len(records) == len(sample) and int(records.column(LEVEL, 4)[idle]) == 0:
            found += [(index, place) for place in _numbers(sample, records, pid)]
    if len(found) != 1:
        return {}
    index, place = found[0]
    word = sample.word
    columns.take("thread_pid", index * word, pointer(word))
    upid: Members = {"nr": (0, number(4, signed=True)), "ns": (word, pointer(word))}
    return {"upid": upid, "pid": {"level": (LEVEL, number(4)), "numbers": (place, array(structure("upid", upid), 1))}}


def _numbers(sample: Sample, records: Sample, pid: Column) -> list[int]:
    """Where these records have the PIDs, with one namespace behind all of them."""
    if not sample.holds(records.column(LEVEL, 4) <= LEVELS):
        return []
    found = []
    for place in (sample.agreed(records.table(4) == pid[:, None]) * 4).tolist():
        if place % sample.word or place + 2 * sample.word > records.size:
            continue
        spaces, counts = np.unique(records.column(place + sample.word), return_counts=True)
        common = int(np.argmax(counts))
        if int(spaces[common]) >= sample.kernel_start and int(counts[common]) >= len(sample) - sample.slack:
            found.append(place)
    return found


def find_groups(columns: TaskColumns, memory: Memory, numbers: int) -> Members:
    """`pids` of `signal_struct`; `numbers` is where a `struct pid` has its first number."""
    sample, own, signals = columns.sample, columns.of("thread_pid"), columns.of("signal")
    if own is None or signals is None:
        return {}
    records = Sample.read(memory, signals.tolist(), SIGNAL_BYTES, sample.kernel_start)
    if len(records) < len(sample):
        return {}
    words = records.words().astype(np.uint64)
    place = one(sample.agreed(words == own[:, None]))
    if place is None or place < GROUP_IN_KINDS or place + 2 >= words.shape[1]:
        return {}
    for index in (place + 1, place + 2):
        told, faults = memory.words(words[:, index] + np.uint64(numbers), "<u4")
        sound = sample.pointers(words[:, index]) & (told <= PID_LIMIT)
        sound[faults.rows] = False
        if not sample.holds(sound):
            return {}
    word = sample.word
    return {"pids": ((place - GROUP_IN_KINDS) * word, array(pointer(word), KINDS))}
