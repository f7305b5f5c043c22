"""The processes of a kernel as of one moment, from two sources: the ring of tasks, and the table of PIDs.

A rootkit that takes a process out of one of them leaves it in the other: what only one has is listed and told so.
Over live memory the two are read one after the other, so that a process that began or ended meanwhile is in one
alone, too: where they differ, each of these is looked at again, by itself, and what is found then holds. In an image
whose ring is broken those are added to which the known ones lead (`kin`).

Sources: Linux kernel/pid.c, include/linux/{pid,pid_namespace,idr}.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from itertools import islice

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.kin import by_kin
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.tasks import DEAD, TASK_LIMIT, TaskRecord, Tasks
from engine.oslayers.linux.walks import xarray, xarray_entry
from engine.records import dataclass

RING, NUMBERS, KIN = "task ring", "pid numbers", "lists of kin"
"""Where a process may be found: in the list of tasks, in the table of PIDs; where these are damaged, by its kin."""
BOTH = (RING, NUMBERS)
LOOKS = 3
"""How often over live memory it is looked at what only one of them has, before that is believed."""
DOUBTS = 1024
"""Of so many it is looked again, at the most; where there are more, the ring is broken."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One process, and where it was found."""

    record: TaskRecord
    sources: tuple[str, ...]


class PidNumbers:
    """The table of PIDs of the outermost namespace: every process of every namespace has a number in it."""

    def __init__(self, tasks: Tasks, objects: Objects) -> None:
        """Raises NotFoundError where the kernel's types or symbols lack what this needs."""
        kinds = objects.types.enum("pid_type") or {}
        index = kinds.get("PIDTYPE_TGID", 1)
        pid, namespace = objects.struct("pid"), objects.struct("pid_namespace")
        node, root = objects.struct("xa_node"), objects.struct("xarray", "radix_tree_root")
        _ = node["slots"], node["shift"], root.first("xa_head", "rnode")  # what the walk needs must be told, too
        self.table = tasks.profile.require("init_pid_ns") + namespace["idr.idr_rt"].offset
        self.first = pid[f"tasks[{index}].first"]
        self.link = tasks.task[f"pid_links[{index}]"].offset

    def leaders(self, objects: Objects) -> dict[int, int]:
        """Address of a thread group's leader → its PID, of all numbers that are a process's."""
        entries = [(index, entry) for index, entry, _ in xarray(objects, self.table, TASK_LIMIT) if not entry & 3]
        if not entries:
            return {}
        firsts, _ = objects.pointers(objects.addresses(entry for _, entry in entries), self.first)
        pairs = zip(entries, firsts.tolist(), strict=True)
        return {first - self.link: index for (index, _), first in pairs if objects.is_pointer(first)}


    def leader(self, objects: Objects, pid: int) -> int | None:
        """The leader of the thread group with that PID; None where the table has none. Raises FaultError."""
        entry = xarray_entry(objects, self.table, pid)
        first = objects.pointer(entry + self.first.offset) if objects.is_pointer(entry) and not entry & 3 else 0
        return first - self.link if objects.is_pointer(first) else None


def find_process(tasks: Tasks, objects: Objects, numbers: PidNumbers, pid: int) -> Listed | None:
    """One process by its number, with no walk of the ring: whether it stands in that its neighbours say.

    None where the table of PIDs does not tell of it: the ring may.
    """
    try:
        address = numbers.leader(objects, pid)
        record = None if address is None else tasks.record(objects, address)
        if address is None or record is None or not record.pid == record.tgid == pid or record.state == DEAD:
            return None
        linked = _is_linked(tasks, objects, address)
    except FaultError:
        return None
    return Listed(record, BOTH if linked else (NUMBERS,))


def _is_linked(tasks: Tasks, objects: Objects, address: int) -> bool:
    """Whether a task stands in the ring, as its neighbours say. Raises FaultError."""
    link, word = address + tasks.link.offset, objects.word
    following, previous = objects.pointer(link), objects.pointer(link + word)
    return following != link and objects.pointer(following + word) == objects.pointer(previous) == link


