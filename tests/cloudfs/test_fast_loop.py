"""The two primitives that replace trio's in pyfuse3, and when they are used."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from types import ModuleType
from typing import Any, TypeVar

import pyfuse3
import pytest
import trio
import trio.testing

from cloudfs import fast_loop
from cloudfs.fast_loop import (
    BUDGET,
    FastLoop,
    HandOverLock,
    behaves,
    hooked_trio,
    make_eager_wait,
    make_wait_readable,
    why_not,
)
from cloudfs.shim import READY

T = TypeVar("T")


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    async def limited() -> T:
        with trio.fail_after(10):
            return await main()

    return trio.run(limited)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


class Waits:
    """trio's wait_readable, counted."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, fd: int) -> None:
        self.count += 1
        await trio.lowlevel.wait_readable(fd)


# -- wait_readable -------------------------------------------------------------------------------------------


def test_a_readable_descriptor_is_had_without_a_checkpoint(pipe: tuple[int, int]) -> None:
    waits = Waits()
    wait_readable = make_wait_readable(waits)
    os.write(pipe[1], b"x")

    async def main() -> None:
        with trio.testing.assert_no_checkpoints():
            await wait_readable(pipe[0])

    run(main)
    assert waits.count == 0


def test_one_that_is_not_readable_is_waited_for(pipe: tuple[int, int]) -> None:
    waits = Waits()
    wait_readable = make_wait_readable(waits)
    order: list[str] = []

    async def reader() -> None:
        await wait_readable(pipe[0])
        order.append("read")

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            order.append("write")
            os.write(pipe[1], b"x")

    run(main)
    assert order == ["write", "read"]
    assert waits.count == 1


def test_other_tasks_have_their_turn_after_the_budget(pipe: tuple[int, int]) -> None:
    waits = Waits()
    wait_readable = make_wait_readable(waits)
    os.write(pipe[1], b"x")
    turns = 0
    seen: list[int] = []

    async def busy(scope: trio.CancelScope) -> None:
        for _ in range(10 * (BUDGET + 1)):
            await wait_readable(pipe[0])
            seen.append(turns)
        scope.cancel()

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(busy, nursery.cancel_scope)
            nursery.start_soon(other)

    run(main)
    assert waits.count >= 10
    assert seen[-1] >= 9
    longest = max(seen.count(turn) for turn in set(seen))
    assert longest <= 2 * (BUDGET + 1)  # trio runs the tasks of one turn in any order


def test_other_tasks_have_their_turn_after_a_slice_of_time(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_loop, "SLICE", 0.0)
    waits = Waits()
    wait_readable = make_wait_readable(waits)
    os.write(pipe[1], b"x")

    async def main() -> None:
        for _ in range(BUDGET):
            await wait_readable(pipe[0])

    run(main)
    assert waits.count >= BUDGET // 9


def test_spinning_sees_what_comes_within_its_time(pipe: tuple[int, int]) -> None:
    waits = Waits()
    wait_readable = make_wait_readable(waits, spin=5.0)
    timer = threading.Timer(0.02, os.write, (pipe[1], b"x"))

    async def main() -> None:
        timer.start()
        await wait_readable(pipe[0])

    run(main)
    timer.join()
    assert waits.count == 0


class Shim:
    """What the shim says, and what it is told."""

    def __init__(self) -> None:
        self.words = [0] * 5
        self.came = 0

    def note(self) -> None:
        self.came += 1


def test_where_the_shim_is_ready_nothing_is_waited_for_within_a_slice(pipe: tuple[int, int]) -> None:
    waits, shim = Waits(), Shim()
    wait_readable = make_eager_wait(waits, shim.words, shim.note)
    os.write(pipe[1], b"x")

    async def main() -> None:
        await wait_readable(pipe[0])
        assert (waits.count, shim.came) == (1, 1)
        shim.words[READY] = 1
        with trio.testing.assert_no_checkpoints():
            await wait_readable(pipe[0])
        assert (waits.count, shim.came) == (1, 1)

    run(main)


def test_where_it_is_not_ready_a_request_is_waited_for(pipe: tuple[int, int]) -> None:
    waits, shim = Waits(), Shim()
    wait_readable = make_eager_wait(waits, shim.words, shim.note)
    os.write(pipe[1], b"x")

    async def main() -> None:
        for count in range(1, 4):
            await wait_readable(pipe[0])
            assert (waits.count, shim.came) == (count, count)

    run(main)


def test_other_tasks_have_their_turn_however_ready_it_is(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_loop, "SLICE", 0.0)
    waits, shim = Waits(), Shim()
    wait_readable = make_eager_wait(waits, shim.words, shim.note)
    shim.words[READY] = 1
    os.write(pipe[1], b"x")

    async def main() -> None:
        for _ in range(5):
            await wait_readable(pipe[0])

    run(main)
    assert waits.count == 5


# -- the lock ------------------------------------------------------------------------------------------------


def test_a_free_lock_is_had_without_a_checkpoint() -> None:
    async def main() -> None:
        lock = HandOverLock()
        with trio.testing.assert_no_checkpoints():
            for _ in range(3):
                async with lock:
                    pass

    run(main)


def test_only_one_has_the_lock_and_all_get_it() -> None:
    inside = 0
    served: list[int] = []

    async def worker(lock: HandOverLock, number: int) -> None:
        nonlocal inside
        for _ in range(5):
            async with lock:
                inside += 1
                assert inside == 1
                await trio.lowlevel.checkpoint()
                inside -= 1
            served.append(number)
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        lock = HandOverLock()
        async with trio.open_nursery() as nursery:
            for number in range(100):
                nursery.start_soon(worker, lock, number)

    run(main)
    assert sorted(served) == sorted(list(range(100)) * 5)


