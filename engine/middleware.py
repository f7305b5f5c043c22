"""Middleware: option keys that every connector knows, since they wrap the memory that it gives.

`metrics=yes` counts reads, writes, bytes, faults and the time they take; `info` shows the figures.
`overlay=cow` takes writes into pages of its own: the target is opened read-only and never touched.
`cache=tables|read-only|all` keeps pages for `lifetime=` seconds, for sources that are slow to ask.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping

from engine.errors import FaultError, InvalidArgumentError
from engine.memory import Addresses, Data, Faults, Memory, Rows
from engine.overlay import OverlayMemory
from engine.page_cache import KINDS, KindCache
from engine.types import Extent

OPTIONS_HELP = {
    "metrics": "yes: count reads, writes, bytes, faults and time; shown in info",
    "overlay": "cow: what is written stays here, the target is never touched",
    "cache": "tables, read-only or all: pages of that kind may be as old as lifetime= (none)",
    "lifetime": "seconds for which cache= keeps a page (1)",
}
LIFETIME_MOST = 3600.0


def truth(key: str, value: str) -> bool:
    """What yes and no mean in an option. Raises InvalidArgumentError for other words."""
    words = {"yes": True, "true": True, "1": True, "on": True, "no": False, "false": False, "0": False, "off": False}
    found = words.get(value.lower())
    if found is None:
        raise InvalidArgumentError(f"{key}={value}: want yes or no")
    return found


def overlaid(options: Mapping[str, str]) -> bool:
    """Whether writes stay here. Raises InvalidArgumentError for other words than cow and none."""
    word = options.get("overlay", "none")
    if word not in ("cow", "none"):
        raise InvalidArgumentError(f"overlay={word}: want cow or none")
    return word == "cow"


def check(options: Mapping[str, str]) -> None:
    """Raise InvalidArgumentError where one of these options is wrong: before anything is opened."""
    overlaid(options)
    truth("metrics", options.get("metrics", "no"))
    _cache_of(options)


def _cache_of(options: Mapping[str, str]) -> tuple[str, float]:
    kept, word = options.get("cache", "none"), options.get("lifetime", "1")
    if kept not in ("none", *KINDS):
        raise InvalidArgumentError(f"cache={kept}: want none, {', '.join(KINDS)}")
    if "lifetime" in options and kept == "none":
        raise InvalidArgumentError("lifetime= wants cache=")
    try:
        lifetime = float(word)
    except ValueError:
        lifetime = -1.0
    if not 0 < lifetime <= LIFETIME_MOST:
        raise InvalidArgumentError(f"lifetime={word}: want seconds up to {LIFETIME_MOST:g}")
    return kept, lifetime


def wrap(memory: Memory, options: Mapping[str, str]) -> Memory:
    """`memory` behind what the reserved keys in `options` ask for. Raises InvalidArgumentError as `check`."""
    kept, lifetime = _cache_of(options)
    if kept != "none":
        memory = KindCache(memory, kept, lifetime)
    if overlaid(options):
        memory = OverlayMemory(memory)
    if truth("metrics", options.get("metrics", "no")):
        memory = MeteredMemory(memory)
    return memory


def notes(memory: Memory) -> Iterator[str]:
    """What there is to say of the wrappers around a connector's memory, sentences for a person."""
    if isinstance(memory, MeteredMemory):
        yield from notes(memory.memory)
    elif isinstance(memory, OverlayMemory):
        yield f"overlay: {memory.written} pages were written to here, none of the target"
        yield from notes(memory.memory)
    elif isinstance(memory, KindCache):
        yield f"cache: {memory.cache.hits} pages answered from it, {memory.cache.misses} read"


SHORTEST = 1e-7
"""Seconds: what is faster is not told apart."""
STEP = 1.2
LOG_STEP = math.log(STEP)
BUCKETS = 110
"""From 0.1 µs, each a fifth longer than the one before, to 50 s."""


