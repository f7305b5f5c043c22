"""/proc/stat and /proc/cpuinfo: the processors, and what they did.

Sources: Linux fs/proc/stat.c, kernel/sched/core.c, include/linux/kernel_stat.h, kernel/time/tick-sched.h,
arch/x86/kernel/cpu/proc.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

import contextlib

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.percpu import PerCpu, online_cpus
from engine.oslayers.linux.profile import Profile
from engine.oslayers.linux.tasks import TICKS

KINDS = ("USER", "NICE", "SYSTEM", "IDLE", "IOWAIT", "IRQ", "SOFTIRQ", "STEAL", "GUEST", "GUEST_NICE")
"""In the order of a line; CPUTIME_… of enum cpu_usage_stat."""
MICROSECOND = 1000
FEATURE_LIMIT = 64
"""Words of x86_capability."""


class Processors:
    """Reads what the processors counted in one operation."""

    def __init__(self, profile: Profile, objects: Objects) -> None:
        """Raises NotFoundError, FaultError where the kernel's types or symbols lack what this needs."""
        self.profile = profile
        self.objects = objects
        self.per_cpu = PerCpu(profile, objects)
        self.online = online_cpus(profile, objects)

    def _place(self, symbol: str, cpu: int) -> int | None:
        address = self.profile.symbol(symbol)
        if address is None or cpu not in self.per_cpu.cpus:
            return None
        return self.per_cpu.places(address)[self.per_cpu.cpus.index(cpu)]

    def times(self, cpu: int) -> list[int]:
        """Nanoseconds of a CPU in the order of KINDS. Raises NotFoundError, FaultError."""
        objects, kinds = self.objects, self.objects.types.enum("cpu_usage_stat") or {}
        place, array = self._place("kernel_cpustat", cpu), objects.struct("kernel_cpustat")["cpustat"]
        if place is None:
            raise NotFoundError("the kernel's symbols do not tell where kernel_cpustat is")
        counts = [objects.memory.u64(place + array.offset + 8 * kinds[f"CPUTIME_{kind}"]) for kind in KINDS
                  if f"CPUTIME_{kind}" in kinds]  # fmt: skip
        if len(counts) != len(KINDS):
            raise NotFoundError("the kernel's types do not tell the kinds of a processor's time")
        idle = self._sleep(cpu, "idle_sleeptime")
        if idle is not None and cpu in self.online:
            counts[3], counts[4] = idle, self._sleep(cpu, "iowait_sleeptime") or counts[4]
        return counts

    def _sleep(self, cpu: int, name: str) -> int | None:
        """Idle time where ticks stop meanwhile, to the microsecond; None where they do not, or it is not known."""
        layout, place = self.objects.types.struct("tick_sched"), self._place("tick_cpu_sched", cpu)
        if layout is None or place is None or name not in layout:
            return None
        active = layout.get("nohz_mode", "nohz_active")
        flags = layout.get("flags")
        try:
            if active is not None and not self.objects.value(place, active):
                return None
            if active is None and flags is None:
                return None
            return max(0, self.objects.value(place, layout[name])) // MICROSECOND * MICROSECOND
        except FaultError:
            return None

    def idle(self) -> int:
        """Nanoseconds that all possible CPUs together were idle. Raises NotFoundError, FaultError."""
        return sum(self.times(cpu)[3] for cpu in self.per_cpu.cpus)

    def stat_text(self, boot_time: int | None) -> str:
        """/proc/stat; what is not known of it is left out. Raises NotFoundError, FaultError."""
        each = {cpu: self.times(cpu) for cpu in self.per_cpu.cpus}
        total = [sum(column) for column in zip(*each.values(), strict=True)]
        rows = [("cpu ", total), *((f"cpu{cpu}", each[cpu]) for cpu in self.online if cpu in each)]
        lines = [f"{name} {' '.join(str(count // TICKS) for count in counts)}\n" for name, counts in rows]
        facts = {
            "ctxt": self._queues("nr_switches", self.per_cpu.cpus),
            "btime": None if boot_time is None else boot_time // 1_000_000_000,
            "processes": self._forks(),
            "procs_running": self._queues("nr_running", self.online),
            "procs_blocked": self._queues("nr_iowait.counter", self.per_cpu.cpus),
        }
        return "".join(lines) + "".join(f"{key} {value}\n" for key, value in facts.items() if value is not None)

    def _forks(self) -> int | None:
        """How many processes were made since boot, each CPU counting its own."""
        address = self.profile.symbol("total_forks")
        try:
            return None if address is None else self.objects.memory.u64(address)
        except FaultError:
            return None

    def _queues(self, member: str, cpus: list[int]) -> int | None:
        """A number of the run queues of some CPUs together."""
        layout, total = self.objects.types.struct("rq"), 0
        field = layout.get(member) if layout is not None else None
        for cpu in cpus:
            place = self._place("runqueues", cpu)
            if place is None or field is None:
                return None
            try:
                total += self.objects.value(place, field)
            except FaultError:
                return None
        return total

    def running(self) -> int | None:
        """How many tasks run or could."""
        return self._queues("nr_running", self.online)

    def cpuinfo_text(self) -> str:
        """/proc/cpuinfo: a paragraph for each CPU; on other architectures than x86 its number alone."""
        return "".join(self._paragraph(cpu) for cpu in self.online)

    def _paragraph(self, cpu: int) -> str:
        lines = [("processor", str(cpu))]
        place, layout = self._place("cpu_info", cpu), self.objects.types.struct("cpuinfo_x86")
        if place is not None and layout is not None:
            objects = self.objects
            with contextlib.suppress(FaultError, NotFoundError):
                lines += [
                    ("vendor_id", objects.text_in(place, layout["x86_vendor_id"])),
                    ("cpu family", str(objects.value(place, layout["x86"]))),
                    ("model", str(objects.value(place, layout["x86_model"]))),
                    ("model name", objects.text_in(place, layout["x86_model_id"])),
                    ("stepping", str(objects.value(place, layout.first("x86_stepping", "x86_mask")))),
                    ("microcode", f"{objects.value(place, layout['microcode']):#x}"),
                    ("cache size", f"{objects.value(place, layout['x86_cache_size'])} KB"),
                    ("flags", " ".join(self._features(place + layout["x86_capability"].offset))),
                ]
        return "".join(f"{key}\t{'' if len(key) > 7 else chr(9)}: {value}\n" for key, value in lines) + "\n"

    def _features(self, capability: int) -> list[str]:
        """The names of a CPU's features, from the kernel's own table of them."""
        objects, table = self.objects, self.profile.symbol("x86_cap_flags")
        leafs = objects.types.enum("cpuid_leafs")
        if table is None or not leafs:
            return []
        names = []
        count = leafs.get("NR_CPUID_WORDS", max(leafs.values()) + 1)  # words of errata follow those of features
        words = objects.memory.read(capability, 4 * min(count, FEATURE_LIMIT))
        for bit in range(8 * len(words)):
            if not words[bit // 8] >> bit % 8 & 1:
                continue
            name = objects.pointer(table + bit * objects.word)
            if not objects.is_pointer(name & ~1):
                continue
            try:
                names.append(objects.text(name, 32))
            except FaultError:
                continue
        return names
