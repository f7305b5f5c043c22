"""/proc/PID/stat and statm: a process as numbers.

The formats have no word for «not known»: what memory does not tell is 0, as /proc shows what a reader may not see;
but the state is `?`, and process group and session are -1, as /proc has them of a task that has just ended (0 are those
of the kernel's threads).

Sources: Linux fs/proc/array.c (do_task_stat), fs/proc/task_mmu.c (task_statm), kernel/sched/cputime.c
(cputime_adjust), include/linux/kdev_t.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import FaultError
from engine.oslayers.linux.fields import PROCESS_GROUP, SESSION, Fields
from engine.oslayers.linux.percpu import PerCpu
from engine.oslayers.linux.tasks import TICKS, TaskRecord

LOW_SIGNALS = 0x7FFF_FFFF
"""stat shows the first 31 signals alone."""
RLIMIT_RSS = 5
STOPPED_OR_ENDING = 0x1 | 0x4
"""SIGNAL_STOP_STOPPED, SIGNAL_GROUP_EXIT (include/linux/sched/signal.h)."""
_IGNORED = 1
"""SIG_IGN; SIG_DFL is 0."""


def signal_sets(fields: Fields) -> tuple[int, int] | None:
    """The signals that are ignored and those that are caught, a bit for each from signal 1 on; None: not known."""
    layout = fields.objects.types.struct("sighand_struct")
    actions = layout.get("action") if layout else None
    handler = layout.get("action[0].sa.sa_handler") if layout and actions else None
    data = fields.data("hand", "action")
    if actions is None or handler is None or data is None or not actions.type.count:
        return None
    one = actions.size // actions.type.count
    ignored = caught = 0
    for index in range(actions.type.count):
        start = index * one + handler.offset - actions.offset
        value = int.from_bytes(data[start : start + handler.size], "little")
        ignored |= (value == _IGNORED) << index
        caught |= (value > _IGNORED) << index
    return ignored, caught


def processor_times(fields: Fields, threads: Sequence[Fields]) -> tuple[int | None, int | None]:
    """Nanoseconds in user mode and in the kernel, of a thread group or of one task, as the kernel would tell them.

    Where the two are sampled by ticks, they are scaled so that their sum is the exact run time, and never go back
    behind what was told before (`prev_cputime`).
    """
    place = "signal" if threads else "task"
    times = [_summed(fields, threads, name) for name in ("utime", "stime")]
    run = _summed(fields, threads, "se.sum_exec_runtime", "sum_sched_runtime")
    told = [fields.number(place, f"prev_cputime.{name}") for name in ("utime", "stime")]
    if None in times or run is None or None in told:
        return times[0], times[1]
    user, system = (time or 0 for time in times)
    told_user, told_system = (time or 0 for time in told)
    if told_user + told_system >= run:
        return told_user, told_system
    if not system:
        system = 0
    elif not user:
        system = run
    else:
        system = min(system * run // (system + user), run)
    system = max(system, told_system)
    if run - system < told_user:
        return told_user, run - told_user
    return run - system, system


def _summed(fields: Fields, threads: Sequence[Fields], name: str, of_ended: str | None = None) -> int | None:
    """A number of one task; of a group the sum over its threads, those that have ended in its signal_struct."""
    if not threads:
        return fields.number("task", name)
    counts = [fields.number("signal", of_ended or name), *(thread.number("task", name) for thread in threads)]
    return None if None in counts else sum(count or 0 for count in counts)


def terminal(fields: Fields) -> tuple[int, int]:
    """(device number, process group in the foreground) of the controlling terminal; (0, -1) without one."""
    objects = fields.objects
    tty, driver = objects.types.struct("tty_struct"), objects.types.struct("tty_driver")
    at = fields.number("signal", "tty")
    if not at or tty is None or driver is None or not objects.is_pointer(at):
        return 0, -1
    try:
        its = objects.pointer(at + tty["driver"].offset)
        major, minor = objects.value(its, driver["major"]), objects.value(its, driver["minor_start"])
        minor += objects.value(at, tty["index"])
        group = fields.numbers_of(objects.pointer(at + tty.first("ctrl.pgrp", "pgrp").offset))
    except FaultError:
        return 0, -1
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12, group[0][0] if group else -1


def stat_text(one: TaskRecord, fields: Fields, threads: Sequence[Fields], page: int) -> str:
    """/proc/PID/stat: 52 fields in one line; with `threads` of the whole group, without of the one task alone."""

    def first(numbers: list[tuple[int, int]]) -> int:
        return numbers[0][0] if numbers else -1

    def plus(name: str, by: int) -> int | None:
        value = fields.number("task", name)
        return None if value is None else value + by

    def ticks(nanoseconds: int | None) -> int | None:
        return None if nanoseconds is None else nanoseconds // TICKS

    def low(value: int | None) -> int | None:
        return None if value is None else value & LOW_SIGNALS

    pages = fields.number("mm", "total_vm")
    user, system = processor_times(fields, threads)
    ignored, caught = signal_sets(fields) or (None, None)
    waits = one.state != "R" and len(threads) < 2 and fields.has("task", "__state")
    guest = _summed(fields, threads, "gtime")
    numbers: list[int | None] = [
        one.ppid, first(fields.pid_of_kind(PROCESS_GROUP)), first(fields.pid_of_kind(SESSION)), *terminal(fields),
        one.flags, _summed(fields, threads, "min_flt"), fields.number("signal", "cmin_flt"),
        _summed(fields, threads, "maj_flt"), fields.number("signal", "cmaj_flt"), ticks(user), ticks(system),
        ticks(fields.number("signal", "cutime")), ticks(fields.number("signal", "cstime")),
        plus("prio", -100), plus("static_prio", -120), one.threads, 0, one.start_ticks,
        None if pages is None else pages * page, fields.resident(),
        fields.number("signal", f"rlim[{RLIMIT_RSS}].rlim_cur"),
        fields.number("mm", "start_code"), fields.number("mm", "end_code"), fields.number("mm", "start_stack"), 0, 0,
        low(fields.number("task", "pending.signal.sig[0]")), low(fields.number("task", "blocked.sig[0]")),
        low(ignored), low(caught), int(waits), 0, 0, fields.number("task", "exit_signal"),
        fields.number("task", "thread_info.cpu", "cpu"), fields.number("task", "rt_priority"),
        fields.number("task", "policy"), ticks(fields.number("delays", "blkio_delay")), ticks(guest),
        ticks(fields.number("signal", "cgtime")), fields.number("mm", "start_data"), fields.number("mm", "end_data"),
        fields.number("mm", "start_brk"), fields.number("mm", "arg_start"), fields.number("mm", "arg_end"),
        fields.number("mm", "env_start"), fields.number("mm", "env_end"), _exit_code(fields, threads),
    ]  # fmt: skip
    text = " ".join(str(number or 0) for number in numbers)
    return f"{one.pid} ({one.name}) {one.state or '?'} {text}\n"


def _exit_code(fields: Fields, threads: Sequence[Fields]) -> int | None:
    """Of a group that has ended or stands still the group's own: told since kthreads have a structure each (5.17)."""
    if threads and fields.has("task", "worker_private") and (fields.number("signal", "flags") or 0) & STOPPED_OR_ENDING:
        return fields.number("signal", "group_exit_code")
    return fields.number("task", "exit_code")


def statm_text(fields: Fields, page: int, per_cpu: PerCpu | None) -> str:
    """/proc/PID/statm: sizes in pages; all 0 of what has no address space."""
    size = fields.number("mm", "total_vm")
    shared = [fields.exact_pages(kind, per_cpu) for kind in (0, 3)]
    resident = sum(count or 0 for count in (*shared, fields.exact_pages(1, per_cpu)))
    data = [fields.number("mm", name) for name in ("data_vm", "stack_vm")]
    numbers = (size, resident, sum(count or 0 for count in shared), text_size(fields, page) // page, 0,
               sum(count or 0 for count in data), 0)  # fmt: skip
    return " ".join(str(number or 0) for number in numbers) + "\n"


def text_size(fields: Fields, page: int) -> int:
    """Bytes of the program's code, in whole pages."""
    start, stop = fields.number("mm", "start_code") or 0, fields.number("mm", "end_code") or 0
    return max(0, -(-stop // page) * page - start // page * page)

