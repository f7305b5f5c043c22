"""The page cache: what memory holds of a file, read as the file.

An inode's `struct address_space` keeps its pages in an xarray by their number in the file. An entry is a page, or the
first page of a large folio that stands for several (5.17 on in one entry and its siblings, before in one for each
page); or a value, which is the trace of a page that was evicted, or, of a file that lies in memory alone, the place
in swap where its page went. Each page is believed only if it names this file and its number in it.

What is not cached of a file on a disk is a hole: nobody knows it here. Of a file in memory alone (tmpfs, ramfs, memfd,
shared memory, hugetlbfs) it is zeros: it was never written. Files of DAX have no page cache: nothing of them is known.

Sources: Linux include/linux/{pagemap,xarray,mm_types,page-flags}.h, mm/{filemap,shmem}.c, fs/hugetlbfs/inode.c;
releases 5.10 to 7.x.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError, FaultKind, NotFoundError, PagedOutError
from engine.layout import Field
from engine.memory import Addresses, Memory, Rows, fault
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Mask, Objects
from engine.oslayers.linux.page_frames import PageFrames, page_frames
from engine.oslayers.linux.paths import BLOCK, FILE_TYPE, REGULAR, Paths
from engine.oslayers.linux.swap import CACHE_OFFSET_BITS
from engine.oslayers.linux.swap_cache import swap_cache_of
from engine.oslayers.linux.walks import xarray
from engine.records import dataclass
from engine.types import Extent

IN_MEMORY = frozenset(("tmpfs", "devtmpfs", "ramfs", "rootfs", "shm", "hugetlbfs"))
"""File systems whose files lie in memory alone (names of fs/ramfs/inode.c, init/do_mounts.c, mm/shmem.c)."""
BATCH_PAGES = 1024
"""Pages that are looked up at a time."""
FOLIO_PAGES = 1 << 19
"""More pages than a folio of the page cache has: 2^18 of 4 KiB, where hugetlbfs has pages of 1 GiB."""
HUGE_BITS = 36
"""More than log2 of any huge page (16 GiB on some architectures)."""
SIZE_LIMIT = 1 << 63
ZERO = 255
"""Among kinds of faults: a page that was never written, which reads as zeros."""
_Kinds = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Shape:
    """Where the members lie that a file's pages are found by."""

    host: Field
    pages: Field
    size: Field
    owner: Field
    index: Field
    flags: Field
    up_to_date: int | None
    """The flag that says that a page has been read or written whole (PG_uptodate); None where it is not known."""

    @property
    def span(self) -> int:
        """Bytes of a page's structure that are read of it."""
        return max(self.owner.stop, self.index.stop, self.flags.stop)

    @classmethod
    def of(cls, objects: Objects) -> _Shape:
        """Raises NotFoundError where the kernel's types lack what this needs."""
        space, folio = objects.struct("address_space"), objects.struct("folio", "page")
        bit = (objects.types.enum("pageflags") or {}).get("PG_uptodate")
        return cls(
            space["host"], space["i_pages"], objects.struct("inode")["i_size"], folio["mapping"],
            folio.first("index", "__folio_index"), folio.first("flags.f", "flags"), None if bit is None else 1 << bit,
        )  # fmt: skip


