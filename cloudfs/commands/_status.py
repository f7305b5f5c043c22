"""The status line of a mount in the foreground: what was read and written so far.

It is drawn again only after something was done. While nothing is, its thread sleeps without a timer, so that an
idle mount never wakes a CPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from cloudfs.commands._output import clip
from cloudfs.render import human_size

REFRESH = 0.5
"""Seconds between two drawings while something is done."""
SETTLED = 6.0
"""Seconds without anything done after which `wake` is relied on: it is only called after some."""
_CLEAR = "\r\x1b[K"


class Counted(Protocol):
    """What the mount counts."""

    reads: int
    bytes_read: int
    writes: int
    bytes_written: int
    errors: int


Figures = tuple[int, int, int, int, int]


class StatusLine:
    """One line at the bottom of a terminal, as long as the context; `write` prints lines above it."""

    def __init__(self, terminal: TextIO, log: TextIO, counters: Counted, width: Callable[[], int]) -> None:
        self._terminal = terminal
        self._log = log
        self._counters = counters
        self._width = width
        self._lock = threading.Lock()
        self._awake = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="cloudfs-status", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped = True
        self._awake.set()
        self._thread.join()
        with self._lock:
            self._put(_CLEAR)

    def wake(self) -> None:
        """Something is done again."""
        self._awake.set()

    def write(self, text: str) -> None:
        """A line of the log: it goes above the status line."""
        with self._lock:
            self._put(_CLEAR)
            self._log.write(text)
            self._log.flush()
            self._draw(self._figures(), 0.0)

    def flush(self) -> None:
        """See `TextIO.flush`: everything is written at once."""

    def _figures(self) -> Figures:
        counted = self._counters
        return counted.reads, counted.bytes_read, counted.writes, counted.bytes_written, counted.errors

    def _run(self) -> None:
        drawn: Figures | None = None
        since = changed = time.monotonic()
        while not self._stopped:
            self._awake.clear()
            figures, now = self._figures(), time.monotonic()
            if figures != drawn:
                rate = 0.0 if drawn is None else (figures[1] - drawn[1]) / max(now - since, 1e-3)
                with self._lock:
                    self._draw(figures, rate)
                drawn, changed = figures, now
            since = now
            # A request counts when it ends, and `wake` comes when it begins: hence some seconds of looking.
            self._awake.wait(REFRESH if now - changed < SETTLED else None)
            if not self._stopped and self._awake.is_set():
                changed = time.monotonic()

    def _draw(self, figures: Figures, rate: float) -> None:
        reads, bytes_read, writes, bytes_written, errors = figures
        parts = [f"{reads:,} reads, {human_size(bytes_read)}"]
        if rate:
            parts[0] += f" ({human_size(int(rate))}/s)"
        if writes:
            parts.append(f"{writes:,} writes, {human_size(bytes_written)}")
        if errors:
            parts.append(f"{errors:,} errors")
        self._put(_CLEAR + clip(f"{', '.join(parts)}; Ctrl-C unmounts", self._width() - 1))

    def _put(self, text: str) -> None:
        try:
            self._terminal.write(text)
            self._terminal.flush()
        except (OSError, ValueError):
            self._stopped = True  # the terminal is gone: the mount goes on
