"""The status line: drawn when something was done, and never otherwise."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import dataclass

from cloudfs.commands import _status
from cloudfs.commands._status import StatusLine


@dataclass
class Counted:
    reads: int = 0
    bytes_read: int = 0
    writes: int = 0
    bytes_written: int = 0
    errors: int = 0


class Screen(io.StringIO):
    """A terminal that says when it was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        count = super().write(text)
        self.written.set()
        return count

    def drawn(self) -> int:
        return self.getvalue().count("Ctrl-C unmounts")

    def last(self) -> str:
        return self.getvalue().split("\r\x1b[K")[-1]


def line(screen: Screen, counted: Counted, log: io.StringIO | None = None) -> StatusLine:
    return StatusLine(screen, log or io.StringIO(), counted, lambda: 200)


def wait_for(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_it_is_drawn_again_after_something_was_done(monkeypatch):
    monkeypatch.setattr(_status, "REFRESH", 0.02)
    screen, counted = Screen(), Counted()
    with line(screen, counted):
        wait_for(lambda: screen.last() == "0 reads, 0 B; Ctrl-C unmounts")
        counted.reads, counted.bytes_read, counted.writes, counted.bytes_written, counted.errors = 1234, 2048, 5, 9, 1
        wait_for(lambda: "1,234 reads, 2.0 KiB (" in screen.last())
        assert screen.last().endswith("/s), 5 writes, 9 B, 1 errors; Ctrl-C unmounts")
    assert screen.getvalue().endswith("\r\x1b[K"), "it is taken away at the end"


def test_while_nothing_is_done_it_is_not_drawn_and_its_thread_sleeps_without_a_timer(monkeypatch):
    monkeypatch.setattr(_status, "REFRESH", 0.02)
    monkeypatch.setattr(_status, "SETTLED", 0.1)
    screen, counted = Screen(), Counted()
    status = line(screen, counted)
    waits: list[float | None] = []
    real = status._awake.wait

    def wait(timeout: float | None = None) -> bool:
        waits.append(timeout)
        return real(timeout)

    monkeypatch.setattr(status._awake, "wait", wait)
    with status:
        wait_for(lambda: waits and waits[-1] is None)
        assert screen.drawn() == 1
        slept = len(waits)
        counted.reads = 1
        time.sleep(0.1)
        assert len(waits) == slept, "nobody has woken it"
        status.wake()
        wait_for(lambda: "1 reads" in screen.last())
        assert screen.drawn() == 2


def test_what_is_done_long_after_it_was_woken_is_drawn_too(monkeypatch):
    monkeypatch.setattr(_status, "REFRESH", 0.02)
    monkeypatch.setattr(_status, "SETTLED", 0.3)
    screen, counted = Screen(), Counted()
    with line(screen, counted) as status:
        time.sleep(0.4)
        status.wake()  # a request has begun …
        time.sleep(0.1)
        counted.reads = 1  # … and ends
        wait_for(lambda: "1 reads" in screen.last())


def test_the_log_goes_above_it():
    screen, log = Screen(), io.StringIO()
    with line(screen, Counted(), log) as status:
        wait_for(lambda: screen.drawn() == 1)
        status.write("something has happened\n")
        assert log.getvalue() == "something has happened\n"
        assert screen.getvalue().count("\r\x1b[K") == 3, "cleared, and drawn anew"


def test_a_terminal_that_is_gone_ends_nothing():
    class Gone(Screen):
        def flush(self) -> None:
            raise OSError(5, "Input/output error")

    with line(Gone(), Counted()) as status:
        status.write("x\n")
        status.wake()
