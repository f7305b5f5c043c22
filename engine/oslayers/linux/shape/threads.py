"""`signal` and the list of a process's threads, which prove one another.

The leader is the first in the list of its thread group: `thread_node.prev` leads to `thread_head`, whose `next` leads
back to the leader's `thread_node`. `thread_head` lies in `struct signal_struct`, so a third column, `signal`, stands
the same distance before it in every task.

Sources: Linux include/linux/sched/signal.h, kernel/fork.c (copy_process), releases 5.10 to 7.x.
"""

from __future__ import annotations

import numpy as np

from engine.errors import FaultError
from engine.memory import Addresses, Memory
from engine.oslayers.linux.shape.sample import Sample, one
from engine.oslayers.linux.shape.tasks import TaskColumns
from engine.oslayers.linux.shape.types import Members, list_head, number, pointer

HEAD_LIMIT = 256
"""Bytes of a signal_struct before its `thread_head`: four counters."""
THREAD_LIMIT = 1 << 20
NR_THREADS = 8
"""Behind `sigcnt` and `live`, two numbers of 32 bits."""


def find_threads(columns: TaskColumns, memory: Memory) -> dict[str, Members]:
    """`signal` and `thread_node` of tasks, and `signal_struct`."""
    sample, word = columns.sample, columns.sample.word
    words = sample.words().astype(np.uint64)
    possible = sample.agreed(sample.pointers(words))
    nodes = []
    for index in possible.tolist():
        if not index or (index - 1) * word == columns.members["tasks"][0]:  # a list of the same look
            continue
        heads = words[:, index]
        back, faults = memory.words(heads, f"<u{word}")
        own = sample.addresses + np.uint64((index - 1) * word)
        claim = (back.astype(np.uint64) == own) & (heads != own)
        claim[faults.rows] = False
        if sample.holds(claim):
            nodes.append(index)
    node = one(nodes)
    if node is None:
        return {}
    distance = words[:, node][:, None] - words[:, possible]
    found = []
    for place, index in enumerate(possible.tolist()):
        values, counts = np.unique(distance[:, place], return_counts=True)
        common = int(np.argmax(counts))
        if 0 < int(values[common]) <= HEAD_LIMIT and int(counts[common]) >= len(sample) - sample.slack:
            found.append((index, int(values[common])))
    if len(found) != 1:
        return {}
    signal, head = found[0]
    columns.take("thread_node", (node - 1) * word, list_head(word))
    columns.take("signal", signal * word, pointer(word))
    members: Members = {"thread_head": (head, list_head(word))}
    if head >= NR_THREADS + 4 and _counts(sample, memory, words[:, node], head):
        members["nr_threads"] = NR_THREADS, number(4)
    return {"signal_struct": members}


def _counts(sample: Sample, memory: Memory, heads: Addresses, head: int) -> bool:
    """Whether the number behind `sigcnt` and `live` is how many threads there are, of every task."""
    told, faults = memory.words(heads - np.uint64(head - NR_THREADS), "<u4")
    claim = np.ones(len(sample), bool)
    claim[faults.rows] = False
    for row, (at, count) in enumerate(zip(heads.tolist(), told.tolist(), strict=True)):
        if claim[row]:
            claim[row] = _length(memory, at, sample.word, count) == count
    return sample.holds(claim)


def _length(memory: Memory, head: int, word: int, expected: int) -> int:
    """Entries of a list; it is left where there are more than expected."""
    read = memory.u64 if word == 8 else memory.u32
    count, at = 0, head
    try:
        while (at := read(at)) != head and count <= min(expected, THREAD_LIMIT):
            count += 1
    except FaultError:
        return -1
    return count
