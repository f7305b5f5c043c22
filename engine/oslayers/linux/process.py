"""A process of a Linux kernel that is read from memory.

What its record does not need is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

from engine.bytes_memory import BytesMemory
from engine.containers import container_among, main_path
from engine.errors import EngineError, FaultError, NotFoundError, ProcessExitedError
from engine.memory import Memory
from engine.oslayer import C, CachedFiles, Module, OpenFiles, PhysicalMaps, Process, ProcFiles, ThreadRegisters
from engine.oslayers.linux.auxiliary import is_narrow
from engine.oslayers.linux.cgroups import cgroups_of, paths_of
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import decoded
from engine.oslayers.linux.paths import Paths
from engine.oslayers.linux.spaces import Watched, process_space
from engine.oslayers.linux.standing import Standing
from engine.oslayers.linux.tasks import DEAD, TaskRecord, Tasks
from engine.translate.virtual import VirtualMemory
from engine.types import NARROW, CachedFileInfo, OpenFileInfo, PhysicalMap, ProcessInfo, Region, ThreadInfo

T = TypeVar("T")
LOOKS = 3
"""How often facts are read that changed meanwhile."""
NOTHING = BytesMemory(b"")
"""The address space of a kernel thread: it has none of its own."""
STRINGS_LIMIT = 4 << 20
"""Bytes of arguments or environment that are read; by default Linux lets an exec have 2 MiB of both."""
DELETED = " (deleted)"


class LinuxProcess(Process, PhysicalMaps, OpenFiles, CachedFiles, ThreadRegisters):
    """One thread group. Over live memory its record is read anew each time it is asked for."""

    def __init__(self, kernel: Kernel, tasks: Tasks, record: TaskRecord, sources: tuple[str, ...]) -> None:
        self.kernel = kernel
        self.tasks = tasks
        self._record = record
        self._sources = sources
        self._memory: tuple[int | None, Memory] | None = None
        self._standing = Standing(kernel, tasks, record)

    @property
    def pid(self) -> int:
        """Its PID in the outermost namespace."""
        return self._record.pid

    @property
    def record(self) -> TaskRecord:
        """The task as it is now. Raises ProcessExitedError where another one, or none, has its place."""
        if not self.kernel.live:
            return self._record
        if self.kernel.replaced:
            raise ProcessExitedError(self.pid)
        found = self.tasks.record(self.kernel.objects(), self._record.address)
        if found is None or found.state == DEAD or (found.pid, found.start_ns) != (self.pid, self._record.start_ns):
            raise ProcessExitedError(self.pid)
        return found

    def again(self) -> LinuxProcess:
        """See `Process.again`: with its memory, which is what it is wanted for mostly."""
        other = LinuxProcess(self.kernel, self.tasks, self.record, self._sources)
        other._standing = self._standing
        other._memory_of(other._record)
        return other

    def steady(self, tell: Callable[[TaskRecord], T]) -> T:
        """What `tell` gives of its record: all of it was read while it was this process, and had this mm.

        Where it called exec meanwhile, or something had to be left out, it is told again, up to three times. Raises
        ProcessExitedError where it has ended; then nothing was left out.
        """
        kernel, left = self.kernel, LOOKS
        if not kernel.live:
            return tell(self._record)
        while True:
            record, left = self.record, left - 1
            with kernel.counted() as skipped:
                try:
                    told = tell(record)
                except EngineError:
                    if self._standing.has_mm_of(record) or not left:
                        raise
                    continue
                settled = self._standing.has_mm_of(record) and not skipped
            if settled or not left:
                kernel.leave_out(skipped)
                return told
            kernel.retried["process"] += 1

    @property
    def identity(self) -> Hashable:
        """See `Process.identity`."""
        return self.pid, self._record.start_ns, self._record.address, self.kernel.boot

    @property
    def name(self) -> str:
        """See `Process.name`."""
        return self.record.name

    def check(self) -> None:
        """See `Process.check`: its PID, start and mm stand where they stood."""
        if self.kernel.live:
            self._standing.check(self._record)

    @property
    def info(self) -> ProcessInfo:
        """See `Process.info`."""
        return self.steady(self._info)

    def _info(self, record: TaskRecord) -> ProcessInfo:
        extra: dict[str, Any] = {"sources": list(self._sources)}
        namespaces = self.tasks.namespaces(self.kernel.objects(), record.address)
        extra["namespaces"] = None if namespaces is None else dict(namespaces)
        pgd = self._pgd(record)
        executable, deleted = self._executable(record)
        extra["executable_deleted"] = deleted
        groups = cgroups_of(self.kernel.objects(), self.tasks, record.address, record.flags)
        paths = [] if groups is None else paths_of(groups)
        extra["cgroup"], extra["container"] = main_path(paths), container_among(paths)
        return ProcessInfo(
            record.pid,
            record.name,
            ppid=record.ppid,
            state=record.state,
            uid=record.uid,
            gid=record.gid,
            threads=record.threads,
            start_ticks=record.start_ticks,
            start_time=self._start_time(record),
            command_line=self._command_line(record),
            executable=executable,
            architecture=self._architecture(record),
            kernel_thread=record.kernel_thread,
            dtb=None if pgd is None else self.kernel.dtb_of(pgd),
            object=record.address,
            extra=extra,
        )

    def capability(self, kind: type[C]) -> C | None:
        """See `Capable.capability`."""
        if issubclass(OpenFiles, kind) and not self.kernel.knows("files_struct", "fdtable", "file"):
            return None
        if issubclass(CachedFiles, kind) and not self.kernel.knows("file", "address_space", "xa_node", "page"):
            return None
        if issubclass(ThreadRegisters, kind) and not self.kernel.knows("pt_regs"):
            return None
        if issubclass(ProcFiles, kind):
            from engine.oslayers.linux.procfiles import LinuxProcFiles

            files = LinuxProcFiles(self.kernel, self.tasks, self)
            return files if isinstance(files, kind) else None
        return super().capability(kind)

    def _architecture(self, record: TaskRecord) -> str | None:
        """What its program is written for: the kernel's machine, or that machine's of 32 bits."""
        machine = self.kernel.found.machine
        if not record.mm or machine not in NARROW:
            return machine
        try:
            objects = self.kernel.objects()
            vector = objects.memory.read(record.mm + objects.struct("mm_struct")["saved_auxv"].offset, 8)
        except (FaultError, NotFoundError):
            return None
        return NARROW.get(machine) if is_narrow(objects, vector) else machine

    def _start_time(self, record: TaskRecord) -> float | None:
        """Seconds since 1970 UTC; None where the clock is not found."""
        boot = self.kernel.boot_time()
        return None if boot is None or record.start_ns is None else (boot + record.start_ns) / 1e9

    def _executable(self, record: TaskRecord) -> tuple[str | None, bool | None]:
        """(path of the executable, whether its name was removed); None where there is none, or it cannot be read."""
        if not record.mm:
            return None, None
        try:
            objects = self.kernel.objects()
            file = objects.pointer(record.mm + objects.struct("mm_struct")["exe_file"].offset)
            path = objects.once(Paths, lambda: Paths(objects)).of_file(file) if file else None
        except (FaultError, NotFoundError):
            return None, None
        if path is None:
            return None, None
        return path.removesuffix(DELETED), path.endswith(DELETED)

    def _command_line(self, record: TaskRecord) -> tuple[str, ...] | None:
        """The arguments; () of a kernel thread and a zombie, None where they cannot be read."""
        if not record.mm:
            return None if record.mm is None else ()
        data = self._arguments(record)
        if data is None:
            return None
        return tuple(decoded(part) for part in data.removesuffix(b"\0").split(b"\0")) if data else ()

    def arguments(self) -> bytes | None:
        """What /proc/PID/cmdline gives; None where it cannot be read whole.

        A program that overwrote its arguments beyond their last byte has its text go on into the environment
        (get_mm_cmdline of fs/proc/base.c).
        """
        return self.steady(self._arguments)

    def _arguments(self, record: TaskRecord) -> bytes | None:
        found = self._strings(record, "arg_start", "arg_end")
        if found and found[-1]:
            longer = self._strings(record, "arg_start", "env_end")
            return longer.partition(b"\0")[0] if longer is not None else found
        return found

    def environment(self) -> bytes | None:
        """What /proc/PID/environ gives; None where it cannot be read whole."""
        return self.steady(lambda record: self._strings(record, "env_start", "env_end"))

    def _strings(self, record: TaskRecord, first: str, last: str) -> bytes | None:
        if not record.mm:
            return None if record.mm is None else b""
        try:
            objects = self.kernel.objects()
            layout = objects.struct("mm_struct")
            start, stop = (objects.value(record.mm, layout[name]) for name in (first, last))
            if start >= stop:
                return b""
            return self._memory_of(record).read(start, min(stop - start, STRINGS_LIMIT))
        except (FaultError, NotFoundError):
            return None

    def _pgd(self, record: TaskRecord) -> int | None:
        """The kernel's address of the top page table; None for a kernel thread, and where it cannot be read."""
        if not record.mm:
            return None
        try:
            return self.kernel.objects().pointer(record.mm + self.kernel.types.require("mm_struct")["pgd"].offset)
        except (FaultError, NotFoundError):
            return None

    @property
    def memory(self) -> Memory:
        """See `Process.memory`: empty for a kernel thread. Once it has called exec this is no more its memory."""
        if self._memory is None:
            return self._memory_of(self.record)
        return self._memory[1]

    def _memory_of(self, record: TaskRecord) -> Memory:
        """The memory that it has by that record."""
        known = self._memory
        if known is None or known[0] != record.mm or (isinstance(known[1], Watched) and not known[1].stands()):
            known = self._memory = record.mm, self._space(record)
        return known[1]

    def _space(self, record: TaskRecord) -> Memory:
        pgd = self._pgd(record)
        if pgd is None or not record.mm:
            return NOTHING
        try:
            if not self.kernel.base.live:
                return process_space(self.kernel, record.mm, pgd)
            top = record.mm + self.kernel.types.require("mm_struct")["pgd"].offset
            space = self.kernel.found.memory.virt_to_phys(top), pgd
            check, identity = self._standing.check, self._standing.identity
            return process_space(
                self.kernel, record.mm, pgd, partial(check, record, space), partial(identity, record, space)
            )
        except FaultError:
            return NOTHING

    def regions(self) -> Iterator[Region]:
        """See `Process.regions`."""
        return iter(self.steady(self._regions))

    def _regions(self, record: TaskRecord) -> list[Region]:
        if not record.mm:
            return []
        from engine.oslayers.linux.vmas import regions_of

        try:
            return list(regions_of(self.kernel, record.mm))
        except NotFoundError:
            return list(self._by_page_tables(record))

    def _by_page_tables(self, record: TaskRecord) -> Iterator[Region]:
        """What can be told of mappings where nothing is known of VMAs."""
        from engine.oslayers.linux.user_space import mapped_regions

        objects, memory = self.kernel.objects(), self._memory_of(record)
        if not isinstance(memory, VirtualMemory) or record.mm is None:
            return iter(())
        try:
            layout = objects.struct("mm_struct")
            low, high, stack = (objects.value(record.mm, layout[name]) for name in ("start_brk", "brk", "start_stack"))
        except (FaultError, NotFoundError):
            return mapped_regions(memory, None, None)
        return mapped_regions(memory, (low, high), stack)

    def physical_maps(self) -> Iterator[PhysicalMap]:
        """See `PhysicalMaps.physical_maps`."""
        memory = self.memory
        if isinstance(memory, Watched):
            told = list(memory.physical_maps())
            memory.check()
            return iter(told)
        return memory.physical_maps() if isinstance(memory, VirtualMemory) else iter(())

    @property
    def tells_modules(self) -> bool:
        """See `Process.tells_modules`: page tables do not tell which files are mapped."""
        return self.kernel.knows("vm_area_struct")

    def modules(self) -> Iterator[Module]:
        """See `Process.modules`."""
        from engine.oslayers.linux.images import process_images

        return process_images(self)

    def open_files(self) -> Iterator[OpenFileInfo]:
        """See `OpenFiles.open_files`."""
        from engine.oslayers.linux.files import Descriptors

        try:
            reader = Descriptors(self.kernel, self.tasks)
        except NotFoundError:
            return iter(())
        return iter(
            self.steady(
                lambda record: [reader.info(number, file) for number, file in reader.files(record.address)]
            )
        )

    def cached_files(self) -> Iterator[CachedFileInfo]:
        """See `CachedFiles.cached_files`."""
        from engine.oslayers.linux.contents import Contents

        try:
            return iter(self.steady(lambda record: list(Contents(self.kernel, self.tasks, record).infos())))
        except ProcessExitedError:
            raise
        except NotFoundError:
            return iter(())

    def cached_file(self, name: str) -> Memory:
        """See `CachedFiles.cached_file`."""
        from engine.oslayers.linux.contents import Contents

        return Contents(self.kernel, self.tasks, self.record).file(name)

    def registers(self, tid: int) -> Mapping[str, int]:
        """See `ThreadRegisters.registers`."""
        from engine.oslayers.linux.registers import Frames

        frames = Frames(self.kernel, self.tasks)

        def read(record: TaskRecord) -> Mapping[str, int]:
            task = next((one.address for one in self._threads(record) if one.pid == tid), None)
            if task is None:
                raise NotFoundError(f"process {self.pid} has no thread {tid}")
            return frames.registers(task)

        try:
            return self.steady(read)
        except FaultError as error:
            raise NotFoundError(f"the registers of thread {tid} cannot be read: {error}") from None

    def threads(self) -> Iterator[ThreadInfo]:
        """See `Process.threads`."""
        for one in sorted(self.steady(self._threads), key=lambda record: record.pid):
            yield ThreadInfo(one.pid, one.name, one.state, one.start_ticks)

    def _threads(self, record: TaskRecord) -> list[TaskRecord]:
        objects = self.kernel.objects()
        return self.tasks.records(objects, self.tasks.threads(objects, record.address))