class CachedPages(Memory):
    """The cached pages of one file, whole: the last one reaches beyond the file's end. Safe for concurrent readers."""

    def __init__(self, kernel: Kernel, mapping: int, file_system: str = "", shape: _Shape | None = None) -> None:
        """`mapping` is the address of a `struct address_space`, `file_system` the type of the one it is in.

        Raises NotFoundError where the kernel's types lack what this needs, FaultError where it cannot be read.
        """
        objects = kernel.objects()
        self.kernel = kernel
        self.mapping = mapping
        self.in_memory = file_system in IN_MEMORY
        self._shape = shape or _Shape.of(objects)
        self._frames: PageFrames = page_frames(kernel)
        self.inode = objects.pointer(mapping + self._shape.host.offset)
        self._page_bits = self._frames.page_bits
        if file_system == "hugetlbfs":
            self._page_bits = self._huge_page_bits(objects)
        self.page_size = 1 << self._page_bits
        self._last_size = self._read_size(objects)

    def _huge_page_bits(self, objects: Objects) -> int:
        """Log2 of what the numbers of this file's pages count: before 6.7 huge pages, where each has one entry."""
        entries = xarray(objects, self.mapping + self._shape.pages.offset)
        if next((width for _, _, width in entries), 0) != 1:
            return self._page_bits
        block = objects.pointer(self.inode + objects.struct("inode")["i_sb"].offset)
        bits = objects.value(block, objects.struct("super_block")["s_blocksize_bits"])
        return bits if self._page_bits < bits < HUGE_BITS else self._page_bits

    def _read_size(self, objects: Objects) -> int:
        size = objects.value(self.inode, self._shape.size)
        return size if 0 <= size < SIZE_LIMIT else 0

    @property
    def file_size(self) -> int:
        """Bytes of the file: over live memory as it is now, or as it was last where that cannot be read."""
        if self.kernel.live:
            with contextlib.suppress(FaultError):
                self._last_size = self._read_size(self.kernel.objects())
        return self._last_size

    @property
    def size(self) -> int:
        """Bytes of all pages that the file can have."""
        return (self.file_size + self.page_size - 1) >> self._page_bits << self._page_bits

    @property
    def may_block(self) -> bool:
        """As physical memory."""
        return self.kernel.found.physical.may_block

    def pages(self, first: int, count: int) -> tuple[_Kinds, Addresses]:
        """(kind, physical address) of `count` pages from number `first` on: 0 is there, `ZERO`, or a `FaultKind`.

        Of a page in swap the second is its entry.
        """
        objects, shape = self.kernel.objects(), self._shape
        entries = np.zeros(count, np.uint64)
        for index, entry, width in xarray(
            objects, self.mapping + shape.pages.offset, first=first, last=first + count - 1
        ):
            entries[max(index, first) - first : min(index + width, first + count) - first] = entry
        kinds = np.full(count, ZERO if self.in_memory else FaultKind.ABSENT, np.uint8)
        physical = np.zeros(count, np.uint64)
        if self.in_memory:
            gone = entries & np.uint64(1) == 1
            kinds[gone] = FaultKind.PAGED_OUT
            physical[gone] = entries[gone] >> np.uint64(1)
            self._back_from_swap(objects, np.flatnonzero(gone).tolist(), kinds, physical)
        rows = np.flatnonzero((entries >= np.uint64(objects.kernel_start)) & (entries & np.uint64(3) == 0))
        if len(rows):
            good, fresh, behind = self._believed(objects, entries[rows], rows.astype(np.uint64) + np.uint64(first))
            frames, fitting = self._frames.physical(entries[rows])
            there = good & fitting
            if not there.all():
                objects.skipped["page of the page cache"] += int(np.count_nonzero(~there))
                kinds[rows[~there]] = FaultKind.MALFORMED
            there &= fresh  # of others the bytes are not the file's yet
            kinds[rows[there]] = 0
            physical[rows] = frames + (behind << np.uint64(self._page_bits))
        return kinds, physical

    def _back_from_swap(self, objects: Objects, rows: list[int], kinds: _Kinds, physical: Addresses) -> None:
        """Of pages in swap those that memory has, too: where they lie."""
        cache = swap_cache_of(self.kernel, objects) if rows else None
        if cache is None:
            return
        for row in rows:
            found = cache.page(*_slot(int(physical[row])))
            if found is not None:
                kinds[row], physical[row] = 0, found

    def _believed(self, objects: Objects, entries: Addresses, numbers: Addresses) -> tuple[Mask, Mask, Addresses]:
        """(is a page of this file, holds its bytes, how many pages behind the first one of its folio)."""
        shape = self._shape
        folios, place = np.unique(entries, return_inverse=True)
        heads = np.empty((len(folios), shape.span), np.uint8)
        good = np.ones(len(folios), bool)
        good[objects.memory.gather(folios, heads).rows] = False
        good &= _words(heads, shape.owner, objects) == np.uint64(self.mapping)
        fresh = np.ones(len(folios), bool)
        if shape.up_to_date is not None:
            fresh = _words(heads, shape.flags, objects) & np.uint64(shape.up_to_date) != 0
        behind = numbers - _words(heads, shape.index, objects)[place]
        fitting = good[place] & (behind < np.uint64(FOLIO_PAGES))
        return fitting, fresh[place], np.where(fitting, behind, np.uint64(0))

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        stop = address + len(buffer)
        limit = min(stop, self.size)
        at = address
        while 0 <= at < limit:
            first = at >> self._page_bits
            count = min(BATCH_PAGES, ((limit - 1) >> self._page_bits) - first + 1)
            kinds, physical = self.pages(first, count)
            for row, width in _runs(kinds, physical, self._page_bits):
                until = min(first + row + width << self._page_bits, limit)
                self._read_run(at, buffer[at - address : until - address], int(kinds[row]), int(physical[row]))
                at = until
        if at < stop:
            raise FaultError(at, detail="the file ends before it")

    def _read_run(self, at: int, buffer: memoryview, kind: int, physical: int) -> None:
        """Pages that are all there and follow one another, or are all of one kind."""
        if kind == ZERO:
            buffer[:] = bytes(len(buffer))
            return
        if kind == FaultKind.ABSENT:
            raise FaultError(at, detail="this page of the file is not in the page cache")
        if kind == FaultKind.PAGED_OUT:
            raise PagedOutError(at, detail=self.kernel.swap_areas(self.kernel.objects()).place(*_slot(physical)))
        if kind:
            raise fault(at, FaultKind(kind))
        frame = physical + (at & self.page_size - 1)
        try:
            self.kernel.found.physical.readinto(frame, buffer)
        except FaultError as error:
            raise error.moved(at - frame) from None

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: the pages that are cached."""
        stop = self.size if stop is None else min(stop, self.size)
        if start >= stop:
            return
        objects, bits = self.kernel.objects(), self._page_bits
        begun = until = start
        for index, entry, width in xarray(
            objects, self.mapping + self._shape.pages.offset, first=start >> bits, last=(stop - 1) >> bits
        ):
            if entry & 3 or not objects.is_pointer(entry):
                continue
            low, high = max(index << bits, start), min(index + width << bits, stop)
            if low > until:
                if begun < until:
                    yield Extent(begun, until - begun)
                begun = low
            until = max(until, high)
        if begun < until:
            yield Extent(begun, until - begun)


def _slot(entry: int) -> tuple[int, int]:
    """(area, slot) of an entry of the page cache."""
    return entry >> CACHE_OFFSET_BITS, entry & (1 << CACHE_OFFSET_BITS) - 1


def _words(rows: Rows, member: Field, objects: Objects) -> Addresses:
    """A word of each row."""
    column = np.ascontiguousarray(rows[:, member.offset : member.stop]).view(f"{objects.types.order}u{member.size}")
    return column.reshape(len(rows)).astype(np.uint64)


def _runs(kinds: _Kinds, physical: Addresses, page_bits: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of pages of one kind; those that are there follow one another in physical memory."""
    cuts = kinds[1:] != kinds[:-1]
    cuts |= (kinds[1:] == 0) & (physical[1:] - physical[:-1] != np.uint64(1 << page_bits))
    begins = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(kinds)]
    for begin, stop in pairwise(begins):
        yield begin, stop - begin


