"""Members of `struct task_struct` by what their columns prove.

    pid, tgid             equal numbers side by side, 0 of the idle task, 1 among them, no two alike
    real_parent, parent   tasks side by side, from each of which one comes to the idle task
    group_leader          behind them and two lists, the task itself: all are leaders here
    mm, active_mm         side by side, null or equal; null of some (threads of the kernel) and not of all
    flags                 before tasks; bit PF_KTHREAD is set of those, and only of those, that have no mm and descend
                          from `kthreadd`, and PF_EXITING of nobody who has an mm
    __state               before flags; states alone, TASK_IDLE of some kernel threads and of nobody else, and
                          TASK_INTERRUPTIBLE of some process
    exit_signal           between mm and pid; SIGCHLD of nearly all, 0 of the idle task; before it stand exit_code and
                          exit_state, which is no more than the states of the dead
    start_time, start_boottime   nanoseconds side by side, growing along the ring, which is in order of birth, and
                          not for all alike; 0 of the idle task
    real_cred, cred       see `cred`;  signal, thread_node   see `threads`

Sources: Linux include/linux/sched.h (order of members that stand side by side), kernel/fork.c, kernel/kthread.c,
releases 5.10 to 7.x.
"""

from __future__ import annotations

from dataclasses import field

import numpy as np

from engine.layout import DataType
from engine.memory import Addresses, Memory
from engine.oslayers.linux.shape.sample import Column, Mask, Sample, one
from engine.oslayers.linux.shape.types import Members, number, pointer
from engine.records import dataclass

PID_LIMIT = 1 << 22
PF_KTHREAD = 0x0020_0000
"""include/linux/sched.h; the same since 2.6.27."""
PF_EXITING = 4
"""The same; who has it has given up its address space, or soon will."""
SIGCHLD = 17
"""include/uapi/asm-generic/signal.h; of MIPS and SPARC it is another."""
IDLE, INTERRUPTIBLE = 0x402, 1
_STATE_BITS = 0x1FFFF
_STATE_LOW = (0, 1, 2, 4, 8, 0x40, 0x80)
"""One at the most of TASK_INTERRUPTIBLE, UNINTERRUPTIBLE, STOPPED, TRACED, PARKED, DEAD (include/linux/sched.h)."""
_EXIT_STATES = (0, 0x10, 0x20, 0x30)
"""EXIT_DEAD, EXIT_ZOMBIE, EXIT_TRACE."""
_ANCESTORS = 4096
_TO_LEADER = 6
"""Words from `real_parent` to `group_leader`: `parent` and the two lists `children` and `sibling` are between them."""


@dataclass(slots=True)
class TaskColumns:
    """What was found of tasks: the offset and type of each member, and the columns that others are measured by."""

    sample: Sample
    members: Members = field(default_factory=dict)

    def take(self, name: str, offset: int, kind: DataType) -> None:
        """Know where a member stands."""
        self.members[name] = offset, kind

    def of(self, name: str) -> Column | None:
        """The column of a member of which it is known."""
        if name not in self.members:
            return None
        offset, kind = self.members[name]
        return self.sample.column(offset, kind.size)

    @property
    def idle(self) -> int | None:
        """The row of the idle task; None where it could not be read."""
        found = np.flatnonzero(self.sample.column(self.members["pid"][0], 4) == 0)
        return int(found[0]) if len(found) else None


def find_pid(columns: TaskColumns) -> dict[str, Members]:
    """`pid` and `tgid`."""
    sample = columns.sample
    table = sample.table(4)
    equal = sample.agreed(table[:, :-1] == table[:, 1:])
    found = []
    for index in equal.tolist():
        numbers = table[:, index].astype(np.int64)
        different = len(np.unique(numbers))
        sound = (numbers <= PID_LIMIT) & (numbers >= 0)
        if different >= len(numbers) - sample.slack and 0 in numbers and 1 in numbers and sample.holds(sound):
            found.append(index)
    place = one(found)
    if place is not None:
        columns.take("pid", 4 * place, number(4, signed=True))
        columns.take("tgid", 4 * place + 4, number(4, signed=True))
    return {}


def find_parents(columns: TaskColumns, memory: Memory) -> dict[str, Members]:
    """`real_parent` and `parent`, in this order; `group_leader`."""
    sample, idle = columns.sample, columns.idle
    words = sample.words().astype(np.uint64)
    own = sample.agreed(words == sample.addresses[:, None]).tolist()
    if idle is None:
        return {}
    possible = sample.agreed(sample.pointers(words)).tolist()
    possible = [index for index in possible if words[idle, index] == sample.addresses[idle] and index not in own]
    trees = {index for index in possible if _is_tree(columns, memory, words[:, index])}
    pairs = [index for index in sorted(trees) if index + 1 in trees]
    found = one(pairs)
    if found is not None:
        columns.take("real_parent", found * sample.word, pointer(sample.word))
        columns.take("parent", (found + 1) * sample.word, pointer(sample.word))
        if found + _TO_LEADER in own:
            columns.take("group_leader", (found + _TO_LEADER) * sample.word, pointer(sample.word))
    return {}


def _is_tree(columns: TaskColumns, memory: Memory, parents: Addresses) -> bool:
    """Whether each pointer leads to a task, and from each row one comes to the idle task."""
    sample = columns.sample
    pid = columns.of("pid")
    assert pid is not None  # found first
    own = pid.tolist()
    numbers, faults = memory.words(parents + np.uint64(columns.members["tgid"][0]), "<u4")
    known = np.isin(numbers, pid)
    known[faults.rows] = False
    if not sample.holds(known):
        return False
    above = dict(zip(own, numbers.tolist(), strict=True))
    lost = 0
    for at in own:
        for _ in range(_ANCESTORS):
            if not at or at not in above:
                break
            at = above[at]
        lost += at != 0
    return lost <= sample.slack and len(set(numbers.tolist())) > 2


