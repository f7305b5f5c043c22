"""The tasks of a kernel: the ring of thread groups, and what each record says, column by column.

Sources: Linux include/linux/sched.h, sched/signal.h, cred.h, pid.h, fs/proc/array.c (letters of states), 5.10 to 7.x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.errors import FaultError, NotFoundError
from engine.layout import Field, StructLayout
from engine.memory import Addresses
from engine.oslayers.linux.names import KernelThreadNames
from engine.oslayers.linux.objects import Objects, decoded
from engine.oslayers.linux.profile import Profile
from engine.oslayers.linux.walks import settled_ring
from engine.records import dataclass

NOTHING_KNOWN = StructLayout("", 0, ())
"""Stands for a structure of which no member is known."""
TASK_LIMIT = 1 << 22
"""PID_MAX_LIMIT of include/linux/threads.h."""
PF_KTHREAD = 0x0020_0000
"""include/linux/sched.h; the same since 2.6.27."""
SINGLE = 4
"""Up to so many records are read each by itself: faster than a column of each member (measured)."""
RECORD_LIMIT = 1 << 16
"""Bytes of a task_struct, at the most: it has 4 to 10 KB."""
TICKS = 10_000_000
"""Nanoseconds of a tick of USER_HZ, in which /proc/PID/stat counts."""
NAMESPACES = ("uts", "ipc", "mnt", "net", "time", "cgroup")
STATE_LETTERS = "RSDTtXZPI"
"""By the highest bit of the state (task_state_array of fs/proc/array.c)."""
DEAD = "X"
"""Of a task that is being freed: nobody finds it any more."""
_REPORTED, _IDLE, _NO_LOAD, _RTLOCK, _FROZEN = 0x7F, 0x402, 0x400, 0x1000, 0x8000


def state_letter(state: int, exit_state: int) -> str:
    """The letter that ps(1) prints (task_state_index and get_task_state)."""
    both = state | exit_state
    if both & _IDLE == _IDLE:
        return "I"
    if both & (_RTLOCK | _FROZEN):
        return "D"
    return STATE_LETTERS[min((both & _REPORTED).bit_length(), len(STATE_LETTERS) - 2)]


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One task as its `struct task_struct` says; None is «not known»."""

    address: int
    pid: int
    tgid: int
    comm: str
    ppid: int | None = None
    state: str | None = None
    uid: int | None = None
    gid: int | None = None
    flags: int | None = None
    mm: int | None = 0
    """0 of who has no address space; None where it is not known."""
    start_ns: int | None = None
    """Nanoseconds since boot, suspended time included."""
    threads: int | None = None
    name: str = ""
    """Its name as /proc shows it: of a kernel thread in full."""

    @property
    def kernel_thread(self) -> bool | None:
        """Whether it is a thread of the kernel itself."""
        return None if self.flags is None else bool(self.flags & PF_KTHREAD)

    @property
    def start_ticks(self) -> int | None:
        """Field 22 of /proc/PID/stat."""
        return None if self.start_ns is None else self.start_ns // TICKS