def test_who_does_not_suspend_has_the_lock_again_before_the_one_that_was_woken() -> None:
    order: list[str] = []

    async def waiting(lock: HandOverLock) -> None:
        async with lock:
            order.append("waiter")

    async def main() -> None:
        lock = HandOverLock()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(waiting, lock)
                await trio.testing.wait_all_tasks_blocked()
            for _ in range(3):
                async with lock:
                    order.append("owner")

    run(main)
    assert order == ["owner", "owner", "owner", "waiter"]


def test_when_the_owner_suspends_elsewhere_a_waiter_goes_on() -> None:
    order: list[str] = []

    async def waiting(lock: HandOverLock, done: trio.Event) -> None:
        async with lock:
            order.append("waiter")
        done.set()

    async def main() -> None:
        lock, done = HandOverLock(), trio.Event()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(waiting, lock, done)
                await trio.testing.wait_all_tasks_blocked()
            await done.wait()
            order.append("owner")

    run(main)
    assert order == ["waiter", "owner"]


def test_a_parked_task_can_be_cancelled_and_is_not_waited_for() -> None:
    async def waiting(lock: HandOverLock, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                raise AssertionError("it had been cancelled")

    async def main() -> None:
        lock = HandOverLock()
        scopes = [trio.CancelScope() for _ in range(10)]
        async with trio.open_nursery() as nursery, lock:
            for scope in scopes:
                nursery.start_soon(waiting, lock, scope)
            await trio.testing.wait_all_tasks_blocked()
            for scope in scopes:
                scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            assert not lock._waiting
        async with lock:
            pass

    run(main)


def test_cancelling_under_load_loses_no_wake_up() -> None:
    finished = 0

    async def worker(lock: HandOverLock, number: int) -> None:
        nonlocal finished
        for turn in range(20):
            with trio.move_on_after(0.0002 if (number + turn) % 3 == 0 else 5) as scope:
                async with lock:
                    await trio.lowlevel.checkpoint()
            if not scope.cancelled_caught:
                await trio.lowlevel.checkpoint()
        finished += 1

    async def main() -> None:
        lock = HandOverLock()
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(worker, lock, number)
        assert not lock._held
        assert not lock._waiting
        assert not lock._woken

    run(main)
    assert finished == 50


def test_a_woken_task_that_is_cancelled_before_it_runs_wakes_the_next() -> None:
    had: list[str] = []

    async def waiting(lock: HandOverLock, scope: trio.CancelScope, name: str) -> None:
        with scope:
            async with lock:
                await trio.lowlevel.checkpoint()
                had.append(name)

    async def main() -> None:
        lock = HandOverLock()
        first, second = trio.CancelScope(), trio.CancelScope()
        async with trio.open_nursery() as nursery:
            async with lock:
                nursery.start_soon(waiting, lock, first, "first")
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(waiting, lock, second, "second")
                await trio.testing.wait_all_tasks_blocked()
            first.cancel()

    run(main)
    assert had == ["second"]


# -- the hook ------------------------------------------------------------------------------------------------


def test_trio_itself_stays_as_it_is() -> None:
    lock, wait = trio.Lock, trio.lowlevel.wait_readable
    module = hooked_trio()
    assert (trio.Lock, trio.lowlevel.wait_readable) == (lock, wait)
    assert module.Lock is HandOverLock
    assert module.lowlevel.wait_readable is not wait
    assert module.open_nursery is trio.open_nursery
    assert module.lowlevel.notify_closing is trio.lowlevel.notify_closing


def test_the_trio_that_is_installed_behaves() -> None:
    async def main() -> bool:
        return await behaves(hooked_trio())

    assert run(main)


def test_it_is_in_pyfuse3_for_as_long_as_the_context_lasts() -> None:
    async def main() -> None:
        async with FastLoop(pyfuse3) as loop:
            assert loop.reason is None
            assert pyfuse3.trio is not trio
        assert pyfuse3.trio is trio

    run(main)


def fake_pyfuse3(**names: object) -> ModuleType:
    module = ModuleType("pyfuse3")
    module.__dict__.update({"__version__": "3.5.0", "trio": trio, **names})
    return module


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"__version__": "3.3.0"}, "pyfuse3 3.3.0 is not one of the known releases"),
        ({"__version__": "4.0"}, "pyfuse3 4.0 is not one of the known releases"),
        ({"__version__": "unknown"}, "pyfuse3 unknown"),
        ({"trio": None}, "does not reach trio"),
    ],
)
def test_another_pyfuse3_is_left_as_it_is_with_a_line_in_the_log(
    names: dict[str, object], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    module: Any = fake_pyfuse3(**names)
    before = module.trio

    async def main() -> None:
        async with FastLoop(module) as loop:
            assert loop.reason is not None
            assert words in loop.reason
            assert module.trio is before

    run(main)
    assert "the stock loop is used" in caplog.text
    assert words in caplog.text


def test_a_trio_that_lacks_something_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(fake_pyfuse3()) is None
    monkeypatch.delattr(trio.lowlevel, "reschedule")
    assert "lacks reschedule" in str(why_not(fake_pyfuse3()))


def test_a_trio_that_behaves_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Open:
        """A lock that locks nothing."""

        async def __aenter__(self) -> None: ...

        async def __aexit__(self, *arguments: object) -> None: ...

    monkeypatch.setattr(fast_loop, "HandOverLock", Open)
    module: Any = fake_pyfuse3()

    async def main() -> None:
        async with FastLoop(module) as loop:
            assert "behaves differently" in str(loop.reason)
            assert module.trio is trio

    run(main)
