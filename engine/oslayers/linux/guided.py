"""Finding a kernel by what processors' registers tell, instead of looking through all of memory.

    for text in guided_texts(memory, architecture, registers): …      VMCOREINFO that a kernel's image points to
    for kernel in guided_kernels(memory, architecture, registers): …  found without, in its image alone

A processor's page tables map the image of the kernel that it runs: one linear run, with parts that nobody may write to.
VMCOREINFO lies outside of it, in a page of its own to which the image holds a pointer. Nothing of this is believed:
each kernel proves itself as those do that are found without registers, and must lie where the processor has it.

Sources: Linux kernel/vmcore_info.c (vmcoreinfo_data and vmcoreinfo_note; kernel/crash_core.c before 6.9), arch/x86/
entry/calling.h (PTI_USER_PGTABLE_BIT), arch/arm64/kernel/vmlinux.lds.S (tramp_pg_dir); releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engine.errors import EngineError, FaultError, InvalidArgumentError
from engine.formats.search import chunks
from engine.formats.vmcoreinfo import Vmcoreinfo, vmcoreinfo_at
from engine.memory import Addresses, Faults, Memory, MemoryOver, Rows
from engine.oslayers.linux.architectures import SPLITS, TOP, Candidate, image_region
from engine.oslayers.linux.finding import IMAGE_HOLE, IMAGE_LIMIT, Found
from engine.records import dataclass
from engine.translate.maps import physical_maps
from engine.translate.mmu import Root
from engine.translate.modes import roots_of
from engine.translate.virtual import VirtualMemory
from engine.types import Extent, PhysicalMap, Rights

PAGE = 4096
SPACES_MOST = 16
"""Address spaces that are looked into: processors of one machine share their kernel."""
RUNS_MOST = 1 << 18
"""Mapped runs of one address space that are looked at."""
IMAGES_MOST = 4
"""Of one address space."""
LEAST_IMAGE = 1 << 20
BEHIND = 32 << 20
"""Where all of low memory is one run: an image's data end at the most so far behind what nobody may write to."""
IN_FRONT = 2 << 20
"""On ARM the top table stands in front of the image (arch/arm/kernel/head.S: TEXT_OFFSET; mapped by sections)."""
AT_ONCE = 1 << 20
"""Bytes of an image that are looked through at a time."""
POINTERS_MOST = 1 << 16
"""Pages that an image points to, which are looked at."""
_MACHINES = {"x86-64": "x86_64", "x86": "i686", "aarch64": "aarch64", "arm": "armv7l", "riscv": "riscv64"}
"""How the names of paging modes begin, and whose they are; of those that fit the first."""
_USER_TABLES = 1 << 12
"""x86-64 with PTI: the bit by which the table of user mode lies above the kernel's."""


@dataclass(frozen=True, slots=True)
class Image:
    """A linear run of an address space that may be a kernel's image."""

    space: VirtualMemory
    runs: tuple[PhysicalMap, ...]

    @property
    def size(self) -> int:
        """Bytes that are mapped."""
        return sum(run.size for run in self.runs)

    @property
    def is_wide(self) -> bool:
        """Whether addresses have 64 bits."""
        return self.runs[0].start >> 32 != 0


def guided_texts(
    memory: Memory, architecture: str | None, registers: Sequence[Mapping[str, int]]
) -> Iterator[Vmcoreinfo]:
    """The texts that images point to in which a processor with these registers is."""
    for image in _images_of_all(memory, architecture, registers):
        yield from _texts(memory, image)


def guided_kernels(
    memory: Memory, architecture: str | None, registers: Sequence[Mapping[str, int]], *, keep: bool
) -> Iterator[Found]:
    """The kernels that prove themselves without VMCOREINFO, looked for in such images alone."""
    from engine.oslayers.linux.claims import leads  # not before they are needed
    from engine.oslayers.linux.unaided import unaided

    for image in _images_of_all(memory, architecture, registers):
        first = image.runs[0].physical
        front = Extent(max(0, first - IN_FRONT), min(first, IN_FRONT))
        part = PartOfMemory(memory, [front, *(Extent(run.physical, run.size) for run in image.runs)])
        for found in unaided(part, leads(part), keep=keep):
            if found.physical is part and _is_own(found):
                yield replace(found, physical=memory, memory=found.memory.over(memory))


