"""The cache of swap: pages whose entries say that they are in swap, while their bytes are in memory, too.

A page comes to stand there when it is written out and not given up yet, and when one of several processes has read it
again. Each area has an array of `struct address_space`, one for 2^14 slots, whose tree has the pages by their slot: by
its number in the area, or, from 6.11 on, in that part of it. A page is believed only if it says itself that it is in
the cache of swap, up to date, and of that very slot.

6.18 keeps this cache in tables of the clusters of an area: not read here, such pages count as paged out.

Sources: Linux mm/swap_state.c, mm/swap.h (swap_address_space, SWAP_ADDRESS_SPACE_SHIFT), include/linux/swapops.h
(swp_entry: type and offset of a swp_entry_t), include/linux/page-flags.h; releases 5.10 to 6.17.
"""

from __future__ import annotations

import numpy as np

from engine.errors import FaultError, NotFoundError
from engine.memory import Addresses
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.page_frames import PageFrames, page_frames
from engine.oslayers.linux.swap import CACHE_OFFSET_BITS, TYPES
from engine.oslayers.linux.walks import xarray_entry

SPACE_BITS = 14
"""SWAP_ADDRESS_SPACE_SHIFT of mm/swap.h."""
FOLIO_PAGES = 1 << 10
"""More pages than a folio in swap has: one of a huge page."""


class SwapCache:
    """The cache of swap, in one operation."""

    def __init__(self, kernel: Kernel, objects: Objects) -> None:
        """Raises NotFoundError where the kernel does not tell what this needs."""
        table = kernel.profile.symbol("swapper_spaces")
        if table is None:
            raise NotFoundError("the kernel's symbols do not tell where swapper_spaces is")
        self.objects = objects
        self._table = table
        space, page = objects.struct("address_space"), objects.struct("folio", "page")
        self._size, self._pages = space.size, space["i_pages"]
        self._flags, self._slot = page.first("flags.f", "flags"), page.first("swap.val", "private")
        numbers = objects.types.enum("pageflags") or {}
        self._wanted = sum(1 << numbers[name] for name in ("PG_uptodate", "PG_swapcache") if name in numbers)
        self._frames: PageFrames = page_frames(kernel)

    def page(self, area: int, offset: int) -> int | None:
        """The physical address of the page with the bytes of a slot; None where it is in swap alone."""
        objects = self.objects
        if not 0 <= area < TYPES:
            return None
        try:
            spaces = objects.pointer(self._table + area * objects.word)
            if not objects.is_pointer(spaces):
                return None
            tree = spaces + (offset >> SPACE_BITS) * self._size + self._pages.offset
            for index in dict.fromkeys((offset, offset & (1 << SPACE_BITS) - 1)):
                found = self._believed(xarray_entry(objects, tree, index), area, offset)
                if found is not None:
                    return found
        except FaultError:
            objects.skipped["cache of swap"] += 1
        return None

    def _believed(self, entry: int, area: int, offset: int) -> int | None:
        objects = self.objects
        if entry & 3 or not objects.is_pointer(entry):
            return None
        if objects.value(entry, self._flags) & self._wanted != self._wanted:
            return None
        behind = (area << CACHE_OFFSET_BITS | offset) - objects.value(entry, self._slot)
        if not 0 <= behind < FOLIO_PAGES:
            return None
        column: Addresses = np.array([entry], np.uint64)
        frames, fitting = self._frames.physical(column)
        return int(frames[0]) + (behind << self._frames.page_bits) if fitting[0] else None


def swap_cache_of(kernel: Kernel, objects: Objects) -> SwapCache | None:
    """The cache of swap; None where the kernel does not tell what that needs."""

    def find() -> SwapCache | None:
        try:
            return SwapCache(kernel, objects.apart())
        except NotFoundError:
            return None

    return objects.once(SwapCache, find)
