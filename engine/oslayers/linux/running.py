"""Whether the kernel that was understood is the one that runs: a guest may be started anew under an open layer.

Four things tell. What each boot draws or makes for itself (the canary of the idle task, where the first process lies
and when it began) changes as soon as another kernel takes that memory. But with KASLR the next kernel lies elsewhere,
and the image of the last may stay whole for hours, page tables and all: that one is told by its clock, which stands.
A clock may stand in a guest that is paused, too, so it is but a reason to search memory for a kernel anew, and to ask
who runs the machine, where he can be asked: whether it runs, and whether any processor is in that kernel. Of a PC its
BIOS tells without being asked: no kernel lets it count its ticks, but it begins to after a reset.

Sources: Linux arch/*/include/asm/stackprotector.h (boot_init_stack_canary), init/init_task.c, 5.10 to 7.x; SeaBIOS
src/clock.c and src/biosvar.h (BDA, the ticks since midnight at 0x46c).
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable, Hashable, Iterable

from engine.errors import EngineError, FaultError, NotFoundError, NotRecognisedError
from engine.machine_states import RUNNING
from engine.oslayers.linux.clock import Clock, Timekeeper
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.searching import are_off, is_inside
from engine.types import TargetHints

STILL = 1.5
"""Seconds after which a clock that stands is a reason to search. An idle kernel sleeps for less, mostly (NO_HZ)."""
SEARCH_SHARE = 20
"""A search that found nothing new is repeated after so many times what it took, and twice as long each time."""
PAUSE_MOST = 60.0
"""But no later than after so many seconds."""
ASK_SHARE, ASK_MOST = 10, 10.0
"""Who runs the machine is asked again after a tenth of the time for which it stands, after so many seconds at most."""
LOOK_EACH = 0.25
"""Seconds between two looks."""
BIOS_TICKS = 0x46C
BIOS_MACHINES = ("x86_64", "i686")


class Doubt(enum.Enum):
    """Why a kernel that is in memory may not be the one that runs."""

    STANDS = "its clock stands, or went back"
    RESET = "no processor is in it"


class Running:
    """One kernel, kept in sight. Not safe for several threads at a time: `Watch` is."""

    def __init__(
        self,
        kernel: Kernel,
        clock: Callable[[], Clock | None],
        ask: Callable[[], TargetHints | None] = lambda: None,
    ) -> None:
        """`ask` gives what is known of the processors now, and whether the machine runs."""
        self._kernel = kernel
        self._clock = clock
        self._ask = ask
        self._identity = identity_of(kernel)
        self._uptime = -1
        self._ticks = self._bios_ticks()
        self.state: str | None = kernel.base.hints.state
        """Whether the machine runs, as QEMU words it; None where nobody knows."""
        self._moved = time.monotonic()
        self._search_again = 0.0
        self._failures = 0
        self._told: TargetHints | None = None
        self._ask_again = 0.0

    def is_same(self) -> bool:
        """Whether memory holds this boot's kernel still, be it that it runs or not."""
        return not self._kernel.replaced and identity_of(self._kernel) == self._identity

    def doubt(self) -> Doubt | None:
        """What speaks against it now; None while its clock goes on, and where a processor is in it that stands still.

        A clock that went back, as when a machine is set back to what was saved of it, is a reason to look once.
        """
        clock, ticks, now = self._clock(), self._bios_ticks(), time.monotonic()
        if clock is not None and clock.uptime > self._uptime:
            first = self._uptime < 0
            self._uptime, self._moved, self._failures, self._search_again = clock.uptime, now, 0, 0.0
            self._ask_again = 0.0
            self._ticks = ticks
            if not first:
                self.state = RUNNING
            return None
        if clock is not None and clock.uptime < self._uptime:
            self._uptime, self._moved = clock.uptime, now
            return Doubt.STANDS
        was_reset = ticks != self._ticks
        if not was_reset and (clock is None or now - self._moved <= STILL):
            return None
        told = self._asked(now, at_once=was_reset)
        self.state = None if told is None else told.state
        inside = None if told is None else is_inside(self._kernel.found, told.registers)
        if inside:
            return None
        if was_reset or (told is not None and inside is False and (self.state == RUNNING or are_off(told.registers))):
            return Doubt.RESET
        return Doubt.STANDS

    def _asked(self, now: float, *, at_once: bool) -> TargetHints | None:
        """What is told of the processors: the longer nothing has moved, the more seldom it is asked."""
        if at_once or now >= self._ask_again:
            self._told = self._ask()
            self._ask_again = now + min((now - self._moved) / ASK_SHARE, ASK_MOST)
        return self._told

    def _bios_ticks(self) -> int | None:
        """The ticks that a PC's BIOS has counted; None of other machines."""
        if self._kernel.found.machine not in BIOS_MACHINES:
            return None
        try:
            return self._kernel.found.physical.u32(BIOS_TICKS)
        except FaultError:
            return None

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


def marks_of(kernel: Kernel) -> list[tuple[int, int]]:
    """(physical address, word) of what no kernel changes of its own that runs: to be looked at after each read."""
    head, found = kernel.profile.symbol("init_task"), []
    try:
        task = kernel.objects().struct("task_struct")
        if head is None or kernel.profile.word != 8:
            return []
        for name in ("tasks", "stack_canary"):
            member = task.get(name)
            if member is not None:
                place = kernel.found.memory.virt_to_phys(head + member.offset)
                found.append((place, kernel.found.physical.u64(place)))
    except (NotFoundError, FaultError):
        return []
    return found


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
            doubt = None if gone else running.doubt()
            if gone or doubt is not None:
                if running.is_search_due():
                    self._search(running, gone, doubt)
                elif gone or doubt is Doubt.RESET:
                    raise NotRecognisedError(self._problem)
            self._look_again = time.monotonic() + LOOK_EACH

    def _search(self, running: Running, gone: bool, doubt: Doubt | None) -> None:
        began = time.monotonic()
        try:
            fresh = self._renew(gone)
            if fresh is None and doubt is Doubt.RESET:
                raise NotRecognisedError("the machine is being restarted: no processor is in its old kernel any more")
        except NotRecognisedError as error:
            self._problem = str(error)
            running.searched(time.monotonic() - began, gone=True)
            raise
        if fresh is None:
            running.searched(time.monotonic() - began, gone=False)
        else:
            self._running = fresh

    @property
    def state(self) -> str | None:
        """Whether the machine runs, as it was known at the last look."""
        return self._running.state

    def is_same(self) -> bool:
        """Whether memory still holds the kernel that was looked at last."""
        return self._running.is_same()

