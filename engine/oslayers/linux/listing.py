"""The processes of a kernel as of one moment, from two sources: the ring of tasks, and the table of PIDs.

A rootkit that takes a process out of one of them leaves it in the other: what only one has is listed and told so.
Over live memory the two are read one after the other, so that a process that began or ended meanwhile is in one
alone, too: where they differ, or the ring does not close, they are read again, and what they then agree on holds.

Sources: Linux kernel/pid.c, include/linux/{pid,pid_namespace,idr}.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.tasks import TASK_LIMIT, TaskRecord, Tasks
from engine.oslayers.linux.walks import xarray, xarray_entry
from engine.records import dataclass

RING, NUMBERS = "task ring", "pid numbers"
"""Where a process may be found: in the list of tasks, in the table of PIDs."""
LOOKS = 3
"""How often both are read over live memory before a difference is believed."""
DEAD = "X"


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
        records = [] if address is None else tasks.records(objects, [address])
        if address is None or not records or not records[0].pid == records[0].tgid == pid or records[0].state == DEAD:
            return None
        link, word = address + tasks.link.offset, objects.word
        following, previous = objects.pointer(link), objects.pointer(link + word)
        linked = following != link and objects.pointer(following + word) == objects.pointer(previous) == link
    except FaultError:
        return None
    return Listed(records[0], (RING, NUMBERS) if linked else (NUMBERS,))


@dataclass(frozen=True, slots=True)
class _Look:
    """What one reading of both sources gave, by address."""

    ring: Mapping[int, None]
    whole: bool
    numbers: Mapping[int, int] | None
    """None where this kernel does not tell."""

    @property
    def agreed(self) -> bool:
        return self.whole and (self.numbers is None or self.ring.keys() == self.numbers.keys())

    def sources(self, address: int) -> tuple[str, ...]:
        """Where it was found; never empty for what one of the looks has."""
        found = (RING,) if address in self.ring else ()
        return (*found, NUMBERS) if self.numbers is not None and address in self.numbers else found


def list_processes(
    tasks: Tasks, objects: Callable[[], Objects], numbers: PidNumbers | None, *, live: bool
) -> dict[int, Listed]:
    """All processes by PID, but the idle task, which has no number that a user sees."""
    looks: list[_Look] = []
    for _ in range(LOOKS if live else 1):
        reader = objects()
        ring, whole = tasks.ring(reader)
        looks.append(_Look(dict.fromkeys(ring), whole, None if numbers is None else numbers.leaders(reader)))
        if looks[-1].agreed:
            looks = looks[-1:]
            break
    reader = objects()
    sources = _united(looks)
    records = tasks.records(reader, list(sources))
    found: dict[int, Listed] = {}
    for record in records:
        one = Listed(record, sources[record.address])
        if not _is_process(record, one.sources, looks[-1].numbers) or (record.state == DEAD and live):
            if not live:
                reader.skipped["pid entry"] += 1
            continue
        there = found.get(record.pid)
        if there is not None:
            reader.skipped["process with the PID of another"] += 1
        if there is None or len(there.sources) < len(one.sources):
            found[record.pid] = one
    return found


def _united(looks: list[_Look]) -> dict[int, tuple[str, ...]]:
    """Address → sources; over several looks: of what the last has, and of what no broken look may have missed."""
    last = looks[-1]
    united = {address: last.sources(address) for address in dict.fromkeys([*last.ring, *(last.numbers or ())])}
    if not last.whole:
        for look in looks[:-1]:
            for address in (*look.ring, *(look.numbers or ())):
                united.setdefault(address, look.sources(address))
    if len(looks) > 1:  # a difference counts that every look saw
        for address, found in united.items():
            for look in looks[:-1]:
                found = tuple(dict.fromkeys((*found, *look.sources(address))))
            united[address] = tuple(name for name in (RING, NUMBERS) if name in found)
    return united


def _is_process(record: TaskRecord, sources: tuple[str, ...], numbers: Mapping[int, int] | None) -> bool:
    """Whether a record is one: what the table of PIDs alone has must say of itself the number it has there."""
    if not record.pid:
        return False
    if RING in sources:
        return True
    return numbers is not None and record.pid == record.tgid == numbers.get(record.address, record.pid)


def pid_numbers(tasks: Tasks, objects: Objects) -> PidNumbers | None:
    """The second source; None where this kernel does not tell enough of it."""
    try:
        return PidNumbers(tasks, objects)
    except (NotFoundError, FaultError):
        return None

