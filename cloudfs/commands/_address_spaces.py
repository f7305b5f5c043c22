"""Address spaces that have page tables: what `translate` and `pagetree` work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cloudfs.commands._opening import Opened, process_of
from cloudfs.commands._spaces import space_of
from cloudfs.render import ModuleNames
from engine.errors import UnsupportedError
from engine.translate.virtual import VirtualMemory


@contextmanager
def address_space_of(target: Opened, word: str, *, is_process: bool = False) -> Iterator[tuple[str, VirtualMemory]]:
    """(name, memory) of `kernel` or of a process, as long as the context.

    Raises UnsupportedError where no page tables can be seen: of physical memory, and of this machine's processes.
    """
    with space_of(target, word, is_process=is_process) as space:
        if not isinstance(space.memory, VirtualMemory):
            raise UnsupportedError(
                f"{space.name} shows no page tables: translation wants a machine seen through its physical memory, "
                "an image or a guest"
            )
        yield space.name, space.memory


def modules_of(target: Opened, word: str, *, is_process: bool = False) -> ModuleNames:
    """The modules of `kernel` or of a process, to say what lies at an address."""
    if word == "kernel" and not is_process:
        return ModuleNames(module.info for module in target.layer.modules())
    with process_of(target, word) as process:
        return ModuleNames(module.info for module in process.modules())
