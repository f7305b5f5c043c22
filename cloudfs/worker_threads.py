"""Worker threads for what may wait, with a time limit and one small limit of threads per group.

A thread that waits cannot be ended. When its time is up it is abandoned: the caller gets ETIMEDOUT, the
thread goes on to hold its place in the group until it returns. So a target that hangs costs a few
threads, once, and its own requests; nodes of other groups go on.

All methods but the function that is run belong to the trio thread.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import trio

from engine.errors import TargetTimeoutError

T = TypeVar("T")

THREADS_PER_GROUP = 16
WAITING_PER_GROUP = 64
"""Requests of one group that wait for a thread; more are refused, so that they do not use up pyfuse3's tasks."""
THREADS = 512
"""Of all groups together: so many processes that hang are met by nobody's accident."""
SCRATCH_SIZE = 1 << 20
"""The kernel asks for 1 MiB at the most: 256 pages, fs.fuse.max_pages_limit."""
SCRATCHES_KEPT = 8


class _Call(Generic[T]):
    """What came of a function in a thread; the thread and the caller agree on who disposes of its result.

    An error is handed over as well, never raised in the thread: trio would leave it in a cycle with the frames that
    it came through, and all they hold, an open file of a target among it, would wait for the garbage collector.
    """

    __slots__ = ("_error", "_first", "_result")
    _result: T

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._error: BaseException | None = None

    def claim(self, who: str) -> bool:
        """True for whoever comes first; `dict.setdefault` is atomic."""
        return self._first.setdefault("first", who) == who

    def make(self, function: Callable[[], T], discard: Callable[[T], object] | None) -> None:
        """Call it, in the thread; a result that nobody waits for any more is given to `discard`."""
        try:
            self._result = function()
        except BaseException as error:
            self._error = error
            if not self.claim("thread"):
                self._error = None
            return
        if not self.claim("thread") and discard is not None:
            discard(self._result)

    def result(self) -> T:
        """What the function gave; raises what it raised. To be asked once: nothing is kept."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return self._result
        finally:
            del error
            if hasattr(self, "_result"):
                del self._result

    def dispose(self, discard: Callable[[T], object] | None) -> None:
        """Let go of what came: the caller has gone."""
        error, self._error = self._error, None
        if error is None and discard is not None:
            discard(self._result)


def new_scratch(size: int = SCRATCH_SIZE) -> memoryview:
    """A page-aligned buffer of `size` bytes, all of them already touched."""
    buffer = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(buffer)
    view[:: mmap.PAGESIZE] = bytes(len(view[:: mmap.PAGESIZE]))
    return view


class ScratchPool:
    """Buffers for reads in threads; what an abandoned thread still writes to is never given back."""

    def __init__(self) -> None:
        self._free: list[memoryview] = []

    def take(self, size: int) -> memoryview:
        """A buffer of at least `size` bytes."""
        if self._free and size <= SCRATCH_SIZE:
            return self._free.pop()
        return new_scratch(max(size, SCRATCH_SIZE))

    def give(self, scratch: memoryview) -> None:
        """Take a buffer back that no thread writes to; its bytes stay valid until the next `take`."""
        if len(self._free) < SCRATCHES_KEPT and len(scratch) == SCRATCH_SIZE:
            self._free.append(scratch)


class WorkerThreads:
    """Runs functions in threads; `timeout` in seconds, from the request to its result."""

    def __init__(self, timeout: float = 30.0) -> None:
        self.timeout = timeout
        self.abandoned = 0
        """Calls given up so far, whether or not their threads have returned since."""
        self._limiters: dict[Hashable, trio.CapacityLimiter] = {}

    @property
    def busy(self) -> int:
        """Threads that work or hang now."""
        return sum(limiter.borrowed_tokens for limiter in self._limiters.values())

    async def run(
        self,
        group: Hashable,
        function: Callable[[], T],
        what: str,
        discard: Callable[[T], object] | None = None,
    ) -> T:
        """The result of `function`, called in a thread of `group`.

        `what` names it in the error: TargetTimeoutError after `timeout` seconds, or at once where too many
        wait already. A result that comes later is given to `discard`, in the thread.
        """
        limiter = self._limiters.get(group)
        if len(self._limiters) * THREADS_PER_GROUP >= THREADS and self.busy >= THREADS:
            raise TargetTimeoutError(f"{what} was not begun: {THREADS} threads wait for targets already")
        if limiter is None:
            limiter = self._limiters[group] = trio.CapacityLimiter(THREADS_PER_GROUP)
        elif limiter.statistics().tasks_waiting >= WAITING_PER_GROUP:
            raise TargetTimeoutError(f"{what} was not begun: {WAITING_PER_GROUP} requests wait for the same target")
        call = _Call[T]()

        try:
            with trio.fail_after(self.timeout):
                await trio.to_thread.run_sync(call.make, function, discard, abandon_on_cancel=True, limiter=limiter)
            return call.result()
        except trio.TooSlowError:
            if not call.claim("caller"):
                return call.result()
            self.abandoned += 1
            raise TargetTimeoutError(f"{what} did not answer within {self.timeout:g} s") from None
        except trio.Cancelled:
            if not call.claim("caller"):
                call.dispose(discard)
            raise
        finally:
            if not limiter.borrowed_tokens and not limiter.statistics().tasks_waiting:
                self._limiters.pop(group, None)
