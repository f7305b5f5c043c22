"""A process's files in the formats of /proc/PID, made from the kernel's records.

What the kernel counts elsewhere than in its records of the process is as its records have it; a line that is not known
is left out of `status`, and what `stat` has, which knows no word for that, stands in `procstat`.

Sources: Linux fs/proc/{array,base,fd}.c, kernel/user_namespace.c, include/linux/task_io_accounting.h,
Documentation/filesystems/proc.rst; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from engine.errors import FaultError, NotFoundError, ProcessExitedError
from engine.oslayer import ProcFiles
from engine.oslayers.linux.auxiliary import auxiliary_vector
from engine.oslayers.linux.cgroups import cgroups_of
from engine.oslayers.linux.fields import Fields
from engine.oslayers.linux.files import Descriptors
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.mounts import Mount, MountTable
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.percpu import per_cpu
from engine.oslayers.linux.procstat import stat_text, statm_text
from engine.oslayers.linux.procstatus import Status, limits_text
from engine.oslayers.linux.tasks import DEAD, TaskRecord, Tasks

T = TypeVar("T")

NAMES = {
    "auxv": "mm_struct.saved_auxv", "cgroup": "css_set.dfl_cgrp", "cmdline": "mm_struct.arg_start",
    "comm": "task_struct.comm", "environ": "mm_struct.env_start", "gid_map": "user_namespace.gid_map",
    "io": "task_struct.ioac", "limits": "signal_struct.rlim", "mountinfo": "mount.mnt_id", "mounts": "mount.mnt_id",
    "oom_score_adj": "signal_struct.oom_score_adj", "stat": "task_struct.pid", "statm": "mm_struct.total_vm",
    "status": "task_struct.pid", "uid_map": "user_namespace.uid_map",
}  # fmt: skip
"""The files, each with the member that has to be known of a kernel for it."""
LINKS = {"exe": "mm_struct.exe_file", "cwd": "fs_struct.pwd", "root": "fs_struct.root", "fd": "fdtable.fd"}
"""The links, as `NAMES`."""
_COUNTS = ("rchar", "wchar", "syscr", "syscw", "read_bytes", "write_bytes", "cancelled_write_bytes")
CLOSE_ON_EXEC = 0o2000000
"""O_CLOEXEC of all architectures but alpha, parisc and sparc (include/uapi/asm-generic/fcntl.h)."""
EXTENTS_HERE, EXTENTS = 5, 340
"""UID_GID_MAP_MAX_BASE_EXTENTS and …_MAX_EXTENTS (include/linux/user_namespace.h)."""
_EXTENT = 12
"""sizeof(struct uid_gid_extent): first, lower_first, count."""


class Subject(Protocol):
    """The process whose files these are."""

    @property
    def pid(self) -> int:
        """Its number."""

    def steady(self, tell: Callable[[TaskRecord], T]) -> T:
        """What `tell` gives of its record, read while it was that process. Raises ProcessExitedError."""

    def arguments(self) -> bytes | None:
        """Its arguments."""

    def environment(self) -> bytes | None:
        """Its environment."""


class LinuxProcFiles(ProcFiles):
    """The files of one process, or of one of its threads."""

    def __init__(self, kernel: Kernel, tasks: Tasks, subject: Subject, thread: TaskRecord | None = None) -> None:
        """Of all threads together, or of one alone."""
        self.kernel = kernel
        self.tasks = tasks
        self._subject = subject
        self._thread = thread

    def names(self) -> tuple[str, ...]:
        """See `ProcFiles.names`."""
        return tuple(name for name, member in NAMES.items() if self.kernel.tells(member))

    def _steady(self, tell: Callable[[TaskRecord], T]) -> T:
        """What `tell` gives of the task; of a thread too, only while it is that. Raises ProcessExitedError."""
        thread = self._thread
        if thread is None or not self.kernel.live:
            return self._subject.steady(tell if thread is None else lambda _: tell(thread))

        def now() -> TaskRecord:
            found = self.tasks.record(self.kernel.objects(), thread.address)
            if found is None or found.state == DEAD or (found.pid, found.start_ns) != (thread.pid, thread.start_ns):
                raise ProcessExitedError(thread.pid)
            return found

        def of_thread(_: TaskRecord) -> T:
            told = tell(now())
            now()
            return told

        return self._subject.steady(of_thread)

    @property
    def _name(self) -> str:
        return f"process {self._subject.pid}" if self._thread is None else f"thread {self._thread.pid}"

    def read(self, name: str) -> bytes:
        """See `ProcFiles.read`. Raises NotFoundError where the memory that holds it cannot be read."""
        if name in ("cmdline", "environ"):
            data = self._subject.arguments() if name == "cmdline" else self._subject.environment()
            if data is None:
                raise NotFoundError(f"the {name} of {self._name} lies in memory that cannot be read")
            return data
        made = _MADE.get(name)
        is_descriptor = name.startswith("fdinfo/") and name[7:].isdigit()
        if made is None and not is_descriptor:
            raise NotFoundError(f"a process read from memory has no file {name}")
        try:
            if made is None:
                return self._steady(lambda record: self._descriptor(record, int(name[7:])))
            return self._steady(lambda record: made(self, self.kernel.objects(), record))
        except FaultError:
            raise NotFoundError(f"the {name} of {self._name} lies in memory that cannot be read") from None

    def links(self) -> tuple[str, ...]:
        """See `ProcFiles.links`."""
        return tuple(name for name, member in LINKS.items() if self.kernel.tells(member))

    def link(self, name: str) -> str:
        """See `ProcFiles.link`."""
        found = self._steady(lambda record: self._link(record, name))
        if found is None:
            raise NotFoundError(f"{self._name} has no {name}, or it cannot be read")
        return found

    def _link(self, record: TaskRecord, name: str) -> str | None:
        descriptors = Descriptors(self.kernel, self.tasks)
        if name in ("cwd", "root"):
            return descriptors.folder(record.address, "pwd" if name == "cwd" else "root")
        if name == "exe":
            return self._executable(record, descriptors)
        if name.startswith("fd/") and name[3:].isdigit():
            file = dict(descriptors.files(record.address)).get(int(name[3:]))
            return descriptors.describe(int(name[3:]), file).path if file else None
        return None

    def _executable(self, record: TaskRecord, descriptors: Descriptors) -> str | None:
        if not record.mm:
            return None
        objects = descriptors.objects
        try:
            file = objects.pointer(record.mm + objects.struct("mm_struct")["exe_file"].offset)
            return descriptors.paths.of_file(file) if file else None
        except (FaultError, NotFoundError):
            return None

    def descriptors(self) -> list[int]:
        """See `ProcFiles.descriptors`."""
        return self._steady(
            lambda record: [number for number, _ in Descriptors(self.kernel, self.tasks).files(record.address)]
        )

    def thread(self, tid: int) -> ProcFiles:
        """See `ProcFiles.thread`. Raises ProcessExitedError where there is no such thread."""

        def found(record: TaskRecord) -> list[TaskRecord]:
            objects = self.kernel.objects()
            return self.tasks.records(objects, self.tasks.threads(objects, record.address))

        for one in self._subject.steady(found):
            if one.pid == tid:
                return LinuxProcFiles(self.kernel, self.tasks, self._subject, one)
        raise ProcessExitedError(tid)

    def _fields(self, objects: Objects, record: TaskRecord) -> Fields:
        return Fields(objects, self.tasks, record.address)

    def _threads(self, objects: Objects, leader: Fields) -> list[Fields]:
        """Of each thread of the group; empty where this is one thread's."""
        if self._thread is not None:
            return []
        found = self.tasks.threads(objects, leader.task)
        return [leader if task == leader.task else Fields(objects, self.tasks, task) for task in found]

    @property
    def _page(self) -> int:
        return 1 << self.kernel.found.candidate.user.page_bits

    def _stat(self, objects: Objects, record: TaskRecord) -> bytes:
        fields = self._fields(objects, record)
        return encoded(stat_text(record, fields, self._threads(objects, fields), self._page))

    def _statm(self, objects: Objects, record: TaskRecord) -> bytes:
        fields = self._fields(objects, record)
        return statm_text(fields, self._page, per_cpu(self.tasks.profile, objects)).encode()

    def _status(self, objects: Objects, record: TaskRecord) -> bytes:
        counts = per_cpu(self.tasks.profile, objects)
        return encoded(Status(self.tasks, record, self._fields(objects, record), self._page, counts).text())

    def _limits(self, objects: Objects, record: TaskRecord) -> bytes:
        text = limits_text(self._fields(objects, record), objects.word)
        if text is None:
            raise NotFoundError(f"the limits of {self._name} are not known")
        return text.encode()

    def _cgroup(self, objects: Objects, record: TaskRecord) -> bytes:
        found = cgroups_of(objects, self.tasks, record.address, record.flags)
        if found is None:
            raise NotFoundError(f"the cgroups of {self._name} are not known")
        return encoded("".join(one.line() for one in found))

    def _mounts(self, objects: Objects, record: TaskRecord, line: Callable[[Mount], str]) -> bytes:
        return encoded("".join(line(mount) for mount in MountTable(objects, self.tasks).of(record.address)))

    def _kill_score(self, objects: Objects, record: TaskRecord) -> bytes:
        score = self._fields(objects, record).number("signal", "oom_score_adj")
        if score is None:
            raise NotFoundError(f"the oom_score_adj of {self._name} is not known")
        return f"{score}\n".encode()

    def _io(self, objects: Objects, record: TaskRecord) -> bytes:
        """What it has read and written; of a group the sum over its threads, and what those had that have ended."""
        fields = self._fields(objects, record)
        threads = self._threads(objects, fields)
        lines = []
        for name in _COUNTS:
            counts = [one.number("task", f"ioac.{name}") for one in threads or [fields]]
            counts += [fields.number("signal", f"ioac.{name}")] if threads else []
            if None not in counts:
                lines.append(f"{name}: {sum(count or 0 for count in counts)}\n")
        return "".join(lines).encode()

    def _id_map(self, objects: Objects, record: TaskRecord, name: str) -> bytes:
        """How its user namespace's numbers of users or groups follow the outermost one's."""
        layout, space = objects.struct("user_namespace"), self._fields(objects, record).number("cred", "user_ns")
        if not space:
            raise NotFoundError(f"the user namespace of {self._name} is not known")
        count = objects.value(space, layout[f"{name}.nr_extents"])
        at = space + layout[f"{name}.extent"].offset
        if count > EXTENTS_HERE:
            at = objects.pointer(space + layout[f"{name}.forward"].offset)
        data = objects.memory.read(at, min(count, EXTENTS) * _EXTENT)
        numbers = [int.from_bytes(data[start : start + 4], "little") for start in range(0, len(data), 4)]
        rows = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
        return "".join(f"{first:10} {lower:10} {length:10}\n" for first, lower, length in rows).encode()

    def _descriptor(self, record: TaskRecord, number: int) -> bytes:
        """/proc/PID/fdinfo/N: position, flags, mount and inode; what the kind of file adds to them is left out."""
        descriptors = Descriptors(self.kernel, self.tasks)
        file = dict(descriptors.files(record.address)).get(number)
        if file is None:
            raise NotFoundError(f"{self._name} has no descriptor {number}")
        objects, one = descriptors.objects, descriptors.describe(number, file)
        flags = one.flags or 0
        if descriptors.closes_on_exec(record.address, number):
            flags |= CLOSE_ON_EXEC
        mount = objects.pointer(file + descriptors.paths.file_path + descriptors.paths.path_mount.offset)
        mount_id = objects.value(mount - descriptors.paths.in_mount, objects.struct("mount")["mnt_id"])
        inode = descriptors.paths.device_and_number(one.inode)[1] if one.inode else 0
        return f"pos:\t{one.position or 0}\nflags:\t0{flags:o}\nmnt_id:\t{mount_id}\nino:\t{inode}\n".encode()


_MADE: dict[str, Callable[[LinuxProcFiles, Objects, TaskRecord], bytes]] = {
    "auxv": lambda _, objects, record: auxiliary_vector(objects, record.mm),
    "cgroup": LinuxProcFiles._cgroup,
    "comm": lambda _, __, record: encoded(record.name) + b"\n",
    "gid_map": lambda files, objects, record: files._id_map(objects, record, "gid_map"),
    "io": LinuxProcFiles._io,
    "limits": LinuxProcFiles._limits,
    "mountinfo": lambda files, objects, record: files._mounts(objects, record, Mount.mountinfo_line),
    "mounts": lambda files, objects, record: files._mounts(objects, record, Mount.mounts_line),
    "oom_score_adj": LinuxProcFiles._kill_score,
    "stat": LinuxProcFiles._stat,
    "statm": LinuxProcFiles._statm,
    "status": LinuxProcFiles._status,
    "uid_map": lambda files, objects, record: files._id_map(objects, record, "uid_map"),
}


def encoded(text: str) -> bytes:
    """Text out of a kernel as the bytes that it was."""
    return text.encode("utf-8", "surrogateescape")
