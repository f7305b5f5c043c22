"""What is given back when nobody asks for anything: when, and what is looked at for it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import trio
import trio.testing
from made_up_tree import Folder, Text

from cloudfs import resting
from cloudfs.operations import TreeOperations
from cloudfs.watchdog import Watchdog


def test_resident_memory_is_what_proc_status_says() -> None:
    said = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert said is not None
    assert abs(resting.resident() - int(said[1]) * 1024) < 8 << 20


def test_free_memory_of_the_heap_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        resting.give_back()()  # harmless
        return
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(60_000) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(block, 1, 60_000)
    for block in blocks[:-1]:  # the last one stands at the top of the heap
        libc.free(ctypes.c_void_p(block))
    before = resting.resident()
    resting.give_back()()
    assert resting.resident() < before - (30 << 20)
    libc.free(ctypes.c_void_p(blocks[-1]))


class Asleep(Watchdog):
    """A watchdog that is asleep as long as it is told to be."""

    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.asleep = True


async def told_of_idleness(files: int, *, busy: bool, resident: int) -> tuple[int, list[tuple[int, bytes]], float]:
    """(rests, what was invalidated, seconds) after a daemon that knows some files and takes some memory fell idle."""
    invalidated: list[tuple[int, bytes]] = []
    children = {f"{number}": Text(f"{number}", "") for number in range(files)}
    root = Folder("root", {"all": Folder("all", dict(children))})
    watchdog = Asleep()
    operations = TreeOperations(
        root,
        inode_bound=100,
        watchdog=watchdog,
        invalidate=lambda parent, name: invalidated.append((parent, name)),
        readdir_reply=lambda *_: True,
    )
    above = (await operations.lookup(1, b"all", None)).st_ino
    for name in children:
        await operations.lookup(above, name.encode(), None)
    rest = resting.Rest(operations, watchdog, 10.0)
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rest.run)
        await trio.testing.wait_all_tasks_blocked()
        rest._resident -= resident
        rest.fell_idle()
        watchdog.asleep = not busy
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    return rest.count, invalidated, trio.current_time() - began


@pytest.mark.parametrize(
    ("files", "busy", "resident", "rests", "named"),
    [
        pytest.param(50, False, 0, 1, {b"all", b"0", b"49"}, id="many-nodes"),
        pytest.param(50, True, 0, 0, set(), id="many-nodes-but-busy-again"),
        pytest.param(2, False, 0, 0, set(), id="few-nodes"),
        pytest.param(2, False, 1 << 30, 1, set(), id="few-nodes-and-much-memory"),
    ],
)
def test_it_rests_where_there_is_something_to_give_back(
    files: int, busy: bool, resident: int, rests: int, named: set[bytes]
) -> None:
    clock = trio.testing.MockClock(autojump_threshold=0.01)
    count, invalidated, _ = trio.run(lambda: told_of_idleness(files, busy=busy, resident=resident), clock=clock)
    assert count == rests
    assert named <= {name for _, name in invalidated}
    assert bool(named) == bool(invalidated)


def test_a_root_that_fails_to_let_go_is_a_bug_in_the_log_and_no_more() -> None:
    class Broken(Folder):
        def rest(self) -> None:
            raise KeyError("a bug")

    operations = TreeOperations(Broken("root", {}))
    operations.rest()
    assert operations.counters.bugs == 1
