"""/proc/PID/status and limits: a process for people. A line whose number is not known is left out.

Sources: Linux fs/proc/array.c (proc_pid_status), fs/proc/task_mmu.c (task_mem), fs/proc/base.c (lnames),
include/linux/{cred,seccomp,user_namespace}.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.fields import PROCESS_GROUP, SESSION, Fields
from engine.oslayers.linux.percpu import CPU_LIMIT, PerCpu, mask_bits
from engine.oslayers.linux.procstat import signal_sets, text_size
from engine.oslayers.linux.tasks import TaskRecord, Tasks

STATE_NAMES = {
    "R": "running", "S": "sleeping", "D": "disk sleep", "T": "stopped", "t": "tracing stop", "X": "dead",
    "Z": "zombie", "P": "parked", "I": "idle",
}  # fmt: skip
GROUPS_LIMIT = 65536
"""NGROUPS_MAX (include/uapi/linux/limits.h)."""
RLIMIT_SIGPENDING = 11
_CAPABILITIES = {"CapInh": "cap_inheritable", "CapPrm": "cap_permitted", "CapEff": "cap_effective",
                 "CapBnd": "cap_bset", "CapAmb": "cap_ambient"}  # fmt: skip
_LIMITS = (
    ("Max cpu time", "seconds"), ("Max file size", "bytes"), ("Max data size", "bytes"), ("Max stack size", "bytes"),
    ("Max core file size", "bytes"), ("Max resident set", "bytes"), ("Max processes", "processes"),
    ("Max open files", "files"), ("Max locked memory", "bytes"), ("Max address space", "bytes"),
    ("Max file locks", "locks"), ("Max pending signals", "signals"), ("Max msgqueue size", "bytes"),
    ("Max nice priority", ""), ("Max realtime priority", ""), ("Max realtime timeout", "us"),
)  # fmt: skip
"""By number (include/uapi/asm-generic/resource.h; architectures with another order are none of ours)."""

Line = tuple[str, object]


class Status:
    """The lines of one process's status, or of one of its threads."""

    def __init__(self, tasks: Tasks, one: TaskRecord, fields: Fields, page: int, per_cpu: PerCpu | None) -> None:
        self.tasks = tasks
        self.one = one
        self.fields = fields
        self.page = page
        self.per_cpu = per_cpu

    def text(self) -> str:
        """The whole of it."""
        parts: Sequence[Callable[[], Iterator[Line]]] = (
            self._identity, self._numbers_in_namespaces, self._memory, self._signals, self._rights, self._placement,
        )  # fmt: skip
        return "".join(f"{key}:\t{value}\n" for part in parts for key, value in part() if value is not None)

    def _number(self, place: str, *paths: str) -> int | None:
        return self.fields.number(place, *paths)

    def _identity(self) -> Iterator[Line]:
        one = self.one
        umask = self._number("fs", "umask")
        yield "Name", one.name.replace("\\", "\\\\").replace("\n", "\\n")
        yield "Umask", None if umask is None else f"{umask:04o}"
        yield "State", f"{one.state} ({STATE_NAMES.get(one.state, 'unknown')})" if one.state else None
        yield "Tgid", one.tgid
        yield "Ngid", self._numa_group()
        yield "Pid", one.pid
        yield "PPid", one.ppid
        yield "TracerPid", self._tracer()
        for key, prefix in (("Uid", "uid"), ("Gid", "gid")):
            numbers = [self._number("cred", f"{kind}{prefix}.val") for kind in ("", "e", "s", "fs")]
            yield key, None if None in numbers else "\t".join(str(number) for number in numbers)
        yield "FDSize", self._table_size()
        yield "Groups", self._groups()

    def _numa_group(self) -> int | None:
        """0 without one; None where the types do not tell all members."""
        if not self.fields.objects.types.whole and not self.fields.has("task", "numa_group"):
            return None
        group = self._number("task", "numa_group")
        layout = self.fields.objects.types.struct("numa_group")
        try:
            return self.fields.objects.value(group, layout["gid"]) if group and layout else 0
        except (FaultError, NotFoundError):
            return 0

    def _tracer(self) -> int | None:
        """The PID of who traces it (PT_PTRACED is bit 0 of `ptrace`)."""
        traced, parent = self._number("task", "ptrace"), self._number("task", "parent")
        if traced is None:
            return None
        if not traced or not parent:
            return 0
        try:
            return self.fields.objects.value(parent, self.tasks.task["tgid"])
        except FaultError:
            return None

    def _table_size(self) -> int | None:
        table, layout = self._number("files", "fdt"), self.fields.objects.types.struct("fdtable")
        if layout is None:
            return None
        if self.fields.address("files") is None:
            return 0
        try:
            return self.fields.objects.value(table, layout["max_fds"]) if table and layout else None
        except FaultError:
            return None

    def _groups(self) -> str | None:
        """Supplementary groups, each followed by a space; a space alone where there are none."""
        objects, at = self.fields.objects, self._number("cred", "group_info")
        layout = objects.types.struct("group_info")
        if not at or layout is None:
            return None
        try:
            count, first = objects.value(at, layout["ngroups"]), layout["gid"]
            data = objects.memory.read(at + first.offset, 4 * count) if 0 <= count <= GROUPS_LIMIT else None
        except (FaultError, NotFoundError):
            return None
        if data is None:
            return None
        numbers = (int.from_bytes(data[start : start + 4], "little") for start in range(0, len(data), 4))
        return " ".join(str(number) for number in numbers) + " "

    def _numbers_in_namespaces(self) -> Iterator[Line]:
        fields = self.fields
        own = fields.numbers_of(self._number("task", "thread_pid"))
        if not own:
            return
        group = fields.numbers_of(self._leader_pid()) or own
        for key, numbers in (
            ("NStgid", group), ("NSpid", own), ("NSpgid", fields.pid_of_kind(PROCESS_GROUP)),
            ("NSsid", fields.pid_of_kind(SESSION)),
        ):  # fmt: skip
            inside = {namespace: number for number, namespace in numbers}
            yield key, "\t".join(str(inside.get(namespace, 0)) for _, namespace in own)

    def _leader_pid(self) -> int | None:
        leader, layout = self._number("task", "group_leader"), self.tasks.task.get("thread_pid")
        try:
            return self.fields.objects.pointer(leader + layout.offset) if leader and layout else None
        except FaultError:
            return None

    def _memory(self) -> Iterator[Line]:
        """As task_mem; a kernel thread and a zombie have none of these lines."""
        fields = self.fields
        if fields.address("mm") is None:
            return

        def size(pages: int | None) -> str | None:
            return None if pages is None else f"{pages * self.page >> 10:8d} kB"

        total, code = self._number("mm", "total_vm"), text_size(fields, self.page)
        indices = {"File": 0, "Anon": 1, "Swap": 2, "Shmem": 3}
        kinds = {key: fields.exact_pages(index, self.per_cpu) for key, index in indices.items()}
        now = None if None in kinds.values() else sum(kinds[key] or 0 for key in ("File", "Anon", "Shmem"))
        peaks = self._number("mm", "hiwater_vm"), self._number("mm", "hiwater_rss")
        executable = self._number("mm", "exec_vm")
        code = 0 if executable is None else min(code, executable * self.page)
        yield "VmPeak", size(None if None in (total, peaks[0]) else max(total or 0, peaks[0] or 0))
        yield "VmSize", size(total)
        yield "VmLck", size(self._number("mm", "locked_vm"))
        yield "VmPin", size(self._number("mm", "pinned_vm.counter", "pinned_vm"))
        yield "VmHWM", size(None if None in (now, peaks[1]) else max(now or 0, peaks[1] or 0))
        yield "VmRSS", size(now)
        yield "RssAnon", size(kinds["Anon"])
        yield "RssFile", size(kinds["File"])
        yield "RssShmem", size(kinds["Shmem"])
        yield "VmData", size(self._number("mm", "data_vm"))
        yield "VmStk", size(self._number("mm", "stack_vm"))
        yield "VmExe", None if executable is None else f"{code >> 10:8d} kB"
        yield "VmLib", None if executable is None else f"{(executable * self.page - code) >> 10:8d} kB"
        tables = self._number("mm", "pgtables_bytes.counter")
        yield "VmPTE", None if tables is None else f"{tables >> 10:8d} kB"
        yield "VmSwap", size(kinds["Swap"])
        huge = self._number("mm", "hugetlb_usage.counter")
        yield "HugetlbPages", size(huge)
        dump = self._number("mm", "core_state")
        dump = self._number("signal", "core_state") if dump is None else dump  # since 5.16
        yield "CoreDumping", None if dump is None else int(bool(dump))

    def _signals(self) -> Iterator[Line]:
        def mask(value: int | None) -> str | None:
            return None if value is None else f"{value:016x}"

        yield "Threads", self.one.threads
        limit, queued = self._number("signal", f"rlim[{RLIMIT_SIGPENDING}].rlim_cur"), self._queued()
        yield "SigQ", None if None in (limit, queued) else f"{queued}/{limit}"
        yield "SigPnd", mask(self._number("task", "pending.signal.sig[0]"))
        yield "ShdPnd", mask(self._number("signal", "shared_pending.signal.sig[0]"))
        yield "SigBlk", mask(self._number("task", "blocked.sig[0]"))
        ignored, caught = signal_sets(self.fields) or (None, None)
        yield "SigIgn", mask(ignored)
        yield "SigCgt", mask(caught)

    def _queued(self) -> int | None:
        """Signals that wait for processes of its user: counted in ucounts since 5.14, in user_struct before."""
        objects = self.fields.objects
        layout, counts = objects.types.struct("user_struct"), objects.types.struct("ucounts")
        before = layout.get("sigpending.refs.counter", "sigpending.counter") if layout else None
        try:
            if before is not None:
                user = self._number("cred", "user")
                return objects.value(user, before) if user else None
            for kinds, array in (("rlimit_type", "rlimit"), ("ucount_type", "ucount")):
                index = (objects.types.enum(kinds) or {}).get("UCOUNT_RLIMIT_SIGPENDING")
                member = counts.get(f"{array}[{index}].counter") if counts else None
                at = self._number("cred", "ucounts")
                if index is not None and member is not None and at:
                    return objects.value(at, member)
        except FaultError:
            return None
        return None

    def _rights(self) -> Iterator[Line]:
        for key, member in _CAPABILITIES.items():
            value = self._number("cred", f"{member}.val")
            if value is None:  # two words of 32 bits before 6.3
                parts = [self._number("cred", f"{member}.cap[{index}]") for index in (0, 1)]
                value = None if None in parts else (parts[0] or 0) | (parts[1] or 0) << 32
            yield key, None if value is None else f"{value:016x}"
        flags = self._number("task", "atomic_flags")
        yield "NoNewPrivs", None if flags is None else flags & 1
        yield "Seccomp", self._number("task", "seccomp.mode")
        yield "Seccomp_filters", self._number("task", "seccomp.filter_count.counter")

    def _placement(self) -> Iterator[Line]:
        cpus, limit = self.fields.data("task", "cpus_mask"), self._cpu_count()
        if cpus is not None:
            bits = mask_bits(cpus[: -(-limit // 8)])
            yield "Cpus_allowed", bitmap_text([bit for bit in bits if bit < limit], limit)
            yield "Cpus_allowed_list", list_text([bit for bit in bits if bit < limit])
        nodes = self.fields.data("task", "mems_allowed")
        if nodes is not None:
            if len(nodes) > 8:  # of a shorter one the count of its bits is not known
                yield "Mems_allowed", bitmap_text(mask_bits(nodes), 8 * len(nodes))
            yield "Mems_allowed_list", list_text(mask_bits(nodes))
        yield "voluntary_ctxt_switches", self._number("task", "nvcsw")
        yield "nonvoluntary_ctxt_switches", self._number("task", "nivcsw")

    def _cpu_count(self) -> int:
        """`nr_cpu_ids`: how many bits of a set of CPUs are shown."""
        address = self.tasks.profile.symbol("nr_cpu_ids")
        try:
            count = self.fields.objects.memory.u32(address) if address is not None else 0
        except FaultError:
            count = 0
        return count if 0 < count <= CPU_LIMIT else max(self.per_cpu.cpus if self.per_cpu else [0]) + 1


def bitmap_text(bits: list[int], count: int) -> str:
    """A set of `count` bits in hexadecimal, 32 to a group, as %*pb prints it."""
    value = sum(1 << bit for bit in bits)
    groups = [f"{value >> start & 0xFFFF_FFFF:08x}" for start in range(0, count, 32)][::-1]
    groups[0] = groups[0][8 - ((count % 32 or 32) + 3) // 4 :]
    return ",".join(groups)


def list_text(bits: list[int]) -> str:
    """A set of bits as ranges, as %*pbl prints it: `0-3,8`."""
    parts: list[list[int]] = []
    for bit in bits:
        if parts and parts[-1][1] == bit - 1:
            parts[-1][1] = bit
        else:
            parts.append([bit, bit])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def limits_text(fields: Fields, word: int) -> str | None:
    """/proc/PID/limits; None where they cannot be read."""
    unlimited = (1 << 8 * word) - 1

    def shown(value: int) -> str:
        return "unlimited" if value == unlimited else str(value)

    lines = [f"{'Limit':<25} {'Soft Limit':<20} {'Hard Limit':<20} {'Units':<10}\n"]
    for index, (name, unit) in enumerate(_LIMITS):
        soft, hard = (fields.number("signal", f"rlim[{index}].rlim_{kind}") for kind in ("cur", "max"))
        if soft is None or hard is None:
            return None
        lines.append(f"{name:<25} {shown(soft):<20} {shown(hard):<20} {f'{unit:<10}' if unit else ''}\n")
    return "".join(lines)
