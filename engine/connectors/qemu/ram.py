"""Where a guest's RAM lies in its QEMU: mappings told by sizes and names, where no monitor tells more.

Never taken: what is executable (TCG's buffer of translated code is 1 GiB of `rwxp`) or the same buffer mapped to be
written, what belongs to a device (a BAR of a device that was passed through may exceed RAM), heap and stacks, and files
that are not the guest's RAM.

Sources: QEMU util/mmap-alloc.c (RAM of 2 MiB and more begins at a multiple of that, with a page without rights
behind it), backends/hostmem-*.c (what the files are called), proc_pid_maps(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product

from engine.connectors.qemu.command_line import Backend, CommandLine
from engine.records import dataclass
from engine.types import Region, Rights

ALIGNMENT = 2 << 20
"""QEMU_VMALLOC_ALIGN of include/qemu/osdep.h, for x86, ARM and PowerPC."""
REGIONS_MOST = 1 << 18
ASSIGNMENTS_MOST = 64
_ZERO, _MEMFD, _HUGE = "/dev/zero", "/memfd:", "/anon_hugepage"
_TRANSLATED = "/memfd:tcg-jit"
"""The buffer of translated code as it is written (`-accel tcg,split-wx=on`; tcg/region.c)."""


@dataclass(frozen=True, slots=True)
class Block:
    """RAM in QEMU's address space: one piece of it."""

    start: int
    size: int

    @property
    def stop(self) -> int:
        """First address behind it."""
        return self.start + self.size

    def __str__(self) -> str:
        return f"{self.start:#x} ({self.size >> 20} MiB)"


@dataclass(frozen=True, slots=True)
class Run:
    """Mappings that follow one another and show the same thing."""

    regions: tuple[Region, ...]

    @property
    def start(self) -> int:
        """First address."""
        return self.regions[0].start

    @property
    def stop(self) -> int:
        """First address behind it."""
        return self.regions[-1].stop

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start

    @property
    def first(self) -> Region:
        """The first mapping, which all others continue."""
        return self.regions[0]

    @property
    def anonymous(self) -> bool:
        """Whether it is private memory without a file."""
        return not self.first.shared and (not self.first.path or self.first.path.startswith("[anon:"))


def runs(regions: Iterable[Region]) -> list[Run]:
    """The mappings that can be RAM: read and written, not executed; those that continue one another joined."""
    found: list[list[Region]] = []
    for number, region in enumerate(regions):
        if number >= REGIONS_MOST:
            break
        if region.rights & (Rights.READ | Rights.WRITE | Rights.EXECUTE) != Rights.READ | Rights.WRITE:
            continue
        if region.path.startswith(_TRANSLATED):
            continue
        if found and _continues(found[-1][-1], region):
            found[-1].append(region)
        else:
            found.append([region])
    return [Run(tuple(parts)) for parts in found]


def _continues(one: Region, two: Region) -> bool:
    same = (one.shared, one.device, one.inode, one.path) == (two.shared, two.device, two.inode, two.path)
    return same and one.stop == two.start and (not one.inode or one.offset + one.size == two.offset)


def expected(line: CommandLine) -> list[Backend]:
    """The pieces that RAM is made of, in the order of their addresses."""
    if line.backends and all(backend.size for backend in line.backends):
        return list(line.backends)
    if line.path:
        return [Backend("", "file", line.size, line.path)]
    return [Backend("", "ram", line.size)]


def candidates(backend: Backend, found: Sequence[Run]) -> list[Block]:
    """Where that piece may be mapped, the likely ones alone where there are such."""
    size = backend.size or 0
    fitting = [run for run in found if run.size >= size and _fits(backend, run)]
    exact = [Block(start, size) for run in fitting for start in _spans(run, size)]
    if not exact and backend.kind in ("ram", ""):
        # Joined with what is mapped below; behind it there is a page without rights.
        exact = [Block(run.stop - size, size) for run in fitting if run.anonymous and not (run.stop - size) % ALIGNMENT]
    aligned = [block for block in exact if not block.start % ALIGNMENT]
    return aligned or exact


def _spans(run: Run, size: int) -> Iterator[int]:
    """Where within a run mappings begin that have this size together; a neighbour of RAM may look like a part of it."""
    stops = {region.stop for region in run.regions}
    return (region.start for region in run.regions if region.start + size in stops)


def _fits(backend: Backend, run: Run) -> bool:
    path = run.first.path.removesuffix(" (deleted)")
    if backend.kind == "file":
        return _is_file(backend, path)
    if backend.kind == "memfd":
        return path.startswith((_MEMFD, _HUGE))
    if backend.kind == "shm":
        return bool(run.first.shared and path)
    return run.anonymous or bool(run.first.shared and path.startswith((_ZERO, _MEMFD)))


def _is_file(backend: Backend, path: str) -> bool:
    """Whether a path is that of mem-path, or of a file that QEMU makes in that folder and removes (util/mmap-alloc.c).

    Folders are not compared: QEMU's may have other names outside of its mount namespace.
    """
    name = os.path.basename(path)
    return bool(name) and (name == os.path.basename(backend.path) or name.startswith("qemu_back_mem."))


def assignments(wanted: Sequence[Backend], found: Sequence[Run]) -> Iterator[tuple[Block, ...]]:
    """Every way to say which mapping is which piece; at most `ASSIGNMENTS_MOST`."""
    given = 0
    for blocks in product(*(candidates(backend, found) for backend in wanted)):
        if all(one.stop <= two.start for one, two in _neighbours(blocks)):
            yield blocks
            given += 1
        if given >= ASSIGNMENTS_MOST:
            return


def in_order_of_making(wanted: Sequence[Backend], blocks: Sequence[Block]) -> bool:
    """Whether pieces of one size lie as the kernel places what is mapped one after the other: each below the last."""
    made = sorted(zip(wanted, blocks, strict=True), key=lambda pair: (pair[1].size, pair[0].number))
    return all(one.start > two.start for (_, one), (_, two) in pairwise(made) if one.size == two.size)


def _neighbours(blocks: Sequence[Block]) -> Iterator[tuple[Block, Block]]:
    ordered = sorted(blocks, key=lambda block: block.start)
    return pairwise(ordered)


def region_at(found: Sequence[Run], address: int) -> Region | None:
    """The mapping that holds an address of QEMU."""
    for run in found:
        if run.start <= address < run.stop:
            return next(region for region in run.regions if address < region.stop)
    return None