def _is_own(found: Found) -> bool:
    """Whether its top table is the kernel's own, as its symbols tell, and no process's."""
    top = found.vmcoreinfo.symbol("swapper_pg_dir")
    try:
        return top is not None and found.memory.virt_to_phys(top) == found.candidate.dtb
    except FaultError:
        return False


def _images_of_all(
    memory: Memory, architecture: str | None, registers: Sequence[Mapping[str, int]]
) -> Iterator[Image]:
    tried: set[tuple[int, int]] = set()
    for space in kernel_spaces(memory, architecture, registers):
        for image in _images(space):
            place = image.runs[0].start, image.runs[0].physical
            if place not in tried:  # the same in every process
                tried.add(place)
                yield image


# -- address spaces ------------------------------------------------------------------------------------------


def kernel_spaces(
    memory: Memory, architecture: str | None, registers: Sequence[Mapping[str, int]]
) -> Iterator[VirtualMemory]:
    """The address spaces that processors with these registers are in; then those of the kernel, from user mode.

    Of the latter it is but a guess where their tables lie: beside those of user mode.
    """
    if architecture is None:
        return
    seen: set[tuple[str, int]] = set()
    for moved in (False, True):
        for one in registers:
            for values in _beside(one) if moved else [one]:
                try:
                    roots = roots_of(architecture, values)
                    root = roots[-1]  # the high half's, where there are two
                    key = root[0].name, root[1]
                    if key in seen or len(seen) == SPACES_MOST or not root[1] < memory.size:
                        continue
                    seen.add(key)
                    yield VirtualMemory(memory, roots)
                except InvalidArgumentError:
                    continue


def _beside(registers: Mapping[str, int]) -> Iterator[Mapping[str, int]]:
    """The registers as the kernel may have them when it is entered from user mode, where it is not all mapped."""
    known = {name.lower(): value for name, value in registers.items()}
    if known.get("cr3", 0) & _USER_TABLES and known.get("cs", 3) & 3:
        yield known | {"cr3": known["cr3"] & ~_USER_TABLES}
    if "ttbr1_el1" in known and not known.get("cpsr", 0) & 0xF:
        granule = {1: 1 << 14, 3: 1 << 16}.get(known.get("tcr_el1", 0) >> 30 & 3, PAGE)
        for pages in (1, 2):  # swapper_pg_dir stands behind tramp_pg_dir, in most releases with one between
            yield known | {"ttbr1_el1": known["ttbr1_el1"] + pages * granule}


# -- images --------------------------------------------------------------------------------------------------


def _images(space: VirtualMemory) -> list[Image]:
    """What may be a kernel's image, the largest first."""
    root = space.roots[-1]
    region = _region(root)
    if region is None:
        return []
    try:
        maps = _long_maps(space, region)
    except EngineError:
        return []
    narrow = region.stop <= 1 << 32
    found = [_cut(image, narrow=narrow) for image in _linear(space, maps)]
    good = [image for image in found if image.size >= LEAST_IMAGE]
    return sorted(good, key=lambda image: -image.size)[:IMAGES_MOST]


def _long_maps(space: VirtualMemory, region: Extent) -> list[PhysicalMap]:
    """What is mapped there in runs, of such a distance between both addresses as enough of it has for an image."""
    count, chunks_of = 0, []
    for chunk in space.coalesced(region.start, region.stop):
        chunks_of.append(chunk)
        count += len(chunk)
        if count > RUNS_MOST:
            break
    if not count:
        return []
    distances = np.concatenate([chunk.starts - chunk.physical for chunk in chunks_of])
    sizes = np.concatenate([chunk.sizes for chunk in chunks_of])
    _, which = np.unique(distances, return_inverse=True)
    long = np.bincount(which, sizes)[which] >= LEAST_IMAGE
    starts = np.cumsum([0, *map(len, chunks_of)])
    good = (chunk.take(long[at : at + len(chunk)]) for chunk, at in zip(chunks_of, starts.tolist(), strict=False))
    return list(physical_maps(chunk for chunk in good if len(chunk)))


def _region(root: Root) -> Extent | None:
    """Where a kernel's image may lie in an address space with this top table."""
    spec, dtb = root
    machine = next((machine for prefix, machine in _MACHINES.items() if spec.name.startswith(prefix)), None)
    if machine is None:
        return None
    wide = machine not in ("i686", "armv7l")
    if wide and not spec.high_bits:
        return None
    start = TOP - (1 << spec.high_bits) if wide else min(SPLITS)
    return image_region(Candidate(machine, spec, spec, dtb, start))