class CachedFile(Memory):
    """A file as far as the page cache holds it, from its first byte to its last."""

    def __init__(self, pages: CachedPages) -> None:
        self.pages = pages
        self.page_size = pages.page_size

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.pages.file_size

    @property
    def may_block(self) -> bool:
        """As physical memory."""
        return self.pages.may_block

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`. Raises PagedOutError for what went to swap, TargetGoneError after a restart."""
        size = self.size
        count = max(0, min(len(buffer), size - address)) if address >= 0 else 0
        try:
            self.pages.readinto(address, buffer[:count])
        finally:
            self.pages.kernel.check()
        if count < len(buffer):
            raise FaultError(address + count, detail="the file ends before it")

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        return not self.pages.kernel.is_check_due() and super().readinto_nowait(address, buffer)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        return self.pages.extents(start, self.size if stop is None else min(stop, self.size))


class PageCache:
    """The page cache of a kernel, for one operation on several files."""

    def __init__(self, kernel: Kernel, objects: Objects, paths: Paths | None = None) -> None:
        """Raises NotFoundError where the kernel's types lack what this needs."""
        self.kernel = kernel
        self.objects = objects
        self.paths = paths or Paths(objects)
        self._mapping_of = objects.struct("file")["f_mapping"]
        self._shape = _Shape.of(objects)

    def pages(self, file: int) -> CachedPages:
        """What is cached of the open file whose `struct file` lies at `file`.

        Raises NotFoundError where that has no contents (a pipe, a socket, a directory), FaultError where it cannot
        be read.
        """
        objects, paths = self.objects, self.paths
        if objects.value(paths.inode(file), paths.mode) & FILE_TYPE not in (REGULAR, BLOCK):
            raise NotFoundError("only files and block devices have contents that are cached")
        mapping = objects.pointer(file + self._mapping_of.offset)
        if not objects.is_pointer(mapping):
            raise NotFoundError("the file has no page cache")
        # The inode of the pages: of a file seen through another file system (overlay), or of a device, not its own.
        file_system = paths.file_system(objects.pointer(mapping + self._shape.host.offset))
        return CachedPages(self.kernel, mapping, file_system, self._shape)
