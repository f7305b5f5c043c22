"""Whether the kernel that was understood is the one that runs: a guest may be started anew under an open layer.

Two things tell. What each boot draws or makes for itself (the canary of the idle task, where the first process lies
and when it began) changes as soon as another kernel takes that memory. But with KASLR the next kernel lies elsewhere,
and the image of the last may stay whole for hours, page tables and all: that one is told by its clock, which stands.
A clock may stand in a guest that is paused, too, so it is but a reason to search memory for a kernel anew.

Sources: Linux arch/*/include/asm/stackprotector.h (boot_init_stack_canary), init/init_task.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable

from engine.errors import EngineError, FaultError, NotFoundError, NotRecognisedError
from engine.oslayers.linux.clock import Clock, Timekeeper
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.kernel import Kernel

STILL = 1.5
"""Seconds after which a clock that stands is a reason to search. An idle kernel sleeps for less, mostly (NO_HZ)."""
SEARCH_SHARE = 20
"""A search that found nothing new is repeated after so many times what it took, and twice as long each time."""
PAUSE_MOST = 60.0
"""But no later than after so many seconds."""
LOOK_EACH = 0.25
"""Seconds between two looks."""


class Running:
    """One kernel, kept in sight. Not safe for several threads at a time: `Watch` is."""

    def __init__(self, kernel: Kernel, clock: Callable[[], Clock | None]) -> None:
        self._kernel = kernel
        self._clock = clock
        self._identity = identity_of(kernel)
        self._uptime = -1
        self._moved = time.monotonic()
        self._search_again = 0.0
        self._failures = 0

    def is_same(self) -> bool:
        """Whether memory holds this boot's kernel still, be it that it runs or not."""
        return not self._kernel.replaced and identity_of(self._kernel) == self._identity

    def is_doubtful(self) -> bool:
        """Whether its clock stands, or went back."""
        clock, now = self._clock(), time.monotonic()
        if clock is None:
            return False
        if clock.uptime > self._uptime:
            self._uptime, self._moved, self._failures, self._search_again = clock.uptime, now, 0, 0.0
            return False
        return clock.uptime < self._uptime or now - self._moved > STILL

    @property
    def stands(self) -> float:
        """Seconds since its clock was seen to go on."""
        return time.monotonic() - self._moved

    def is_search_due(self) -> bool:
        """Whether the last search lies long enough behind."""
        return time.monotonic() >= self._search_again

    def searched(self, took: float, *, gone: bool) -> None:
        """Note that a search found no other kernel: where this one is gone, it is soon repeated."""
        pause = 2 * took if gone else min(SEARCH_SHARE * took * (1 << min(self._failures, 10)), PAUSE_MOST)
        self._failures += not gone
        self._search_again = time.monotonic() + pause


def identity_of(kernel: Kernel) -> Hashable:
    """What tells this boot from any other; None where its memory holds this kernel no more.

    Raises TargetGoneError and its kin, but never FaultError.
    """
    memory, found = kernel.found.memory, kernel.found
    try:
        top, names = found.vmcoreinfo.symbol("swapper_pg_dir"), found.vmcoreinfo.symbol("init_uts_ns")
        if top is not None and memory.virt_to_phys(top) != found.candidate.dtb:
            return None
        if names is not None and b"Linux\0" not in memory.read_padded(names, 512):
            return None
        return found.candidate.dtb, *_of_tasks(kernel)
    except FaultError:
        return None


def _of_tasks(kernel: Kernel) -> tuple[int, ...]:
    """The idle task's canary, the first process's address and start; what is not known is left out."""
    head = kernel.profile.symbol("init_task")
    if head is None:
        return ()
    try:
        objects = kernel.objects()
        task = objects.struct("task_struct")
        link = task["tasks"].offset
    except NotFoundError:
        return ()
    first = objects.pointer(head + link) - link
    told = [first]
    canary, start = task.get("stack_canary"), task.get("start_boottime", "real_start_time")
    if canary is not None:
        told.append(objects.value(head, canary))
    if start is not None:
        told.append(objects.value(first, start))
    return tuple(told)


def _now(kernel: Kernel) -> int:
    try:
        clock = Timekeeper(kernel).read()
    except (EngineError, FaultError):
        return -1
    return -1 if clock is None else clock.now


def is_up(kernel: Kernel) -> bool:
    """Whether it has come so far in its start as to have a first process, and RAM laid out: sooner it tells half."""
    head = kernel.profile.symbol("init_task")
    if head is None or kernel.profile.symbol("iomem_resource") is None:
        return True  # this one never tells
    if any(note.startswith("the layout of RAM is a guess") for note in kernel.profile.notes):
        return False
    try:
        objects = kernel.objects()
        task = objects.struct("task_struct")
        link = task["tasks"].offset
        return objects.value(objects.pointer(head + link) - link, task["pid"]) == 1
    except NotFoundError:
        return True
    except FaultError:
        return False


def latest(found: Found, proved: Iterable[Found], understood: Callable[[Found], Kernel]) -> Found:
    """Of kernels that all prove themselves in live memory the one that runs: its clock is farthest on.

    What is left of a kernel that ran before stands still since.
    """
    rest = [one for one in proved if one.candidate.dtb != found.candidate.dtb]
    return max((understood(one) for one in (found, *rest)), key=_now).found if rest else found


class Watch:
    """Looks after the kernel of one layer, and has it recognised anew. Safe for concurrent readers."""

    def __init__(self, running: Running, renew: Callable[[bool], Running | None]) -> None:
        """`renew(gone)` recognises: it gives None where no other kernel is there; it may raise where this is gone."""
        self._running = running
        self._renew = renew
        self._lock = threading.Lock()
        self._look_again = 0.0
        self._problem = "the machine is being restarted"

    @property
    def is_due(self) -> bool:
        """Whether `look_seldom` would look now, which may take as long as a search of memory."""
        return time.monotonic() >= self._look_again

    @property
    def stands(self) -> float:
        """Seconds since the kernel's clock was seen to go on."""
        return self._running.stands

    def look_seldom(self) -> None:
        """`look`, if nobody has just done so."""
        if self.is_due:
            self.look()

    def look(self) -> None:
        """Recognise anew where another kernel runs. Raises NotRecognisedError where none is there."""
        with self._lock:
            self._look_again = 0.0  # and so it stays where this raises
            running = self._running
            gone = not running.is_same()
            if gone or running.is_doubtful():
                if running.is_search_due():
                    self._search(running, gone)
                elif gone:
                    raise NotRecognisedError(self._problem)
            self._look_again = time.monotonic() + LOOK_EACH

    def _search(self, running: Running, gone: bool) -> None:
        began = time.monotonic()
        try:
            fresh = self._renew(gone)
        except NotRecognisedError as error:
            self._problem = str(error)
            running.searched(time.monotonic() - began, gone=True)
            raise
        if fresh is None:
            running.searched(time.monotonic() - began, gone=False)
        else:
            self._running = fresh

    def is_same(self) -> bool:
        """Whether memory still holds the kernel that was looked at last."""
        return self._running.is_same()

