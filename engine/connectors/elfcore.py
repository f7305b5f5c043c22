"""Connectors `elfcore` and `kcore`: an ELF core file of a whole machine, whose segments say where its bytes lie.

    elfcore:vmcore                    written by a kernel that crashed (/proc/vmcore, makedumpfile -E), by QEMU
                                      (dump-guest-memory), by virsh dump --memory-only, by VirtualBox (dumpvmcore)
    kcore                             this machine, by the segments of /proc/kcore that have a physical address

What a segment has in memory but not in the file reads as zeros where the file carries VMCOREINFO: makedumpfile leaves
pages out that way. In other files it is a hole. Where segments overlap (the kernel's image lies in RAM, too) the one
that begins first counts. A file that is cut opens as far as it goes. It is never written to.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import ClassVar, Self

from engine.connector import Target
from engine.errors import (
    AccessDeniedError,
    BadDataError,
    FaultError,
    InvalidArgumentError,
    NotFoundError,
    NotRecognisedError,
    UnsupportedError,
    UnusableTargetError,
)
from engine.file_memory import FRESHNESS_HELP
from engine.formats.crash_notes import hints_of, is_of_process
from engine.formats.elf import ElfFile, Note, Segment, parse_notes
from engine.formats.elf.records import ET_CORE, PT_LOAD, PT_NOTE, parse_segments, segment_size
from engine.image_connector import ImageConnector
from engine.image_source import ImageSource, open_source
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.oslayer import Options, OsLayer
from engine.types import ADDRESS_SPACE, Extent
from engine.zero_gaps import ZeroGaps

SEGMENT_LIMIT = 1 << 20
"""Segments of a file; a dump that leaves pages out has one for each run that stayed."""
NOTES_LIMIT = 64 << 20
"""Bytes of notes that are read: a few hundred for each CPU."""
PAGE = 4096
KCORE = "/proc/kcore"
_KINDS = {0: "no type", 1: "a relocatable object", 2: "an executable", 3: "a shared object or an executable"}


class CoreMemory(MappedMemory):
    """Physical memory as the segments hold it; a segment may begin anywhere in the file."""

    def __init__(self, source: Memory, ranges: MemoryMap) -> None:
        super().__init__(source, ranges)
        edges = PAGE
        for entry in ranges.ranges:
            edges |= entry.base | entry.length
        self.page_size = edges & -edges


class ElfCoreConnector(ImageConnector):
    """An ELF core file of a machine."""

    kind = "elfcore"
    summary = "an ELF core of a machine: vmcore, QEMU, libvirt, VirtualBox, /proc/kcore"
    options_help: ClassVar[dict[str, str]] = dict(FRESHNESS_HELP)
    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Open the file. Raises NotFoundError, NotRecognisedError where it is no core of a machine, or OSError."""
        if parent is not None:
            raise InvalidArgumentError("elfcore stands on a file of this host, not on an OS layer: leave -c out")
        if not target:
            raise InvalidArgumentError("elfcore wants a file: elfcore:PATH")
        image = open_source(target, options, writable=False)
        try:
            return cls._of(image)
        except FaultError as error:
            image.close()
            raise UnusableTargetError(f"{target} cannot be opened as an ELF core: {error}") from None
        except BaseException:
            image.close()
            raise

    @classmethod
    def _of(cls, image: ImageSource) -> Self:
        file = image.memory
        elf = ElfFile(file)
        kind = elf.header.kind
        if kind != ET_CORE:
            what = _KINDS.get(kind, f"type {kind:#x}")
            raise NotRecognisedError(
                f"{image.path} is an ELF file but no core of a machine: its type says {what}; "
                f"raw:{image.path} shows its bytes"
            )
        warnings = list(image.notes)
        segments = _segments(elf, warnings)
        notes = _notes(file, segments, elf.header.order, warnings)
        loads = [segment for segment in segments if segment.kind == PT_LOAD and _is_physical(segment)]
        if is_of_process(notes) or not _tells_addresses(loads):
            raise NotRecognisedError(
                f"{image.path} is the core of a process, not of a machine: its segments have no physical addresses"
            )
        hints = hints_of(notes, elf.header.architecture, elf.header.order)
        held, left_out = _placed(loads, file.size, zeros=hints.vmcoreinfo is not None, warnings=warnings)
        if not held:
            raise UnusableTargetError(f"{image.path} holds no memory: it has {len(loads)} segments, all of them empty")
        ranges = MemoryMap(held)
        memory = CoreMemory(file, ranges)
        return cls(image, ZeroGaps(memory, left_out) if left_out else memory, ranges, warnings, hints)


