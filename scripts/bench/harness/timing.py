"""Timing of two Python callables in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

from harness.table import Goal, Row

SAMPLE_SECONDS = 0.02
Action = Callable[[], object]

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


def measure(pair: Pair, rounds: int) -> Row:
    """Both sides in turn, each sample at least `SAMPLE_SECONDS` long, without garbage collection."""
    repeats = [_repeats(action) for action in (pair.baseline, pair.subject)]
    found: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for samples, action, times in zip(found, (pair.baseline, pair.subject), repeats, strict=True):
                samples.append(_nanoseconds(action, times) / pair.count / UNITS[pair.unit])
    finally:
        gc.enable()
    return Row(pair.title, pair.unit, found[0], found[1], pair.goal)


def _repeats(action: Action) -> int:
    """How often one sample calls `action`; it is warm afterwards."""
    times = 1
    while (spent := _nanoseconds(action, times) * times) < SAMPLE_SECONDS * 1e9 / 4:
        times *= 4 if spent else 64
    return max(1, round(SAMPLE_SECONDS * 1e9 / (spent / times)))


def _nanoseconds(action: Action, times: int) -> float:
    """Time of one call."""
    steps = range(times)
    began = time.perf_counter_ns()
    for _ in steps:
        action()
    return (time.perf_counter_ns() - began) / times
