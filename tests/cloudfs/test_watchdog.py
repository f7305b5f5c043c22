"""The watchdog: fires when something stands still, sleeps when nothing happens."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cloudfs.watchdog import Watchdog


def until(condition: object, limit: float = 5.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


def test_it_fires_once_when_what_was_entered_is_not_left(caplog: pytest.LogCaptureFixture) -> None:
    fired: list[float] = []
    began = time.monotonic()
    with Watchdog(lambda: fired.append(time.monotonic()), limit=0.2) as watchdog:
        watchdog.enter()
        until(lambda: fired)
    assert 0.2 <= fired[0] - began < 2
    assert len(fired) == 1
    assert watchdog.fired
    assert "test_watchdog.py" in caplog.text


def test_it_fires_when_the_shim_does_not_get_on() -> None:
    fired: list[int] = []
    with Watchdog(lambda: fired.append(1), limit=0.1) as watchdog:
        watchdog.shared = (7, 1)
        watchdog.came()
        until(lambda: fired)


def test_it_does_not_fire_while_the_shim_gets_on() -> None:
    fired: list[int] = []
    with Watchdog(lambda: fired.append(1), limit=0.5) as watchdog:
        watchdog.came()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            watchdog.shared = (watchdog.shared[0] + 1, 1)
            time.sleep(0.01)
        watchdog.shared = (watchdog.shared[0], 0)
    assert not fired


def test_it_does_not_fire_while_things_are_entered_and_left() -> None:
    fired: list[int] = []
    with Watchdog(lambda: fired.append(1), limit=0.5) as watchdog:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            watchdog.enter()
            time.sleep(0.01)
            watchdog.leave()
    assert not fired


def switches(thread: threading.Thread) -> int:
    """How often the thread was put on a CPU."""
    text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
    return int(text.split()[2])


def test_it_wakes_up_never_while_nothing_happens() -> None:
    with Watchdog(lambda: None, limit=0.04) as watchdog:
        thread = watchdog._thread
        assert thread is not None
        watchdog.enter()
        watchdog.leave()
        until(lambda: watchdog.asleep)
        time.sleep(0.05)
        before = switches(thread)
        time.sleep(0.4)  # ten times its limit
        assert switches(thread) == before


def test_it_watches_again_after_it_slept() -> None:
    fired = threading.Event()
    with Watchdog(fired.set, limit=0.1) as watchdog:
        until(lambda: watchdog.asleep)
        watchdog.enter()
        assert not watchdog.asleep
        assert fired.wait(5)


def test_its_end_does_not_wait_for_its_limit() -> None:
    began = time.monotonic()
    with Watchdog(lambda: None, limit=60) as watchdog:
        watchdog.enter()
    assert time.monotonic() - began < 5


def test_an_abort_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("no way")

    with Watchdog(fail, limit=0.04) as watchdog:
        watchdog.enter()
        until(lambda: "could not be aborted" in caplog.text)