class MeteredMemory(Memory):
    """A memory that counts what is asked of it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.page_size = memory.page_size
        self.writable = memory.writable
        self._lock = threading.Lock()
        self._figures = dict.fromkeys(("reads", "bytes_read", "writes", "bytes_written", "faults"), 0)
        self._seconds = 0.0
        self._took = [0] * BUCKETS

    def figures(self) -> dict[str, int | float | None]:
        """Counts since it was opened, `seconds` spent in the memory below, and percentiles of one call.

        The percentiles are microseconds, upper bounds that are at most a fifth too high; None before the first call.
        """
        with self._lock:
            found = {f"p{share}_us": self._percentile(share) for share in (50, 90, 99)}
            return {**self._figures, "seconds": round(self._seconds, 6), **found}

    def _percentile(self, share: int) -> float | None:
        wanted, seen = sum(self._took) * share / 100, 0
        for bucket, count in enumerate(self._took):
            seen += count
            if seen and seen >= wanted:
                return float(f"{1e6 * SHORTEST * STEP**bucket:.3g}")
        return None

    def _count(self, begun: float, faults: int = 0, **figures: int) -> None:
        took = time.perf_counter() - begun
        bucket = 0 if took <= SHORTEST else min(BUCKETS - 1, 1 + int(math.log(took / SHORTEST) / LOG_STEP))
        with self._lock:
            self._seconds += took
            self._took[bucket] += 1
            self._figures["faults"] += faults
            for name, number in figures.items():
                self._figures[name] += number

    @property
    def size(self) -> int:
        """As the memory below."""
        return self.memory.size

    @property
    def may_block(self) -> bool:
        """As the memory below."""
        return self.memory.may_block

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`."""
        begun = time.perf_counter()
        try:
            self.memory.readinto(address, buffer)
        except FaultError as error:
            self._count(begun, 1, reads=1, bytes_read=max(0, error.address - address))
            raise
        self._count(begun, reads=1, bytes_read=len(buffer))

    def readinto_nowait(self, address: int, buffer: memoryview) -> bool:
        """See `Memory.readinto_nowait`."""
        begun = time.perf_counter()
        try:
            done = self.memory.readinto_nowait(address, buffer)
        except FaultError as error:
            self._count(begun, 1, reads=1, bytes_read=max(0, error.address - address))
            raise
        if done:
            self._count(begun, reads=1, bytes_read=len(buffer))
        return done

    def write(self, address: int, data: Data) -> None:
        """See `Memory.write`."""
        begun = time.perf_counter()
        try:
            self.memory.write(address, data)
        except FaultError as error:
            self._count(begun, 1, writes=1, bytes_written=max(0, error.address - address))
            raise
        self._count(begun, writes=1, bytes_written=len(data))

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`."""
        begun = time.perf_counter()
        faults = self.memory.gather(addresses, out)
        bad = out.shape[1] * len(faults) - int((faults.addresses - addresses[faults.rows]).sum())
        self._count(begun, len(faults), reads=len(addresses), bytes_read=out.size - bad)
        return faults

    def scatter(self, addresses: Addresses, rows: Rows) -> Faults:
        """See `Memory.scatter`."""
        begun = time.perf_counter()
        faults = self.memory.scatter(addresses, rows)
        bad = rows.shape[1] * len(faults) - int((faults.addresses - addresses[faults.rows]).sum())
        self._count(begun, len(faults), writes=len(addresses), bytes_written=rows.size - bad)
        return faults

    def borrow(self, address: int, size: int) -> memoryview | None:
        """See `Memory.borrow`; counted as a read."""
        begun = time.perf_counter()
        view = self.memory.borrow(address, size)
        if view is not None:
            self._count(begun, reads=1, bytes_read=size)
        return view

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        return self.memory.extents(start, stop)

    def for_tables(self) -> Memory:
        """See `Memory.for_tables`; what is kept there is not counted."""
        found = self.memory.for_tables()
        return self if found is self.memory else found

    def for_constants(self) -> Memory:
        """See `Memory.for_constants`; what is kept there is not counted."""
        found = self.memory.for_constants()
        return self if found is self.memory else found

    def cached(self) -> Memory:
        """See `Memory.cached`."""
        return self
