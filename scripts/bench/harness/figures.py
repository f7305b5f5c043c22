"""What mount.py measures and what it asks for. The goals stand here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.runs import Line, Work, daemon_us, p50_ms, p50_us, p99_us, rate, speed
from harness.table import Goal, at_least, at_most

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
WRITE_SEED = 3
LISTINGS = 4
"""Runs of ls for one sample."""
CLIENTS = (4, 16)
SPIN = 60
"""Microseconds of `cloudfs mount --spin`."""


@dataclass(frozen=True)
class Amounts:
    """How much one sample moves; a `shrink` of 4 moves a quarter."""

    shrink: int

    def size(self, size: int) -> int:
        """Bytes of one sample, whole MiB."""
        return max(16, size // self.shrink >> 20) << 20

    def count(self, number: int) -> int:
        """Operations of one sample."""
        return max(100, number // self.shrink)


# -- reading memory: the same four figures for every file of it ------------------------------------


def in_sequence(
    key: str, path: str, size: int, block: int, total: int, *, command: str = "read", apart: bool = False
) -> Work:
    """Blocks of a file, from its begin on."""
    return Work(key, lambda side: [command, side.paths[path], side.start, size, block, total], apart=apart)


def at_random(key: str, path: str, size: int, count: int, *, jobs: int = 1, apart: bool = False) -> Work:
    """8 bytes at random places; where there are several jobs nothing is pinned."""
    words = ["pick", size, 8, count, jobs]
    return Work(key, lambda side: [words[0], side.paths[path], side.start, *words[1:]], jobs == 1, apart)


def reading_works(path: str, size: int, amounts: Amounts) -> list[Work]:
    """1 MiB, 128 KiB, 4 KiB, 8 bytes."""
    return [
        in_sequence(f"{path} 1M", path, size, MIB, amounts.size(2 * GIB)),
        in_sequence(f"{path} 128K", path, size, 128 * KIB, amounts.size(GIB)),
        in_sequence(f"{path} 4K", path, size, 4 * KIB, amounts.size(128 * MIB)),
        at_random(f"{path} 8", path, size, amounts.count(20_000)),
    ]


def reading_lines(path: str, goals: Sequence[Goal | None]) -> list[Line]:
    """The lines of `reading_works`, with goals in that order."""
    return [
        Line("1 MiB reads in sequence", f"{path} 1M", "GB/s", speed, goals[0]),
        Line("128 KiB reads in sequence", f"{path} 128K", "GB/s", speed, goals[1]),
        Line("4 KiB reads in sequence", f"{path} 4K", "GB/s", speed, goals[2]),
        Line("8 byte read at random, p50", f"{path} 8", "us", p50_us, goals[3]),
        Line("8 byte read at random, p99", f"{path} 8", "us", p99_us),
    ]


def raw_lines(stock: bool) -> list[Line]:
    """Direct reads against C."""
    goals = (
        (at_least(0.60), at_least(0.25), at_least(0.12), at_most(8.0))
        if stock
        else (at_least(0.80), at_least(0.65), at_least(0.60), at_most(1.35))
    )
    goal = at_least(0.2 if stock else 0.5)
    return [
        *reading_lines("direct", goals),
        *(Line(f"{jobs} clients, 8 byte reads (not pinned)", f"direct {jobs}", "k/s", rate, goal) for jobs in CLIENTS),
        Line("CPU of the daemon, 1 MiB read", "direct 1M", "us", daemon_us),
        Line("CPU of the daemon, 8 byte read", "direct 8", "us", daemon_us),
    ]


def loop_lines() -> list[Line]:
    """The fast loop against the stock loop."""
    return [Line("CPU of the daemon, 8 byte read", "direct 8", "us", daemon_us, at_most(0.3))]


def native_lines(stock: bool) -> list[Line]:
    """A process's memory against the same reads of /proc/PID/mem."""
    return reading_lines("memory", (None,) * 4 if stock else (at_least(0.65), at_least(0.65), None, None))


def native_lines_of_c(stock: bool) -> list[Line]:
    """A process's memory against a file system in C that reads /proc/PID/mem."""
    return reading_lines("memory", (None,) * 4 if stock else (None, None, None, at_most(1.35)))


