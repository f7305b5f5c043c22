"""From a `struct page` to the page frame that it stands for.

The structures of all frames stand in one array (SPARSEMEM_VMEMMAP). Where it begins is told by VMCOREINFO
(SYMBOL(vmemmap), arm64 and riscv64 from 6.2 on) or a variable (x86-64); where neither does it follows from any page
that is both in the page cache and mapped: the tree of the file names its structure, the page tables its frame.

Sources: Linux include/asm-generic/memory_model.h, arch/x86/include/asm/pgtable_64_types.h (vmemmap_base),
kernel/crash_core.c and kernel/vmcore_info.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from engine.errors import FaultError, NotFoundError
from engine.memory import Addresses
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.mappings import file_mappings
from engine.oslayers.linux.objects import Mask
from engine.oslayers.linux.tasks import Tasks
from engine.oslayers.linux.walks import xarray
from engine.records import dataclass

VOTES = 3
"""Pages that must agree on where the array begins: pages that were copied on write contradict."""
PROCESSES, PAGES = 64, 256
"""How many processes are asked, and pages of each."""
_LEARNT = "vmemmap"


@dataclass(frozen=True, slots=True)
class PageFrames:
    """The array of page structures."""

    base: int
    """Where the structure of frame 0 would stand: often far below what is mapped."""
    size: int
    """Bytes of one structure."""
    page_bits: int

    def physical(self, pages: Addresses) -> tuple[Addresses, Mask]:
        """The physical address of each structure's frame, and which of them can be structures of the array."""
        distance = pages - np.uint64(self.base)
        return (distance // np.uint64(self.size)) << np.uint64(self.page_bits), (pages >= np.uint64(self.base)) & (
            distance % np.uint64(self.size) == 0
        )


def page_frames(kernel: Kernel) -> PageFrames:
    """The array of a kernel's page structures. Raises NotFoundError where nothing tells where it stands."""
    size, page_bits = kernel.types.require("page").size, kernel.found.candidate.user.page_bits
    base = kernel.found.vmcoreinfo.symbol(_LEARNT) or _told_by_variable(kernel) or kernel.profile.known(_LEARNT)
    if base is None:
        base = found_by_mapped_pages(kernel, size)
        if base is None:
            raise NotFoundError("nothing in this memory tells where the kernel's array of page structures stands")
        kernel.profile.learn(_LEARNT, base)
    return PageFrames(base, size, page_bits)


def _told_by_variable(kernel: Kernel) -> int | None:
    address = kernel.profile.symbol("vmemmap_base")
    if address is None:
        return None
    try:
        return kernel.found.memory.u64(address) or None
    except FaultError:
        return None


def found_by_mapped_pages(kernel: Kernel, size: int) -> int | None:
    """Where the array begins, by pages of files that processes have mapped; None where too few agree."""
    page_bits = kernel.found.candidate.user.page_bits
    votes: Counter[int] = Counter()
    for structure, physical in _mapped_pages(kernel):
        votes[structure - (physical >> page_bits) * size] += 1
        base, count = votes.most_common(1)[0]
        if count >= VOTES and 2 * count > votes.total():
            return base
    return None


def _mapped_pages(kernel: Kernel) -> Iterator[tuple[int, int]]:
    """(address of the page structure, physical address) of pages of files as processes have them mapped."""
    objects = kernel.objects()
    tasks = Tasks(kernel.profile, objects)
    spaces = objects.struct("address_space")["i_pages"]
    page_bits = kernel.found.candidate.user.page_bits
    for mm, pgd in _address_spaces(kernel, tasks):
        try:
            memory = kernel.space_of(pgd)
            found = list(file_mappings(kernel, objects, mm))
        except (FaultError, NotFoundError):
            continue
        budget = PAGES
        for mapping in found:
            first, count = mapping.offset >> page_bits, min(mapping.size >> page_bits, budget)
            budget -= count
            if count <= 0:
                break
            structures = dict(_small_pages(xarray(
                objects.silent(), mapping.space + spaces.offset, first=first, last=first + count - 1)))  # fmt: skip
            indices = sorted(index for index in structures if first <= index < first + count)
            physical, faults = memory.virt_to_phys_many([mapping.start + (i - first << page_bits) for i in indices])
            absent = set(faults.rows.tolist())
            for row, index in enumerate(indices):
                if row not in absent:
                    yield structures[index], int(physical[row])


def _small_pages(entries: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    return ((index, entry) for index, entry, count in entries if count == 1 and not entry & 3)


def _address_spaces(kernel: Kernel, tasks: Tasks) -> Iterator[tuple[int, int]]:
    """(mm, address of the top page table) of the first processes."""
    objects = kernel.objects()
    member = objects.struct("mm_struct")["pgd"]
    asked = 0
    for address in tasks.addresses(objects):
        try:
            mm = objects.pointer(address + tasks.task["mm"].offset)
            pgd = objects.pointer(mm + member.offset) if objects.is_pointer(mm) else 0
        except FaultError:
            continue
        if pgd:
            yield mm, pgd
            asked += 1
        if asked == PROCESSES:
            return
