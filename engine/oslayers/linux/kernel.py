"""A kernel that was found and understood: what all parts of the layer work with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from engine.errors import FaultError, NotFoundError
from engine.layout import TypeSource
from engine.oslayers.linux.finding import Found
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.profile import Profile
from engine.oslayers.linux.swap import absent_hook
from engine.translate.mmu import Root
from engine.translate.virtual import VirtualMemory


@dataclass(slots=True)
class Kernel:
    """The kernel of one OS layer; shared by its processes."""

    found: Found
    profile: Profile
    live: bool
    skipped: Counter[str] = field(default_factory=Counter)
    """What was left out since it could not be read, by kind."""

    @property
    def types(self) -> TypeSource:
        """The kernel's types. Raises NotFoundError where it carries none."""
        if self.profile.types is None:
            raise NotFoundError("this kernel carries no types (BTF)")
        return self.profile.types

    def objects(self) -> Objects:
        """A reader for one operation; over live memory nothing that it reads outlives it."""
        memory = self.found.memory
        view = memory.cached() if self.live else memory
        return Objects(view, self.types, self.found.candidate.kernel_start, self.skipped)

    def space_of(self, pgd: int) -> VirtualMemory:
        """The user half of the address space whose top table lies at the kernel's address `pgd`.

        Raises FaultError where that is not mapped.
        """
        dtb = self.found.memory.virt_to_phys(pgd)
        root: Root = (self.found.candidate.user, dtb)
        hook = absent_hook(self.found.machine)
        return VirtualMemory(self.found.physical, [root], hook, keep=not self.live)

    def dtb_of(self, pgd: int) -> int | None:
        """The DTB of an address space; None where it cannot be found."""
        try:
            return self.found.memory.virt_to_phys(pgd)
        except FaultError:
            return None
