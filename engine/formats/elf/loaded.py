"""Which images a loader has mapped into an address space: from its regions and the ELF headers in its memory.

An image is recognised by what makes it one: private mappings of one file, at the places and with the file offsets
that its program headers ask for. A library that someone merely maps to look into it is therefore none, and data
files are none.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from engine.errors import BadDataError, FaultError
from engine.formats.elf.reader import ElfImage
from engine.formats.elf.records import ET_DYN, ET_EXEC, MAGIC, Segment, parse_header, segment_size
from engine.formats.elf.view import HEAD_SIZE, page_ceiling, page_floor
from engine.memory import Memory
from engine.records import dataclass
from engine.types import Region, Rights

VDSO = "[vdso]"
HEADERS_LIMIT = 65536
"""Bytes of program headers; Linux refuses more (load_elf_phdrs in fs/binfmt_elf.c, 6.1)."""
LOAD_LIMIT = 64
WALK_LIMIT = 200_000
"""Regions looked at in one listing: more than any process has, even where many images span them."""
IMAGES_LIMIT = 4096
"""Images in one listing. A process may map one page of a made-up file as often as it has mappings."""
_GATHER_ROWS = 256


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One image in an address space."""

    base: int
    """Address of its ELF header."""
    size: int
    """Bytes from the base to the last page that is mapped of it, that of .bss included."""
    region: Region
    """The region that begins with the header; `path`, `device` and `inode` are those of the file."""
    head: bytes = b""
    """The first bytes of its memory, empty where they were not read."""
    segments_at: int | None = None
    """Where its program headers lie, counted from the base, if not where the header says."""
    architecture: str | None = None
    build_id: str | None = None

    @property
    def stop(self) -> int:
        """First address behind the image."""
        return self.base + self.size


_Key = tuple[tuple[int, int], int, str]


def _key(region: Region) -> _Key:
    return region.device, region.inode, region.path


class _RegionMap:
    """Regions by address."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = regions
        self._starts = [region.start for region in regions]
        self.walked = 0

    def at(self, address: int) -> Region | None:
        index = bisect.bisect_right(self._starts, address) - 1
        return self.regions[index] if index >= 0 and address < self.regions[index].stop else None

    def from_address(self, address: int) -> Iterator[Region]:
        """The regions from `address` on, without gaps between them."""
        region = self.at(address)
        while region is not None and self.walked < WALK_LIMIT:
            self.walked += 1
            yield region
            region = self.at(region.stop)


def _may_begin_image(regions: Sequence[Region]) -> Iterator[Region]:
    """The regions that may hold an ELF header: the first of each run of private mappings of one file."""
    previous: _Key | None = None
    for region in regions:
        if region.path == VDSO:
            yield region
        if not region.inode or not region.path.startswith("/"):
            continue
        key = _key(region)
        if (region.offset == 0 or key != previous) and not region.shared and region.rights & Rights.READ:
            yield region
        previous = key


def _heads(memory: Memory, candidates: Sequence[Region]) -> Iterator[tuple[Region, bytes]]:
    """Each candidate with the first bytes of its memory, empty where they cannot be read."""
    for first in range(0, len(candidates), _GATHER_ROWS):
        part = candidates[first : first + _GATHER_ROWS]
        rows = np.empty((len(part), HEAD_SIZE), np.uint8)
        faults = memory.gather(np.array([region.start for region in part], np.uint64), rows)
        failed = set(faults.rows.tolist())
        for number, region in enumerate(part):
            yield region, b"" if number in failed else rows[number].tobytes()


def loaded_images(memory: Memory, regions: Sequence[Region]) -> list[LoadedImage]:
    """The images in an address space, ascending by base; regions ascend too, as /proc/PID/maps gives them.

    Reads 2 KiB of each file's first mapping, in columns, and no more where headers and build-id lie therein.
    Stops at 4096 images: those that lie lowest are given. Raises what `memory` raises but for faults.
    """
    space = _RegionMap(regions)
    found = []
    for region, head in _heads(memory, list(_may_begin_image(regions))):
        if head.startswith(MAGIC):
            image = _image_at(memory, space, region, head)
            if image is not None:
                found.append(image)
                if len(found) == IMAGES_LIMIT:
                    break
    return found


def mapped_images(regions: Sequence[Region]) -> list[LoadedImage]:
    """What can be told from regions alone, where memory may not be read: files mapped with code in them."""
    space = _RegionMap(regions)
    found = []
    for region in _may_begin_image(regions):
        run = list(_run_of(space, region))
        if any(part.rights & Rights.EXECUTE for part in run):
            found.append(LoadedImage(region.start, run[-1].stop - region.start, region))
    return found


def _run_of(space: _RegionMap, first: Region) -> Iterator[Region]:
    """The regions of one file from `first` on that follow one another without a gap, offsets ascending."""
    key, offset = _key(first), first.offset
    for region in space.from_address(first.start):
        if _key(region) != key or region.offset < offset:
            return
        offset = region.offset
        yield region


def _image_at(memory: Memory, space: _RegionMap, region: Region, head: bytes) -> LoadedImage | None:
    """The image whose header begins `region`; None where that is no image, or nobody loaded it."""
    base = region.start
    try:
        header = parse_header(head)
        if header.kind not in (ET_EXEC, ET_DYN):
            return None
        segments_at = _place_of_segments(space, region, header.segments_offset)
        elf = ElfImage(memory.window(base, memory.size - base), base, head, segments_at)
        if header.segment_count * segment_size(header.bits) > HEADERS_LIMIT or len(elf.loads) > LOAD_LIMIT:
            raise BadDataError(base, detail=f"{header.segment_count} program headers")
        stop = _mapped_stop(space, region, elf)
    except FaultError:
        # A header that was overwritten still names a file with code in it.
        return next((image for image in mapped_images(list(_run_of(space, region))) if image.base == base), None)
    if stop is None:
        return None
    return LoadedImage(base, stop - base, region, head, segments_at, header.architecture, elf.build_id())


def _place_of_segments(space: _RegionMap, first: Region, offset: int) -> int | None:
    """Where the program headers lie in memory if not behind the header: tools that edit images move them."""
    if offset < first.size:
        return None
    for region in space.from_address(first.start):
        if _key(region) == _key(first) and 0 <= first.offset + offset - region.offset < region.size:
            return region.start - first.start + first.offset + offset - region.offset
    return None


def _mapped_stop(space: _RegionMap, first: Region, elf: ElfImage) -> int | None:
    """First address behind what is mapped of the image; None where its segments are not where they belong.

    A segment may have been replaced by other memory (code copied to huge pages); then at least two others
    must lie in mappings of their own.
    """
    stop, replaced = 0, False
    confirmed: set[int] = set()
    for segment in elf.loads:
        start = first.start + page_floor(segment.address) - elf.link_base
        region = space.at(start)
        if region is None:
            return None
        if segment.file_size and _key(region) == _key(first):
            if region.offset + start - region.start != first.offset + page_floor(segment.offset):
                return None
            confirmed.add(region.start)
        elif segment.file_size:
            replaced = True
        stop = max(stop, _stop_of_segment(space, first, elf, segment))
    return stop if confirmed and (not replaced or len(confirmed) > 1) else None


def _stop_of_segment(space: _RegionMap, first: Region, elf: ElfImage, segment: Segment) -> int:
    start = first.start + page_floor(segment.address) - elf.link_base
    limit = first.start + page_ceiling(segment.stop) - elf.link_base
    stop = start
    for region in space.from_address(start):
        if region.inode and _key(region) != _key(first):
            break
        stop = min(region.stop, limit)
        if stop == limit:
            break
    return max(stop, start)

