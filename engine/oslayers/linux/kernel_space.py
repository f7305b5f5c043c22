"""A kernel's memory for those who hold it: over live memory it ends with the kernel.

After a restart the page tables of the old kernel may stay where they were, and lead to what is the new one's by now.
"""

from __future__ import annotations

from engine.memory import Memory
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.spaces import Watched


class KernelSpace(Watched):
    """The memory of a kernel that may be replaced by another: every door may raise TargetGoneError then."""

    def cached(self) -> KernelSpace:
        """See `Memory.cached`."""
        view = KernelSpace(self.physical.cached(), self.roots, self.absent, keep=True)
        view.check, view.is_look_due = self.check, self.is_look_due
        return view


def kernel_space(kernel: Kernel, *, mended: bool = False) -> Memory:
    """The memory of the kernel: where it may be restarted one that is given up then.

    By its page tables alone, holes and all; to read its own objects it may be one in which damaged tables are `mended`.
    """
    memory = kernel.found.memory
    if not kernel.base.live:
        return memory if mended else memory.by_tables
    space = KernelSpace(memory.physical, memory.roots, memory.absent, keep=memory.keep)
    space.check, space.is_look_due = kernel.check, kernel.is_check_due
    return space