class Tasks:
    """Reads tasks through a profile's types."""

    def __init__(self, profile: Profile, objects: Objects) -> None:
        """Raises NotFoundError where the types lack what a list of tasks needs."""
        self.profile = profile
        self.task = objects.struct("task_struct")
        self.link = self.task["tasks"]
        self.head = profile.require("init_task")
        self.signal = objects.types.struct("signal_struct") or NOTHING_KNOWN
        self.cred = objects.types.struct("cred") or NOTHING_KNOWN
        self.names = KernelThreadNames(objects, self.task)
        self._fields = {name: self.task.get(*paths) for name, paths in _FIELDS.items()}
        self._comm = self.task["comm"]
        self._links = self._links_of_tasks()
        known = [field for field in (*self._fields.values(), self._comm, *(link for link, _ in self._links)) if field]
        self._first, self._stop = min(field.offset for field in known), max(field.stop for field in known)

    def ring(self, objects: Objects) -> tuple[list[int], bool]:
        """The leaders of all thread groups but the idle task, in the order in which they began; whether none is missed.

        A list that changes while it is walked is walked again; one that stays broken is counted.
        """
        return settled_ring(objects, self.head + self.link.offset, self.link, TASK_LIMIT, kind="task list")

    def addresses(self, objects: Objects) -> list[int]:
        """The leaders of all thread groups, the idle task first."""
        return [self.head, *self.ring(objects)[0]]

    def threads(self, objects: Objects, leader: int) -> list[int]:
        """The tasks of a thread group; the leader alone where the list cannot be read."""
        node, head, of_group = self.task.get("thread_node"), self.signal.get("thread_head"), self.task.get("signal")
        if node is None or head is None or of_group is None:
            objects.skipped["thread list"] += 1
            return [leader]
        try:
            signal = objects.pointer(leader + of_group.offset)
        except FaultError:
            return [leader]
        if not objects.is_pointer(signal):
            return [leader]
        found, _ = settled_ring(objects, signal + head.offset, node, TASK_LIMIT, kind="thread list")
        return found or [leader]

    def _links_of_tasks(self) -> list[tuple[Field, dict[str, Field]]]:
        """The pointers that are followed for a record, each with the members of what it leads to."""
        wanted = {
            "real_parent": {"ppid": self.task.get("tgid")},
            "real_cred": {"uid": self.cred.get("uid.val"), "gid": self.cred.get("gid.val")},
            "signal": {"threads": self.signal.get("nr_threads")},
        }
        found = []
        for name, members in wanted.items():
            link, known = self.task.get(name), {key: member for key, member in members.items() if member is not None}
            if link is not None and known:
                found.append((link, known))
        return found

    def record(self, objects: Objects, address: int) -> TaskRecord | None:
        """What one task says; None where its record cannot be read, or is none. That is not counted."""
        first = self._first
        try:
            if self._stop - first > RECORD_LIMIT:
                raise FaultError(address)
            data = objects.memory.read(address + first, self._stop - first)
        except FaultError:  # parts of it may be there
            found = self.records(objects.silent(), [address], single=False)
            return found[0] if found else None

        def number(member: Field) -> int:
            return objects.number_of(data[member.offset - first : member.stop - first], member)

        values = {name: None if member is None else number(member) for name, member in self._fields.items()}
        for link, members in self._links:
            pointer = number(link)
            for name, member in members.items() if objects.is_pointer(pointer) else ():
                with contextlib.suppress(FaultError):
                    values[name] = objects.value(pointer, member)
        comm = data[self._comm.offset - first : self._comm.stop - first].partition(b"\0")[0]
        return self._record(objects, address, decoded(comm), values)

    def records(self, objects: Objects, addresses: list[int], *, single: bool = True) -> list[TaskRecord]:
        """What the tasks at these addresses say; those whose record cannot be read are counted and left out.

        A few are read each by itself, if `single`.
        """
        if len(addresses) <= SINGLE and single:
            found = [self.record(objects, address) for address in addresses]
        else:
            found = self._columns(objects, addresses)
        records = [record for record in found if record is not None]
        if len(records) < len(found):
            objects.skipped["task"] += len(found) - len(records)
        return records

    def _columns(self, objects: Objects, addresses: list[int]) -> list[TaskRecord | None]:
        """The records of many tasks, member by member."""
        column = objects.addresses(addresses)
        values: dict[str, list[Any]] = {}
        good = np.ones(len(column), bool)
        for name, member in self._fields.items():
            if member is None:
                values[name] = [None] * len(column)
                continue
            found, readable = objects.column(column, member)
            values[name] = found.tolist()
            if name in ("pid", "tgid"):
                good &= readable
        comms = objects.texts(column, self._comm)
        for link, members in self._links:
            values |= self._through(objects, column, link, members)
        found_rows: list[TaskRecord | None] = []
        for address, comm, fine, *row in zip(addresses, comms, good.tolist(), *values.values(), strict=True):
            told = None if comm is None or not fine else dict(zip(values, row, strict=True))
            found_rows.append(None if told is None else self._record(objects, address, comm, told))
        return found_rows

    def _record(self, objects: Objects, address: int, comm: str, values: Mapping[str, Any]) -> TaskRecord | None:
        """A record; None where these are no values of one."""
        pid, state, ended, flags = (values[name] for name in ("pid", "state", "exit_state", "flags"))
        if not 0 <= pid <= TASK_LIMIT:
            return None
        name = self.names.of(objects, address, comm, flags) if flags and flags & PF_KTHREAD else comm
        return TaskRecord(
            address, pid, values["tgid"], comm, values.get("ppid"),
            None if state is None or ended is None else state_letter(state & 0xFFFF_FFFF, ended),
            values.get("uid"), values.get("gid"), flags, values["mm"],
            values["start"], values.get("threads"), name,
        )  # fmt: skip

    def _through(
        self, objects: Objects, column: Addresses, link: Field, members: Mapping[str, Field]
    ) -> dict[str, list[int | None]]:
        """Members of what a pointer in each task leads to; None where that cannot be read."""
        pointers, good = objects.pointers(column, link)
        possible = good & np.array([objects.is_pointer(pointer) for pointer in pointers.tolist()], bool)
        targets = np.where(possible, pointers, np.uint64(self.head))
        through: dict[str, list[int | None]] = {}
        for name, member in members.items():
            found, readable = objects.column(targets, member)
            fine = (possible & readable).tolist()
            through[name] = [value if one else None for value, one in zip(found.tolist(), fine, strict=True)]
        return through

    def namespaces(self, objects: Objects, address: int) -> Mapping[str, int] | None:
        """The numbers of a task's namespaces by their names under /proc/PID/ns; a zombie has but two of them left."""
        found: dict[str, int] = {}
        try:
            proxy = objects.pointer(address + self.task["nsproxy"].offset)
            if proxy:
                named, whole = objects.once(("nsproxy", proxy), lambda: self._of_proxy(objects, proxy))
                found |= named
                if not whole:
                    return found or None
            cred = objects.pointer(address + self.task["real_cred"].offset)
            user = objects.pointer(cred + self.cred["user_ns"].offset)
            found["user"] = self._namespace(objects, user, "user_namespace")
            numbers = self.pids_in(objects, address)
            if numbers:
                found["pid"] = numbers[-1][1]
        except (FaultError, NotFoundError):
            return found or None
        return found

    def _of_proxy(self, objects: Objects, proxy: int) -> tuple[dict[str, int], bool]:
        """The namespaces of all who have this one, up to the first that cannot be read; whether these are all."""
        found: dict[str, int] = {}
        try:
            layout = objects.struct("nsproxy")
            for name in NAMESPACES:
                member = layout.get(f"{name}_ns")
                if member is not None:
                    found[name] = self._namespace(objects, objects.pointer(proxy + member.offset), f"{name}_namespace")
        except (FaultError, NotFoundError):
            return found, False
        return found, True

    def _namespace(self, objects: Objects, address: int, name: str) -> int:
        return objects.once((name, address), lambda: self._number_of(objects, address, name))

    @staticmethod
    def _number_of(objects: Objects, address: int, name: str) -> int:
        layout = objects.types.struct(name, name.replace("_namespace", ""))
        if layout is None:
            raise NotFoundError(name)
        return objects.value(address, layout["ns.inum"])

    def pids_in(self, objects: Objects, address: int) -> list[tuple[int, int]]:
        """(number, PID namespace) of a task, from the outermost namespace inwards. Raises FaultError."""
        layout, upid = objects.struct("pid"), objects.struct("upid")
        pid = objects.pointer(address + self.task["thread_pid"].offset)
        if not objects.is_pointer(pid):
            return []
        level = objects.value(pid, layout["level"])
        found = []
        for index in range(min(level, 32) + 1):
            at = pid + layout["numbers"].offset + index * upid.size
            space = objects.pointer(at + upid["ns"].offset)
            found.append((objects.value(at, upid["nr"]), self._namespace(objects, space, "pid_namespace")))
        return found


_FIELDS: dict[str, tuple[str, ...]] = {
    "pid": ("pid",),
    "tgid": ("tgid",),
    "state": ("__state", "state"),
    "exit_state": ("exit_state",),
    "flags": ("flags",),
    "mm": ("mm",),
    "start": ("start_boottime", "real_start_time"),
}
