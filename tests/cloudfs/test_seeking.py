"""Requests for holes: answered once each, whatever the file does."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from made_up_tree import Folder

from cloudfs.node import Attributes, File, OpenFile, no_data
from cloudfs.operations import TreeOperations
from cloudfs.seeking import Seeks
from engine.errors import ProcessExitedError

CONTEXT: Any = None
SIZE = 1000
Answer = Callable[[int, int], Any]


class Sought(OpenFile):
    """Asks the functions it is given."""

    def __init__(self, nowait: Answer, wait: Answer) -> None:
        self.nowait, self.wait = nowait, wait

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes:
        return b""

    def seek(self, offset: int, whence: int) -> int | None:
        return self.wait(offset, whence)

    def seek_nowait(self, offset: int, whence: int) -> int | None:
        return self.nowait(offset, whence)


class SoughtFile(File):
    def __init__(self, opened: OpenFile) -> None:
        self.opened = opened

    @property
    def identity(self) -> str:
        return "sought"

    def attributes(self) -> Attributes:
        return Attributes(stat.S_IFREG | 0o444, SIZE)

    def open(self, flags: int) -> OpenFile:
        return self.opened


class Plain(OpenFile):
    """Knows nothing of holes."""

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes:
        return b""


def ask(
    file: OpenFile, offset: int = 0, whence: int = os.SEEK_DATA, *, timeout: float = 10, cancel: bool = False
) -> tuple[int, int]:
    """(offset, errno) of the one answer to a request."""
    answers: list[tuple[int, int, int]] = []

    async def main() -> None:
        operations = TreeOperations(Folder("root", {"file": SoughtFile(file)}), timeout=timeout)
        seeks = Seeks(operations, lambda *answer: answers.append(answer))
        entry = await operations.lookup(1, b"file", CONTEXT)
        info = await operations.open(entry.st_ino, os.O_RDONLY, CONTEXT)
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                seeks.nursery = nursery
                seeks.handle(77, entry.st_ino, info.fh, offset, whence)
                if cancel:
                    nursery.cancel_scope.cancel()

    trio.run(main)
    ((request, found, code),) = answers
    assert request == 77
    return found, code


def never(offset: int, whence: int) -> Any:
    raise AssertionError("not to be asked")


def later(offset: int, whence: int) -> None:
    return None


@pytest.fixture
def event() -> Iterator[threading.Event]:
    """Set at the end, so that no thread waits for it for ever."""
    found = threading.Event()
    yield found
    found.set()


def test_what_is_known_at_once_is_answered_in_the_loop():
    assert ask(Sought(lambda offset, whence: offset + whence, never), 5, os.SEEK_HOLE) == (5 + os.SEEK_HOLE, 0)


def test_what_may_wait_is_answered_by_a_thread():
    threads = []

    def seek(offset: int, whence: int) -> int:
        threads.append(threading.current_thread())
        return offset + 9

    assert ask(Sought(later, seek)) == (9, 0)
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize(
    ("offset", "whence", "answer"),
    [
        (0, os.SEEK_DATA, (0, 0)),
        (SIZE - 1, os.SEEK_DATA, (SIZE - 1, 0)),
        (7, os.SEEK_HOLE, (SIZE, 0)),
        (SIZE, os.SEEK_DATA, (0, errno.ENXIO)),
        (SIZE, os.SEEK_HOLE, (0, errno.ENXIO)),
        (-1, os.SEEK_DATA, (0, errno.ENXIO)),
    ],
)
def test_a_file_that_knows_of_no_holes_is_data_up_to_its_size(offset, whence, answer):
    assert ask(Plain(), offset, whence) == answer


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (no_data(), errno.ENXIO),
        (ProcessExitedError(7), errno.ESRCH),
        (ZeroDivisionError(), errno.EIO),
        (OSError(errno.ENOSYS, ""), errno.EOPNOTSUPP),
        (SystemExit(), errno.EIO),
    ],
)
def test_an_error_is_the_errno_of_the_answer(error, code, inline):
    def fail(offset: int, whence: int) -> int:
        raise error

    assert ask(Sought(fail, never) if inline else Sought(later, fail)) == (0, code)


@pytest.mark.parametrize("bad", [-1, 4, 1 << 63, "5", 5.0, True])
def test_an_impossible_answer_is_eio(bad):
    assert ask(Sought(lambda offset, whence: bad, never), 5) == (0, errno.EIO)
    assert ask(Sought(later, lambda offset, whence: bad), 5) == (0, errno.EIO)


def test_a_target_that_does_not_answer_is_etimedout(event):
    assert ask(Sought(later, lambda offset, whence: event.wait(60)), timeout=0.05) == (0, errno.ETIMEDOUT)


def test_a_request_that_waits_when_the_mount_ends_is_answered(event):
    assert ask(Sought(later, lambda offset, whence: event.wait(60)), cancel=True) == (0, errno.EINTR)


def test_a_handle_that_is_not_open_is_ebadf():
    answers = []
    seeks = Seeks(TreeOperations(Folder("root", {})), lambda *answer: answers.append(answer))
    seeks.handle(1, 2, 3, 0, os.SEEK_DATA)
    assert answers == [(1, 0, errno.EBADF)]
