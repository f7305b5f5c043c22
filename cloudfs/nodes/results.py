"""What the commands written to a file `new` came to: shared by all who look at it."""

from __future__ import annotations

import threading
import time
from dataclasses import field

from engine.records import dataclass


@dataclass(slots=True, eq=False)
class Result:
    """One command, its beginning, and what came of it."""

    line: str
    begun: float = field(default_factory=time.monotonic)
    text: str | None = None
    """A sentence, once it has ended."""
    failed: bool = False


class Results:
    """The last result and the commands that run; safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[Result] = []
        self.last: Result | None = None
        self.writers = 0
        """Descriptors that were opened for writing so far."""

    def begin(self, line: str) -> Result:
        """Note that a command was begun."""
        result = Result(line)
        with self._lock:
            self._running.append(result)
        return result

    def end(self, result: Result, text: str, *, failed: bool = False) -> None:
        """Note what came of it."""
        result.text, result.failed = text, failed
        with self._lock:
            self._running.remove(result)
            self.last = result

    def running(self) -> list[Result]:
        """Those that have not ended, oldest first."""
        with self._lock:
            return list(self._running)
