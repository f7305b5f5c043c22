"""`processes/PID/phys_maps`: where a process's pages lie in physical memory."""

from __future__ import annotations

from itertools import islice

from cloudfs.node import Node
from cloudfs.nodes.contexts import ProcessContext, process_entry
from cloudfs.nodes.files.text import TextFile
from cloudfs.render import ModuleNames, physical_maps_lines
from engine.errors import EngineError
from engine.oslayer import PhysicalMaps

LINE_LIMIT = 1 << 20
"""Lines of the file; what hostile page tables hold beyond is said in a last one."""


@process_entry("phys_maps")
def phys_maps(process: ProcessContext) -> Node | None:
    """START-STOP perms PHYSICAL page-size module: its page frames, by its page tables."""
    source = process.capability(PhysicalMaps)
    if source is None:
        return None
    # A walk of all tables takes longer than a listing may: st_size is 0, and a thread does it.
    return TextFile(process, "phys_maps", lambda: _text(process), sized=False, may_block=True)


def _text(process: ProcessContext) -> str:
    source = process.capability(PhysicalMaps)
    if source is None:
        return ""
    try:
        names = ModuleNames(module.info for module in process.modules().values())
    except EngineError:
        names = ModuleNames(())
    maps = iter(source.physical_maps())
    text = "".join(physical_maps_lines(islice(maps, LINE_LIMIT), names))
    return text + "# more follows: cut here\n" if next(maps, None) is not None else text
