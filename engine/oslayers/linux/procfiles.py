"""A process's files in the formats of /proc/PID, made from the kernel's records.

What the kernel counts elsewhere than in its records of the process (page faults of ended threads, resident pages
kept per CPU) is as its records have it; a number that is not known is 0 in `stat`, which has no word for that, and
its line is left out of `status`.

Sources: Linux fs/proc/array.c, fs/proc/base.c, Documentation/filesystems/proc.rst; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import FaultError, NotFoundError, ProcessExitedError
from engine.layout import Field, StructLayout
from engine.oslayer import ProcFiles
from engine.oslayers.linux.files import Descriptors
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.tasks import TICKS, TaskRecord, Tasks

STATE_NAMES = {
    "R": "running", "S": "sleeping", "D": "disk sleep", "T": "stopped", "t": "tracing stop", "X": "dead",
    "Z": "zombie", "P": "parked", "I": "idle",
}  # fmt: skip
PROCESS_GROUP, SESSION = 2, 3
"""PIDTYPE_PGID and PIDTYPE_SID of include/linux/pid_types.h."""
_CAPABILITIES = {"CapInh": "cap_inheritable", "CapPrm": "cap_permitted", "CapEff": "cap_effective",
                 "CapBnd": "cap_bset", "CapAmb": "cap_ambient"}  # fmt: skip


class Record:
    """Numbers out of one task, its signal_struct, its mm and its credentials; what cannot be read is None."""

    def __init__(self, objects: Objects, tasks: Tasks, task: int) -> None:
        self.objects = objects
        self.task = task
        layout = tasks.task
        self._places: dict[str, tuple[int, StructLayout]] = {"task": (task, layout)}
        for name, member, kind in (
            ("signal", "signal", "signal_struct"), ("mm", "mm", "mm_struct"), ("cred", "real_cred", "cred"),
            ("hand", "sighand", "sighand_struct"), ("files", "files", "files_struct"), ("fs", "fs", "fs_struct"),
        ):  # fmt: skip
            struct = objects.types.struct(kind)
            try:
                at = objects.pointer(task + layout[member].offset)
            except (FaultError, NotFoundError):
                continue
            if struct is not None and objects.is_pointer(at):
                self._places[name] = at, struct

    def number(self, place: str, *paths: str) -> int | None:
        """A number in the task (`task`), its signal_struct (`signal`) …, by the first of the paths that exists."""
        at, layout = self._places.get(place, (0, None))
        member: Field | None = layout.get(*paths) if layout is not None else None
        if member is None:
            return None
        try:
            return self.objects.value(at, member)
        except FaultError:
            return None

    def pid_of_kind(self, kind: int) -> int | None:
        """The number of the process group or session, in the outermost namespace."""
        pointer = self.number("signal", f"pids[{kind}]")
        layout = self.objects.types.struct("pid")
        if not pointer or layout is None or not self.objects.is_pointer(pointer):
            return None
        try:
            return self.objects.value(pointer, layout["numbers[0].nr"])
        except (FaultError, NotFoundError):
            return None


class LinuxProcFiles(ProcFiles):
    """The files of one process, or of one of its threads."""

    def __init__(
        self,
        kernel: Kernel,
        tasks: Tasks,
        record: TaskRecord,
        arguments: Callable[[], bytes | None],
        environment: Callable[[], bytes | None],
    ) -> None:
        self.kernel = kernel
        self.tasks = tasks
        self.record = record
        self._arguments = arguments
        self._environment = environment

    def names(self) -> tuple[str, ...]:
        """See `ProcFiles.names`."""
        return ("cmdline", "environ", "comm", "stat", "status")

    def read(self, name: str) -> bytes:
        """See `ProcFiles.read`. Raises NotFoundError where the memory that holds it cannot be read."""
        if name in ("cmdline", "environ"):
            data = self._arguments() if name == "cmdline" else self._environment()
            if data is None:
                raise NotFoundError(f"the {name} of process {self.record.pid} lies in memory that cannot be read")
            return data
        if name == "comm":
            return encoded(self.record.comm) + b"\n"
        record = Record(self.kernel.objects(), self.tasks, self.record.address)
        if name == "stat":
            return self._stat(record)
        if name == "auxv":
            return auxiliary_vector(record.objects, record.number("task", "mm") or 0)
        if name == "status":
            return self._status(record)
        raise NotFoundError(f"a process read from memory has no file {name}")

    def link(self, name: str) -> str:
        """See `ProcFiles.link`."""
        found: str | None = None
        descriptors = Descriptors(self.kernel, self.tasks)
        if name in ("cwd", "root"):
            found = descriptors.folder(self.record.address, "pwd" if name == "cwd" else "root")
        elif name == "exe":
            found = self._executable(descriptors)
        elif name.startswith("fd/") and name[3:].isdigit():
            files = dict(descriptors.files(self.record.address))
            file = files.get(int(name[3:]))
            found = descriptors.describe(int(name[3:]), file).path if file else None
        if found is None:
            raise NotFoundError(f"process {self.record.pid} has no {name}, or it cannot be read")
        return found

    def _executable(self, descriptors: Descriptors) -> str | None:
        if not self.record.mm:
            return None
        objects = descriptors.objects
        try:
            file = objects.pointer(self.record.mm + objects.struct("mm_struct")["exe_file"].offset)
            return descriptors.paths.of_file(file) if file else None
        except (FaultError, NotFoundError):
            return None

    def descriptors(self) -> list[int]:
        """See `ProcFiles.descriptors`."""
        return [number for number, _ in Descriptors(self.kernel, self.tasks).files(self.record.address)]

    def thread(self, tid: int) -> ProcFiles:
        """See `ProcFiles.thread`. Raises ProcessExitedError where there is no such thread."""
        objects = self.kernel.objects()
        for one in self.tasks.records(objects, self.tasks.threads(objects, self.record.address)):
            if one.pid == tid:
                return LinuxProcFiles(self.kernel, self.tasks, one, self._arguments, self._environment)
        raise ProcessExitedError(tid)

    # -- stat ---------------------------------------------------------------------------------------------

    def _stat(self, record: Record) -> bytes:
        """/proc/PID/stat: 52 fields in one line (proc(5))."""
        one = self.record
        policy = record.number("task", "policy")
        priority = record.number("task", "prio")
        nice = record.number("task", "static_prio")
        pages = record.number("mm", "total_vm")
        page = 1 << self.kernel.found.candidate.user.page_bits
        fields: list[int | str | None] = [
            one.ppid, record.pid_of_kind(PROCESS_GROUP), record.pid_of_kind(SESSION), 0, -1,
            one.flags, record.number("task", "min_flt"), record.number("signal", "cmin_flt"),
            record.number("task", "maj_flt"), record.number("signal", "cmaj_flt"),
            self._ticks(record.number("task", "utime")), self._ticks(record.number("task", "stime")),
            self._ticks(record.number("signal", "cutime")), self._ticks(record.number("signal", "cstime")),
            None if priority is None else priority - 100, None if nice is None else nice - 120,
            one.threads, 0, one.start_ticks, None if pages is None else pages * page, self._resident(record),
            record.number("signal", "rlim[5].rlim_cur"),
            record.number("mm", "start_code"), record.number("mm", "end_code"), record.number("mm", "start_stack"),
            0, 0, record.number("task", "pending.signal.sig[0]"), record.number("task", "blocked.sig[0]"),
            0, 0, 0, 0, 0, record.number("task", "exit_signal"), record.number("task", "thread_info.cpu", "cpu"),
            record.number("task", "rt_priority"), policy, 0, 0, 0,
            record.number("mm", "start_data"), record.number("mm", "end_data"), record.number("mm", "start_brk"),
            record.number("mm", "arg_start"), record.number("mm", "arg_end"),
            record.number("mm", "env_start"), record.number("mm", "env_end"), record.number("task", "exit_code"),
        ]  # fmt: skip
        text = " ".join(str(value if value is not None else 0) for value in fields)
        return encoded(f"{one.pid} ({one.comm}) {one.state or '?'} {text}\n")

    @staticmethod
    def _ticks(nanoseconds: int | None) -> int | None:
        return None if nanoseconds is None else nanoseconds // TICKS

    def _resident(self, record: Record) -> int | None:
        """Pages in memory: files, anonymous and shared ones; kept per CPU since 6.2, their sum in `count`."""
        total = 0
        for index in (0, 1, 3):  # MM_FILEPAGES, MM_ANONPAGES, MM_SHMEMPAGES of include/linux/mm_types_task.h
            count = record.number("mm", f"rss_stat[{index}].count", f"rss_stat.count[{index}].counter")
            if count is None:
                return None
            total += max(0, count)
        return total

    # -- status -------------------------------------------------------------------------------------------

    def _status(self, record: Record) -> bytes:
        """/proc/PID/status: what is known of it."""
        one, lines = self.record, []

        def line(key: str, value: object) -> None:
            if value is not None:
                lines.append(f"{key}:\t{value}\n")

        line("Name", one.comm.replace("\\", "\\\\").replace("\n", "\\n"))
        umask = record.number("fs", "umask")
        line("Umask", None if umask is None else f"{umask:#06o}".replace("0o", "", 1).rjust(4, "0"))
        line("State", f"{one.state} ({STATE_NAMES.get(one.state, 'unknown')})" if one.state else None)
        line("Tgid", one.tgid)
        line("Ngid", record.number("task", "numa_group.gid") or 0)
        line("Pid", one.pid)
        line("PPid", one.ppid)
        line("TracerPid", self._tracer(record))
        for key, prefix in (("Uid", "uid"), ("Gid", "gid")):
            numbers = [record.number("cred", f"{kind}{prefix}.val") for kind in ("", "e", "s", "fs")]
            line(key, None if None in numbers else "\t".join(str(number) for number in numbers))
        line("FDSize", self._table_size(record))
        line("Threads", one.threads)
        for key, member in _CAPABILITIES.items():
            value = record.number("cred", f"{member}.val")
            if value is None:  # two words of 32 bits before 6.3
                parts = [record.number("cred", f"{member}.cap[{index}]") for index in (0, 1)]
                value = None if None in parts else (parts[0] or 0) | (parts[1] or 0) << 32
            line(key, None if value is None else f"{value:016x}")
        line("voluntary_ctxt_switches", record.number("task", "nvcsw"))
        line("nonvoluntary_ctxt_switches", record.number("task", "nivcsw"))
        return encoded("".join(lines))

    def _tracer(self, record: Record) -> int | None:
        """The PID of who traces it (PT_PTRACED is bit 0 of `ptrace`)."""
        traced = record.number("task", "ptrace")
        parent = record.number("task", "parent")
        if traced is None:
            return None
        if not traced or not parent:
            return 0
        try:
            return record.objects.value(parent, self.tasks.task["tgid"])
        except FaultError:
            return None

    def _table_size(self, record: Record) -> int | None:
        table, layout = record.number("files", "fdt"), record.objects.types.struct("fdtable")
        if not table or layout is None:
            return None
        try:
            return record.objects.value(table, layout["max_fds"])
        except FaultError:
            return None


def auxiliary_vector(objects: Objects, mm: int) -> bytes:
    """What the kernel told a program at its start, as /proc/PID/auxv gives it; empty for a kernel thread.

    Pairs of words of the program, up to and with one of type 0 (AT_NULL). Raises NotFoundError.
    """
    if not mm:
        return b""
    member = objects.struct("mm_struct")["saved_auxv"]
    try:
        data = objects.memory.read(mm + member.offset, member.size)
    except FaultError:
        raise NotFoundError("the auxiliary vector lies in memory that cannot be read") from None
    word = 4 if is_narrow(objects, data) else objects.word
    for at in range(0, len(data) - 2 * word + 1, 2 * word):
        if not any(data[at : at + word]):
            return data[: at + 2 * word]
    return data


def is_narrow(objects: Objects, vector: bytes) -> bool:
    """Whether an auxiliary vector is one of 32-bit words on a kernel of 64 bits.

    As 64 bits its first type, which is small, has the first value beside it.
    """
    first = int.from_bytes(vector[:8], "little" if objects.types.order == "<" else "big")
    return objects.word == 8 and first >> 32 != 0


def encoded(text: str) -> bytes:
    """Text out of a kernel as the bytes that it was."""
    return text.encode("utf-8", "surrogateescape")
