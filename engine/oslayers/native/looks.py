"""Which processes were looked at lately, and whether reading their memory may have to wait.

To look at a process's mappings, or at its pages, takes its mmap_lock. Somebody may hold that while waiting for a
page of a file: the process itself in mmap(2) of a FUSE file, a debugger that reads through /proc/PID/mem. Whoever
must not wait therefore never looks: he believes what a thread that may wait found out within the last second, and
lets one look again where there is nothing to believe.
"""

from __future__ import annotations

import os
import threading
import time

from engine.errors import EngineError
from engine.oslayers.native.procfs import ProcDirectory
from engine.oslayers.native.regions import read_lines
from engine.oslayers.native.storage import mapped_devices, may_wait

AGE = 1.0
"""Seconds for which a look is believed. No longer where looking takes long: it does where the machine is busy, and
all that is believed wrongly meanwhile may hold up who believes it. 60,000 mappings take 35 ms of CPU time.
"""
COUNT = 4096
"""Processes of which the last look is kept, while it is believed."""

_Key = tuple[str, int, int]


def _key(directory: ProcDirectory) -> _Key:
    return directory.path, directory.pid, directory.start_ticks


def _wait_for_lock(directory: ProcDirectory) -> None:
    """Wait until the process's mmap_lock is free: since Linux 6.17 maps is read without it (PER_VMA_LOCK)."""
    try:
        with open(directory.open("pagemap"), "rb", buffering=0) as pagemap:
            os.pread(pagemap.fileno(), 8, 0)  # pagemap_read takes the lock, whatever lies there
    except (EngineError, OSError):
        pass


class Looks:
    """The last look at each process; safe for threads. All who read one process share it."""

    def __init__(self) -> None:
        self._found: dict[_Key, tuple[float, bool]] = {}
        self._lock = threading.Lock()

    def answer(self, directory: ProcDirectory) -> bool | None:
        """Whether reading that process may have to wait; None where nobody looked lately. Never waits."""
        found = self._found.get((directory.path, directory.pid, directory.start_ticks))
        return None if found is None or time.monotonic() >= found[0] else found[1]

    def harmless_until(self, directory: ProcDirectory) -> float | None:
        """How long (time.monotonic()) reading it is known not to wait; None where it may."""
        found = self._found.get(_key(directory))
        return None if found is None or found[1] else found[0]

    def look(self, directory: ProcDirectory) -> bool:
        """Find it out by the process's mappings; may wait for as long as its mmap_lock is held.

        False where they cannot be looked at: a read then fails at once.
        """
        try:
            with open(directory.open("maps"), "rb", buffering=0) as maps:
                devices = mapped_devices(read_lines(maps.fileno()))
        except (EngineError, OSError):
            devices = {}
        _wait_for_lock(directory)
        answer = may_wait(devices, lambda: directory.read_unchecked("mountinfo"))
        key, now = _key(directory), time.monotonic()
        with self._lock:
            self._found.pop(key, None)
            self._found[key] = (now + AGE, answer)
            while len(self._found) > COUNT or next(iter(self._found.values()))[0] < now:
                del self._found[next(iter(self._found))]
        return answer

    def forget(self, directory: ProcDirectory) -> None:
        """Believe the last look no more: the process runs another program."""
        with self._lock:
            self._found.pop(_key(directory), None)


LOOKS = Looks()
"""The one of this program."""
