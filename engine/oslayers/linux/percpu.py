"""Variables that each CPU has of its own: an address in the template, or from the allocator, plus the CPU's offset.

Sources: Linux include/linux/{percpu-defs,percpu_counter}.h, lib/percpu_counter.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

import numpy as np

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.profile import Profile

CPU_LIMIT = 8192
"""The largest NR_CPUS of any architecture (MAXSMP of x86)."""


def possible_cpus(profile: Profile, objects: Objects) -> list[int]:
    """The numbers of the CPUs that the machine may have; [0] where the kernel does not tell."""
    return _set_bits(profile, objects, "__cpu_possible_mask") or [0]


def online_cpus(profile: Profile, objects: Objects) -> list[int]:
    """The numbers of the CPUs that run; [0] where the kernel does not tell."""
    return _set_bits(profile, objects, "__cpu_online_mask") or [0]


def _set_bits(profile: Profile, objects: Objects, name: str) -> list[int]:
    layout, address = objects.types.struct("cpumask"), profile.symbol(name)
    if layout is None or address is None:
        return []
    try:
        data = objects.memory.read(address, min(layout.size, CPU_LIMIT // 8))
    except FaultError:
        return []
    return mask_bits(data)


def mask_bits(data: bytes) -> list[int]:
    """The numbers of the bits that are set in a bitmap of little-endian words."""
    found: list[int] = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")).tolist()
    return found


class PerCpu:
    """Where the CPUs have what is theirs."""

    def __init__(self, profile: Profile, objects: Objects) -> None:
        """Raises NotFoundError, FaultError where the kernel does not tell.

        A kernel for one CPU alone has no offsets: there the template is the variable.
        """
        self.objects = objects
        table = profile.symbol("__per_cpu_offset")
        self.cpus = possible_cpus(profile, objects)
        self.offsets = [0 if table is None else objects.pointer(table + cpu * objects.word) for cpu in self.cpus]
        self._mask = (1 << 8 * objects.word) - 1

    def places(self, address: int) -> list[int]:
        """Where each possible CPU has the variable at `address`."""
        return [(address + offset) & self._mask for offset in self.offsets]

    def counter(self, address: int) -> int:
        """The exact value of a `struct percpu_counter`. Raises FaultError, NotFoundError."""
        objects = self.objects
        layout = objects.struct("percpu_counter")
        total = objects.value(address, layout["count"])
        counters = objects.pointer(address + layout["counters"].offset)
        if not counters:
            return total
        for place in self.places(counters):
            total += int.from_bytes(objects.memory.read(place, 4), "little", signed=True)
        return total


def per_cpu(profile: Profile, objects: Objects) -> PerCpu | None:
    """The same, None where the kernel does not tell."""
    try:
        return PerCpu(profile, objects)
    except (FaultError, NotFoundError):
        return None
