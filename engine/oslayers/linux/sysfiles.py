"""Files of the whole system in the formats of /proc. What memory does not tell is not there.

Sources: Linux fs/proc/{version,cmdline,uptime,loadavg,filesystems}.c, kernel/module/procfs.c, kernel/pid.c,
drivers/char/random.c, lib/vsprintf.c (%pU); releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engine.errors import FaultError, NotFoundError
from engine.oslayer import SystemFiles
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.memory_counts import MemoryCounts
from engine.oslayers.linux.modules import KernelModule, kernel_modules
from engine.oslayers.linux.mounts import MountTable
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.processors import Processors
from engine.oslayers.linux.procfiles import encoded
from engine.oslayers.linux.system import System
from engine.oslayers.linux.tasks import TICKS, Tasks
from engine.oslayers.linux.walks import chain, hlist, ring

FIXED = 11
"""FSHIFT: how many bits of a load average stand behind the point (include/linux/sched/loadavg.h)."""
FS_REQUIRES_DEV = 1
NANOSECONDS = 1_000_000_000
MOST_PID = "sys/kernel/pid_max"
NEEDED = {
    "filesystems": "file_system_type.next", "loadavg": "pid_namespace.idr", "modules": "module.refcnt",
    "mounts": "mount.mnt_id", "stat": "kernel_cpustat.cpustat",
}  # fmt: skip
"""File → the member that has to be known of a kernel for it."""


class LinuxSystemFiles(SystemFiles):
    """The files of a kernel."""

    def __init__(self, kernel: Kernel, system: System, tasks: Tasks, thread_count: Callable[[], int]) -> None:
        self.kernel = kernel
        self.system = system
        self.tasks = tasks
        self._thread_count = thread_count
        self._made: dict[str, tuple[Callable[[Objects], str | None], tuple[str, ...]]] = {
            "cmdline": (lambda _: _line(system.command_line()), ()),
            "cpuinfo": (lambda objects: Processors(kernel.profile, objects).cpuinfo_text(), ("__per_cpu_offset",)),
            "filesystems": (self._file_systems, ("file_systems",)),
            "loadavg": (self._load, ("avenrun",)),
            "meminfo": (lambda objects: self._memory(objects).text(), ("vm_node_stat", "vm_zone_stat")),
            "modules": (self._modules, ()),
            "mounts": (self._mounts, ()),
            "stat": (self._stat, ("kernel_cpustat",)),
            "sys/kernel/domainname": (lambda _: _line(system.names().get("domainname")), ()),
            "sys/kernel/hostname": (lambda _: _line(system.names().get("nodename")), ()),
            "sys/kernel/osrelease": (lambda _: _line(system.names().get("release")), ()),
            "sys/kernel/ostype": (lambda _: _line(system.names().get("sysname")), ()),
            MOST_PID: (self._most_pid, ()),
            "sys/kernel/random/boot_id": (self._boot_identifier, ("sysctl_bootid",)),
            "sys/kernel/version": (lambda _: _line(system.names().get("version")), ()),
            "uptime": (self._uptime, ()),
            "version": (lambda _: _line(system.banner()), ()),
        }

    def names(self) -> tuple[str, ...]:
        """See `SystemFiles.names`: those whose symbols this kernel tells."""
        profile = self.kernel.profile
        known = (name for name, (_, symbols) in self._made.items() if all(map(profile.symbol, symbols)))
        return tuple(name for name in known if self._is_told(name))

    def _is_told(self, name: str) -> bool:
        if name == MOST_PID:
            return self._knows_most_pid()
        if name == "uptime":
            return self.system.clock() is not None
        if name == "meminfo":
            return self.kernel.types.enum("zone_stat_item") is not None
        return name not in NEEDED or self.kernel.tells(NEEDED[name])

    def read(self, name: str) -> bytes:
        """See `SystemFiles.read`."""
        make = self._made.get(name)
        text: str | None = None
        if make is not None:
            try:
                text = make[0](self.kernel.objects())
            except FaultError:
                text = None
        if text is None:
            raise NotFoundError(f"what stands in /proc/{name} is not known of this kernel")
        return encoded(text)

    def _memory(self, objects: Objects) -> MemoryCounts:
        return MemoryCounts(self.kernel.profile, objects, 1 << self.kernel.found.candidate.user.page_bits)

    def _uptime(self, objects: Objects) -> str | None:
        """Since boot, and how long all CPUs together had nothing to do."""
        clock = self.system.clock()
        if clock is None:
            return None
        try:
            idle = Processors(self.kernel.profile, objects).idle()
        except (FaultError, NotFoundError):
            idle = 0
        times = (f"{time // NANOSECONDS}.{time % NANOSECONDS // TICKS:02d}" for time in (clock.uptime, idle))
        return " ".join(times) + "\n"

    def _stat(self, objects: Objects) -> str:
        return Processors(self.kernel.profile, objects).stat_text(self.system.boot_time())

    def _load(self, objects: Objects) -> str:
        """Three averages, tasks that run of all there are, the last PID that was given."""
        start, parts = self.kernel.profile.require("avenrun"), []
        for index in range(3):
            load = objects.pointer(start + index * objects.word) + (1 << FIXED) // 200
            parts.append(f"{load >> FIXED}.{(load & (1 << FIXED) - 1) * 100 >> FIXED:02d}")
        try:
            running = Processors(self.kernel.profile, objects).running()
        except (FaultError, NotFoundError):
            running = None
        member = objects.struct("pid_namespace")["idr.idr_next"]
        last = objects.value(self.kernel.profile.require("init_pid_ns"), member) - 1
        return f"{' '.join(parts)} {running or 0}/{self._thread_count()} {last}\n"

    def _mounts(self, objects: Objects) -> str:
        """Those of the first process: /proc/mounts itself is a link to the reader's own."""
        first = next(iter(self.tasks.ring(objects)[0]), None)
        if first is None:
            raise NotFoundError("there is no process whose mounts could be shown")
        return "".join(mount.mounts_line() for mount in MountTable(objects, self.tasks).of(first))

    def _file_systems(self, objects: Objects) -> str:
        layout = objects.struct("file_system_type")
        name, flags = layout["name"], layout["fs_flags"]
        lines, head = [], self.kernel.profile.require("file_systems")
        if "next" in layout:
            found = chain(objects, objects.pointer(head), layout["next"], 1 << 12, kind="file system list")
        else:  # 7.2
            found = hlist(objects, head, layout["list"], 1 << 12, kind="file system list")
        for address in found:
            text = objects.text(objects.pointer(address + name.offset), 64)
            device = objects.value(address, flags) & FS_REQUIRES_DEV
            lines.append(f"{'' if device else 'nodev'}\t{text}\n")
        return "".join(lines)

    def _knows_most_pid(self) -> bool:
        layout = self.kernel.types.struct("pid_namespace")
        return self.kernel.profile.symbol("pid_max") is not None or (layout is not None and "pid_max" in layout)

    def _most_pid(self, objects: Objects) -> str | None:
        layout = objects.struct("pid_namespace")
        member, symbol = layout.get("pid_max"), self.kernel.profile.symbol("pid_max")
        if member is not None:  # of each namespace since 6.14
            return f"{objects.value(self.kernel.profile.require('init_pid_ns'), member)}\n"
        return None if symbol is None else f"{objects.memory.u32(symbol)}\n"

    def _boot_identifier(self, objects: Objects) -> str | None:
        data = objects.memory.read(self.kernel.profile.require("sysctl_bootid"), 16)
        text = data.hex()
        if not any(data):
            return None  # made when it is first read
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}\n"

    def _modules(self, objects: Objects) -> str:
        return "".join(
            f"{module.name} {module.size} {_uses(objects, module)} {module.state} {module.info.base or 0:#018x}"
            f"{_taints(objects, module)}\n"
            for module in kernel_modules(self.kernel)
        )


