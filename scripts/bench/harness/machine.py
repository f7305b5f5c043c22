"""The machine: what it must have, one CPU to pin to, and how much of it others used meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

HERE = Path(__file__).resolve().parent.parent
URGENT = -20
"""The nice value of what is measured."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class CannotMeasureError(Exception):
    """Something that a benchmark needs is missing or failed; the text is for the person who started it."""


@dataclass(frozen=True)
class Tools:
    """The compiled programs."""

    client: Path
    baseline_fs: Path


def build(directory: Path, *, fuse: bool = True) -> Tools:
    """Compile the client and, if `fuse`, the file system in C into `directory`."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise CannotMeasureError("no C compiler was found: install gcc (Debian: apt install gcc)")
    tools = Tools(directory / "client", directory / "baseline_fs")
    _compile(compiler, HERE / "client.c", tools.client, [])
    if fuse:
        _compile(compiler, HERE / "baseline_fs.c", tools.baseline_fs, _fuse_flags())
    return tools


def _fuse_flags() -> list[str]:
    program = shutil.which("pkg-config")
    if program is None:
        raise CannotMeasureError("pkg-config was not found: install it (Debian: apt install pkg-config)")
    found = subprocess.run([program, "--cflags", "--libs", "fuse3"], capture_output=True, text=True, timeout=30)
    if found.returncode:
        raise CannotMeasureError("the headers of libfuse 3 were not found (Debian: apt install libfuse3-dev)")
    return found.stdout.split()


def _compile(compiler: str, source: Path, target: Path, flags: list[str]) -> None:
    command = [compiler, "-O2", "-o", str(target), str(source), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), "unknown error")
        raise CannotMeasureError(f"{source.name} cannot be compiled: {reason.strip()}")


def cloudfs_program() -> Path:
    """The `cloudfs` beside this Python."""
    program = Path(sys.executable).parent / "cloudfs"
    if not program.exists():
        raise CannotMeasureError(f"cloudfs is not installed beside {sys.executable}: run pip install -e . with it")
    return program


def require_fuse() -> None:
    """Raise CannotMeasureError where this user cannot mount."""
    if not os.path.exists("/dev/fuse"):
        raise CannotMeasureError("/dev/fuse does not exist: load the module (modprobe fuse) or pass the device in")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise CannotMeasureError("/dev/fuse cannot be opened by this user: run as root or ask for access to it")
    if os.geteuid() and shutil.which("fusermount3") is None:
        raise CannotMeasureError("fusermount3 was not found, users need it to mount (Debian: apt install fuse3)")


@contextlib.contextmanager
def scratch_directory(size: int) -> Iterator[Path]:
    """A directory on tmpfs with room for `size` bytes, removed at the end whatever happens."""
    parent = Path("/dev/shm")
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise CannotMeasureError("/dev/shm is not there or not writable: the files to read must lie in memory")
    free = shutil.disk_usage(parent).free
    if free < size + (64 << 20):
        raise CannotMeasureError(
            f"/dev/shm has {free >> 20} MiB free and {size >> 20} are needed: try --quick or --size"
        )
    directory = Path(tempfile.mkdtemp(prefix="cloudfs-bench-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def busy_seconds(cpu: int) -> float:
    """Seconds since boot in which `cpu` worked for anyone, another virtual machine too; proc_stat(5)."""
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            if line.startswith(f"cpu{cpu} "):
                user, nice, system, _idle, _wait, interrupt, soft, steal = map(int, line.split()[1:9])
                return (user + nice + system + interrupt + soft + steal) / TICKS_PER_SECOND
    raise CannotMeasureError(f"/proc/stat knows no CPU {cpu}")


def quietest_cpu() -> int:
    """The allowed CPU that did least in the last 0.3 seconds."""
    allowed = sorted(os.sched_getaffinity(0))
    before = {cpu: busy_seconds(cpu) for cpu in allowed}
    time.sleep(0.3)
    return min(allowed, key=lambda cpu: (round(busy_seconds(cpu) - before[cpu], 2), -cpu))


@contextlib.contextmanager
def measuring(cpu: int | None) -> Iterator[None]:
    """What is started inside goes before all other programs, where this user may say so (root), and on one CPU.

    With None it may run on any.
    """
    affinity, niceness = os.sched_getaffinity(0), os.getpriority(os.PRIO_PROCESS, 0)
    try:
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, URGENT)
        if cpu is not None:
            os.sched_setaffinity(0, {cpu})
        yield
    finally:
        os.sched_setaffinity(0, affinity)
        os.setpriority(os.PRIO_PROCESS, 0, niceness)


def process_seconds(pid: int) -> float:
    """CPU seconds of all living threads of a process, to the nanosecond (schedstat, not ticks)."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text("ascii").split()[0])
    return total / 1e9


def describe() -> str:
    """One line on this machine: what a reader needs to judge the figures."""
    model = "unknown processor"
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} CPUs ({model}), Linux {os.uname().release.split('-')[0]}, Python {sys.version.split()[0]}"


@contextlib.contextmanager
def unwinding_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program the way Ctrl-C does, so that everything is cleaned up."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
