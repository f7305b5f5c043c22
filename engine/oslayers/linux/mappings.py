"""What a process's mappings are of: memory of its own, a file, neither. From its VMAs, without names.

Sources: Linux include/linux/mm.h (flags of VMAs), mm_types.h, fs.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.errors import FaultError
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.vmas import vma_addresses
from engine.oslayers.linux.walks import EVERYWHERE
from engine.records import dataclass

SHARED, UFFD_MISSING, PFNMAP, IO, HUGETLB, MIXEDMAP = 0x8, 0x200, 0x400, 0x4000, 0x40_0000, 0x1000_0000
"""Of vm_flags (include/linux/mm.h; the same in 5.10 to 7.x)."""
_NOT_PAGES = PFNMAP | IO | HUGETLB | MIXEDMAP
"""Mappings whose pages are not those of a file, or are huge ones that are counted otherwise."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """One VMA."""

    start: int
    stop: int
    flags: int
    offset: int
    """In the file, in bytes."""
    file: int
    """The kernel's address of the `struct file`; 0 where it maps none."""
    anonymous: bool
    """Memory of the process's own, which nobody else fills: untouched pages of it are zeros."""
    private: int = 0
    """Of one that the kernel itself made: what it keeps of it (`vm_private_data`)."""

    @property
    def has_file_pages(self) -> bool:
        """Whether its pages are those of a file's page cache, until they are written to."""
        return bool(self.file) and not self.flags & _NOT_PAGES


def mappings_of(kernel: Kernel, objects: Objects, mm: int, within: tuple[int, int] = EVERYWHERE) -> list[Mapping]:
    """The mappings of the mm at `mm`, ascending and disjoint; broken ones are counted and left out.

    Of others than those that hold an address from `within[0]` to `within[1]` some may be missing.

    Raises NotFoundError where the kernel's types lack what this needs.
    """
    vma = objects.struct("vm_area_struct")
    members = [vma["vm_start"], vma["vm_end"], vma.first("vm_flags", "__vm_flags"), vma["vm_pgoff"], vma["vm_file"]]
    members += [vma["vm_ops"], vma["vm_private_data"]]
    column = objects.addresses(vma_addresses(objects, mm, within))
    rows, good = [], np.ones(len(column), bool)
    for member in members:
        values, readable = objects.column(column, member)
        rows.append(values.tolist())
        good &= readable
    bits, last, found = kernel.found.candidate.user.page_bits, 0, []
    for fine, start, stop, flags, offset, file, operations, private in zip(good.tolist(), *rows, strict=True):
        if not fine or not last <= start < stop or (start | stop) & (1 << bits) - 1:
            objects.skipped["VMA"] += 1
            continue
        last = stop
        own = not file and not operations and not flags & (_NOT_PAGES | UFFD_MISSING)
        file = file if objects.is_pointer(file) else 0
        found.append(Mapping(start, stop, flags, offset << bits, file, own, 0 if file or own else private))
    return found


@dataclass(frozen=True, slots=True)
class FileMapping:
    """A mapping of a file, and the file's pages."""

    start: int
    size: int
    offset: int
    space: int
    """The kernel's address of the `struct address_space`."""


def file_mappings(kernel: Kernel, objects: Objects, mm: int) -> Iterator[FileMapping]:
    """The mappings of an mm that are of files, ascending. Raises NotFoundError as `mappings_of`."""
    member = objects.struct("file")["f_mapping"]
    for mapping in mappings_of(kernel, objects, mm):
        if mapping.has_file_pages:
            try:
                space = objects.pointer(mapping.file + member.offset)
            except FaultError:
                continue
            if objects.is_pointer(space):
                yield FileMapping(mapping.start, mapping.stop - mapping.start, mapping.offset, space)
