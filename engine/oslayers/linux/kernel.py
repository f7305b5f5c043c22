"""A kernel that was found and understood: what all parts of the layer work with."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field

from engine.errors import FaultError, NotFoundError, NotRecognisedError, TargetGoneError
from engine.layout import TypeSource
from engine.memory import Memory
from engine.oslayer import Base
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.profile import Profile
from engine.oslayers.linux.swap import SwapAreas, SwapEntries, absent_hook, entries_of
from engine.oslayers.linux.user_space import UserSpace
from engine.records import dataclass
from engine.translate.mmu import Root


class _Local(threading.local):
    """What belongs to the operation of one thread."""

    skipped: Counter[str] | None = None


@dataclass(slots=True)
class Kernel:
    """The kernel of one OS layer; shared by its processes."""

    found: Found
    profile: Profile
    base: Base
    skipped: Counter[str] = field(default_factory=Counter)
    """What was left out since it could not be read, by kind."""
    retried: Counter[str] = field(default_factory=Counter)
    """What was read again since it had changed meanwhile, by kind."""
    listed: Counter[str] = field(default_factory=Counter)
    """Entries of the lists that were given so far, by kind."""
    boot_time: Callable[[], int | None] = lambda: None
    """When it was started, nanoseconds since 1970 UTC by its own clock; None where that is not known."""
    boot: int = 0
    """How often the machine was restarted before, since the layer was opened."""
    replaced: bool = False
    """Whether it runs no more: the machine was started anew, and what its memory holds is another kernel's."""
    look: Callable[[], None] = lambda: None
    """Asks, not too often, whether it still runs; `replaced` says then. May take a while."""
    look_now: Callable[[], None] = lambda: None
    """The same at once."""
    is_look_due: Callable[[], bool] = lambda: False
    marks: Sequence[tuple[int, int]] = ()
    """(physical address, word): where one of these has changed, another kernel has taken its memory."""
    _kept: Objects | None = None
    _swap: list[SwapEntries | None] = field(default_factory=list)
    _local: _Local = field(default_factory=_Local)

    @property
    def live(self) -> bool:
        """Whether what was read may not be true any more: of an image on disk from when somebody writes to it on."""
        return not self.base.may_cache

    @property
    def types(self) -> TypeSource:
        """The kernel's types. Raises NotFoundError where it carries none."""
        if self.profile.types is None:
            raise NotFoundError("this kernel carries no types (BTF)")
        return self.profile.types

    @property
    def swap_entries(self) -> SwapEntries | None:
        """How page-table entries of absent pages are read; None where that is not known."""
        if not self._swap:
            known = self.profile.symbol
            release = self.found.vmcoreinfo.release_number()
            self._swap.append(entries_of(self.found.machine, release, lambda name: known(name) is not None))
        return self._swap[0]

    def swap_areas(self, objects: Objects) -> SwapAreas:
        """The areas that it swaps to, for one operation."""
        return SwapAreas(objects, self.profile.symbol("swap_info"))

    def knows(self, *structures: str) -> bool:
        """Whether the kernel's types tell of all these structures."""
        types = self.profile.types
        return types is not None and all(types.struct(name) is not None for name in structures)

    def tells(self, path: str) -> bool:
        """Whether the kernel's types tell of a member: `mm_struct.total_vm`."""
        name, _, member = path.partition(".")
        layout = None if self.profile.types is None else self.profile.types.struct(name)
        return layout is not None and member in layout

    def is_check_due(self) -> bool:
        """Whether `check` may take long now."""
        return self.is_look_due() or not self.is_marked()

    def check(self) -> None:
        """Raise TargetGoneError where another kernel runs by now, or none: what was read before was this one's."""
        if not self.live:
            return
        try:
            self.look()
            if not self.replaced and not self.is_marked():
                self.look_now()
        except NotRecognisedError as error:
            raise TargetGoneError(str(error)) from None
        if self.replaced:
            raise TargetGoneError(self._gone)

    def is_marked(self) -> bool:
        """Whether memory still holds what this boot has drawn for itself, as far as a glance tells."""
        physical = self.found.physical
        try:
            return all(physical.u64(place) == word for place, word in self.marks)
        except FaultError:
            return False

    @property
    def _gone(self) -> str:
        return f"the Linux {self.found.release} that ran here has ended: the machine was restarted"

    def objects(self) -> Objects:
        """A reader for one operation; over live memory nothing that it reads outlives it. Else one for all operations.

        Raises TargetGoneError where another kernel runs by now.
        """
        if self.replaced:
            raise TargetGoneError(self._gone)
        memory, own = self.found.memory, self._local.skipped
        if self.live:
            self._kept = None
            return self._reader(memory.cached(), own)
        kept = self._kept or self._reader(memory if memory.keep else memory.cached(), None)
        self._kept = kept
        return kept if own is None else self._reader(kept.memory, own)

    def _reader(self, view: Memory, skipped: Counter[str] | None) -> Objects:
        told = self.skipped if skipped is None else skipped
        return Objects(view, self.types, self.found.candidate.kernel_start, told, self.retried)

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """What is left out within, by this thread, is counted in the counter that this gives, and nowhere else."""
        local, before = self._local, self._local.skipped
        local.skipped = Counter()
        try:
            yield local.skipped
        finally:
            local.skipped = before

    def leave_out(self, skipped: Counter[str]) -> None:
        """Count what was counted apart, and is to be told."""
        own = self._local.skipped
        (self.skipped if own is None else own).update(skipped)

    def space_of(self, pgd: int) -> UserSpace:
        """The user half of the address space whose top table lies at the kernel's address `pgd`.

        Raises FaultError where that is not mapped.
        """
        dtb = self.found.memory.virt_to_phys(pgd)
        root: Root = (self.found.candidate.user, dtb)
        hook = absent_hook(self.swap_entries)
        stop = self.found.candidate.kernel_start
        return UserSpace(self.found.physical, [root], hook, keep=not self.base.live, stop=None if stop >> 32 else stop)

    def dtb_of(self, pgd: int) -> int | None:
        """The DTB of an address space; None where it cannot be found."""
        try:
            return self.found.memory.virt_to_phys(pgd)
        except FaultError:
            return None