def mm_candidates(columns: TaskColumns) -> list[int]:
    """Offsets of words that may be `mm`, with `active_mm` behind it: what they lead to decides."""
    sample = columns.sample
    words = sample.words().astype(np.uint64)
    null = words == 0
    claim = (null | sample.pointers(words))[:, :-1]
    claim &= null[:, :-1] | (words[:, :-1] == words[:, 1:])
    claim &= (null | sample.pointers(words))[:, 1:]
    found = []
    for index in sample.agreed(claim).tolist():
        empty = null[:, index]
        if empty.any() and not empty.all() and words[_of_pid(columns, 1), index] != 0:
            found.append(index * sample.word)
    return found


def _of_pid(columns: TaskColumns, wanted: int) -> int:
    pid = columns.of("pid")
    assert pid is not None  # found first
    rows = np.flatnonzero(pid == wanted)
    return int(rows[0]) if len(rows) else 0


def kernel_threads(columns: TaskColumns) -> Mask | None:
    """Which tasks are the kernel's own: without mm, `kthreadd` (PID 2) or its children, or the idle task."""
    mm, tgid, parents = columns.of("mm"), columns.of("pid"), columns.of("real_parent")
    if mm is None or parents is None or tgid is None:
        return None
    threads = np.flatnonzero((tgid == 2) & (mm == 0))
    if not len(threads):
        return None
    own = columns.sample.addresses[threads[0]]
    result: Mask = (mm == 0) & ((parents == own) | (tgid == 2) | (tgid == 0))
    return result


def find_flags(columns: TaskColumns) -> dict[str, Members]:
    """`flags`."""
    sample, threads, mm = columns.sample, kernel_threads(columns), columns.of("mm")
    if threads is None or mm is None or threads.all() or not threads.any():
        return {}
    table = sample.table(4)[:, : columns.members["tasks"][0] // 4]
    words = sample.words()
    pointers = set(sample.agreed(sample.pointers(words) | (words == 0)).tolist())
    alive = threads | (mm != 0)
    claim = (table & np.uint32(PF_KTHREAD) != 0) == threads[:, None]
    claim &= (table & np.uint32(PF_EXITING) == 0) | ~alive[:, None]
    found = [
        index for index in sample.agreed(claim).tolist()
        if index * 4 // sample.word not in pointers
    ]  # fmt: skip
    place = one(found)
    if place is not None:
        columns.take("flags", 4 * place, number(4))
    return {}


def find_state(columns: TaskColumns) -> dict[str, Members]:
    """`__state` (before 5.14 `state`): one name for both."""
    sample, threads, mm = columns.sample, kernel_threads(columns), columns.of("mm")
    if threads is None or mm is None or "flags" not in columns.members:
        return {}
    table = sample.table(4)[:, : columns.members["flags"][0] // 4]
    sound = (table <= _STATE_BITS) & np.isin(table & np.uint32(0xFF), np.array(_STATE_LOW, np.uint32))
    sound &= (table != IDLE) | threads[:, None]
    found = []
    for index in sample.agreed(sound).tolist():
        states = table[:, index]
        resting = (states & np.uint32(0xFF) == INTERRUPTIBLE) & (mm != 0)
        if (states == IDLE).any() and resting.any():
            found.append(index)
    place = one(found)
    if place is not None:
        columns.take("__state", 4 * place, number(4))
    return {}


def find_exit(columns: TaskColumns) -> dict[str, Members]:
    """`exit_state`, `exit_code`, `exit_signal`, which stand in this order."""
    sample, mm, idle = columns.sample, columns.of("mm"), columns.idle
    if mm is None or idle is None:
        return {}
    table = sample.table(4)[:, : columns.members["pid"][0] // 4]
    found = []
    for index in sample.agreed(table <= 64).tolist():
        signals = table[:, index]
        usual = int((signals == SIGCHLD).sum())
        if index - 2 <= columns.members["mm"][0] // 4 or signals[idle] or usual * 4 < len(sample) * 3:
            continue
        states = table[:, index - 2]
        sound = np.isin(states, np.array(_EXIT_STATES, np.uint32)) & ((states == 0) | (mm == 0))
        if sample.holds(sound):
            found.append(index)
    place = one(found)
    if place is not None:
        for name, before in (("exit_state", 2), ("exit_code", 1), ("exit_signal", 0)):
            columns.take(name, 4 * (place - before), number(4, signed=True))
    return {}


def find_start(columns: TaskColumns) -> dict[str, Members]:
    """`start_time` and `start_boottime`, in this order."""
    sample, idle = columns.sample, columns.idle
    if idle is None:
        return {}
    table = sample.table(8, 4)
    live = np.arange(len(sample)) != idle
    times = table[live].astype(np.uint64)
    if len(times) < 2:
        return {}
    sound = (times > 0) & (times < np.uint64(1 << 58))
    sound[1:] &= times[1:] >= times[:-1]
    good = {index for index in sample.agreed(sound).tolist() if len(np.unique(times[:, index])) * 4 > len(times)}
    found = []
    for index in sorted(good):
        other = index + 2
        if other in good and table[idle, index] == 0 and table[idle, other] == 0:
            slept = times[:, other] - times[:, index]
            if sample.holds((times[:, other] >= times[:, index]) & (slept < np.uint64(1 << 58))):
                found.append(index)
    place = one(found)
    if place is not None:
        columns.take("start_time", 4 * place, number(8))
        columns.take("start_boottime", 4 * place + 8, number(8))
    return {}