def _linear(space: VirtualMemory, maps: Sequence[PhysicalMap]) -> Iterator[Image]:
    """The runs of equal distance between virtual and physical addresses, over holes as images have them."""
    size = space.physical.size
    groups: dict[int, list[list[PhysicalMap]]] = {}
    for run in maps:
        if run.physical >= size:
            continue
        if run.physical + run.size > size:
            run = replace(run, size=size - run.physical)
        lists = groups.setdefault(run.start - run.physical, [])
        if not lists or run.start - lists[-1][-1].stop > IMAGE_HOLE:
            lists.append([])
        lists[-1].append(run)
    for lists in groups.values():
        for runs in lists:
            yield Image(space, tuple(runs))


def _cut(image: Image, *, narrow: bool) -> Image:
    """From the first long part that nobody may write to on; where there is none nothing, or what is executed."""
    fixed = [part for part in _fixed(image.runs) if part.size >= LEAST_IMAGE]
    first = min((part.start for part in fixed), default=None)
    if first is None and not narrow:
        first = min((run.start for run in image.runs if run.rights & Rights.EXECUTE), default=None)
    if first is None:
        return Image(image.space, ())
    stop = first + IMAGE_LIMIT
    if narrow:
        stop = min(stop, max(part.stop for part in fixed if part.start < stop) + BEHIND)
    runs = (_clipped(run, first, stop) for run in image.runs)
    return Image(image.space, tuple(run for run in runs if run.size > 0))


def _fixed(runs: Sequence[PhysicalMap]) -> Iterator[Extent]:
    """What only the kernel may read and nobody may write to, neighbours joined."""
    start = stop = 0
    for run in runs:
        if run.rights & (Rights.WRITE | Rights.USER):
            continue
        if run.start != stop:
            yield Extent(start, stop - start)
            start = run.start
        stop = run.stop
    yield Extent(start, stop - start)


def _clipped(run: PhysicalMap, first: int, stop: int) -> PhysicalMap:
    start = max(first, run.start)
    return replace(run, start=start, physical=run.physical + start - run.start, size=min(run.stop, stop) - start)


# -- what an image points to -------------------------------------------------------------------------------


def _texts(memory: Memory, image: Image) -> Iterator[Vmcoreinfo]:
    """The texts at the pages to which what may be written of an image points."""
    seen = np.empty(0, np.uint64)
    for part in _writable(image):
        for _, data, _, fresh in chunks(memory, part.start, part.stop, 0):
            new = np.setdiff1d(_pointers(image, data, fresh), seen)
            if not len(new):
                continue
            seen = np.union1d(seen, new)
            if len(seen) > POINTERS_MOST:
                return
            places, faults = image.space.virt_to_phys_many(new)
            good = np.ones(len(new), np.bool_)
            good[faults.rows] = False
            yield from vmcoreinfo_at(memory, np.unique(places[good & (places < np.uint64(memory.size))]))


def _writable(image: Image) -> list[Extent]:
    """Where what may be written lies in physical memory, in small parts, the likeliest first.

    The pointers are among what begins as zeros (.bss), which stands last; but where all of low memory is one run,
    what follows is no image.
    """
    runs = [run for run in image.runs if run.rights & Rights.WRITE] or image.runs
    parts = [
        Extent(run.physical + at, min(AT_ONCE, run.size - at)) for run in runs for at in range(0, run.size, AT_ONCE)
    ]
    return parts[::-1] if image.is_wide else parts


def _pointers(image: Image, data: bytearray, size: int) -> npt.NDArray[np.uint64]:
    """The words that are addresses of pages in the kernel's half, each once."""
    region = image.space.roots[-1][0]
    word = 8 if image.is_wide else 4
    words = np.frombuffer(data, f"<u{word}", size // word)
    least = TOP - (1 << region.high_bits) if image.is_wide else min(SPLITS)
    found = words[(words & words.dtype.type(PAGE - 1) == 0) & (words >= words.dtype.type(least))]
    return np.unique(found).astype(np.uint64)


class PartOfMemory(MemoryOver):
    """A memory of which only some parts are looked through: reads pass, but it holds data in these extents alone."""

    def __init__(self, memory: Memory, parts: Sequence[Extent]) -> None:
        super().__init__(memory)
        self.writable = False
        self._parts = sorted(parts)

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """What holds data of the parts."""
        stop = self.size if stop is None else stop
        for part in self._parts:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                yield from self.memory.extents(low, high)

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        self.memory.readinto(address, buffer)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        return self.memory.gather(addresses, out)
