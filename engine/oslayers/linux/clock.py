"""The kernel's clock, as its last tick left it: since when it runs, for how long, and what time it takes it to be.

Where kallsyms has no data symbols the timekeeper is found by its shape: two readers of one clock source, which has a
name, and a time since 1970 that is the time since boot and what lies between the two.

Sources: Linux include/linux/timekeeper_internal.h, kernel/time/timekeeping.c (getboottime64, ktime_get_boottime);
releases 5.10 to 7.x.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects
from engine.records import dataclass

NANOSECONDS = 1_000_000_000
ATTEMPTS = 8
"""A timekeeper is written to with its sequence odd; so soon does nobody meet that again."""
_NAME_LIMIT = 64
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Clock:
    """Times in nanoseconds."""

    boot: int
    """When the machine was started, since 1970 UTC, as its own clock has it."""
    now: int
    """Since 1970 UTC."""
    uptime: int
    """Since boot, suspended time included."""


class Timekeeper:
    """Reads the clock of a kernel."""

    def __init__(self, kernel: Kernel) -> None:
        """Raises NotFoundError where it is not found."""
        self.kernel = kernel
        objects = kernel.objects()
        self.layout = objects.struct("timekeeper")
        self._sequence: int | None = None
        self.address = self._placed(objects)

    def _placed(self, objects: Objects) -> int:
        profile = self.kernel.profile
        data, sequence = objects.types.struct("tk_data"), objects.types.struct("seqcount_raw_spinlock", "seqcount")
        core = profile.symbol("tk_core", "timekeeper_data")
        if core is not None and (data is not None or sequence is not None):
            self._sequence = core
            inside = data["timekeeper"].offset if data is not None else -(-(sequence.size if sequence else 4) // 8) * 8
            return core + inside
        shadow = profile.symbol("shadow_timekeeper")
        return shadow if shadow is not None else self._by_shape(objects)

    def _by_shape(self, objects: Objects) -> int:
        """The first of what looks like one. Raises NotFoundError."""
        image = self.kernel.found.image
        for start in range(image.start, image.stop, _CHUNK) if objects.word == 8 else ():
            size = min(_CHUNK + self.layout.size, image.stop - start) // 8 * 8
            words = np.frombuffer(self.kernel.found.memory.read_padded(start, size), "<i8")
            for row in self._rows_like_clocks(words):
                if self._is_clock(objects, start + row * 8):
                    return start + row * 8
        raise NotFoundError("the kernel's clock was not found")

    def _rows_like_clocks(self, words: npt.NDArray[np.int64]) -> list[int]:
        """Where a timekeeper could begin among words of the image: its times agree, its readers share a source."""
        seconds, base, real, first, second = (
            self.layout[name].offset // 8
            for name in ("xtime_sec", "tkr_mono.base", "offs_real", "tkr_mono.clock", "tkr_raw.clock")
        )
        count = max(0, len(words) - self.layout.size // 8)

        def column(offset: int) -> npt.NDArray[np.int64]:
            return words[offset : offset + count]

        with np.errstate(over="ignore"):
            told = column(seconds) * NANOSECONDS == column(base) + column(real)
        alike = (column(first) == column(second)) & (column(first) < 0) & (column(seconds) > 0)
        found: list[int] = np.flatnonzero(told & alike).tolist()
        return found

    def _is_clock(self, objects: Objects, address: int) -> bool:
        try:
            source = objects.pointer(address + self.layout["tkr_mono.clock"].offset)
            masks = {objects.value(address, self.layout[f"{reader}.mask"]) for reader in ("tkr_mono", "tkr_raw")}
            masks.add(objects.value(source, objects.struct("clocksource")["mask"]))
            name = objects.text(objects.pointer(source + objects.struct("clocksource")["name"].offset), _NAME_LIMIT)
            shift = objects.value(address, self.layout["tkr_mono.shift"])
        except (FaultError, NotFoundError):
            return False
        (mask, *others) = masks
        named = name.isprintable() and bool(name)
        return named and not others and mask > 0xFFFF and not mask & mask + 1 and 0 < shift <= 32

    def read(self) -> Clock | None:
        """The clock now; None where it cannot be read, or is being written to again and again."""
        for _ in range(ATTEMPTS):
            objects = self.kernel.objects()
            try:
                before = self._count(objects)
                found = self._read(objects)
                if not before & 1 and self._count(self.kernel.objects()) == before:
                    return found
            except (FaultError, NotFoundError):  # members may be lost with damaged pages of the types
                return None
            self.kernel.retried["clock"] += 1
        return None

    def _count(self, objects: Objects) -> int:
        return 0 if self._sequence is None else objects.memory.u32(self._sequence)

    def _read(self, objects: Objects) -> Clock:
        def value(path: str) -> int:
            return objects.value(self.address, self.layout[path])

        fraction = value("tkr_mono.xtime_nsec") >> min(value("tkr_mono.shift"), 63)
        real, boot = value("offs_real"), value("offs_boot")
        now = value("xtime_sec") * NANOSECONDS + fraction
        return Clock(real - boot, now, value("tkr_mono.base") + fraction + boot)