def clients_works(path: str, size: int, amounts: Amounts) -> list[Work]:
    """Several readers at once."""
    return [
        at_random(f"{path} {jobs}", path, size, amounts.count(40_000) // jobs, jobs=jobs) for jobs in CLIENTS
    ]


# -- from another CPU ------------------------------------------------------------------------------


def apart_works(path: str, size: int, amounts: Amounts) -> list[Work]:
    """1 MiB, 4 KiB and 8 bytes, by a client that has a CPU of its own."""
    return [
        in_sequence("apart 1M", path, size, MIB, amounts.size(GIB), apart=True),
        in_sequence("apart 4K", path, size, 4 * KIB, amounts.size(32 * MIB), apart=True),
        at_random("apart 8", path, size, amounts.count(10_000), apart=True),
    ]


def apart_lines(goal: Goal | None) -> list[Line]:
    """The lines of `apart_works`; `goal` is that of the 8 bytes."""
    return [
        Line("1 MiB reads in sequence", "apart 1M", "GB/s", speed),
        Line("4 KiB reads in sequence", "apart 4K", "GB/s", speed),
        Line("8 byte read at random, p50", "apart 8", "us", p50_us, goal),
        Line("8 byte read at random, p99", "apart 8", "us", p99_us),
        Line("CPU of the daemon, 8 byte read", "apart 8", "us", daemon_us),
    ]


# -- the page cache --------------------------------------------------------------------------------


def cold_work(size: int) -> Work:
    """One pass over a file that has just left the page cache."""
    return in_sequence("cold 1M", "cached", size, MIB, size, command="cold")


def warm_works(size: int, amounts: Amounts) -> list[Work]:
    """Passes over a file that is in the page cache: the file system is not asked."""
    return [
        in_sequence("warm 1M", "cached", size, MIB, amounts.size(4 * GIB)),
        in_sequence("warm 4K", "cached", size, 4 * KIB, amounts.size(GIB)),
    ]


def cold_lines(stock: bool) -> list[Line]:
    """The line of `cold_work`."""
    return [Line("1 MiB reads", "cold 1M", "GB/s", speed, None if stock else at_least(0.75))]


def warm_lines(_stock: bool) -> list[Line]:
    """The lines of `warm_works`."""
    return [
        Line("1 MiB reads", "warm 1M", "GB/s", speed, at_least(0.9)),
        Line("4 KiB reads", "warm 4K", "GB/s", speed, at_least(0.9)),
    ]


# -- writing ---------------------------------------------------------------------------------------


def write_works(size: int, amounts: Amounts) -> list[Work]:
    """1 MiB, 128 KiB, 4 KiB in sequence, 8 bytes at random."""

    def blocks(key: str, block: int, total: int) -> Work:
        return Work(key, lambda side: ["write", side.paths["write"], 0, size, block, total, WRITE_SEED])

    count = amounts.count(20_000)
    return [
        blocks("write 1M", MIB, amounts.size(GIB)),
        blocks("write 128K", 128 * KIB, amounts.size(GIB)),
        blocks("write 4K", 4 * KIB, amounts.size(128 * MIB)),
        Work("write 8", lambda side: ["poke", side.paths["write"], 0, size, 8, count, WRITE_SEED]),
    ]


def write_lines(stock: bool) -> list[Line]:
    """The lines of `write_works`."""
    return [
        Line("1 MiB writes in sequence", "write 1M", "GB/s", speed, at_least(0.55 if stock else 0.65)),
        Line("128 KiB writes in sequence", "write 128K", "GB/s", speed),
        Line("4 KiB writes in sequence", "write 4K", "GB/s", speed),
        Line("8 byte write at random, p50", "write 8", "us", p50_us),
    ]


# -- names -----------------------------------------------------------------------------------------


def name_works(amounts: Amounts) -> list[Work]:
    """A large directory, opening and closing, names that do not exist."""
    count = amounts.count(10_000)
    return [
        Work("ls -l", lambda side: ["run", LISTINGS, "ls", "-l", side.paths["many"]]),
        Work("ls -f", lambda side: ["run", LISTINGS, "ls", "-f", side.paths["many"]]),
        Work("reopen", lambda side: ["reopen", side.paths["many"] / "file-000000", count]),
        Work("missing", lambda side: ["missing", side.paths["many"], count]),
    ]


def name_lines(stock: bool) -> list[Line]:
    """The lines of `name_works`."""
    return [
        Line("ls -l", "ls -l", "ms", p50_ms, None if stock else at_most(1.5)),
        Line("ls -f", "ls -f", "ms", p50_ms),
        Line("open + close, p50", "reopen", "us", p50_us),
        Line("stat of a name that is missing, p50", "missing", "us", p50_us),
    ]
