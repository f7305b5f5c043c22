"""A faster loop for pyfuse3: two trio primitives replaced, 12 instead of 68 µs of CPU per small read.

pyfuse3 pays per request for a checkpoint of `trio.Lock`, for a `wait_readable` (epoll_ctl and two
epoll_wait) and for a switch between two tasks, although the next request mostly waits already. It reaches
trio through its module attribute `pyfuse3.trio` (the door by which `pyfuse3.asyncio` comes in). `FastLoop`
puts a copy of the trio module there, with `Lock` and `lowlevel.wait_readable` replaced; trio itself stays
as it is, and handlers use the true one.

What it does not do: it changes nothing of how requests are read, handled or answered.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any

import trio

from cloudfs.shim import READY

log = logging.getLogger(__name__)

BUDGET = 64
"""Short cuts in a row, after which the other tasks have their turn."""
SLICE = 0.001
"""Seconds of short cuts in a row, after which they have it too: 64 reads of 1 MiB take 13 ms."""
KNOWN_VERSIONS = ((3, 4), (4, 0))
"""Releases of pyfuse3 (first, and first not) whose loop was read: `async with` on one Lock, and
`wait_readable` on one descriptor within it.
"""

WaitReadable = Callable[[int], Awaitable[None]]


class HandOverLock:
    """A lock for `async with` that is taken without a checkpoint where it is free.

    The one who releases it wakes one waiter at most, does not give it the lock, and wakes no second one
    before the first has run. So a worker whose handler did not suspend takes the lock again without a
    switch, and where the handler suspended the woken one reads the next request.
    """

    __slots__ = ("_held", "_waiting", "_woken")

    def __init__(self) -> None:
        self._held = False
        self._waiting: dict[trio.lowlevel.Task, None] = {}
        self._woken = False

    async def __aenter__(self) -> None:
        while self._held:
            await self._park()
        self._held = True

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held = False
        if self._waiting and not self._woken:
            task = next(iter(self._waiting))
            del self._waiting[task]
            self._woken = True
            trio.lowlevel.reschedule(task)

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()

        def abort(_: object) -> trio.lowlevel.Abort:
            del self._waiting[task]
            return trio.lowlevel.Abort.SUCCEEDED

        self._waiting[task] = None
        await trio.lowlevel.wait_task_rescheduled(abort)
        self._woken = False


def make_wait_readable(wait: WaitReadable, spin: float = 0.0) -> WaitReadable:
    """A `wait_readable` that returns at once, without a checkpoint, where the descriptor is readable.

    After `BUDGET` short cuts in a row, or `SLICE` seconds of them, it awaits `wait`, trio's own. `spin`:
    seconds for which it polls on before it does so: half the latency across CPUs, for one CPU kept busy.
    """
    pollers: dict[int, Callable[[int], list[tuple[int, int]]]] = {}
    streak = 0
    deadline = 0.0
    clock = time.perf_counter

    def poller(fd: int) -> Callable[[int], list[tuple[int, int]]]:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        pollers[fd] = poll.poll
        return poll.poll

    async def wait_readable(fd: int) -> None:
        nonlocal streak, deadline
        if streak == 0:
            deadline = clock() + SLICE
        if streak & 7 or (streak < BUDGET and clock() < deadline):
            poll = pollers.get(fd) or poller(fd)
            if poll(0):
                streak += 1
                return
            if spin:
                until = clock() + spin
                while clock() < until:
                    if poll(0):
                        streak += 1
                        return
        streak = 0
        await wait(fd)

    return wait_readable


def make_eager_wait(wait: WaitReadable, words: Sequence[int], came: Callable[[], object]) -> WaitReadable:
    """A `wait_readable` for a shim that receives without waiting: it returns at once where that may bring something.

    The shim spins, and gives others their turn after a batch, by itself; it says in `words` that it is `READY` for
    more. `came` is called when a request has come that had to be waited for.
    """
    deadline = 0.0
    clock = time.perf_counter

    async def wait_readable(fd: int) -> None:
        nonlocal deadline
        if words[READY] and clock() < deadline:
            return
        await wait(fd)
        came()
        deadline = clock() + SLICE

    return wait_readable


def hooked_trio(spin: float = 0.0, replaced_wait: WaitReadable | None = None) -> ModuleType:
    """A copy of the trio module with the two primitives replaced."""
    copy, lowlevel = ModuleType("trio"), ModuleType("trio.lowlevel")
    copy.__dict__.update(trio.__dict__)
    lowlevel.__dict__.update(trio.lowlevel.__dict__)
    own = replaced_wait or make_wait_readable(trio.lowlevel.wait_readable, spin)
    replaced: dict[str, Any] = {"wait_readable": own}
    lowlevel.__dict__.update(replaced)
    copy.__dict__.update(lowlevel=lowlevel, Lock=HandOverLock)
    return copy


def why_not(pyfuse3: ModuleType) -> str | None:
    """The reason why the fast loop cannot be used with this pyfuse3 and trio, or None."""
    first, behind = KNOWN_VERSIONS
    text = str(getattr(pyfuse3, "__version__", "unknown"))
    numbers = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if not first <= numbers < behind:
        return f"pyfuse3 {text} is not one of the known releases"
    if getattr(pyfuse3, "trio", None) is not trio:
        return "pyfuse3 does not reach trio by its attribute `trio`"
    needed = ("Abort", "current_task", "reschedule", "wait_readable", "wait_task_rescheduled")
    missing = [name for name in needed if not hasattr(trio.lowlevel, name)]
    return f"trio {trio.__version__} lacks {', '.join(missing)}" if missing else None


async def behaves(module: ModuleType) -> bool:
    """Whether lock and `wait_readable` of a hooked trio work.

    What is free or ready is had at once, what is not is waited for, and whoever waits is woken.
    """
    lock: HandOverLock = module.Lock()
    reader, writer = os.pipe()
    order: list[str] = []

    async def second() -> None:
        order.append("second waits")
        async with lock:
            order.append("second has it")
            await module.lowlevel.wait_readable(reader)
            order.append("second is woken")

    try:
        with trio.move_on_after(1.0):
            async with trio.open_nursery() as nursery:
                async with lock:
                    nursery.start_soon(second)
                    await trio.lowlevel.checkpoint()
                    await trio.lowlevel.checkpoint()
                    order.append("first leaves")
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                order.append("first writes")
                os.write(writer, b"x")
            await module.lowlevel.wait_readable(reader)
            order.append("ready at once")
    finally:
        trio.lowlevel.notify_closing(reader)
        os.close(reader)
        os.close(writer)
    return order == [
        "second waits",
        "first leaves",
        "second has it",
        "first writes",
        "second is woken",
        "ready at once",
    ]


class FastLoop:
    """The replacement, installed in a pyfuse3 module for as long as the context lasts.

    `reason` tells why it was not: the stock loop serves as well, at five times the CPU.
    """

    def __init__(self, pyfuse3: ModuleType, spin: float = 0.0, wait: WaitReadable | None = None) -> None:
        self._pyfuse3: Any = pyfuse3
        self._spin = spin
        self._wait = wait
        self.reason: str | None = None

    async def __aenter__(self) -> FastLoop:
        self.reason = why_not(self._pyfuse3)
        if self.reason is None:
            module = hooked_trio(self._spin)
            if await behaves(module):
                # A new one: the poller of the pipe that was tried must not live on under a reused number.
                self._pyfuse3.trio = hooked_trio(self._spin, self._wait)
            else:
                self.reason = f"trio {trio.__version__} behaves differently"
        if self.reason is not None:
            log.warning("the stock loop is used, which is slower: %s", self.reason)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.reason is None:
            self._pyfuse3.trio = trio
