"""Whether the process that holds a guest still is the one that was opened.

On this host a pidfd tells (0.7 us), in a guest the record of its task, which is read anew. A PID that is in use again
is another process: both know it by its start.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable

from engine.errors import EngineError, FaultError, NotFoundError, TargetGoneError
from engine.oslayer import Process

SHARE = 20
"""While one operation reads much, a look takes no more than one part in so many of its time."""


class Presence:
    """One process, kept in sight. Safe for concurrent readers."""

    def __init__(self, process: Process, what: str, *, on_host: bool, live: bool) -> None:
        """Raises TargetGoneError where it has ended already. A dump's process is there for ever."""
        self._process = process
        self._what = what
        self._live = live
        self._gone = False
        self._watch: _Watch | None = None
        if on_host and live:
            with contextlib.suppress(OSError, AttributeError):
                self._watch = _Watch(_Descriptor(os.pidfd_open(process.info.pid)))
        self._ask()  # behind the pidfd, which may be that of another process with its PID

    def _ask(self) -> None:
        try:
            self._process.check()
        except NotFoundError:
            raise self._ended() from None

    def _ended(self) -> TargetGoneError:
        self._gone = True
        return TargetGoneError(f"{self._what} has ended")

    def check(self) -> None:
        """Raise TargetGoneError where it has ended: what was read before this call is the guest's."""
        if self._gone:
            raise self._ended()
        if not self._live:
            return
        if self._watch is None:
            self._ask()
        elif self._watch.poll(0):
            raise self._ended()

    def explained(self, error: EngineError) -> EngineError:
        """The error of a read that failed: that the process has ended, where it has."""
        if isinstance(error, NotFoundError):
            return self._ended()
        try:
            self.check()
            if isinstance(error, FaultError) and error.detail:
                self.check_memory()
        except TargetGoneError as gone:
            return gone
        return error

    def check_memory(self) -> None:
        """Raise TargetGoneError where it maps nothing: it is about to end, or waits to be buried."""
        try:
            if next(iter(self._process.regions()), None) is not None:
                return
        except NotFoundError:
            pass
        raise self._ended()

    def glance(self, least: float = 0.0) -> Callable[[], None]:
        """`check`, but only as often as costs little, and not within `least` seconds. It looks now."""
        clock = time.monotonic
        following = 0.0

        def look() -> None:
            nonlocal following
            now = clock()
            if now < following:
                return
            self.check()
            following = now + max(least, SHARE * (clock() - now))

        look()
        return look


class _Watch(threading.local):
    """What polls a pidfd: one for each thread, since two cannot use it at a time. It is readable after an exit."""

    def __init__(self, descriptor: _Descriptor) -> None:
        self.descriptor = descriptor
        watch = select.poll()
        watch.register(descriptor.number, select.POLLIN)
        self.poll = watch.poll


class _Descriptor:
    """A file descriptor that is closed with its last reference, never under a reader."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.number)
