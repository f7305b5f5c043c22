"""The OS layer `native`: this Linux host, as /proc shows it to this user."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from typing import Self

from engine.containers import cgroup_paths, container_among
from engine.errors import AccessDeniedError, InvalidArgumentError, NotRecognisedError, ProcessExitedError
from engine.oslayer import Base, Containers, Module, Options, OsLayer
from engine.oslayers.native.process import NativeProcess
from engine.oslayers.native.procfs import ProcDirectory, read_start
from engine.types import OsInfo

_BOOT_TIME = re.compile(rb"^btime (\d+)$", re.MULTILINE)
_MOST_PID = 1 << 31


def read_command_line() -> str | None:
    """What the kernel was started with; None where that is hidden."""
    try:
        return os.fsdecode(read_start("/proc/cmdline")).rstrip("\n")
    except OSError:
        return None


def read_boot_time() -> float | None:
    """Seconds since 1970 UTC at which this machine was started (proc_stat(5), btime), or None."""
    try:
        with open("/proc/stat", "rb") as file:
            found = _BOOT_TIME.search(file.read())
    except OSError:
        return None
    return float(found[1]) if found else None


class NativeLayer(OsLayer, Containers):
    """The host itself: its processes and kernel modules. It shows neither physical nor kernel memory."""

    kind = "native"
    summary = "this Linux host: its processes, through /proc"
    needs_memory = False

    def __init__(self, *, writable: bool = False) -> None:
        self._writable = writable
        # Once: the kernel computes it from a clock that is adjusted, and start times must not wander.
        self._boot_time = read_boot_time()
        self._command_line = read_command_line()
        self._hidden = 0

    @classmethod
    def open(cls, base: Base, options: Options) -> Self:
        """See `OsLayer.open`; writable where `base` is. Raises InvalidArgumentError where a target is named."""
        if base.target:
            raise InvalidArgumentError(f"native is this host and takes no target: leave {base.target!r} out")
        if not sys.platform.startswith("linux"):
            system = platform.system() or sys.platform
            raise NotRecognisedError(f"the OS layer native needs Linux; this is {system}")
        if not os.path.exists("/proc/self/stat"):
            raise NotRecognisedError(
                "the OS layer native needs /proc, and none is mounted; mount -t proc proc /proc"
            )
        return cls(writable=base.writable)

    @property
    def info(self) -> OsInfo:
        """See `OsLayer.info`; `skipped` counts processes that the last listing could not look at."""
        host = os.uname()
        return OsInfo(
            kind=self.kind,
            version=host.release,
            architecture=host.machine,
            page_size=os.sysconf("SC_PAGE_SIZE"),
            boot_time=self._boot_time,
            time=time.time(),
            uptime=time.clock_gettime(time.CLOCK_BOOTTIME),
            command_line=self._command_line,
            hostname=host.nodename,
            live=True,
            writable=self._writable,
            skipped={"processes": self._hidden} if self._hidden else {},
        )

    def pids(self) -> list[int]:
        """See `OsLayer.pids`."""
        return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())

    def process(self, pid: int) -> NativeProcess:
        """See `OsLayer.process`. Raises AccessDeniedError where /proc is mounted with hidepid."""
        if not 0 < pid < _MOST_PID:
            raise ProcessExitedError(pid)
        return NativeProcess(ProcDirectory.of_process(pid), self._boot_time, writable=self._writable)

    def processes(self) -> Iterator[NativeProcess]:
        """See `OsLayer.processes`; those hidden from this user (hidepid) are left out and counted."""
        hidden = 0
        for pid in self.pids():
            with contextlib.suppress(ProcessExitedError):
                try:
                    process = self.process(pid)
                except AccessDeniedError:
                    hidden += 1
                    continue
                yield process
        self._hidden = hidden

    def containers(self) -> dict[str, tuple[int, ...]]:
        """See `Containers.containers`."""
        found: dict[str, tuple[int, ...]] = {}
        for pid in self.pids():
            try:
                text = os.fsdecode(read_start(f"/proc/{pid}/cgroup"))
            except OSError:
                continue
            container = container_among(cgroup_paths(text))
            if container is not None:
                found[container] = (*found.get(container, ()), pid)
        return found

    def modules(self) -> Iterator[Module]:
        """See `OsLayer.modules`: /proc/modules."""
        from engine.oslayers.native.modules import kernel_modules

        return kernel_modules()

    def close(self) -> None:
        """Nothing is held here; processes and their memory stay usable."""
