"""/proc/meminfo: what the kernel counts of its memory. A line whose count is not known is left out.

Sources: Linux fs/proc/meminfo.c, include/linux/mmzone.h, mm/page_alloc.c (si_mem_available), mm/vmstat.c, block/bdev.c
(nr_blockdev_pages); releases 5.10 to 7.x.
"""

from __future__ import annotations

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.profile import Profile
from engine.oslayers.linux.walks import ring

NODE_LIMIT = 1024
"""MAX_NUMNODES of any architecture."""
WMARK_LOW = 1
"""enum zone_watermarks."""
_PLAIN = (
    ("Active(anon)", "NR_ACTIVE_ANON"), ("Inactive(anon)", "NR_INACTIVE_ANON"), ("Active(file)", "NR_ACTIVE_FILE"),
    ("Inactive(file)", "NR_INACTIVE_FILE"), ("Unevictable", "NR_UNEVICTABLE"),
)  # fmt: skip
_LATER = (
    ("Dirty", "NR_FILE_DIRTY"), ("Writeback", "NR_WRITEBACK"), ("AnonPages", "NR_ANON_MAPPED"),
    ("Mapped", "NR_FILE_MAPPED"), ("Shmem", "NR_SHMEM"),
)  # fmt: skip


class MemoryCounts:
    """Reads the counts in one operation."""

    def __init__(self, profile: Profile, objects: Objects, page: int) -> None:
        """Raises NotFoundError where the kernel's types or symbols lack what this needs."""
        self.profile = profile
        self.objects = objects
        self.page = page
        self.node_items = objects.types.enum("node_stat_item") or {}
        self.zone_items = objects.types.enum("zone_stat_item") or {}
        self.node_counts, self.zone_counts = profile.require("vm_node_stat"), profile.require("vm_zone_stat")

    def text(self) -> str:
        """The whole of it."""
        lines = []
        for key, pages in self._lines():
            if pages is not None:
                lines.append(f"{key + ':':<16}{pages * self.page >> 10:8d} kB\n")
        return "".join(lines)

    def _lines(self) -> list[tuple[str, int | None]]:
        free, buffers = self.zone("NR_FREE_PAGES"), self.buffers()
        files, swapped = self.node("NR_FILE_PAGES"), self.node("NR_SWAPCACHE")
        if swapped is None and self.number("total_swap_pages") != 0:  # counted elsewhere before 5.12
            files = None
        cached = None if None in (files, buffers) else max(0, (files or 0) - (swapped or 0) - (buffers or 0))
        reclaimable = self.node("NR_SLAB_RECLAIMABLE_B", "NR_SLAB_RECLAIMABLE")
        fixed = self.node("NR_SLAB_UNRECLAIMABLE_B", "NR_SLAB_UNRECLAIMABLE")
        other = self.node("NR_KERNEL_MISC_RECLAIMABLE")
        active = [self.node(f"NR_{kind}_{of}") for kind in ("ACTIVE", "INACTIVE") for of in ("ANON", "FILE")]
        stacks, tables = (
            (self.node if name in self.node_items else self.zone)(name)  # of each zone before 5.11
            for name in ("NR_KERNEL_STACK_KB", "NR_PAGETABLE")
        )
        return [
            ("MemTotal", self.number("_totalram_pages", "totalram_pages")), ("MemFree", free),
            ("MemAvailable", self.available(free, reclaimable, other)), ("Buffers", buffers), ("Cached", cached),
            ("SwapCached", swapped), ("Active", _sum(active[0], active[1])), ("Inactive", _sum(active[2], active[3])),
            *((key, self.node(name)) for key, name in _PLAIN), ("SwapTotal", self.number("total_swap_pages")),
            ("SwapFree", self.number("nr_swap_pages")), *((key, self.node(name)) for key, name in _LATER),
            ("KReclaimable", _sum(reclaimable, other)), ("Slab", _sum(reclaimable, fixed)),
            ("SReclaimable", reclaimable), ("SUnreclaim", fixed),
            ("KernelStack", None if stacks is None else (stacks << 10) // self.page),
            ("PageTables", tables),
        ]  # fmt: skip

    def number(self, *symbols: str) -> int | None:
        """A count in a variable of one word."""
        address = self.profile.symbol(*symbols)
        try:
            return None if address is None else self._count(address)
        except FaultError:
            return None

    def node(self, *names: str) -> int | None:
        """A count of all nodes, by the first of the names that this kernel has."""
        return self._item(self.node_counts, self.node_items, names)

    def zone(self, *names: str) -> int | None:
        """A count of all zones."""
        return self._item(self.zone_counts, self.zone_items, names)

    def _item(self, start: int, items: dict[str, int], names: tuple[str, ...]) -> int | None:
        index = next((items[name] for name in names if name in items), None)
        try:
            return None if index is None else self._count(start + index * self.objects.word)
        except FaultError:
            return None

    def _count(self, address: int) -> int:
        """A signed word that may for a moment be below zero."""
        value = int.from_bytes(self.objects.memory.read(address, self.objects.word), "little", signed=True)
        return max(0, value)

    def buffers(self) -> int | None:
        """Pages that hold block devices: the files of the file system `bdev`."""
        objects, symbol = self.objects, self.profile.symbol("blockdev_superblock")
        try:
            if symbol is None:
                return None
            block, inode = objects.struct("super_block"), objects.struct("inode")
            head = objects.pointer(symbol) + block["s_inodes"].offset
            total = 0
            for address in ring(objects, head, inode["i_sb_list"], kind="inode list"):
                total += objects.value(address, inode["i_data.nrpages"])
        except (FaultError, NotFoundError):
            return None
        return total

    def available(self, free: int | None, reclaimable: int | None, other: int | None) -> int | None:
        """What programs could have without swapping: all that is free or easily freed, above the low watermarks."""
        reserve, low = self.number("totalreserve_pages"), self._low()
        files = [self.node(name) for name in ("NR_ACTIVE_FILE", "NR_INACTIVE_FILE")]
        if None in (free, reclaimable, reserve, low, *files):
            return None
        cache, easy = sum(count or 0 for count in files), (reclaimable or 0) + (other or 0)
        found = (free or 0) - (reserve or 0) + cache - min(cache // 2, low or 0) + easy - min(easy // 2, low or 0)
        return max(0, found)

    def _low(self) -> int | None:
        """The sum of the zones' low watermarks."""
        objects = self.objects
        try:
            node, zone = objects.struct("pglist_data"), objects.struct("zone")
            zones, low = node["node_zones"], zone[f"_watermark[{WMARK_LOW}]"]
            total = 0
            for address in self._nodes():
                for index in range(zones.type.count):
                    total += objects.value(address + zones.offset + index * zone.size, low)
        except (FaultError, NotFoundError):
            return None
        return total

    def _nodes(self) -> list[int]:
        table, one = self.profile.symbol("node_data"), self.profile.symbol("contig_page_data")
        if table is None:
            return [] if one is None else [one]
        found = []
        for index in range(NODE_LIMIT):
            address = self.objects.pointer(table + index * self.objects.word)
            if not self.objects.is_pointer(address):
                break
            found.append(address)
        return found


def _sum(*counts: int | None) -> int | None:
    return None if None in counts else sum(count or 0 for count in counts)
