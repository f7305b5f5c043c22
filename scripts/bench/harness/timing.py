"""Timing of two Python callables in turn."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from harness.table import Goal, Row, Table

SAMPLE_SECONDS = 0.02
Action = Callable[[], object]
Clock = Callable[[], int]
"""Nanoseconds: `time.perf_counter_ns`, or `time.thread_time_ns` for CPU time of the one thread that works."""

UNITS = {"ns": 1.0, "us": 1e3, "ms": 1e6}


@dataclass(frozen=True)
class Pair:
    """The same work done twice: by what Python offers, and by us. `count` things are done by one call."""

    title: str
    unit: str
    baseline: Action
    subject: Action
    count: int = 1
    goal: Goal | None = None


def tabled(
    title: str, baseline: str, pairs: Iterable[Pair], rounds: int, subject: str = "engine",
    clock: Clock = time.perf_counter_ns,
) -> Table:  # fmt: skip
    """The measured pairs; each is told on stderr as its turn comes."""
    rows = []
    for pair in pairs:
        print(f"  {title}: {pair.title}", file=sys.stderr, flush=True)
        rows.append(measure(pair, rounds, clock))
    return Table(title, baseline, subject, rows)


def each(function: Callable[[int], object], addresses: Sequence[int]) -> Action:
    """A loop over scalar calls: its own cost is in both sides."""

    def loop() -> None:
        for address in addresses:
            function(address)

    return loop


def measure(pair: Pair, rounds: int, clock: Clock = time.perf_counter_ns) -> Row:
    """Both sides in turn, each sample at least `SAMPLE_SECONDS` long, without garbage collection."""
    repeats = [_repeats(action, clock) for action in (pair.baseline, pair.subject)]
    found: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for samples, action, times in zip(found, (pair.baseline, pair.subject), repeats, strict=True):
                samples.append(_nanoseconds(action, times, clock) / pair.count / UNITS[pair.unit])
    finally:
        gc.enable()
    return Row(pair.title, pair.unit, found[0], found[1], pair.goal)


def _repeats(action: Action, clock: Clock) -> int:
    """How often one sample calls `action`; it is warm afterwards."""
    times = 1
    while (spent := _nanoseconds(action, times, clock) * times) < SAMPLE_SECONDS * 1e9 / 4:
        times *= 4 if spent else 64
    return max(1, round(SAMPLE_SECONDS * 1e9 / (spent / times)))


def _nanoseconds(action: Action, times: int, clock: Clock) -> float:
    """Time of one call."""
    steps = range(times)
    began = clock()
    for _ in steps:
        action()
    return (clock() - began) / times
