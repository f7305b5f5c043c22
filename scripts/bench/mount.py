"""The mount against a small file system in C: one run, all pinned to one CPU, medians of rounds in turn.

    .venv/bin/python scripts/bench/mount.py [--quick] [--unpinned] [--stock] [--only SECTION] [--json FILE]

What each figure is and how to read it stands in README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import figures, overtime
from harness.daemons import holding, mounted, set_read_ahead
from harness.figures import GIB, MIB, Amounts
from harness.machine import (
    HERE,
    CannotMeasureError,
    Tools,
    build,
    cloudfs_program,
    quietest_cpu,
    require_fuse,
    scratch_directory,
)
from harness.program import Outcome, finish, options, rounds_of
from harness.runs import Line, Runner, Side
from harness.table import Table, at_most

C, STOCK, CLOUDFS, AGAIN = "C libfuse", "--stock-loop", "cloudfs", "C again"
SPINNING = f"--spin {figures.SPIN}"
TMPFS, PROC, REMOTE = "tmpfs", "/proc/PID/mem", "C vm_readv"
FILE_SEED, HOLDER_SEED = 1, 2
ENTRIES = 10_000
READ_AHEAD_KIB = 1024
"""What cloudfs sets for its mounts, where it may; the file system in C gets the same."""


@dataclass
class Bench:
    """What all sections need."""

    runner: Runner
    tools: Tools
    directory: Path
    size: int
    amounts: Amounts
    stock: bool
    noise: bool
    tables: list[Table] = field(default_factory=list)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def names(self) -> list[str]:
        """The sides that are compared with C."""
        if self.noise:
            return [AGAIN]
        return [CLOUDFS, STOCK] if self.stock else [CLOUDFS]

    def sides(self, label: str, yardstick: Mount, subject: Mount, start: int = 0) -> list[Side]:
        """C and what is compared with it, mounted until the section ends."""
        command = [self.tools.baseline_fs, *yardstick.words]
        found = [self.side(label, C, command, yardstick, start)]
        for name in self.names:
            if self.noise:
                found.append(self.side(label, name, command, yardstick, start))
            else:
                options = ["--stock-loop"] if name == STOCK else []
                program = subject.program or [cloudfs_program(), "mount"]
                words = [*program, *options, *subject.words]
                found.append(self.side(label, name, words, subject, start))
        return found

    def side(self, label: str, name: str, command: Sequence[object], mount: Mount, start: int = 0) -> Side:
        """One of them."""
        point = self.directory / f"{label}-{name.strip('-').replace(' ', '-').lower()}"
        words = [str(word) for word in (*command, point)]
        daemon = self.stack.enter_context(mounted(name, words, point, self.runner.cpu))
        return Side(name, {mount.key: daemon.path(mount.path)}, daemon, start)

    def file(self, name: str, size: int) -> Path:
        """A patterned file in memory, until the section ends."""
        path = self.directory / name
        self.stack.callback(path.unlink, missing_ok=True)
        self.runner.client(["fill", path, size, FILE_SEED, 0], None, None)
        return path

    def check(self, side: Side, key: str, size: int, seed: int, period: int = 0) -> None:
        """Bytes first: a fast wrong answer is worth no figure."""
        self.runner.client(["check", side.paths[key], side.start, size, seed, period, 400], None, side.daemon)

    def compare(self, title: str, baseline: str, lines: Callable[[bool], list[Line]]) -> None:
        """A table for each side but C; `lines` is asked with whether it is the stock loop."""
        for name in self.names:
            self.tables.append(self.runner.table(title, baseline, name, lines(name == STOCK)))


@dataclass(frozen=True)
class Mount:
    """How one side is mounted, and the path below its mount point that the work knows as `key`."""

    key: str
    path: str
    words: Sequence[object]
    program: Sequence[object] = ()


def raw_section(bench: Bench) -> None:
    """`phys_mem` of a raw file, read directly."""
    file = bench.file("file", bench.size)
    sides = bench.sides(
        "raw",
        Mount("direct", "direct", ["--file", file]),
        Mount("direct", "connector/raw/phys_mem", [f"raw:{file}"]),
    )
    for side in sides:
        bench.check(side, "direct", bench.size, FILE_SEED)
    for work in figures.reading_works("direct", bench.size, bench.amounts):
        bench.runner.measure(work, sides)
    for work in figures.clients_works("direct", bench.size, bench.amounts):
        bench.runner.measure(work, sides)
    bench.compare(f"phys_mem of a raw file of {bench.size >> 20} MiB, direct I/O", C, figures.raw_lines)
    if STOCK in bench.names:
        lines = figures.loop_lines()
        bench.tables.append(bench.runner.table("The fast loop against the stock loop", STOCK, CLOUDFS, lines))


def apart_section(bench: Bench) -> None:
    """The same from another CPU: each request wakes the daemon's, each answer the client's."""
    if bench.runner.other_cpu is None:
        bench.runner.say("another CPU: nothing is pinned, or there is no other")
        return
    size = min(bench.size, 256 * MIB)
    file = bench.file("file-apart", size)
    mount = Mount("direct", "connector/raw/phys_mem", [f"raw:{file}"])
    sides = bench.sides("apart", Mount("direct", "direct", ["--file", file]), mount)
    command = [cloudfs_program(), "mount", "--spin", figures.SPIN, *mount.words]
    sides.append(bench.side("apart", SPINNING, command, mount))
    for side in sides:
        bench.check(side, "direct", size, FILE_SEED)
    for work in figures.apart_works("direct", size, bench.amounts):
        bench.runner.measure(work, sides)
    title = "phys_mem of a raw file, read from another CPU"
    bench.compare(title, C, lambda _stock: figures.apart_lines(None))
    bench.tables.append(bench.runner.table(title, C, SPINNING, figures.apart_lines(at_most(0.6))))


def time_section(bench: Bench) -> None:
    """Memory and CPU of the daemon at the beginning and at the end of many rounds of mixed work, and at rest."""
    holder = bench.stack.enter_context(holding(bench.tools, 16 * MIB, HOLDER_SEED))
    path = f"os/processes/{holder.pid}/mem"
    side = bench.side("time", CLOUDFS, [cloudfs_program(), "mount"], Mount("memory", path, []), holder.address)
    bench.tables += overtime.tables(bench.runner, side, holder, bench.amounts)


def cache_section(bench: Bench) -> None:
    """`phys_mem` of an immutable raw file, through the page cache."""
    size = min(bench.size, 256 * MIB)
    file = bench.file("cached-file", size)
    sides = bench.sides(
        "cache",
        Mount("cached", "cached", ["--file", file]),
        Mount("cached", "connector/raw/phys_mem", [f"raw:{file}:immutable=yes"]),
    )
    for side in sides:
        if side.daemon is not None:
            set_read_ahead(side.daemon.mountpoint, READ_AHEAD_KIB)
        bench.check(side, "cached", size, FILE_SEED)
    bench.runner.measure(figures.cold_work(size), sides)
    everyone = [Side(TMPFS, {"cached": file}), *sides]
    for work in figures.warm_works(size, bench.amounts):
        bench.runner.measure(work, everyone)
    bench.compare("Page cache, cold: all is asked of the file system", C, figures.cold_lines)
    bench.compare("Page cache, warm: nothing is", TMPFS, figures.warm_lines)


def write_section(bench: Bench) -> None:
    """`phys_mem` of a raw file, written directly."""
    size = min(bench.size, 256 * MIB)
    file = bench.file("written-file", size)
    itself = Side(TMPFS, {"write": file})
    sides = bench.sides(
        "write",
        Mount("write", "direct", ["--file", file]),
        Mount("write", "connector/raw/phys_mem", ["--writable", f"raw:{file}"]),
    )
    for side in sides:
        bench.runner.client(["fill", file, size, FILE_SEED, 0], None, None)
        words = ["write", side.paths["write"], 0, size, MIB, size, figures.WRITE_SEED]
        bench.runner.client(words, None, side.daemon)
        bench.check(itself, "write", size, figures.WRITE_SEED, MIB)
    for work in figures.write_works(size, bench.amounts):
        bench.runner.measure(work, sides)
    bench.check(itself, "write", size, figures.WRITE_SEED, MIB)
    bench.compare("phys_mem of a raw file, written", C, figures.write_lines)


def names_section(bench: Bench) -> None:
    """A directory of many files."""
    words = ["--entries", ENTRIES]
    program = [sys.executable, "-P", HERE / "wide_tree.py"]
    sides = bench.sides("names", Mount("many", "many", words), Mount("many", "many", words, program))
    for side in sides:
        listed = subprocess.run(["ls", "-U", side.paths["many"]], capture_output=True, timeout=60, check=True)
        if listed.stdout.count(b"\n") != ENTRIES:
            raise CannotMeasureError(f"{side.name} does not list {ENTRIES} entries")
    for work in figures.name_works(bench.amounts):
        bench.runner.measure(work, sides)
    bench.compare(f"Names: a directory of {ENTRIES} files", C, figures.name_lines)


def native_section(bench: Bench) -> None:
    """`mem` of a process of this host."""
    holder = bench.stack.enter_context(holding(bench.tools, min(bench.size, GIB), HOLDER_SEED))
    memory = Path(f"/proc/{holder.pid}/mem")
    served = bench.sides(
        "native",
        Mount("memory", "memory", ["--memory", memory, "--remote", holder.pid]),
        Mount("memory", f"os/processes/{holder.pid}/mem", []),
        holder.address,
    )
    yardstick = served[0].daemon
    assert yardstick is not None
    sides = [
        Side(PROC, {"memory": memory}, start=holder.address),
        Side(REMOTE, {"memory": yardstick.path("remote")}, yardstick, holder.address),
        *served,
    ]
    for side in sides:
        bench.check(side, "memory", holder.size, HOLDER_SEED)
    for work in figures.reading_works("memory", holder.size, bench.amounts):
        bench.runner.measure(work, sides)
    title = f"mem of a native process, {holder.size >> 20} MiB"
    bench.compare(title, PROC, figures.native_lines)
    bench.compare(title, C, figures.native_lines_of_c)
    lines = figures.native_lines(True)
    title = "What a file system can reach there: C with process_vm_readv"
    bench.tables.append(bench.runner.table(title, PROC, REMOTE, lines))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "raw": raw_section,
    "apart": apart_section,
    "cache": cache_section,
    "write": write_section,
    "names": names_section,
    "native": native_section,
    "time": time_section,
}


def measure(arguments: argparse.Namespace, directory: Path, size: int) -> Outcome:
    """All tables asked for."""
    tools = build(directory)
    cpu = None if arguments.unpinned else quietest_cpu()
    runner = Runner(tools, cpu, rounds_of(arguments), lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    bench = Bench(
        runner, tools, directory, size, Amounts(4 if arguments.quick else 1), arguments.stock, arguments.noise
    )
    for name in arguments.only or SECTIONS:
        with contextlib.ExitStack() as bench.stack:
            SECTIONS[name](bench)
    place = "not pinned" if runner.cpu is None else "daemons and clients pinned to one CPU"
    return Outcome(bench.tables, runner.remark, f"{place}; medians of {runner.rounds} rounds")


def main() -> int:
    """The exit code."""
    parser = options(__doc__, quick="a quarter of the bytes", rounds=(7, 3), sections=SECTIONS)
    parser.add_argument("--size", type=int, help="MiB of the raw file (default 2048, quick 512)")
    parser.add_argument("--stock", action="store_true", help="measure `cloudfs mount --stock-loop` as well")
    parser.add_argument("--noise", action="store_true", help="C against itself: how far from 1.00 is noise")
    arguments = parser.parse_args()
    size = (arguments.size or (512 if arguments.quick else 2048)) * MIB

    def work() -> Outcome:
        require_fuse()
        with scratch_directory(size) as directory:
            return measure(arguments, directory, size)

    return finish(arguments, work)


if __name__ == "__main__":
    sys.exit(main())
