"""The ring of all tasks, from `init_task` alone, and where in a task its name stands.

Every pair of words in `init_task` may be the `struct list_head` by which it is linked with the other tasks. It is
the one whose ring closes over structures that have, where the idle task has `swapper`, a name: NUL-terminated in all
of them, printable in three of four (names are whatever a program chose).

Sources: Linux include/linux/sched.h, init/init_task.c (the idle task's name), releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.errors import FaultError
from engine.memory import Memory, as_addresses
from engine.oslayers.linux.shape.sample import Sample
from engine.records import dataclass

TASK_BYTES = 8192
"""Bytes of a task in which members are looked for; those in question stand within the first 5000."""
COMM_SIZE = 16
"""TASK_COMM_LEN."""
TASK_LIMIT = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""
ROWS = 512
"""Tasks that give evidence; of more every so many-th does."""
FEWEST = 8
"""Tasks below which columns prove nothing; a kernel has some fifty threads of its own."""


@dataclass(frozen=True, slots=True)
class Ring:
    """The tasks, and the places of `tasks` and `comm` in each."""

    link: int
    comm: int
    tasks: list[int]
    """Addresses, the idle task first."""
    closed: bool
    """Whether the ring was followed all around."""


def find_ring(memory: Memory, init_task: int, kernel_start: int) -> Ring | None:
    """The ring of tasks; None where no pair of words leads around one."""
    idle = Sample.read(memory, [init_task], TASK_BYTES, kernel_start)
    if not len(idle):
        return None
    names = list(_names(idle.data[0].tobytes()))
    best: Ring | None = None
    for link in _links(memory, idle):
        tasks, closed = _around(memory, init_task, link, idle.word, kernel_start)
        if len(tasks) < FEWEST or (best is not None and len(tasks) <= len(best.tasks)):
            continue
        for comm in names:
            if _named(memory, tasks, comm):
                best = Ring(link, comm, tasks, closed)
                break
    return best


def _names(data: bytes) -> Iterator[int]:
    """Where the idle task's name may stand: `swapper`, or `swapper/0` where there are several CPUs."""
    at = data.find(b"swapper")
    while at >= 0:
        if data[at : at + 16] in (b"swapper".ljust(16, b"\0"), b"swapper/0".ljust(16, b"\0")):
            yield at
        at = data.find(b"swapper", at + 1)


def _links(memory: Memory, idle: Sample) -> list[int]:
    """Offsets of pairs of words that point out of the idle task, to where words point back."""
    words = idle.words()[0].astype(np.uint64)
    init_task, word = int(idle.addresses[0]), idle.word
    good = idle.pointers(words)
    good &= (words < np.uint64(init_task)) | (words >= np.uint64(init_task + idle.size))
    rows = np.flatnonzero(good[:-1] & good[1:])
    places = np.uint64(init_task) + rows.astype(np.uint64) * np.uint64(word)
    back, faults = memory.words(words[rows] + np.uint64(word), f"<u{word}")
    forth, more = memory.words(words[rows + 1], f"<u{word}")
    linked = (back.astype(np.uint64) == places) | (forth.astype(np.uint64) == places)
    linked[np.intersect1d(faults.rows, more.rows)] = False
    found: list[int] = (rows[linked] * word).tolist()
    return found


def _around(memory: Memory, init_task: int, link: int, word: int, kernel_start: int) -> tuple[list[int], bool]:
    """The structures in a ring, forwards; where it is broken those before `init_task` backwards too."""
    head = init_task + link
    read = memory.u64 if word == 8 else memory.u32
    seen = {head: None}
    closed = False
    for direction in (0, word):
        at = head
        try:
            while len(seen) <= TASK_LIMIT:
                at = read(at + direction)
                if at == head:
                    closed = True
                    break
                if at in seen or at < kernel_start or at & word - 1:
                    break
                if read(read(at + word - direction) + direction) != at:
                    break
                seen[at] = None
        except FaultError:
            pass
        if closed:
            break
    return [at - link for at in seen], closed


def _named(memory: Memory, tasks: list[int], comm: int) -> bool:
    """Whether each of these structures has a name there."""
    rows = tasks if len(tasks) <= ROWS else tasks[:: len(tasks) // ROWS]
    data = np.zeros((len(rows), COMM_SIZE), np.uint8)
    faults = memory.gather(as_addresses([task + comm for task in rows]), data)
    ended = (data == 0).any(axis=1)
    printable = ((data >= 0x20) & (data < 0x7F)) | (np.cumsum(data == 0, axis=1) > 0)
    named = printable.all(axis=1) & (data[:, 0] != 0)
    slack = len(rows) // 32
    return len(faults) + int((~ended).sum()) <= slack and int(named.sum()) * 4 >= len(rows) * 3
