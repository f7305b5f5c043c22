"""Errors leave nothing behind that waits for the garbage collector: a frame in a cycle may hold a process's files."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pyfuse3
import pytest
import trio
from made_up_tree import Blocking, Folder, Text

from cloudfs.node import Attributes, Node, OpenFile
from cloudfs.operations import TreeOperations

CONTEXT: Any = None
Step = Callable[[TreeOperations], Awaitable[object]]


class Failing(Folder):
    """A directory of which everything fails."""

    def __init__(self, *, blocks: bool) -> None:
        super().__init__("failing", {})
        self._blocks = blocks

    @property
    def may_block(self) -> bool:
        return self._blocks

    def children(self) -> Iterator[tuple[str, Node]]:
        raise PermissionError("a listing that fails")

    def child(self, name: str) -> Node | None:
        raise PermissionError("a look-up that fails")


class Unreadable(Text):
    """A file whose attributes, opening or reading fail."""

    def __init__(self, name: str, *, blocks: bool, attributes: type[Exception] | None = None) -> None:
        super().__init__(name, "text")
        self._blocks = blocks
        self._error = attributes

    @property
    def may_block(self) -> bool:
        return self._blocks

    def attributes(self) -> Attributes:
        if self._error is not None:
            raise self._error("attributes that fail")
        return super().attributes()

    def open(self, flags: int) -> OpenFile:
        if flags & os.O_NONBLOCK:
            raise PermissionError("an opening that fails")
        return Reading(blocks=self._blocks)


class Reading(OpenFile):
    def __init__(self, *, blocks: bool) -> None:
        self._blocks = blocks

    def read_nowait(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview | None:
        return None if self._blocks else self.read(offset, size, scratch)

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        raise OSError(5, "a read that fails")


class Half(Folder):
    """Its listing breaks off."""

    def __init__(self, name: str, *, blocks: bool) -> None:
        super().__init__(name, {})
        self._blocks = blocks

    def children(self) -> Iterator[tuple[str, Node]]:
        return broken_off(blocks=self._blocks)


def failing_tree(*, blocks: bool) -> Folder:
    return Folder(
        "root",
        {
            "failing": Failing(blocks=blocks),
            "half": Half("half", blocks=blocks),
            "file": Unreadable("file", blocks=blocks),
            "attributes": Unreadable("attributes", blocks=blocks, attributes=PermissionError),
        },
    )


def broken_off(*, blocks: bool) -> Iterator[tuple[str, Node]]:
    yield "gone", Unreadable("gone", blocks=blocks, attributes=FileNotFoundError)
    yield "denied", Unreadable("denied", blocks=blocks, attributes=PermissionError)
    yield "bug", Unreadable("bug", blocks=blocks, attributes=KeyError)
    raise RuntimeError("a listing that breaks off")


async def list_all(operations: TreeOperations, inode: int) -> None:
    handle = await operations.opendir(inode, CONTEXT)
    await operations.readdir(handle, 0, CONTEXT)
    await operations.releasedir(handle)


async def inode(operations: TreeOperations, name: bytes) -> int:
    return (await operations.lookup(1, name, CONTEXT)).st_ino


async def looks_up(operations: TreeOperations) -> None:
    await operations.lookup(await inode(operations, b"failing"), b"x", CONTEXT)


async def lists(operations: TreeOperations) -> None:
    await list_all(operations, await inode(operations, b"failing"))


async def lists_half(operations: TreeOperations) -> None:
    await list_all(operations, await inode(operations, b"half"))


async def asks_attributes(operations: TreeOperations) -> None:
    await operations.lookup(1, b"attributes", CONTEXT)


async def opens(operations: TreeOperations) -> None:
    await operations.open(await inode(operations, b"file"), os.O_RDONLY | os.O_NONBLOCK, CONTEXT)


async def reads(operations: TreeOperations) -> None:
    opened = await operations.open(await inode(operations, b"file"), os.O_RDONLY, CONTEXT)
    await operations.read(opened.fh, 0, 10)


@contextmanager
def collected() -> Iterator[list[object]]:
    """All that only the collector would have freed, at the end."""
    found: list[object] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def fails_a_few_times(operations: TreeOperations, step: Step) -> list[object]:
    with collected() as found:
        for _ in range(3):
            try:
                await step(operations)
            except pyfuse3.FUSEError as error:
                del error
    return [one for one in found if isinstance(one, BaseException | FrameType | Node)]


@pytest.mark.parametrize("blocks", [False, True], ids=["inline", "in-a-thread"])
@pytest.mark.parametrize("step", [looks_up, lists, lists_half, asks_attributes, opens, reads])
def test_what_fails_leaves_no_cycle(step: Step, *, blocks: bool) -> None:
    operations = TreeOperations(
        failing_tree(blocks=blocks), invalidate=lambda *_: None, readdir_reply=lambda *_: True
    )
    assert trio.run(fails_a_few_times, operations, step) == []


def test_what_comes_too_late_leaves_no_cycle() -> None:
    event = threading.Event()
    operations = TreeOperations(Folder("root", {"file": Blocking("file", event)}), timeout=0.05)

    async def too_late(operations: TreeOperations) -> None:
        opened = await operations.open(await inode(operations, b"file"), os.O_RDONLY, CONTEXT)
        await operations.read(opened.fh, 0, 10)

    try:
        found = trio.run(fails_a_few_times, operations, too_late)
        assert operations.threads.abandoned == 3
        assert not [one for one in found if isinstance(one, Node)]
    finally:
        event.set()
