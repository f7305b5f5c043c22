"""A daemon that tells its parent how its start went: the shell gets its prompt back when the mount stands.

    side = begin()                       # returns twice, as fork(2) does
    if isinstance(side, Outcome):        # the parent: the child has started, or has ended
        return side.code
    …                                    # the child: what it prints on standard error is still seen
    side.started("it works")             # and now no longer; the parent returns

Fork before threads are started and before anything large is imported.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time

from engine.errors import TargetGoneError
from engine.records import dataclass

log = logging.getLogger(__name__)

_STARTED = b"\1"
STOP_LIMIT = 10.0
"""Seconds that a child has to clean up in when its parent is interrupted."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The parent's side, when the child has started or ended."""

    code: int
    """0 where it has started, else the child's exit code."""
    said: str = ""
    """What the child wants to be printed."""


class Background:
    """The child's side."""

    def __init__(self, report: int) -> None:
        self._report = report

    def started(self, said: str = "") -> None:
        """Let the parent return, and let go of its terminal. Raises TargetGoneError where the parent was killed."""
        null = os.open(os.devnull, os.O_RDWR)
        sys.stderr.flush()
        os.dup2(null, 2)
        os.close(null)
        try:
            with open(self._report, "wb") as report:
                report.write(_STARTED + said.encode("utf-8", "surrogateescape"))
        except BrokenPipeError:
            raise TargetGoneError("whoever has started the daemon is gone: it ends") from None


def begin() -> Background | Outcome:
    """Fork. The child gets its side at once, the parent when the child has started or ended.

    When the parent is interrupted the child is told to end, and KeyboardInterrupt is raised; once the child has
    started the parent ignores SIGINT, so that its exit code is true. Raises TargetGoneError where a signal has killed
    the child.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    reading, writing = os.pipe()
    # Between the fork and `try` an interrupt would leave a child behind of which nobody knows.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if child == 0:
        os.close(reading)
        _detach(writing)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return Background(writing)
    os.close(writing)
    try:
        with open(reading, "rb") as report:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return _outcome(child, report.read())
    except KeyboardInterrupt:
        _stop(child)
        raise


def tell_service_manager(state: str) -> None:
    """Send a line such as READY=1 to whoever has started this process as a service, if anyone has: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(2)
            out.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            out.sendall(state.encode())
    except OSError as error:
        log.warning("the service manager cannot be told %s: %s", state, error)


def _outcome(child: int, report: bytes) -> Outcome:
    if report.startswith(_STARTED):
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return Outcome(0, report[len(_STARTED) :].decode("utf-8", "surrogateescape"))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise TargetGoneError(f"the daemon was killed by {signal.Signals(-code).name} before it had started")
    return Outcome(code)


def _stop(child: int) -> None:
    """End a child that has not started yet, and wait until it has cleaned up."""
    os.kill(child, signal.SIGTERM)
    until = time.monotonic() + STOP_LIMIT
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.02)


def _detach(keep: int) -> None:
    """Leave the parent's session, its standard input and output, and what else it may have left open to us.

    Programs that a mount starts would hold them for as long as it stands: `cloudfs mount --daemon … | cat` would
    never end. Standard error stays until the start is reported. The working directory stays too: paths given to
    `new` count from it.
    """
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    os.close(null)
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2 and descriptor != keep and _is_inherited(descriptor):
            os.close(descriptor)


def _is_inherited(descriptor: int) -> bool:
    """Whether the shell has left it open: Python's own are closed by exec(2), PEP 446."""
    try:
        return os.get_inheritable(descriptor)
    except OSError:
        return False
