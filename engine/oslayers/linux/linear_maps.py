"""What a kernel maps by plain arithmetic: its image, and all of RAM; each distance is proved before it is believed.

    image    virtual - physical = where `swapper_pg_dir` is named and where it lies
    RAM      arm64 PAGE_OFFSET - PHYS_OFFSET, riscv64 PAGE_OFFSET - phys_ram_base, x86-64 page_offset_base

What VMCOREINFO or a variable tells is a claim like any other. It holds where the kernel's own page tables lead a sample
of RAM there, or, where these are lost, where lists that begin in the image run through RAM and back at that distance.

Sources: Linux arch/arm64/include/asm/memory.h (memstart_addr), arch/riscv/include/asm/page.h (kernel_map),
arch/x86/include/asm/page_64_types.h (page_offset_base), include/linux/list.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import field
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.layout import TypeSource
from engine.memory import Addresses, Memory
from engine.oslayers.linux.architectures import TOP, Candidate
from engine.records import dataclass
from engine.translate.virtual import VirtualMemory
from engine.types import ADDRESS_SPACE, Extent

PAGE = 4096
RAM_STEP = 2 << 20
"""RAM comes in blocks of at least so much: where there is data, what lies around it is RAM too."""
SAMPLE = 1024
"""Pages of RAM that are looked up to prove a distance."""
AGREEING = 64
"""So many of them must be mapped so, and seven eighths of those that are mapped to RAM at all."""
LIST_HEADS = 16
"""Lists that must begin in the image and come back to it."""
EMPTY_LISTS = 64
"""Heads of empty lists, which name themselves, that an image must hold: kernels have thousands."""
LOW_MEMORY = 736 << 20
"""Bytes of RAM that 32-bit kernels map for certain: behind it vmalloc may begin."""
X86_PAGE_OFFSETS = (0xFFFF_8880_0000_0000, 0xFF11_0000_0000_0000)
"""__PAGE_OFFSET_BASE_L4 and _L5 of arch/x86/include/asm/page_64_types.h: where KASLR moves nothing."""

Symbols = Callable[[str], int | None]


@dataclass(frozen=True, slots=True)
class LinearMap:
    """A region of a kernel's addresses that lie in physical memory as they follow one another."""

    region: Extent
    distance: int
    """Of virtual from physical addresses, modulo 2^64."""
    known: tuple[int, ...] | None = None
    """Addresses that are mapped for certain; None where all of it is."""

    def place(self, address: int) -> int:
        """The physical address of one of the region."""
        return (address - self.distance) % TOP


@dataclass(slots=True)
class Claims:
    """What is known, or told, of a kernel's linear maps before any of them is proved."""

    candidate: Candidate
    text: Vmcoreinfo
    image_distance: int
    """Proved by who makes this: see `finding`."""
    image: Extent | None = None
    """Where the image lies, as far as that is known."""
    types: TypeSource | None = None
    symbols: Symbols | None = field(default=None)

    def symbol(self, name: str) -> int | None:
        """The address of a symbol of the kernel, as far as symbols were read."""
        return self.text.symbol(name) or (self.symbols(name) if self.symbols is not None else None)

    def image_maps(self) -> list[LinearMap]:
        """The image, up to its end and without what is given back when the kernel has started, if symbols tell."""
        if self.image is None:
            return []
        start, stop = self.image.start, self.symbol("_end") or self.image.stop
        first, last = self.symbol("__init_begin"), self.symbol("__init_end")
        cuts = [(start, stop)]
        if first is not None and last is not None and start < first < last < stop:
            cuts = [(start, first & -PAGE), (last + PAGE - 1 & -PAGE, stop)]
        known = tuple(address for address in self.text.symbols.values() if start <= address < stop)
        return [LinearMap(Extent(low, high - low), self.image_distance, known) for low, high in cuts if low < high]


# -- RAM ---------------------------------------------------------------------------------------------------


