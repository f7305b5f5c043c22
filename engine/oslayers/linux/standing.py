"""Whether a process is still the one that it was, asked of its record at the price of three words.

A task leaves its mm before the page tables are given back, and its record still says so when it is free. The record
lies in a slab, which the kernel never moves: where, is asked once.

Sources: Linux kernel/exit.c (exit_mm), kernel/fork.c (free_task, dup_task_struct); releases 5.10 to 7.x.
"""

from __future__ import annotations

from engine.errors import FaultError, NotRecognisedError, ProcessExitedError
from engine.layout import Field
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.spaces import Identity
from engine.oslayers.linux.tasks import TaskRecord, Tasks


class Standing:
    """One process of a kernel that runs. It holds nothing of what is read by it: what holds it makes no circle."""

    def __init__(self, kernel: Kernel, tasks: Tasks, record: TaskRecord) -> None:
        self.kernel = kernel
        self.tasks = tasks
        self._record = record
        self._places: tuple[int, int | None, int | None] | None = None

    def check(self, record: TaskRecord, top: tuple[int, int] | None = None) -> None:
        """Raise ProcessExitedError where it is no more what that record of it says, or another kernel runs.

        `top`: (physical address, value) of what its mm has for its top page table. Who calls exec twice may have an mm
        where his first one was: what was freed last is given out next.
        """
        if not self._runs_here() or not self.has_mm_of(record):
            raise ProcessExitedError(record.pid)
        try:
            same = top is None or self._word(top[0]) == top[1]
        except FaultError:
            same = False
        if not same:
            raise ProcessExitedError(record.pid)

    def _word(self, place: int) -> int:
        memory = self.kernel.found.physical
        return memory.u64(place) if self.kernel.profile.word == 8 else memory.u32(place)

    def has_mm_of(self, record: TaskRecord) -> bool:
        """Whether its mm is still that of a record of it. Raises ProcessExitedError where it has ended."""
        memory = self.kernel.found.physical
        try:
            pid, start, mm = self._known_places()
            if memory.u32(pid) != record.pid or (start is not None and memory.u64(start) != record.start_ns):
                raise ProcessExitedError(record.pid)
            if mm is None:
                return True
            return self._word(mm) == record.mm
        except FaultError:
            raise ProcessExitedError(record.pid) from None

    def identity(self, record: TaskRecord, top: tuple[int, int] | None = None) -> Identity | None:
        """What `check` looks at, for reads that are done in C; None where that is not found now."""
        try:
            pid, start, mm = self._known_places()
        except FaultError:
            return None
        words = [(pid, 4, record.pid)]
        if start is not None and record.start_ns is not None:
            words.append((start, 8, record.start_ns))
        if mm is not None and record.mm is not None:
            words.append((mm, self.kernel.profile.word, record.mm))
        if top is not None:
            words.append((top[0], self.kernel.profile.word, top[1]))
        return sorted(words), self._runs_here

    def _runs_here(self) -> bool:
        """Whether the kernel that holds it is the one that runs, as far as is known."""
        try:
            self.kernel.look()
        except NotRecognisedError:
            return False
        return not self.kernel.replaced

    def _known_places(self) -> tuple[int, int | None, int | None]:
        """`_found_places`, found once. Raises FaultError."""
        if self._places is None:
            self._places = self._found_places()
        return self._places

    def _found_places(self) -> tuple[int, int | None, int | None]:
        """Physical addresses of its PID, its start, its mm; None where that is not known. Raises FaultError."""
        task, record, space = self.tasks.task, self._record, self.kernel.found.memory

        def place(member: Field) -> int:
            return space.virt_to_phys(record.address + member.offset)

        start = task.get("start_boottime", "real_start_time") if record.start_ns is not None else None
        return (
            place(task["pid"]),
            None if start is None else place(start),
            None if record.mm is None else place(task["mm"]),
        )
