"""`struct cred`, by the capabilities of the idle task.

`real_cred` and `cred` are pointers side by side, equal but of who acts for another at the moment. The idle task has
all capabilities: `cap_permitted`, `cap_effective` and `cap_bset` are one number of the form 2^k - 1, side by side,
between the empty `cap_inheritable` and `cap_ambient`. Before them stand `securebits` and eight IDs, before these the
count of uses; there is no room for anything else. In every task then effective capabilities are permitted ones, all
are among those of the idle task, and it is used.

Sources: Linux include/linux/cred.h, kernel/cred.c (init_cred), releases 5.10 to 7.x (from 6.7 on `usage` is a long).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.memory import Memory
from engine.oslayers.linux.shape.sample import Sample, one
from engine.oslayers.linux.shape.tasks import TaskColumns
from engine.oslayers.linux.shape.types import Members, number, pointer, structure

CRED_BYTES = 128
IDS = ("uid", "gid", "suid", "sgid", "euid", "egid", "fsuid", "fsgid")
CAPABILITIES = ("cap_inheritable", "cap_permitted", "cap_effective", "cap_bset", "cap_ambient")
_ALL = range(30, 64)
"""How many capabilities there may be: 38 to 41 in the kernels known."""
_SECUREBITS_LIMIT = 1 << 12


def find_cred(columns: TaskColumns, memory: Memory) -> dict[str, Members]:
    """`real_cred` and `cred` of tasks, and `cred`."""
    sample = columns.sample
    words = sample.words().astype(np.uint64)
    claim = sample.pointers(words)[:, :-1] & (words[:, :-1] == words[:, 1:])
    found = []
    for index in sample.agreed(claim).tolist():
        target = Sample.read(memory, words[:, index].tolist(), CRED_BYTES, sample.kernel_start)
        if len(target) < len(sample):
            continue
        found += [(index, members) for members in _members(columns, target)]
    index = one([index for index, _ in found])
    if index is None:
        return {}
    columns.take("real_cred", index * sample.word, pointer(sample.word))
    columns.take("cred", (index + 1) * sample.word, pointer(sample.word))
    return {"cred": found[0][1]}


def _members(columns: TaskColumns, target: Sample) -> Iterator[Members]:
    """Each way in which all these records may be credentials."""
    sample, idle = columns.sample, columns.idle
    if idle is None:
        return
    for use, aligned in dict.fromkeys((use, aligned) for use in (4, target.word) for aligned in (4, target.word)):
        securebits = use + 4 * len(IDS)
        first = securebits + 4 + (-(securebits + 4)) % aligned
        everything = int(target.column(first + 8, 8)[idle])
        if everything not in [(1 << count) - 1 for count in _ALL]:
            continue
        ids = [target.column(use + 4 * place, 4) for place in range(len(IDS))]
        caps = [target.column(first + 8 * place, 8) for place in range(len(CAPABILITIES))]
        full = [int(column[idle]) for column in caps] == [0, everything, everything, everything, 0]
        if not full or any(int(column[idle]) for column in ids):
            continue
        claim = target.column(0, use) > 0
        claim &= target.column(securebits, 4) < _SECUREBITS_LIMIT
        claim &= caps[2] & ~caps[1] == 0
        for column in caps:
            claim &= column & np.uint64(~everything & (1 << 64) - 1) == 0
        if sample.holds(claim):
            yield _named(use, securebits, first)
            return  # the numbers stand at one place: another way would name the same IDs


def _named(first_id: int, securebits: int, first_capability: int) -> Members:
    members: Members = {"securebits": (securebits, number(4))}
    for place, name in enumerate(IDS):
        members[name] = first_id + 4 * place, structure("kuid_t", {"val": (0, number(4))})
    for place, name in enumerate(CAPABILITIES):
        members[name] = first_capability + 8 * place, structure("kernel_cap_t", {"val": (0, number(8))})
    return members
