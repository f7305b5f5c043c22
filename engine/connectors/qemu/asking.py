"""Asking a guest's QEMU by whatever way there is: its own monitors one after the other, then libvirt's virsh."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from engine.connectors.qemu.finding import Guest
from engine.connectors.qemu.monitor import MonitorError, connect
from engine.errors import EngineError, TargetBusyError, UnsupportedError
from engine.oslayer import HostOwned

VIRSH_LIMIT = 5.0
"""Seconds for one question to libvirt."""
WHOLE_LIMIT = 8.0
"""Seconds for all of a guest's own monitors together: nobody is kept waiting for longer, and no monitor held."""
OUTPUT_MOST = 16 << 20
Human = Callable[[str], str]
"""Gives what the monitor for people prints on a line."""
T = TypeVar("T")


def ask(guest: Guest, act: Callable[[Human, str], T]) -> T:
    """What `act` makes of the first monitor that answers; it is told of whom it asks.

    Raises UnsupportedError, the reasons joined, where none answers.
    """
    reasons: list[str] = []
    if guest.on_host:
        deadline = time.monotonic() + WHOLE_LIMIT
        for address in guest.line.monitors:
            if address.kind == "elsewhere":
                continue
            try:
                with connect(address, guest.pid, deadline) as monitor:
                    return act(monitor.human, f"its monitor at {address}")
            except TargetBusyError as error:
                if is_stopped(guest):
                    reasons.append(f"the QEMU of {guest} was stopped by a signal, and its monitors with it")
                    break
                reasons.append(str(error))
            except (EngineError, OSError) as error:
                reasons.append(str(error))
        if guest.line.uuid and any(address.kind == "elsewhere" for address in guest.line.monitors):
            try:
                return act(_virsh(guest.line.uuid, daemon_of(guest)), "libvirt")
            except EngineError as error:
                reasons.append(str(error))
    raise UnsupportedError("; ".join(reasons) or f"{guest} has no monitor that can be asked")


def is_stopped(guest: Guest) -> bool:
    """Whether QEMU itself was stopped by a signal, or by a debugger."""
    try:
        told = Path(f"/proc/{guest.pid}/stat").read_bytes() if guest.on_host else b""
    except OSError:
        return False
    return told.rpartition(b")")[2].split()[:1] in ([b"T"], [b"t"])


def daemon_of(guest: Guest) -> str:
    """The libvirt that manages a guest: the system's, or that of the user whose process it is."""
    owner = guest.process.capability(HostOwned)
    mine = os.geteuid() != 0 and owner is not None and owner.owner()[0] == os.geteuid()
    return "qemu:///session" if mine else "qemu:///system"


def _virsh(uuid: str, daemon: str) -> Human:
    """The monitor for people by way of libvirt. Raises MonitorError."""
    command = shutil.which("virsh")
    if command is None:
        raise MonitorError("its monitor is its manager's, and there is no virsh to ask it by")

    def human(line: str) -> str:
        words = [command, "--connect", daemon, "qemu-monitor-command", "--domain", uuid, "--hmp", line]
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=VIRSH_LIMIT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MonitorError(f"virsh did not answer: {error}") from None
        if done.returncode:
            said = done.stderr[:300].decode(errors="replace").strip()
            raise MonitorError(f"virsh refused: {said or done.returncode}")
        return done.stdout[:OUTPUT_MOST].decode(errors="replace").replace("\r\n", "\n")

    return human
