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
CLOCK_FAST, CLOCK_SLACK = 8, 10.0
"""A clock may go on so many times faster than ours, and so many seconds more: what is emulated may hurry."""
GONE_SHARE, GONE_MOST = 2, 3.0
"""The same of a kernel that is gone: the next one may come at any moment."""
LOOK_EACH = 0.25
"""Seconds between two looks."""
BIOS_TICKS = 0x46C
BIOS_MACHINES = ("x86_64", "i686")


class Doubt(enum.Enum):
    """Why a kernel that is in memory may not be the one that runs."""

    STANDS = "its clock stands, or went back"
    RESET = "no processor is in it"
    FIRMWARE = "the machine's firmware runs"


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
        self._seen: Clock | None = None
        """The clock as it was when it went on last."""
        self._ticks = self._bios_ticks()
        self._was_reset = False
        """Whether the BIOS has counted since the clock went on last."""
        self.state: str | None = kernel.base.hints.state
        """Whether the machine runs, as QEMU words it; None where nobody knows."""
        self._moved = time.monotonic()
        self._searched, self._took = 0.0, 0.0
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
        if clock is not None and self._goes_on(clock, now):
            if self._seen is not None:
                self.state = RUNNING
            self._seen, self._moved, self._ticks, self._was_reset = clock, now, ticks, False
            self._failures, self._took, self._ask_again = 0, 0.0, 0.0
            return None
        stands = clock is None or clock == self._seen
        if ticks != self._ticks:
            self._ticks, self._was_reset = ticks, self._seen is not None  # without a clock nothing would end that
            return Doubt.FIRMWARE if self._was_reset else Doubt.STANDS
        if not self._was_reset and stands and (self._seen is None or now - self._moved <= STILL):
            return None
        told = self._asked(now, at_once=self._was_reset)
        self.state = None if told is None else told.state
        inside = None if told is None else is_inside(self._kernel.found, told.registers)
        if inside:
            if not stands:
                self.believe()
            return None
        if told is not None and inside is False and are_off(told.registers):
            return Doubt.FIRMWARE
        if self._was_reset or (inside is False and self.state == RUNNING):
            return Doubt.RESET
        return Doubt.STANDS

    def _goes_on(self, clock: Clock, now: float) -> bool:
        """Whether that is the clock which was seen last, and goes on: by what has passed, or from the same beginning.

        Where another kernel has taken its place in memory anything may stand there.
        """
        seen = self._seen
        if seen is None:
            return True
        passed = clock.uptime - seen.uptime
        most = CLOCK_FAST * (now - self._moved) + CLOCK_SLACK
        return passed > 0 and (passed <= most * 1e9 or abs(clock.boot - seen.boot) < CLOCK_SLACK * 1e9)

    def believe(self) -> None:
        """Take its clock for right, wherever it has been set."""
        clock = self._clock()
        if clock is not None and clock != self._seen:
            self._seen, self._moved = clock, time.monotonic()

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

    def is_search_due(self, *, gone: bool) -> bool:
        """Whether the last search lies long enough behind: where this kernel is gone, it is soon repeated."""
        share = GONE_SHARE if gone else SEARCH_SHARE * (1 << min(max(self._failures - 1, 0), 10))
        most = GONE_MOST if gone else PAUSE_MOST
        return time.monotonic() >= self._searched + min(share * self._took, most)

    def searched(self, took: float, *, gone: bool) -> None:
        """Note that a search found no other kernel."""
        self._failures += not gone
        self._searched, self._took = time.monotonic(), took
        if not gone:
            self.believe()


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
    """(physical address, word) of what no kernel changes of its own that runs: to be looked at after each read.

    One word, since that is looked at so often: the idle task's canary, else its link to the first process.
    """
    head = kernel.profile.symbol("init_task")
    try:
        task = kernel.objects().struct("task_struct")
        member = task.get("stack_canary") or task["tasks"]
        if head is None or kernel.profile.word != 8:
            return []
        place = kernel.found.memory.virt_to_phys(head + member.offset)
        return [(place, kernel.found.physical.u64(place))]
    except (NotFoundError, FaultError):
        return []


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
        self._calm = False
        """Whether a search is being made for which nobody has to wait."""
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
        """Recognise anew where another kernel runs. Raises NotRecognisedError where none is there.

        Nobody waits for a search that another thread makes where a clock stands, and nothing else speaks against it.
        """
        if not self._lock.acquire(blocking=not self._calm):
            return
        try:
            self._look_again = 0.0  # and so it stays where this raises
            self._look(self._running)
            self._look_again = time.monotonic() + LOOK_EACH
        finally:
            self._calm = False
            self._lock.release()

    def _look(self, running: Running) -> None:
        gone = not running.is_same()
        doubt = None if gone else running.doubt()
        if doubt is Doubt.FIRMWARE:  # no kernel runs that could be found
            self._problem = "the machine is being restarted: its firmware runs"
            raise NotRecognisedError(self._problem)
        if not gone and doubt is None:
            return
        if running.is_search_due(gone=gone or doubt is Doubt.RESET):
            self._calm = doubt is Doubt.STANDS
            self._search(running, gone, doubt)
        elif gone or doubt is Doubt.RESET:
            raise NotRecognisedError(self._problem)

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

