"""Connector `kdump`: the compressed dumps of makedumpfile, diskdump and QEMU's dump-guest-memory.

    kdump:vmcore                       zlib, LZO, snappy or Zstandard pages, or plain ones; flattened or in order
    kdump:part1:parts=/dumps/part*     the parts of a dump that `makedumpfile --split` wrote, as one

A page that was dumped is read, pages of zeros too, which the file keeps once. A page that the machine has but the dump
level left out is a fault that says so; where the machine has no memory there is a hole. Snappy and Zstandard need the
library cramjam: pip install 'cloudfs[dumps]'. It is never written to.
"""

from __future__ import annotations

import glob
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from typing import Self

import numpy as np
import numpy.typing as npt

from engine.block_memory import STORE_LIMIT, DecodedBlocks, joined
from engine.connector import Connector
from engine.errors import (
    BadDataError,
    FaultError,
    FaultKind,
    InvalidArgumentError,
    NotRecognisedError,
    UnusableTargetError,
)
from engine.file_memory import FRESHNESS_HELP
from engine.formats.crash_notes import hints_of
from engine.formats.elf import parse_notes
from engine.formats.kdump.bitmap import PageBitmap
from engine.formats.kdump.flattened import is_flattened, pieces_of
from engine.formats.kdump.header import KdumpHeader, read_header, why_left_out
from engine.formats.kdump.pages import INCOMPLETE, SNAPPY, ZSTD, PageTable, Part
from engine.image_source import ImageSource, open_source
from engine.joined_memory import JoinedMemory
from engine.leases import JointLease, Lease
from engine.memory import NO_FAULTS, Addresses, Faults, Memory, Rows
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.oslayer import Options, OsLayer
from engine.types import ConnectorInfo, Extent, TargetHints

PAGES_AT_ONCE = 4096
"""Pages whose descriptors are read at once in a long read."""
SCAN_ROWS, SCAN_BYTES = 256, 64
"""From so many rows on that lie within the first bytes of pages, as in a search, pages are not unpacked further."""
NOTES_LIMIT = 64 << 20
INFO_LIMIT = 1 << 16
"""Bytes of VMCOREINFO; Linux keeps it within a page."""
LIVE_STORE = 1
"""Bytes of unpacked pages that are kept of a file that may change: one page."""
PART_LIMIT = 256
RANGE_LIMIT = 1 << 16
"""Ranges of RAM that the memory map tells one by one."""
_PART_SIZE = 1 << 54
"""How far the parts of a split dump lie apart in their joined source; no file is so long."""
_ARCHITECTURES = {"i486": "i386", "i586": "i386", "i686": "i386", "armv6l": "arm", "armv7l": "arm", "armv8l": "arm"}
"""uname(2)'s name of the machine, where it is not that of its ELF files."""
_UNKNOWN = ("", "Unknown")
"""What the header says instead: QEMU writes the second for all machines but x86."""
_U64 = struct.Struct("<Q").unpack_from
_BREAK, _FOLLOWS, _SAME = 0, 1, 2