def _line(text: str | None) -> str | None:
    return None if text is None else text + "\n"


def _users(objects: Objects, module: KernelModule) -> Iterator[str]:
    """The names of the modules that use one (struct module_use)."""
    layout, use = objects.struct("module"), objects.struct("module_use")
    head, link = module.address + layout["source_list"].offset, use["source_list"]
    for address in ring(objects, head, link, 1 << 14, kind="module use list"):
        yield objects.text_in(objects.pointer(address + use["source"].offset), layout["name"])


def _uses(objects: Objects, module: KernelModule) -> str:
    """How often it is in use, and by which modules; one that has a beginning and no end stays for ever."""
    layout = objects.struct("module")
    count = objects.value(module.address, layout["refcnt.counter"]) - 1  # MODULE_REF_BASE
    users = [f"{name}," for name in _users(objects, module)]
    if objects.pointer(module.address + layout["init"].offset) and not objects.pointer(
        module.address + layout["exit"].offset
    ):
        users.append("[permanent],")
    return f"{count} {''.join(users) or '-'}"


TAINTS = {0: "P", 12: "O", 13: "E", 10: "C", 15: "K", 18: "N", 16: "X"}
"""The letters of taints that a module brings (include/linux/panic.h)."""


def _taints(objects: Objects, module: KernelModule) -> str:
    member = objects.struct("module").get("taints")
    value = 0 if member is None else objects.value(module.address, member)
    letters = "".join(letter for bit, letter in sorted(TAINTS.items()) if value >> bit & 1)
    return f" ({letters})" if letters else ""