class KcoreConnector(ElfCoreConnector):
    """The memory of the machine that this runs on, as its Linux kernel offers it; or of another such file."""

    kind = "kcore"
    summary = "physical memory of this machine, where its kernel offers /proc/kcore (root)"
    options_help: ClassVar[dict[str, str]] = {}
    opens_packed = False

    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Open /proc/kcore. Raises UnsupportedError where the kernel offers none, AccessDeniedError."""
        if parent is not None:
            raise InvalidArgumentError("kcore stands on this machine's kernel, not on an OS layer: leave -c out")
        path = target or KCORE
        try:
            return super().open(path, {"live": "yes"}, parent=None, writable=False)
        except (NotFoundError, FileNotFoundError):
            raise UnsupportedError(
                f"there is no {path}: this kernel was built without it (CONFIG_PROC_KCORE), or a container hides it"
            ) from None
        except PermissionError:
            raise AccessDeniedError(
                f"{path} may not be read: that takes root (CAP_SYS_RAWIO), and a kernel that is not locked down"
            ) from None

    @classmethod
    def targets(cls, parent: OsLayer | None) -> Iterator[Target]:
        """See `Connector.targets`."""
        if os.access(KCORE, os.R_OK):
            yield Target(KCORE, "the memory of this machine")


def _segments(elf: ElfFile, warnings: list[str]) -> list[Segment]:
    """The program headers, as many as the file still has."""
    header, count = elf.header, elf.segment_count()
    size = segment_size(header.bits)
    if count and header.segment_entry_size != size:
        raise BadDataError(0, detail=f"its program headers have {header.segment_entry_size} bytes, not {size}")
    if count > SEGMENT_LIMIT:
        raise BadDataError(header.segments_offset, detail=f"{count} program headers")
    there = max(0, elf.memory.size - header.segments_offset) // size
    if there < count:
        warnings.append(f"the file ends within its table of segments: {count - there} of {count} are missing")
    table = elf.memory.read(header.segments_offset, size * min(count, there))
    return list(parse_segments(table, header))


def _notes(file: Memory, segments: list[Segment], order: str, warnings: list[str]) -> list[Note]:
    """The notes of all PT_NOTE segments; those that the file no longer has are left out."""
    found: list[Note] = []
    room = NOTES_LIMIT
    for segment in segments:
        if segment.kind != PT_NOTE or not segment.file_size:
            continue
        size = max(0, min(segment.file_size, room, file.size - segment.offset))
        room -= size
        try:
            found += parse_notes(file.read(segment.offset, size), order)
        except FaultError as error:
            warnings.append(f"the notes at offset {segment.offset:#x} of the file are not read: {error}")
    return found


def _is_physical(segment: Segment) -> bool:
    """Whether it has bytes, and an address that may be physical: /proc/kcore writes -1 where there is none."""
    return segment.size > 0 and segment.physical + segment.size <= ADDRESS_SPACE - PAGE


def _tells_addresses(loads: list[Segment]) -> bool:
    """Whether the physical addresses are any: the core of a process has zeros in all of its segments."""
    return len(loads) < 2 or any(segment.physical for segment in loads)


def _placed(
    loads: list[Segment], size: int, *, zeros: bool, warnings: list[str]
) -> tuple[list[MapRange], list[Extent]]:
    """What the file holds, and what reads as zeros: both ascending, and all of them disjoint."""
    there, missing = [], 0
    for segment in loads:
        wanted = min(segment.file_size, segment.size)
        have = max(0, min(wanted, size - segment.offset))
        if have < wanted:
            missing += wanted - have
            have = max(0, (segment.physical + have) // PAGE * PAGE - segment.physical)
        if have:
            there.append(MapRange(segment.physical, have, segment.offset))
    if missing:
        warnings.append(f"the file is cut: {missing} bytes of its segments are missing, reading them faults")
    held = _disjoint(there)
    if not zeros:
        return held, []
    behind = [
        MapRange(segment.physical + segment.file_size, segment.size - segment.file_size, 0)
        for segment in loads
        if segment.size > segment.file_size
    ]
    left_out = _without(_disjoint(behind), held)
    if left_out:
        count = sum(gap.size for gap in left_out)
        warnings.append(f"{count} bytes were left out of the file when it was written: they read as zeros")
    return held, left_out


def _disjoint(ranges: Iterable[MapRange]) -> list[MapRange]:
    """The ranges by address, each without what one that begins before it has already."""
    found: list[MapRange] = []
    stop = 0
    for entry in sorted(ranges, key=lambda entry: (entry.base, -entry.length)):
        if entry.stop > stop:
            skip = max(0, stop - entry.base)
            found.append(MapRange(entry.base + skip, entry.length - skip, entry.real_base + skip))
            stop = entry.stop
    return found


def _without(ranges: list[MapRange], taken: list[MapRange]) -> list[Extent]:
    """What of disjoint `ranges` is not in `taken`, both ascending."""
    found: list[Extent] = []
    row = 0
    for entry in ranges:
        at = entry.base
        while row and taken[row - 1].stop > at:
            row -= 1
        while row < len(taken) and taken[row].base < entry.stop:
            if taken[row].base > at:
                found.append(Extent(at, taken[row].base - at))
            at = max(at, taken[row].stop)
            row += 1
        if at < entry.stop:
            found.append(Extent(at, entry.stop - at))
    return found
