"""Numbers out of one task and of what it points to, for the files of /proc/PID: what cannot be read is None.

Sources: Linux include/linux/{sched,mm_types,cred,pid}.h, sched/signal.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from engine.errors import FaultError, NotFoundError
from engine.layout import Field, StructLayout
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.percpu import PerCpu
from engine.oslayers.linux.tasks import Tasks

PROCESS_GROUP, SESSION = 2, 3
"""PIDTYPE_PGID and PIDTYPE_SID of include/linux/pid_types.h."""
_PLACES = (
    ("signal", "signal", "signal_struct"), ("mm", "mm", "mm_struct"), ("cred", "real_cred", "cred"),
    ("hand", "sighand", "sighand_struct"), ("files", "files", "files_struct"), ("fs", "fs", "fs_struct"),
    ("delays", "delays", "task_delay_info"),
)  # fmt: skip
STRUCTURE_LIMIT = 1 << 16
"""Bytes of a structure that are read at once; a task_struct has 4 to 10 KB."""
LEVELS = 32
"""MAX_PID_NS_LEVEL of include/linux/pid_namespace.h."""


class Fields:
    """Numbers out of one task, its signal_struct, its mm and its credentials; each structure is read once, whole."""

    def __init__(self, objects: Objects, tasks: Tasks, task: int) -> None:
        self.objects = objects
        self.task = task
        layout = tasks.task
        self._places: dict[str, tuple[int, StructLayout]] = {"task": (task, layout)}
        self._read: dict[str, bytes | None] = {}
        for name, member, kind in _PLACES:
            struct = objects.types.struct(kind)
            if struct is None:
                continue
            at = self.number("task", member) or 0
            if objects.is_pointer(at):
                self._places[name] = at, struct

    def _bytes(self, place: str, at: int, size: int) -> bytes | None:
        """The whole structure; None where not all of it can be read."""
        if place not in self._read:
            try:
                self._read[place] = self.objects.memory.read(at, min(size, STRUCTURE_LIMIT))
            except FaultError:
                self._read[place] = None
        return self._read[place]

    def address(self, place: str) -> int | None:
        """Where the task, its mm … lies; None where it has none."""
        return self._places.get(place, (None, None))[0]

    def number(self, place: str, *paths: str) -> int | None:
        """A number in the task (`task`), its signal_struct (`signal`) …, by the first of the paths that exists."""
        at, layout = self._places.get(place, (0, None))
        member: Field | None = layout.get(*paths) if layout is not None else None
        if member is None or layout is None:
            return None
        data = self._bytes(place, at, layout.size)
        if data is not None and member.stop <= len(data):
            return self.objects.number_in(data, member)
        try:
            return self.objects.value(at, member)
        except FaultError:
            return None

    def has(self, place: str, path: str) -> bool:
        """Whether the structure has that member on this kernel."""
        layout = self._places.get(place, (0, None))[1]
        return layout is not None and path in layout

    def data(self, place: str, path: str) -> bytes | None:
        """The bytes of a member, an array say; None where it is not there or cannot be read."""
        at, layout = self._places.get(place, (0, None))
        member = layout.get(path) if layout is not None else None
        if member is None or layout is None:
            return None
        whole = self._bytes(place, at, layout.size)
        if whole is not None and member.stop <= len(whole):
            return whole[member.offset : member.stop]
        try:
            return self.objects.memory.read(at + member.offset, member.size)
        except FaultError:
            return None

    def pid_of_kind(self, kind: int) -> list[tuple[int, int]]:
        """(number, namespace's address) of the process group or session, from the outermost namespace inwards."""
        return self.numbers_of(self.number("signal", f"pids[{kind}]"))

    def numbers_of(self, pid: int | None) -> list[tuple[int, int]]:
        """(number, namespace's address) of the `struct pid` at an address, from the outermost namespace inwards."""
        objects = self.objects
        layout, one = objects.types.struct("pid"), objects.types.struct("upid")
        if not pid or layout is None or one is None or not objects.is_pointer(pid):
            return []
        found = []
        try:
            start = pid + layout["numbers"].offset
            for index in range(min(objects.value(pid, layout["level"]), LEVELS) + 1):
                at = start + index * one.size
                found.append((objects.value(at, one["nr"]), objects.pointer(at + one["ns"].offset)))
        except (FaultError, NotFoundError):
            return []
        return found

    def pages(self, kind: int) -> int | None:
        """Pages of one kind that are in memory, or in swap (`rss_stat`); kept per CPU since 6.2, their sum in `count`.

        MM_FILEPAGES 0, MM_ANONPAGES 1, MM_SWAPENTS 2, MM_SHMEMPAGES 3 of include/linux/mm_types_task.h.
        """
        count = self.number("mm", f"rss_stat[{kind}].count", f"rss_stat.count[{kind}].counter")
        return None if count is None else max(0, count)

    def exact_pages(self, kind: int, per_cpu: PerCpu | None) -> int | None:
        """The same with what each CPU has not yet added, where the count is kept per CPU."""
        at, layout = self._places.get("mm", (0, None))
        member = layout.get(f"rss_stat[{kind}]") if layout else None
        if member is None or member.type.name != "percpu_counter" or per_cpu is None:
            return self.pages(kind)
        try:
            return max(0, per_cpu.counter(at + member.offset))
        except (FaultError, NotFoundError):
            return None

    def resident(self) -> int | None:
        """Pages in memory: files, anonymous and shared ones."""
        counts = [self.pages(kind) for kind in (0, 1, 3)]
        return None if None in counts else sum(count or 0 for count in counts)
