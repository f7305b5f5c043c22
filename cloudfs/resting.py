"""What the daemon gives back once nobody has asked it for anything for a while.

A walk over everything leaves up to 100,000 nodes behind, for the kernel forgets nothing while memory is free, and
heaps that do not shrink by themselves. So after some seconds without a request the kernel is asked to forget the
directories that were used least recently, and what the heaps then have no use for goes back to the system.

There is no clock in it: the watchdog tells when it falls asleep, and only where there is something to give back a
task waits once, for the rest of those seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
from collections.abc import Callable

import trio

from cloudfs.operations import TreeOperations
from cloudfs.watchdog import Watchdog

M_ARENA_MAX, ARENAS = -8, 2
"""mallopt(3): heaps that glibc makes for threads, 8 for each CPU otherwise. Python's threads take turns anyway."""
GROWN = 4 << 20
"""Bytes of resident memory, more than after the last rest, from which on a rest is worth its 10 to 50 ms of CPU."""
LOOK = 0.25
"""Seconds between two looks at whether the kernel still forgets: 100,000 nodes take it about one."""
SETTLED = 4
"""Looks that find no change; a machine that is busy lets it begin late."""
LOOKS = 80
"""At the most."""


class Rest:
    """Gives memory back whenever `fell_idle` was called and nothing was asked for `after` seconds since."""

    def __init__(self, operations: TreeOperations, watchdog: Watchdog, after: float) -> None:
        self.after = after
        self.count = 0
        """Rests so far."""
        self._operations = operations
        self._watchdog = watchdog
        self._idle = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._resident = 0
        # Made before the first request: small things that are made amid many that go hold a whole MiB of them each.
        self._give_back = give_back()
        share_heaps()

    def fell_idle(self) -> None:
        """Nothing was asked for some seconds; called in any thread."""
        token = self._token
        if token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._notice, idempotent=True)

    def _notice(self) -> None:
        self._idle.set()

    async def run(self) -> None:
        """Wait for idle times, until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        self._resident = resident()
        while True:
            await self._idle.wait()
            self._idle = trio.Event()
            if self._worth_while():
                await trio.sleep(self.after)
                if self._watchdog.asleep and not self._idle.is_set():  # else it tells when it falls asleep, or has told
                    await self._rest()

    def _worth_while(self) -> bool:
        return self._operations.inodes.above_rest or resident() > self._resident + GROWN

    async def _rest(self) -> None:
        operations = self._operations
        if operations.inodes.above_rest:
            pruning = operations.pruning
            for ask in (functools.partial(pruning.forget_stale, each=True), pruning.forget_remaining):
                ask()
                await self._settle()
        operations.rest()
        gc.collect()
        self._give_back()
        self._resident = resident()
        self.count += 1

    async def _settle(self) -> None:
        """Wait until the kernel forgets no more, or knows new nodes; what is freed later is not given back."""
        inodes, same = self._operations.inodes, 0
        for _ in range(LOOKS):
            before = len(inodes)
            await trio.sleep(LOOK)
            same = same + 1 if len(inodes) == before else 0
            if same == SETTLED or len(inodes) > before:
                return


def resident() -> int:
    """Bytes of this process that are in memory (proc_pid_statm(5))."""
    descriptor = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(descriptor, 256).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(descriptor)


def share_heaps() -> None:
    """Have the C library make few heaps: what is free in one is of no use to the others. glibc alone has this."""
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(M_ARENA_MAX, ARENAS)


def give_back() -> Callable[[], object]:
    """What gives free memory of the C library's heaps back to the system: malloc_trim(3), which glibc alone has."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda: None) if trim is None else functools.partial(trim, 0)