class KdumpMemory(Memory):
    """Physical memory, page by page out of a dump."""

    def __init__(self, table: PageTable, ram: PageBitmap, reason: str, limit: int = STORE_LIMIT) -> None:
        """`ram` are the pages that the machine has, `reason` says why some were not dumped."""
        self.table = table
        self.ram = ram
        self.page_size = table.page_size
        self._shift = table.page_size.bit_length() - 1
        self._mask = table.page_size - 1
        self._reason = reason
        self._blocks = DecodedBlocks(table.page, limit)
        self._size = max(ram.stop, table.dumped.stop) * table.page_size

    @property
    def size(self) -> int:
        """First address behind the machine's RAM."""
        return self._size

    @property
    def may_block(self) -> bool:
        """As the file."""
        return self.table.source.may_block

    def _missing(self, address: int) -> FaultError:
        """Why there is nothing at an address whose page the file does not hold."""
        pfn = address >> self._shift
        if not self.ram[pfn]:
            return FaultError(address)
        in_others = self.table.dumped[pfn]
        return FaultError(address, FaultKind.LEFT_OUT, "in another part of a split dump" if in_others else self._reason)

    def _page(self, address: int, *, keep: bool = True) -> bytes:
        pfn = address >> self._shift
        if pfn not in self._blocks and not self.table.holds_one(pfn):
            raise self._missing(address)
        return self._blocks.block(pfn, address, keep=keep)

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`; pages that follow one another in the file are read at once."""
        offset, size = address & self._mask, len(buffer)
        if offset + size <= self.page_size:
            if size:
                buffer[:] = memoryview(self._page(address))[offset : offset + size]
            return
        done = 0
        while done < size:
            step = min(size - done, PAGES_AT_ONCE * self.page_size - (address + done & self._mask))
            self._read_pages(address + done, buffer[done : done + step])
            done += step

    def _read_pages(self, address: int, buffer: memoryview) -> None:
        first, last = address >> self._shift, (address + len(buffer) - 1) >> self._shift
        if not 0 <= first < self.table.dumped.count:
            raise self._missing(address)
        last = min(last, self.table.dumped.count - 1)
        pfns = np.arange(first, last + 1, dtype=np.uint64)
        absent = np.flatnonzero(~self.table.holds(pfns))
        count = int(absent[0]) if len(absent) else len(pfns)
        for row, rows, how, place in self._runs(pfns[:count]):
            self._read_run(first + row, rows, how, place, address, buffer)
        stop = (first + count) << self._shift
        if stop < address + len(buffer):
            raise self._missing(max(stop, address))

    def _runs(self, pfns: Addresses) -> Iterator[tuple[int, int, int, int]]:
        """(first row, rows, how they lie, where the first lies) of pages that can be read together."""
        if not len(pfns):
            return
        places, sizes, flags = self.table.descriptors(pfns)
        plain = (flags == 0) & (sizes == self.page_size) & (places > 0)
        relation = np.zeros(len(pfns), np.int8)
        steps = places[1:] - places[:-1]
        relation[1:][(steps == self.page_size) & plain[1:] & plain[:-1]] = _FOLLOWS
        relation[1:][(steps == 0) & (places[1:] > 0)] = _SAME
        turns = (relation[1:] == _BREAK) | ((relation[:-1] != _BREAK) & (relation[1:] != relation[:-1]))
        starts = [0, *(np.flatnonzero(turns) + 1).tolist(), len(pfns)]
        for start, stop in pairwise(starts):
            how = int(relation[start + 1]) if stop - start > 1 else _FOLLOWS if plain[start] else _BREAK
            yield start, stop - start, how, int(places[start])

    def _read_run(self, pfn: int, rows: int, how: int, place: int, address: int, buffer: memoryview) -> None:
        """Read what of a run of pages lies in the buffer, whose first byte is at `address`."""
        start, stop = pfn << self._shift, (pfn + rows) << self._shift
        low, high = max(start, address), min(stop, address + len(buffer))
        into = buffer[low - address : high - address]
        if how == _FOLLOWS:
            try:
                self.table.source.readinto(place + low - start, into)
            except FaultError as error:
                at = low + max(0, error.address - (place + low - start))
                raise FaultError(at, FaultKind.SOURCE, "the file ends before this page") from None
            return
        whole = high - low == self.page_size
        page = self._page(low, keep=not whole)
        skip = low & self._mask
        if rows == 1:
            into[:] = memoryview(page)[skip : skip + len(into)]
        else:
            into[:] = (page * rows)[low - start : high - start]

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`: only pages that are unpacked already; unpacking is for a thread."""
        first, last = address >> self._shift, (address + len(buffer) - 1) >> self._shift
        if last - first > 16 or not all(pfn in self._blocks for pfn in range(first, last + 1)):
            return False
        for pfn in range(first, last + 1):
            self._read_run(pfn, 1, _BREAK, 0, address, buffer)
        return True

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`: the pages that were dumped, but for those of zeros."""
        stop = self._size if stop is None else min(stop, self._size)
        low = high = 0
        first, behind = max(0, start) >> self._shift, (max(0, stop) + self._mask) >> self._shift
        for one, two in self._used(first, behind):
            if one == high:
                high = two
                continue
            if low < high:
                yield self._clipped(low, high, start, stop)
            low, high = one, two
        if low < high:
            yield self._clipped(low, high, start, stop)

    def _clipped(self, first: int, behind: int, start: int, stop: int) -> Extent:
        low, high = max(first << self._shift, start), min(behind << self._shift, stop)
        return Extent(low, high - low)

    def _used(self, first: int, behind: int) -> Iterator[tuple[int, int]]:
        """Runs of page frames that hold data."""
        for low, high in self.table.dumped.runs(first, behind):
            for piece in range(low, high, 1 << 16):
                pfns = np.arange(piece, min(piece + (1 << 16), high), dtype=np.uint64)
                used = self.table.holds(pfns)
                if used.any():
                    used[used] = ~self.table.is_zero(self.table.descriptors(pfns[used])[0])
                edges = np.flatnonzero(np.diff(used.astype(np.int8), prepend=0, append=0)) + piece
                yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)

    def u64(self, address: int) -> int:
        """See `Memory.u64`."""
        offset = address & self._mask
        if offset > self.page_size - 8:
            return super().u64(address)
        page = self._page(address)
        return int(_U64(page, offset)[0])

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`: each page is unpacked once, plain ones are read out of the file as columns."""
        width = out.shape[1]
        if not len(addresses) or not width or width > self.page_size:
            return super().gather(addresses, out)
        pfns, offsets = addresses >> np.uint64(self._shift), addresses & np.uint64(self._mask)
        across = offsets > self.page_size - width
        there = ~across & self.table.holds(pfns)
        if there.all():
            return self._gather(addresses, pfns, offsets, out)
        good, bad, edge = np.flatnonzero(there), np.flatnonzero(~there & ~across), np.flatnonzero(across)
        parts = [np.zeros((len(rows), width), np.uint8) for rows in (good, bad, edge)]
        return joined(
            (good, self._gather(addresses[good], pfns[good], offsets[good], parts[0]), parts[0]),
            (bad, self._faults(addresses[bad], pfns[bad]), parts[1]),
            (edge, super().gather(addresses[edge], parts[2]), parts[2]),
            out=out,
        )

    def _faults(self, addresses: Addresses, pfns: Addresses) -> Faults:
        """All of these fail at their first byte."""
        kinds = np.where(self.ram.has(pfns), FaultKind.LEFT_OUT, FaultKind.ABSENT).astype(np.uint8)
        return Faults(np.arange(len(addresses)), addresses, kinds)

    def _gather(self, addresses: Addresses, pfns: Addresses, offsets: Addresses, out: Rows) -> Faults:
        """Rows that lie within pages that the file holds."""
        if not len(addresses):
            return NO_FAULTS
        numbers, inverse = np.unique(pfns, return_inverse=True)
        places, sizes, flags = self.table.descriptors(numbers)
        zero = self.table.is_zero(places)[inverse]
        plain = ((flags == 0) & (sizes == self.page_size) & (places > 0))[inverse] & ~zero
        found: list[tuple[npt.NDArray[np.intp], Faults, Rows]] = []
        if zero.any():
            out[zero] = 0
        if plain.any():
            rows, part = np.flatnonzero(plain), np.empty((int(plain.sum()), out.shape[1]), np.uint8)
            real = places[inverse][rows] + offsets[rows]
            faults = self.table.source.gather(real, part)
            moved = faults.addresses - real[faults.rows] + addresses[rows][faults.rows]
            kinds = np.full(len(faults), FaultKind.SOURCE, np.uint8)
            found.append((rows, Faults(faults.rows, moved, kinds), part))
        packed = np.flatnonzero(~plain & ~zero)
        if len(packed):
            part = np.empty((len(packed), out.shape[1]), np.uint8)
            faults = self._store(packed, offsets, out.shape[1]).gather(
                pfns[packed].astype(np.intp), offsets[packed], addresses[packed], part
            )
            found.append((packed, faults, part))
        return joined(*found, out=out) if found else NO_FAULTS


    def _store(self, rows: npt.NDArray[np.intp], offsets: Addresses, width: int) -> DecodedBlocks:
        """Where these rows come from: of many pages whose first bytes alone are wanted no more is unpacked."""
        if len(rows) < SCAN_ROWS or int(offsets[rows].max()) + width > SCAN_BYTES:
            return self._blocks
        return DecodedBlocks(partial(self.table.page, most=SCAN_BYTES), limit=SCAN_BYTES)


class KdumpConnector(Connector):
    """A compressed dump."""

    kind = "kdump"
    summary = "a compressed dump of makedumpfile, diskdump or QEMU"
    opens_packed = True
    options_help = {"parts": "a pattern that the parts of a split dump match", **FRESHNESS_HELP}

    def __init__(self, sources: Sequence[ImageSource], memory: KdumpMemory) -> None:
        self._sources = sources
        self._memory = memory
        leases = [source.lease for source in sources if source.lease is not None]
        self._lease = leases[0] if len(sources) == 1 and leases else JointLease(leases) if leases else None
        self.notes: list[str] = []
        self._hints = TargetHints()
        self._memory_map = _map_of(memory)

    @classmethod
    def open(cls, target: str, options: Options, *, parent: OsLayer | None, writable: bool) -> Self:
        """Open the file, or its parts. Raises NotFoundError, NotRecognisedError, PluginError, or OSError."""
        if parent is not None:
            raise InvalidArgumentError("kdump stands on a file of this host, not on an OS layer: leave -c out")
        if not target:
            raise InvalidArgumentError("kdump wants a file: kdump:PATH")
        paths = sorted({target, *glob.glob(options["parts"])}) if "parts" in options else [target]
        if len(paths) > PART_LIMIT:
            raise InvalidArgumentError(f"parts={options['parts']} matches {len(paths)} files, more than {PART_LIMIT}")
        sources: list[ImageSource] = []
        try:
            as_it_is = len(paths) > 1
            sources.extend(open_source(path, options, writable=False, as_it_is=as_it_is) for path in paths)
            return cls._of(sources)
        except BaseException as error:
            for source in sources:
                source.close()
            if isinstance(error, NotRecognisedError):
                raise NotRecognisedError(f"{target} is no kdump file: {error}") from None
            if isinstance(error, FaultError):
                raise UnusableTargetError(f"{target} cannot be opened as a kdump file: {error}") from None
            raise

    @classmethod
    def _of(cls, sources: Sequence[ImageSource]) -> Self:
        notes = [note for source in sources for note in source.notes]
        dumps = [_in_order(source.memory, notes) for source in sources]
        headers = [read_header(dump) for dump in dumps]
        parts, source = _parts(sources, headers, notes), dumps[0]
        if len(dumps) > 1:
            source = JoinedMemory([(number * _PART_SIZE, dump) for number, dump in enumerate(dumps)])
        ram, dumped = _bitmaps(dumps[0], headers[0], notes)
        table = PageTable(source, parts, dumped)
        for packing in (SNAPPY, ZSTD):
            if any(header.status & packing for header in headers):
                table.unpacker(packing)
        level = headers[0].dump_level
        limit = STORE_LIMIT if all(each.immutable for each in sources) else LIVE_STORE
        made = cls(sources, KdumpMemory(table, ram, why_left_out(level), limit))
        if any(each.status & INCOMPLETE for each in headers):
            notes.append("there was no room for all pages when the dump was written: reading those faults")
        left_out = ram.total - dumped.total
        if left_out > 0:
            notes.append(f"{left_out} pages were {why_left_out(level)}")
        made.notes = notes
        made._hints = _hints(dumps, headers, notes)
        return made

    @property
    def memory(self) -> Memory:
        """See `Connector.memory`."""
        return self._memory

    @property
    def memory_map(self) -> MemoryMap:
        """See `Connector.memory_map`: the machine's RAM, what was left out included; `real_base` says nothing."""
        return self._memory_map

    @property
    def info(self) -> ConnectorInfo:
        """See `Connector.info`."""
        return ConnectorInfo(
            kind=self.kind,
            target=self._sources[0].path,
            size=self._memory.size,
            real_size=self._memory_map.real_size,
            live=not all(source.immutable for source in self._sources),
            writable=False,
            notes=tuple(self.notes),
            freshness=next((each for each in self._sources if not each.immutable), self._sources[0]).freshness,
        )

    @property
    def lease(self) -> Lease | None:
        """See `Connector.lease`."""
        return self._lease

    def hints(self) -> TargetHints:
        """See `Connector.hints`: VMCOREINFO and registers as the sub header's notes tell them."""
        return self._hints

    def close(self) -> None:
        """See `Connector.close`."""
        for source in self._sources:
            source.close()


def _in_order(file: Memory, notes: list[str]) -> Memory:
    """The dump in the file: the file itself, or, where it is flattened, what it stands for."""
    if not is_flattened(file):
        return file
    ranges, warning = pieces_of(file)
    if warning is not None:
        notes.append(warning)
    return MappedMemory(file, MemoryMap(ranges))


def _parts(sources: Sequence[ImageSource], headers: Sequence[KdumpHeader], notes: list[str]) -> list[Part]:
    """The parts by their first page. Raises InvalidArgumentError where they are not of one dump, or overlap."""
    parts = []
    for number, (source, header) in enumerate(zip(sources, headers, strict=True)):
        whole = replace(header, first_pfn=None, stop_pfn=None, vmcoreinfo=(0, 0), notes=(0, 0), status=0)
        first = replace(headers[0], first_pfn=None, stop_pfn=None, vmcoreinfo=(0, 0), notes=(0, 0), status=0)
        if whole != first:
            raise InvalidArgumentError(f"{source.path} is no part of the dump that {sources[0].path} is a part of")
        low, high = header.first_pfn or 0, header.page_count if header.stop_pfn is None else header.stop_pfn
        if not low <= high <= header.page_count:
            raise BadDataError(header.page_size, detail=f"a part of the pages from {low} to {high}")
        parts.append(Part(header, low, high, number * _PART_SIZE))
    parts.sort(key=lambda part: (part.first, part.stop))
    for one, two in pairwise(parts):
        if one.stop > two.first:
            raise InvalidArgumentError("two of the files hold the same part of a split dump")
    if headers[0].first_pfn is not None:
        missing = headers[0].page_count - sum(part.stop - part.first for part in parts)
        if missing:
            notes.append(f"one part of a split dump, {missing} pages are in others: parts=PATTERN opens them together")
    return parts


def _bitmaps(file: Memory, header: KdumpHeader, notes: list[str]) -> tuple[PageBitmap, PageBitmap]:
    """The pages that the machine has, and those that were dumped."""
    at, size = header.bitmaps_at, header.one_bitmap
    second = at + header.bitmap_size // 2 if header.has_two_bitmaps else at
    have = max(0, min(size, file.size - second))
    if have < size:
        notes.append(f"the file ends within its bitmaps: of the pages from {8 * have} on nothing is known")
    dumped = PageBitmap(file.read_padded(second, have), header.page_count)
    if second == at:
        return dumped, dumped
    return PageBitmap(file.read_padded(at, max(0, min(size, file.size - at))), header.page_count), dumped


def _hints(dumps: Sequence[Memory], headers: Sequence[KdumpHeader], notes: list[str]) -> TargetHints:
    """What the notes of the first file that has any say, and the text beside them."""
    name = headers[0].machine
    architecture = _ARCHITECTURES.get(name, name) if name not in _UNKNOWN else None
    found = TargetHints(architecture)
    for dump, header in zip(dumps, headers, strict=True):
        try:
            at, size = header.notes
            order = header.order
            told = hints_of(parse_notes(dump.read(at, min(size, NOTES_LIMIT)), order), architecture, order)
            at, size = header.vmcoreinfo
            text = dump.read(at, min(size, INFO_LIMIT)).partition(b"\0")[0] or told.vmcoreinfo
        except FaultError as error:
            notes.append(f"the notes of the dump cannot be read: {error}")
            continue
        found = TargetHints(
            found.architecture or told.architecture,
            found.dtb or told.dtb,
            None,
            found.registers or told.registers,
            found.vmcoreinfo or text,
        )
    return found


def _map_of(memory: KdumpMemory) -> MemoryMap:
    """The machine's RAM, range by range; as one where there are too many, which no machine has."""
    size, stop = memory.page_size, memory.size // memory.page_size
    runs = list(islice(memory.ram.runs(0, stop), RANGE_LIMIT + 1))
    if len(runs) > RANGE_LIMIT:
        return MemoryMap.whole(memory.size)
    return MemoryMap(MapRange(first * size, (behind - first) * size, first * size) for first, behind in runs)