def list_processes(
    tasks: Tasks, objects: Callable[[], Objects], numbers: PidNumbers | None, *, live: bool
) -> dict[int, Listed]:
    """All processes by PID, but the idle task, which has no number that a user sees."""
    reader = objects()
    ring, whole = tasks.ring(reader)
    leaders = None if numbers is None else numbers.leaders(reader)
    sources: dict[int, tuple[str, ...]] = {
        address: (RING,) if leaders is None or address not in leaders else BOTH for address in ring
    }
    for address in leaders or ():
        sources.setdefault(address, (NUMBERS,))
    if not (whole or live):
        sources |= dict.fromkeys(by_kin(tasks, reader, sources), (KIN,))
    records = tasks.records(reader.silent(), list(sources))
    told = {record.address: record for record in records}
    if live:
        _settle(tasks, objects, numbers, leaders, sources, told)
    found: dict[int, Listed] = {}
    for address, where in sources.items():
        record = told.get(address)
        if record is None:
            reader.skipped["task"] += 1
            continue
        if not _is_process(record, where, leaders) or (record.state == DEAD and live):
            if not live:
                reader.skipped["pid entry"] += 1
            continue
        there = found.get(record.pid)
        if there is not None:
            reader.skipped["process with the PID of another"] += 1
        if there is None or len(there.sources) < len(where):
            found[record.pid] = Listed(record, where)
    return found


def _settle(
    tasks: Tasks,
    objects: Callable[[], Objects],
    numbers: PidNumbers | None,
    leaders: Mapping[int, int] | None,
    sources: dict[int, tuple[str, ...]],
    told: dict[int, TaskRecord],
) -> None:
    """Look again, each by itself, at those that only one source has, or whose record was torn.

    Who began or ended meanwhile then is in both, or in none: who is gone is left out of `sources`, and not counted.
    """

    def is_doubtful(address: int) -> bool:
        record = told.get(address)
        if record is None or leaders is None:
            return record is None
        return sources[address] != BOTH or leaders.get(address, record.pid) != record.pid

    for _ in range(LOOKS - 1):
        doubtful = list(islice(filter(is_doubtful, sources), DOUBTS))
        if not doubtful:
            return
        reader = objects()
        reader.retried["task"] += len(doubtful)
        for address in doubtful:
            record = tasks.record(reader, address)
            pid = record.pid if record is not None else None if leaders is None else leaders.get(address)
            where = _found_at(tasks, reader, numbers, address, pid)
            if where:
                sources[address] = where
            else:
                del sources[address]
            if record is not None and where:
                told[address] = record
            else:
                told.pop(address, None)


def _found_at(
    tasks: Tasks, objects: Objects, numbers: PidNumbers | None, address: int, pid: int | None
) -> tuple[str, ...]:
    """Which of the sources have the task at that address now: none that of one who has ended."""
    found: tuple[str, ...] = ()
    with contextlib.suppress(FaultError):
        found += (RING,) if _is_linked(tasks, objects, address) else ()
    with contextlib.suppress(FaultError):
        found += (NUMBERS,) if numbers is not None and pid and numbers.leader(objects, pid) == address else ()
    return found


def _is_process(record: TaskRecord, sources: tuple[str, ...], numbers: Mapping[int, int] | None) -> bool:
    """Whether a record is one: what the table of PIDs alone has must say of itself the number it has there."""
    if not record.pid:
        return False
    if RING in sources or KIN in sources:
        return True
    return numbers is not None and record.pid == record.tgid == numbers.get(record.address, record.pid)


def pid_numbers(tasks: Tasks, objects: Objects) -> PidNumbers | None:
    """The second source; None where this kernel does not tell enough of it."""
    try:
        return PidNumbers(tasks, objects)
    except (NotFoundError, FaultError):
        return None

