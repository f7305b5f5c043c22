"""The watchdog: a thread that ends the mount when its loop stands still.

A handler that reads, in the loop, a page that only this loop could deliver (a process maps a file of the
mount, and someone reads that page through the process's `mem`) sleeps for ever: kill -9 does nothing, and
`ps` hangs on the whole machine. Only aborting the FUSE connection frees them all.

While nothing happens the thread sleeps without a timer. The first stamp wakes it; it then looks every
quarter of the limit until a whole look passes without a stamp. It counts its own looks, not the clock's
seconds: a daemon that was stopped and continued, or a machine that slept, has not stood still.

It needs the interpreter lock: system calls that a handler blocks in must give it up (os.pread, ctypes and
numpy's file reads do; copying out of a mapping of a file on a FUSE file system does not).
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType

log = logging.getLogger(__name__)

LOOKS = 4
"""Looks in a row that must find the same stamp."""


class Watchdog:
    """Calls `abort` once, in its own thread, when code between `enter` and `leave` takes `limit` seconds.

    `entered` and `left` are the stamps. The hot path writes them itself, exactly as `enter` and `leave` do.
    `activity` is called by that thread with the first stamp after some seconds without any; `idle`, in the
    watchdog's, when it falls asleep.
    """

    def __init__(
        self, abort: Callable[[], None], limit: float = 10.0, activity: Callable[[], object] | None = None
    ) -> None:
        self.entered = 0
        self.left = 0
        self.asleep = False
        self.fired = False
        self.limit = limit
        self.shared: Sequence[int] = (0, 0)
        """Requests that the shim answered by itself, and whether it is about one: further stamps."""
        self.idle: Callable[[], object] | None = None
        self._abort = abort
        self._activity = activity
        self._awake = threading.Event()
        self._stop = threading.Event()
        self._watched = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        """Watch the thread that calls this."""
        self._watched = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="cloudfs-watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._awake.set()
        if self._thread is not None:
            self._thread.join(self.limit)

    def enter(self) -> None:
        """Stamp the begin of something that should not take long."""
        self.entered += 1
        if self.asleep:
            self.wake()

    def leave(self) -> None:
        """Stamp its end."""
        self.left = self.entered

    def came(self) -> None:
        """Stamp that a request came, of which it is not known who answers it."""
        self.enter()
        self.leave()

    def wake(self) -> None:
        """Let the thread look, after it was `asleep`."""
        self.asleep = False
        self._awake.set()
        if self._activity is not None:
            self._activity()

    def _run(self) -> None:
        seen = -1
        same = 0
        while not self._stop.is_set():
            stamp, busy = self._stamp(), self.entered != self.left or bool(self.shared[1])
            if stamp != seen:
                seen, same = stamp, 0
            elif busy:
                same += 1
                if same >= LOOKS:
                    self._fire()
                    return
            else:
                self._sleep(stamp)
                continue
            self._stop.wait(self.limit / LOOKS)

    def _stamp(self) -> int:
        return self.entered + self.shared[0]

    def _sleep(self, stamp: int) -> None:
        self._awake.clear()
        self.asleep = True
        if self._stamp() != stamp or self._stop.is_set():  # meanwhile: nobody will wake us
            self.asleep = False
            return
        if self.idle is not None:
            self.idle()
        self._awake.wait()

    def _fire(self) -> None:
        self.fired = True
        frame = sys._current_frames().get(self._watched)
        where = "".join(traceback.format_stack(frame)) if frame is not None else ""
        log.critical("the mount stood still for %g s and is being ended; it stood here:\n%s", self.limit, where)
        try:
            self._abort()
        except Exception:
            log.exception("the FUSE connection could not be aborted")
