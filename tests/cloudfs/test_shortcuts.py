"""What the shim is told of open files, and for how long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cloudfs import shortcuts
from cloudfs.node import OpenFile
from cloudfs.node_calls import Counters
from cloudfs.shim import COUNTS, SHORTCUTS, USED
from cloudfs.shortcuts import AGE, Shortcuts
from engine.errors import ProcessExitedError
from engine.types import Shortcut

KEEPER = object()


class Shim:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.words = memoryview(bytearray(8 * (COUNTS + 4 * SHORTCUTS))).cast("Q")
        self.ways: dict[int, tuple[int, float]] = {}

    def set(self, handle: int, way: Shortcut | None, until: float = 0.0) -> None:
        if way is None:
            self.ways.pop(handle % SHORTCUTS, None)
        else:
            self.ways[handle % SHORTCUTS] = handle, until


class Plain(OpenFile):
    """A file with a shortcut, or an error instead of one."""

    def __init__(self, way: Shortcut | Exception | None) -> None:
        self.way = way
        self.asked = 0
        self.counted = (0, 0, 0, 0)

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes:
        return b""

    def shortcut(self) -> Shortcut | None:
        self.asked += 1
        if isinstance(self.way, Exception):
            raise self.way
        return self.way

    def count(self, reads: int, bytes_read: int, writes: int, bytes_written: int) -> None:
        self.counted = (reads, bytes_read, writes, bytes_written)


WAY = Shortcut(KEEPER, 5)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(shortcuts.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def shim() -> Shim:
    return Shim()


@pytest.fixture
def kept(shim: Any, clock: list[float]) -> Shortcuts:
    return Shortcuts(shim, Counters())


def test_a_file_is_asked_once_for_as_long_as_its_answer_is_believed(
    kept: Shortcuts, shim: Shim, clock: list[float]
) -> None:
    file = Plain(WAY)
    for _ in range(3):
        kept.offer(7, file)
    assert (file.asked, shim.ways) == (1, {7: (7, 1000.0 + AGE)})
    clock[0] += AGE
    kept.offer(7, file)
    assert (file.asked, shim.ways) == (2, {7: (7, 1000.0 + 2 * AGE)})


def test_what_ends_earlier_is_believed_no_longer(kept: Shortcuts, shim: Shim) -> None:
    kept.offer(7, Plain(replace(WAY, until=1000.25)))
    assert shim.ways == {7: (7, 1000.25)}


def test_a_file_without_one_is_asked_again_later(kept: Shortcuts, shim: Shim, clock: list[float]) -> None:
    file = Plain(None)
    for _ in range(3):
        kept.offer(7, file)
    clock[0] += AGE
    kept.offer(7, file)
    assert (file.asked, shim.ways) == (2, {})


def test_an_error_is_left_to_the_next_read(kept: Shortcuts, shim: Shim) -> None:
    kept.offer(7, Plain(ProcessExitedError(1)))
    assert shim.ways == {}


def test_of_two_files_in_one_place_the_first_has_it_until_it_is_closed(kept: Shortcuts, shim: Shim) -> None:
    first, second = Plain(WAY), Plain(WAY)
    kept.offer(7, first)
    kept.offer(7 + SHORTCUTS, second)
    assert shim.ways[7][0] == 7
    kept.withdraw(7 + SHORTCUTS)
    assert shim.ways[7][0] == 7
    kept.withdraw(7)
    kept.offer(7 + SHORTCUTS, second)
    assert shim.ways[7][0] == 7 + SHORTCUTS


def test_all_are_withdrawn_at_once(kept: Shortcuts, shim: Shim) -> None:
    for handle in range(10):
        kept.offer(handle, Plain(WAY))
    kept.withdraw_all()
    assert shim.ways == {}


def test_what_the_shim_answered_is_added_once_to_the_file_and_to_the_mount(shim: Any, clock: list[float]) -> None:
    counters, file, other = Counters(reads=1), Plain(WAY), Plain(WAY)
    kept = Shortcuts(shim, counters)
    kept.offer(3, file)
    kept.offer(4, other)
    shim.words[USED] = 1 << 3
    for index, value in enumerate((10, 80, 2, 16)):
        shim.words[COUNTS + 4 * 3 + index] = value
    for _ in range(2):
        kept.count()
    assert (file.counted, other.counted) == ((10, 80, 2, 16), (0, 0, 0, 0))
    assert (counters.reads, counters.bytes_read, counters.writes, counters.bytes_written) == (11, 80, 2, 16)
    assert not any(shim.words)
