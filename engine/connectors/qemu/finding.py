"""QEMU processes among the processes of an OS layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from engine.connectors.qemu.command_line import CommandLine, read_line
from engine.connectors.qemu.configuration import reader
from engine.connectors.qemu.emulators import called, disguised
from engine.errors import AccessDeniedError, FaultError, InvalidArgumentError, NotFoundError
from engine.oslayer import HostOwned, OsLayer, Process
from engine.records import dataclass

TEARDOWN = "cleanup/"
"""How the process is called that tears down what QEMU leaves, with its arguments (util/async-teardown.c)."""


@dataclass(frozen=True, slots=True)
class Guest:
    """A process that runs a guest."""

    process: Process
    pid: int
    line: CommandLine
    architecture: str | None
    """That of its processor, as the emulator's name or the host tells."""
    ppid: int | None = None

    @property
    def name(self) -> str:
        """Its name, or its PID where it was given none."""
        return self.line.name or str(self.pid)

    @property
    def on_host(self) -> bool:
        """Whether it is a process of this host, whose files can be opened through /proc."""
        return self.process.capability(HostOwned) is not None

    def resized(self, size: int) -> Guest:
        """The same with RAM of that size, in one piece."""
        return replace(self, line=replace(self.line, size=size, backends=()))

    def __str__(self) -> str:
        return f"{self.line.name} (pid {self.pid})" if self.line.name else f"pid {self.pid}"

    @property
    def description(self) -> str:
        """Machine, RAM, and what else tells it from others, for lists."""
        size = self.line.size
        ram = f"{size >> 30} GiB" if size and not size % (1 << 30) else f"{size >> 20} MiB"
        words = [f"pid {self.pid}", self.architecture or "", self.line.machine or "machine unknown", ram]
        if self.line.encryption:
            words.append(f"memory encrypted ({self.line.encryption})")
        return ", ".join(filter(None, words))


def guest_of(process: Process) -> Guest | None:
    """The guest that a process runs; None where it is not QEMU, has ended, or may not be looked at."""
    try:
        info = process.info
    except (NotFoundError, AccessDeniedError, FaultError):
        return None
    if info.name.startswith(TEARDOWN):
        return None
    arguments = info.command_line or ()
    host = process.capability(HostOwned) is not None
    found = called(info.executable, arguments)
    if found is None and host:
        found = disguised(info.pid, arguments)
    if found is None:
        return None
    line = read_line(found, info.architecture, reader(info.pid) if host else None)
    if line.family == "none":
        return None  # it is asked what it can do, as libvirt does
    return Guest(process, info.pid, line, line.architecture or info.architecture, info.ppid)


def guests(parent: OsLayer) -> Iterator[Guest]:
    """Every guest that runs on an OS layer, ascending by PID."""
    there: dict[int | None, CommandLine] = {}
    for process in parent.processes():
        found = guest_of(process)
        # A child with its parent's words runs another program soon.
        if found is not None and there.get(found.ppid) != found.line:
            there[found.pid] = found.line
            yield found


def find(parent: OsLayer, target: str) -> Guest:
    """The guest of that name or PID, or the only one.

    Raises NotFoundError or InvalidArgumentError that name those there are.
    """
    found = list(guests(parent))
    chosen = [guest for guest in found if target in ("", str(guest.pid))]
    chosen = chosen or [guest for guest in found if guest.line.name == target]
    if len(chosen) == 1:
        return chosen[0]
    if not found:
        raise NotFoundError(
            f"no QEMU runs here{f', so none is called {target!r}' if target else ''}"
            + ("" if os.geteuid() == 0 else "; those of other users are seen by root alone")
        )
    there = ", ".join(f"{guest} with {guest.line.size >> 20} MiB" for guest in found)
    if chosen:
        raise InvalidArgumentError(f"several guests are meant by {target or 'qemu'!r}: {there}; name one: qemu:PID")
    raise NotFoundError(f"no guest is called {target!r}; there are: {there}")


def stranger(parent: OsLayer, target: str) -> Guest | None:
    """Any process by its PID: another program that holds a guest, of which base= and size= are told."""
    if not target.isdecimal() or len(target) > 10:
        return None
    process = parent.process(int(target))
    info = process.info
    return Guest(process, info.pid, CommandLine(None), info.architecture)
