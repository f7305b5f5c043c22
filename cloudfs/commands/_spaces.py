"""Address spaces by name, and reading them in a stream that says where its holes are."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cloudfs.commands._arguments import UsageError
from cloudfs.commands._opening import AbsentError, Need, Opened, process_of
from engine.errors import EngineError, FaultError, InvalidArgumentError, NotFoundError
from engine.memory import Memory
from engine.numbers import parse_number
from engine.oslayer import CachedFiles, Process
from engine.records import dataclass
from engine.types import ADDRESS_SPACE, Extent

CHUNK = 1 << 20
"""Bytes that are read at once; no more are held, whatever the length."""
MAPPED_LIFETIME = 1.0
"""Seconds for which what is mapped is believed."""
PROBES = 256
"""After so many pages in a row that cannot be read, only what is known to hold data is tried."""

Mapped = Callable[[], list[Extent]]


@dataclass(frozen=True, slots=True)
class Space:
    """An address space: its name, its memory, and which parts of it could be readable, asked anew each time."""

    name: str
    memory: Memory
    mapped: Mapped | None = None
    ends: bool = False
    """Whether it has an end, as a file: who asks for more gets what there is."""


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes that were read; `view` is valid until the next piece."""

    address: int
    view: memoryview


@dataclass(frozen=True, slots=True)
class Hole:
    """A range that cannot be read."""

    start: int
    stop: int
    reason: str


def need_of(word: str, *, is_process: bool = False) -> Need:
    """What must be opened to reach the address space called `word`."""
    return "connector" if word == "physical" and not is_process else "os"


@contextmanager
def space_of(target: Opened, word: str, *, is_process: bool = False) -> Iterator[Space]:
    """The address space called `word`: `physical`, `kernel`, or that of a process, by PID or name.

    `PID/files/N` is a file of a process as far as the target's memory holds it, as in the tree of a mount. Raises
    AbsentError where the target has none such.
    """
    owner, part, file = word.rpartition("/files/")
    if word == "physical" and not is_process:
        yield _physical(target)
    elif word == "kernel" and not is_process:
        memory = target.layer.kernel_memory
        if memory is None:
            raise AbsentError(f"{target.name} shows no kernel memory; name a process by its PID")
        yield Space(f"the kernel of {target.name}", memory)
    elif part and not is_process:
        with process_of(target, owner) as process:
            yield _file(target, process, file)
    else:
        with process_of(target, word) as process:
            yield Space(f"process {process.info.pid} of {target.name}", process.memory, lambda: _regions(process))


def _file(target: Opened, process: Process, name: str) -> Space:
    source, pid = process.capability(CachedFiles), process.info.pid
    if source is None:
        raise AbsentError(f"{target.name} does not show what its memory holds of files")
    try:
        return Space(f"file {name} of process {pid} of {target.name}", source.cached_file(name), ends=True)
    except NotFoundError as error:
        listed = " ".join(info.name for info in source.cached_files()) or "none"
        raise AbsentError(f"{error}; there are: {listed}") from None


def _regions(process: Process) -> list[Extent]:
    return [Extent(region.start, region.size) for region in process.regions()]


def _physical(target: Opened) -> Space:
    connector = target.connector
    name = f"physical memory of {target.name}"
    if connector is not None:
        source = connector.connector
        return Space(name, connector.memory, lambda: [Extent(r.base, r.length) for r in source.memory_map.ranges])
    memory = target.layer.physical_memory
    if memory is None:
        raise AbsentError(f"{target.name} shows no physical memory; name a process by its PID")
    return Space(name, memory)


def address_of(word: str) -> int:
    """An address as a person writes it. Raises UsageError that helps where 0x was forgotten."""
    try:
        address = parse_number(word, "the address")
    except InvalidArgumentError as error:
        try:
            hexadecimal = int(word, 16)
        except ValueError:
            raise UsageError(str(error)) from None
        raise UsageError(f"the address {word!r} is no number: write {hexadecimal:#x} for a hexadecimal one") from None
    if address >= ADDRESS_SPACE:
        raise UsageError(f"the address {word} lies behind the last one, {ADDRESS_SPACE - 1:#x}")
    return address


class _Candidates:
    """Where reading could go on behind a fault."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._since = float("-inf")
        self._starts: list[int] = []
        self._stops: list[int] = []

    def _refresh(self) -> None:
        assert self._space.mapped is not None
        try:
            extents = self._space.mapped()
        except EngineError:
            extents = []  # its maps may not be read: page by page, then by what holds data
        self._starts = [extent.start for extent in extents]
        self._stops = [extent.stop for extent in extents]
        self._since = time.monotonic()

    def after(self, page: int, stop: int, probes: int) -> int:
        """The first address from `page` on that may be readable; `stop` where there is none before it."""
        if self._space.mapped is not None and time.monotonic() - self._since > MAPPED_LIFETIME:
            self._refresh()
        if not self._starts or probes >= PROBES:
            holding = self._space.memory.extents(page, stop)
            return next((max(page, extent.start) for extent in holding if extent.stop > page), stop)
        index = bisect.bisect_right(self._stops, page)
        return stop if index == len(self._starts) else min(stop, max(page, self._starts[index]))


def pieces(space: Space, start: int, size: int) -> Iterator[Data | Hole]:
    """What [start, start + size) holds, ascending, without a break: data in pieces of at most CHUNK, and holes.

    Of a space that `ends` no more than it has, unless all lies behind its end: that is a hole.
    """
    memory, candidates = space.memory, _Candidates(space)
    wanted = start + size
    if space.ends and start < memory.size:
        wanted = min(wanted, memory.size)
    stop = max(start, min(wanted, memory.size))
    scratch = memoryview(bytearray(min(CHUNK, stop - start)))
    at, hole, probes = start, None, 0
    while at < stop:
        # After a fault a page alone is tried first, so that a wide hole does not cost wide reads.
        buffer = scratch[: min(len(scratch), stop - at, memory.page_size if hole else CHUNK)]
        error = _read(memory, at, buffer)
        good = len(buffer) if error is None else max(0, error.address - at)
        if good and hole:
            yield hole
            hole, probes = None, 0
        if good:
            yield Data(at, buffer[:good])
        at += good
        if error is not None:
            page = (at // memory.page_size + 1) * memory.page_size
            resume = candidates.after(page, stop, probes) if page < stop else stop
            hole = Hole(hole.start if hole else at, resume, hole.reason if hole else _why(error))
            at, probes = resume, probes + 1
    if hole:
        yield hole
    if stop < wanted:
        yield Hole(stop, wanted, f"it lies behind the end of {space.name}")


def _why(error: FaultError) -> str:
    """The reason alone: the address is said already."""
    return str(error).partition(": ")[2] or str(error)


def _read(memory: Memory, address: int, buffer: memoryview) -> FaultError | None:
    try:
        memory.readinto(address, buffer)
    except FaultError as error:
        return error
    return None
