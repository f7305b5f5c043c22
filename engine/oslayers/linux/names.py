"""Names of kernel threads in full, as /proc/PID/comm shows them: `comm` has room for 15 characters alone.

Sources: Linux fs/proc/array.c (proc_task_name), kernel/kthread.c (get_kthread_comm, full_name from 5.17 on),
kernel/workqueue.c (wq_worker_comm), include/linux/sched.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from engine.errors import FaultError, NotFoundError
from engine.layout import StructLayout
from engine.oslayers.linux.objects import Objects

PF_WQ_WORKER = 0x20
"""include/linux/sched.h."""
NAME_LIMIT = 63
"""Characters that /proc has room for (proc_task_name)."""
RESCUER = "kworker/R-"
"""How rescuers of work queues are called from 6.8 on."""


class KernelThreadNames:
    """Reads the full names of kernel threads; where one cannot be read, `comm` stands."""

    def __init__(self, objects: Objects, task: StructLayout) -> None:
        types = objects.types
        self._private = task.get("worker_private", "set_child_tid")
        kthread, worker, queue = types.struct("kthread"), types.struct("worker"), types.struct("workqueue_struct")
        self._full = kthread.get("full_name") if kthread else None
        self._data = kthread.get("data") if kthread else None
        self._pool = worker.get("pool") if worker else None
        self._work = worker.get("current_work") if worker else None
        self._description = worker.get("desc") if worker else None
        self._rescued = worker.get("rescue_wq") if worker else None
        self._queue_name = queue.get("name") if queue else None

    def of(self, objects: Objects, task: int, comm: str, flags: int) -> str:
        """The name of the kernel thread at `task`."""
        try:
            private = objects.pointer(task + self._private.offset) if self._private else 0
            if not objects.is_pointer(private):
                return comm
            worker = flags & PF_WQ_WORKER
            name = self._of_worker(objects, private, comm) if worker else self._of_thread(objects, private)
        except (FaultError, NotFoundError):
            return comm
        return name[:NAME_LIMIT] if name else comm

    def _of_thread(self, objects: Objects, kthread: int) -> str:
        full = objects.pointer(kthread + self._full.offset) if self._full else 0
        return objects.text(full, NAME_LIMIT + 1) if objects.is_pointer(full & ~1) else ""

    def _of_worker(self, objects: Objects, kthread: int, comm: str) -> str:
        """Its `comm`, then the queue that it last worked for, behind `+` while it does."""
        if self._data is None or self._pool is None or self._description is None or self._work is None:
            return comm
        worker = objects.pointer(kthread + self._data.offset)
        if not objects.is_pointer(worker):
            return comm
        if comm.startswith(RESCUER) and self._rescued and self._queue_name:
            queue = objects.pointer(worker + self._rescued.offset)
            if objects.is_pointer(queue):
                comm = RESCUER + self._text(objects, queue, self._queue_name.offset, self._queue_name.size)
        description = objects.text_in(worker, self._description)
        if not description or not objects.pointer(worker + self._pool.offset):
            return comm
        return comm + ("+" if objects.pointer(worker + self._work.offset) else "-") + description

    def _text(self, objects: Objects, queue: int, offset: int, size: int) -> str:
        """An array of characters at the end of its structure, where BTF gives it no length on some kernels."""
        return objects.text(queue + offset, size or NAME_LIMIT)