class Ram:
    """Where a physical memory holds data, in blocks of `RAM_STEP`, each with one of them around."""

    def __init__(self, physical: Memory) -> None:
        starts: list[int] = []
        stops: list[int] = []
        for extent in physical.extents():
            start, stop = extent.start & -RAM_STEP, min(-(-extent.stop // RAM_STEP) * RAM_STEP, physical.size)
            if stops and start <= stops[-1]:
                stops[-1] = max(stop, stops[-1])
            else:
                starts.append(start)
                stops.append(stop)
        self._starts, self._stops = np.array(starts, np.uint64), np.array(stops, np.uint64)

    @property
    def extent(self) -> Extent:
        """From the first to the last of it; empty where there is none."""
        if not len(self._starts):
            return Extent(0, 0)
        return Extent(int(self._starts[0]), int(self._stops[-1]) - int(self._starts[0]))

    def has(self, first: Addresses, last: Addresses | None = None) -> npt.NDArray[np.bool_]:
        """Between which `first` and `last` addresses there is RAM; at which `first` ones, without `last`."""
        if not len(self._starts):
            return np.zeros(len(first), np.bool_)
        row = np.searchsorted(self._stops, first, "right")
        inside = row < len(self._starts)
        begins = self._starts[np.where(inside, row, 0)]
        found: npt.NDArray[np.bool_] = inside & (begins <= (first if last is None else last))
        return found

    def sample(self, count: int) -> Addresses:
        """At most so many pages of it, evenly spread."""
        sizes = (self._stops - self._starts) // np.uint64(PAGE)
        total = int(sizes.sum())
        if not total:
            return np.empty(0, np.uint64)
        numbers = np.arange(min(count, total), dtype=np.uint64) * np.uint64(total) // np.uint64(min(count, total))
        ends = np.cumsum(sizes)
        row = np.searchsorted(ends, numbers, "right")
        found: Addresses = self._starts[row] + (numbers - (ends - sizes)[row]) * np.uint64(PAGE)
        return found


def proved_map(memory: VirtualMemory, ram: Ram, claims: Claims) -> LinearMap | None:
    """The map of all RAM by a distance that is proved; None where none is.

    `memory` is the kernel's by its page tables alone.
    """
    tried = set()
    for distance in _distances(memory, claims):
        region = _region(ram, claims.candidate, distance)
        if distance in tried or not region.size:
            continue
        tried.add(distance)
        found = LinearMap(region, distance)
        if maps_so(memory, ram, distance) or _lists_run_so(memory.physical, found, claims):
            return found
    return None


def _region(ram: Ram, candidate: Candidate, distance: int) -> Extent:
    extent = ram.extent
    size = extent.size if candidate.wide else min(extent.size, LOW_MEMORY)
    start = (extent.start + distance) % TOP
    if distance % PAGE or start < candidate.kernel_start or start + size > (TOP if candidate.wide else 1 << 32):
        return Extent(0, 0)
    return Extent(start, size)


def _distances(memory: VirtualMemory, claims: Claims) -> Iterator[int]:
    """What is told, what is usual, and at last what most of the kernel's addresses have."""
    machine, text = claims.candidate.machine, claims.text
    if not claims.candidate.wide:
        yield claims.image_distance
    elif machine == "aarch64":
        start = _number(text, "PHYS_OFFSET") or _word(memory, claims, "memstart_addr")
        for bits in {_number(text, "VA_BITS") or 48, claims.candidate.spec.high_bits}:
            if start is not None:
                yield (TOP - (1 << bits) - start) % TOP
    elif machine == "riscv64":
        offset, start = _number(text, "PAGE_OFFSET"), _number(text, "phys_ram_base")
        if offset is not None and start is not None:
            yield (offset - start) % TOP
        layout = claims.types.struct("kernel_mapping") if claims.types is not None else None
        if layout is not None and "va_pa_offset" in layout:
            told = _word(memory, claims, "kernel_map", layout["va_pa_offset"].offset)
            yield from () if told is None else (told,)
    elif machine == "x86_64":
        told = _word(memory, claims, "page_offset_base")
        yield from (() if told is None else (told,), X86_PAGE_OFFSETS)[told is None]
    yield from _commonest(memory, claims.candidate)


def _number(text: Vmcoreinfo, name: str) -> int | None:
    value = text.number(name)
    return None if value is None else value % TOP


def _word(memory: VirtualMemory, claims: Claims, name: str, offset: int = 0) -> int | None:
    """The value of a variable in the image."""
    address = claims.symbol(name)
    try:
        return None if address is None else memory.physical.u64((address + offset - claims.image_distance) % TOP)
    except FaultError:
        return None


def _commonest(memory: VirtualMemory, candidate: Candidate) -> Iterator[int]:
    """The distance at which most bytes are mapped: nothing else that a kernel maps is as large as all of RAM."""
    sizes: Counter[int] = Counter()
    for run in memory.physical_maps(candidate.kernel_start):
        if run.physical + run.size <= memory.physical.size:
            sizes[(run.start - run.physical) % TOP] += run.size
    yield from (distance for distance, _ in sizes.most_common(1))


def maps_so(memory: VirtualMemory, ram: Ram, distance: int) -> bool:
    """Whether the kernel's page tables map RAM at this distance."""
    places = ram.sample(SAMPLE)
    addresses = places + np.uint64(distance)
    good = np.flatnonzero(addresses < np.uint64(ADDRESS_SPACE - PAGE))
    found, faults = memory.virt_to_phys_many(addresses[good])
    there = np.ones(len(good), np.bool_)
    there[faults.rows] = False
    agree = int(np.count_nonzero(there & (found == places[good])))
    other = int(np.count_nonzero(ram.has(found[there & (found != places[good])])))
    return agree >= AGREEING and other * 7 <= agree


# -- by content --------------------------------------------------------------------------------------------


def _words(physical: Memory, claims: Claims) -> tuple[npt.NDArray[Any], int]:
    """The words of the image, and the address of the first."""
    image = claims.image
    if image is None:
        return np.empty(0, np.uint64), 0
    kind = "<u8" if claims.candidate.wide else "<u4"
    data = physical.read_padded((image.start - claims.image_distance) % TOP, image.size & -PAGE)
    return np.frombuffer(data, kind).astype(np.uint64), image.start


def _lists_run_so(physical: Memory, found: LinearMap, claims: Claims) -> bool:
    """Whether enough lists lead from a head in the image to RAM and back, on both sides."""
    words, start = _words(physical, claims)
    word = 8 if claims.candidate.wide else 4
    low, high = np.uint64(found.region.start), np.uint64(found.region.stop - 2 * word)
    inside = (words >= low) & (words <= high) & (words % np.uint64(word) == 0)
    rows = np.flatnonzero(inside[:-1] & inside[1:])
    heads = rows.astype(np.uint64) * np.uint64(word) + np.uint64(start)
    distance = np.uint64(found.distance)
    following, _ = physical.words(words[rows] + np.uint64(word) - distance, f"<u{word}")
    previous, _ = physical.words(words[rows + 1] - distance, f"<u{word}")
    return int(np.count_nonzero((following == heads) & (previous == heads))) >= LIST_HEADS


def holds_an_image(physical: Memory, claims: Claims) -> bool:
    """Whether heads of empty lists in what would be the image name themselves at its distance."""
    words, start = _words(physical, claims)
    word = 8 if claims.candidate.wide else 4
    own = np.arange(len(words), dtype=np.uint64) * np.uint64(word) + np.uint64(start)
    return int(np.count_nonzero((words[:-1] == own[:-1]) & (words[1:] == own[:-1]))) >= EMPTY_LISTS


__all__ = ["Claims", "LinearMap", "Ram", "holds_an_image", "maps_so", "proved_map"]
