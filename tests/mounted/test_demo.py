"""The tour of scripts/demo when it is killed: nothing of it stays, or the next one clears it away."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mounting import is_mounted, require_fuse, take_away

TOUR = Path(__file__).parents[2] / "scripts" / "tour.py"
LIMIT = 60.0


def wait_until(condition: Callable[[], object], what: str) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, f"not {what}"
        time.sleep(0.02)


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    require_fuse()
    folder = tmp_path / "tour"
    timer = threading.Timer(LIMIT, take_away, [folder])
    timer.start()
    yield folder
    timer.cancel()
    take_away(folder)


@contextlib.contextmanager
def tour(point: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The tour, and what it has printed when it begins to wait."""
    began = subprocess.Popen(
        [sys.executable, str(TOUR), str(point)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    timer = threading.Timer(LIMIT, began.kill)
    timer.start()
    try:
        assert began.stdout is not None
        text = ""
        while "Ctrl-C here unmounts" not in text:
            line = began.stdout.readline()
            assert line, f"the tour has ended: {text}"
            text += line
        yield began, text
    finally:
        if began.poll() is None:
            began.send_signal(signal.SIGINT)
        began.communicate(timeout=30)
        timer.cancel()


def processes_with(word: str) -> list[int]:
    """The PIDs of those whose command line ends with a word."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            if os.fsencode(word) in words[-2:]:
                found.append(int(name))
    return found


def test_a_tour_that_is_killed_leaves_no_mount_and_no_process(point: Path) -> None:
    with tour(point) as (began, _):
        assert is_mounted(point)
        began.kill()
        began.wait(10)
        wait_until(lambda: not is_mounted(point), "unmounted")
        wait_until(lambda: not processes_with(str(point)), "ended")


def test_a_tour_where_the_mount_of_a_killed_daemon_stands_clears_it_away_and_says_so(point: Path) -> None:
    point.mkdir()
    command = [sys.executable, "-m", "cloudfs", "mount", "--daemon", "-o", "noauto_unmount", "dummy", str(point)]
    assert subprocess.run(command, timeout=30, check=False).returncode == 0
    (daemon,) = processes_with(str(point))
    os.kill(daemon, signal.SIGKILL)
    wait_until(lambda: not processes_with(str(point)), "ended")
    assert is_mounted(point)
    with tour(point) as (_, text):
        assert f"was cleared away from {point}: its daemon is gone" in text
        assert f"This machine is mounted at {point}" in text
    assert not is_mounted(point)
