"""A process of this host."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

from engine.containers import cgroup_paths, container_among, main_path
from engine.errors import ProcessExitedError
from engine.oslayer import C, HostOwned, Module, Process, ProcFiles
from engine.oslayers.native.files import NativeFiles
from engine.oslayers.native.memory import NativeMemory
from engine.oslayers.native.procfs import (
    ARGUMENTS_LIMIT,
    PF_KTHREAD,
    ProcDirectory,
    Stat,
    parse_command_line,
    parse_ids,
    parse_program_bits,
    parse_stat,
    read_start,
)
from engine.oslayers.native.regions import parse_regions
from engine.types import NARROW, ProcessInfo, Region, ThreadInfo

TICKS = os.sysconf("SC_CLK_TCK")
_DELETED = " (deleted)"


def program_architecture(bits: int | None, machine: str) -> str | None:
    """The architecture of a program of `bits` on this machine, or None where unknown."""
    if bits is None:
        return None
    wide = sys.maxsize > 1 << 32 or machine in NARROW
    if bits == 64:
        return machine if wide else None
    return NARROW.get(machine) if wide else machine


class NativeProcess(Process, HostOwned):
    """A process as it was met: PID and start time. All it tells is of that one, or ProcessExitedError.

    What this user may not see is None in `info`, and AccessDeniedError where it was asked for by itself.
    """

    def __init__(self, directory: ProcDirectory, boot_time: float | None, *, writable: bool = False) -> None:
        self.directory = directory
        self._boot_time = boot_time
        self._memory = NativeMemory(directory, writable=writable)

    @property
    def pid(self) -> int:
        """Its PID."""
        return self.directory.pid

    @property
    def start_ticks(self) -> int:
        """Its start since boot in clock ticks: with the PID its identity."""
        return self.directory.start_ticks

    @property
    def identity(self) -> tuple[int, int]:
        """See `Process.identity`: PID and start time, as they were when it was met."""
        return self.pid, self.start_ticks

    @property
    def name(self) -> str:
        """See `Process.name`. Unlike the arguments in `info` it is told without the process's mmap_lock."""
        return os.fsdecode(self.directory.stat().name)

    @property
    def info(self) -> ProcessInfo:
        """See `Process.info`. Six small files are read, and no other; about 60 us.

        Of the arguments the first 256 KiB are told: a process may say that it has any number.
        """
        directory = self.directory
        status = directory.read_unchecked("status")
        arguments = directory.read_unchecked("cmdline", ARGUMENTS_LIMIT)
        auxv = directory.read_unchecked("auxv")
        groups = directory.read_unchecked("cgroup")
        try:
            executable: str | None = os.readlink(f"{directory.path}/exe")
        except OSError:
            executable = None
        # Last: what came before is this process's only if it is still there now.
        stat = directory.stat()
        return self._record(stat, status or b"", arguments, auxv or b"", executable, groups)

    def _record(
        self, stat: Stat, status: bytes, arguments: bytes | None, auxv: bytes, executable: str | None,
        groups: bytes | None,
    ) -> ProcessInfo:
        uid, gid = parse_ids(status)
        kernel_thread = bool(stat.flags & PF_KTHREAD)
        command_line = parse_command_line(arguments) if arguments else None
        paths = [] if groups is None else cgroup_paths(os.fsdecode(groups))
        extra: dict[str, Any] = {"cgroup": main_path(paths), "container": container_among(paths)}
        if executable is not None:
            extra["executable_deleted"] = executable.endswith(_DELETED)
            executable = executable.removesuffix(_DELETED)
        started = None if self._boot_time is None else self._boot_time + stat.start_ticks / TICKS
        return ProcessInfo(
            pid=self.pid,
            name=os.fsdecode(stat.name),
            ppid=stat.ppid,
            state=stat.state,
            uid=uid,
            gid=gid,
            threads=stat.threads,
            start_ticks=stat.start_ticks,
            start_time=started,
            command_line=() if kernel_thread else command_line,
            executable=executable,
            architecture=program_architecture(parse_program_bits(auxv), platform.machine()),
            kernel_thread=kernel_thread,
            extra=extra,
        )

    @property
    def memory(self) -> NativeMemory:
        """See `Process.memory`."""
        return self._memory

    def regions(self) -> Iterator[Region]:
        """See `Process.regions`: the lines of /proc/PID/maps. Raises AccessDeniedError."""
        descriptor = self.directory.open("maps")
        try:
            yield from parse_regions(descriptor)
        except OSError as error:
            raise self.directory.explained(error, "maps") from None
        finally:
            os.close(descriptor)

    def modules(self) -> Iterator[Module]:
        """See `Process.modules`."""
        from engine.oslayers.native.modules import process_modules

        return process_modules(self)

    def threads(self) -> Iterator[ThreadInfo]:
        """See `Process.threads`; those that end meanwhile are left out."""
        for tid in self.directory.numbers("task"):
            try:
                stat = parse_stat(read_start(f"{self.directory.path}/task/{tid}/stat"))
            except OSError:
                continue
            yield ThreadInfo(tid, os.fsdecode(stat.name), stat.state, stat.start_ticks)

    def capability(self, kind: type[C]) -> C | None:
        """See `Capable.capability`: ProcFiles, HostOwned."""
        if kind is ProcFiles:
            files = NativeFiles(self.directory)
            return files if isinstance(files, kind) else None
        return super().capability(kind)

    def owner(self) -> tuple[int, int]:
        """See `HostOwned.owner`."""
        try:
            status = os.stat(self.directory.path)
        except OSError:
            raise ProcessExitedError(self.pid) from None
        self.directory.stat()
        return status.st_uid, status.st_gid

    def read_proc(self, name: str) -> bytes:
        """The whole of /proc/PID/`name`. Raises like `ProcFiles.read`."""
        return NativeFiles(self.directory).read(name)

    def close(self) -> None:
        """See `Process.close`."""
        self._memory.close()
