"""Processes of a damaged image that neither the ring of tasks nor the table of PIDs leads to: by their kin.

Where the ring is broken it is taken up again at every task that is known, in both directions, and parents, children
and siblings are asked. All these lists have the same order among threads of the kernel, so two gaps cut out what lies
between them; there the kernel's own variables lead, which name many of its threads.

What is met that way is a process only if it says so itself, in more than one way: it leads its thread group, and its
`struct pid` has its number, or a neighbour in the ring names it.

Sources: Linux include/linux/sched.h, include/linux/pid.h; kernel/exit.c (__unhash_process: who is gone has no
`struct pid`), kernel/fork.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError, NotFoundError
from engine.formats.search import chunks
from engine.layout import Field
from engine.memory import Addresses
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.tasks import TASK_LIMIT, Tasks
from engine.types import ADDRESS_SPACE

REACH = 1 << 20
"""More than a `struct task_struct` has bytes."""
ROUNDS = 1 << 12
"""Steps away from what is known at first."""
Mask = npt.NDArray[np.bool_]


def by_kin(tasks: Tasks, objects: Objects, known: Iterable[int]) -> list[int]:
    """The leaders of thread groups that tasks lead to which are `known`, without these; each has proved itself."""
    reader = objects.silent()
    seen = dict.fromkeys([tasks.head, *known])
    told = len(seen)
    _spread(tasks, reader, seen, list(seen))
    fresh = [address for address in _named_by_variables(tasks, reader) if address not in seen]
    seen.update(dict.fromkeys(fresh))
    _spread(tasks, reader, seen, fresh)
    return list(seen)[told:]


def _spread(tasks: Tasks, objects: Objects, seen: dict[int, None], fresh: list[int]) -> None:
    """Add to what was `seen` all to which the `fresh` of them lead."""
    for _ in range(ROUNDS):
        met = dict.fromkeys(address for address in _relatives(tasks, objects, fresh) if address not in seen)
        fresh = _proved(tasks, objects, list(met))
        seen.update(dict.fromkeys(fresh))
        if not fresh or len(seen) > TASK_LIMIT:
            break


def _named_by_variables(tasks: Tasks, objects: Objects) -> list[int]:
    """The leaders of thread groups to which words of the kernel's image point."""
    found, image = tasks.profile.found, tasks.profile.found.image
    leader = tasks.task.get("group_leader")
    words: list[Addresses] = []
    for _, data, size, _ in chunks(found.memory.window(image.start, image.size), 0, None, objects.word):
        column = np.frombuffer(data, objects.word_type, size // objects.word).astype(np.uint64)
        outside = (column < np.uint64(image.start)) | (column >= np.uint64(image.stop))
        words.append(np.unique(column[outside & (column >= np.uint64(objects.kernel_start))]))
    pointers = np.unique(np.concatenate(words)) if words else np.empty(0, np.uint64)
    pointers = pointers[(pointers % np.uint64(objects.word) == 0) & (pointers < np.uint64(ADDRESS_SPACE - REACH))]
    if leader is None or not len(pointers):
        return []
    own, good = objects.pointers(pointers, leader)
    return _proved(tasks, objects, pointers[good & (own == pointers)].tolist())


def _relatives(tasks: Tasks, objects: Objects, addresses: list[int]) -> Iterator[int]:
    """Where tasks may be that these name."""
    column = objects.addresses(addresses)
    for name, member in (("tasks", "tasks"), ("children", "sibling"), ("sibling", "sibling")):
        link = tasks.task.get(member)
        for side in ("next", "prev"):
            yield from _named(objects, column, tasks.task.get(f"{name}.{side}"), 0 if link is None else link.offset)
    for name in ("real_parent", "parent", "group_leader"):
        yield from _named(objects, column, tasks.task.get(name), 0)


def _named(objects: Objects, column: Addresses, member: Field | None, offset: int) -> Iterator[int]:
    if member is not None:
        found, good = objects.pointers(column, member)
        yield from (one - offset for one in found[good].tolist() if objects.is_pointer(one))


def _proved(tasks: Tasks, objects: Objects, addresses: list[int]) -> list[int]:
    """Those of the addresses at which the leader of a thread group stands."""
    addresses = [address for address in addresses if objects.is_pointer(address) and not address % objects.word]
    if not addresses:
        return []
    column = objects.addresses(addresses)
    pids, readable = objects.column(column, tasks.task["pid"])
    groups, also = objects.column(column, tasks.task["tgid"])
    good = readable & also & (pids == groups) & (pids > 0) & (pids <= TASK_LIMIT)
    leader = tasks.task.get("group_leader")
    if leader is not None:
        found, readable = objects.pointers(column, leader)
        good &= readable & (found == column)
    good[good] &= _has_number(tasks, objects, column[good], pids[good]) | _is_named(tasks, objects, column[good])
    return [address for address, fine in zip(addresses, good.tolist(), strict=True) if fine]


def _has_number(tasks: Tasks, objects: Objects, column: Addresses, pids: npt.NDArray[np.int64]) -> Mask:
    """Of which the `struct pid` has the number that they have themselves."""
    link = tasks.task.get("thread_pid")
    try:
        number = objects.struct("pid")["numbers"].offset + objects.struct("upid")["nr"].offset
    except NotFoundError:
        link = None
    found = np.zeros(len(column), np.bool_)
    if link is not None:
        pointers, good = objects.pointers(column, link)
        for row in np.flatnonzero(good).tolist():
            try:
                pointer = int(pointers[row])
                found[row] = objects.is_pointer(pointer) and objects.memory.u32(pointer + number) == int(pids[row])
            except FaultError:
                continue
    return found


def _is_named(tasks: Tasks, objects: Objects, column: Addresses) -> Mask:
    """Which of them a neighbour in the ring names."""
    found = np.zeros(len(column), np.bool_)
    link, word = tasks.link.offset, objects.word
    for row, address in enumerate(column.tolist()):
        for there, back in ((0, word), (word, 0)):
            try:
                neighbour = objects.pointer(address + link + there)
                named = objects.is_pointer(neighbour) and objects.pointer(neighbour + back) == address + link
                found[row] |= named and neighbour != address + link
            except FaultError:
                continue
    return found


__all__ = ["by_kin"]
