"""Which process serves a mount: it says so itself, and the kernel vouches for it.

The daemon listens at an abstract Unix socket (unix(7)) that is named after the device of its mount; nobody says
anything there. Whoever connects is told by the kernel which process of which user it is that listens (SO_PEERCRED).
Nothing has to be cleaned up, and the name ends with the process. In another network namespace it is not seen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

DEVICE = "/dev/fuse"
QUEUE = 128
"""Connections that nobody accepts: the askers have long hung up."""
TERM_LIMIT = 5.0
"""Seconds that a daemon has to unmount after SIGTERM; requests that wait are given up after two."""
KILL_LIMIT = 5.0
STEP = 0.05

Device = tuple[int, int]


def _address(device: Device) -> str:
    return f"\0cloudfs/mount/{device[0]}:{device[1]}"


@contextlib.contextmanager
def announced(device: Device | None) -> Iterator[None]:
    """Say that this process serves the mount of that device, for as long as the context."""
    with contextlib.ExitStack() as stack:
        if device is not None:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                listener.bind(_address(device))
                listener.listen(QUEUE)
            except OSError as error:
                log.info("others will not know which process serves this mount: %s", error)
        yield


def _listener(device: Device) -> tuple[int, int] | None:
    """PID and effective user of who listens there; None where nobody does, or nobody whom we see."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(_address(device))
            pid, uid, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        except OSError:
            return None
    return (pid, uid) if pid > 0 else None


def _serves(pid: int, device: Device) -> bool:
    """Whether a process holds a FUSE connection, and that of the device where the kernel tells (6.16 does)."""
    directory = Path(f"/proc/{pid}")
    try:
        for name in os.listdir(directory / "fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(directory / "fd" / name) != DEVICE:
                    continue
                facts = dict(line.split(":", 1) for line in (directory / "fdinfo" / name).read_text().splitlines())
                if int(facts.get("fuse_connection", device[1])) == device[1]:
                    return True
    except (OSError, ValueError):
        return False
    return False


@contextlib.contextmanager
def daemon_of(device: Device) -> Iterator[int | None]:
    """A descriptor (pidfd_open(2)) of the process of this user that serves the mount; None where none is known."""
    found = _listener(device)
    descriptor = None
    if found is not None and found[1] == os.geteuid() and found[0] != os.getpid():
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(found[0])
    try:
        # It still listens: so the number, when the descriptor was made, was its own.
        sure = descriptor is not None and found == _listener(device) and found is not None and _serves(found[0], device)
        yield descriptor if sure else None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def end_daemon(device: Device, gone: Callable[[], bool]) -> bool:
    """End the process of this user that serves the mount, by SIGTERM and, where that does not help, SIGKILL.

    Returns when it has ended, or when `gone` says that its mount has; False where it is not known or lives on.
    """
    with daemon_of(device) as daemon:
        if daemon is None:
            return False
        for number, limit in ((signal.SIGTERM, TERM_LIMIT), (signal.SIGKILL, KILL_LIMIT)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(daemon, number)
            if _wait(daemon, gone, limit):
                return True
    return False


def _wait(daemon: int, gone: Callable[[], bool], limit: float) -> bool:
    poll = select.poll()
    poll.register(daemon, select.POLLIN)
    until = time.monotonic() + limit
    while time.monotonic() < until:
        if poll.poll(STEP * 1000) or gone():
            return True
    return False
