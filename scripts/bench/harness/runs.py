"""Running the client against several sides in turn, so that what disturbs one disturbs the other too."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.daemons import Daemon, abort
from harness.machine import CannotMeasureError, Tools, busy_seconds, measuring, process_seconds
from harness.table import Goal, Row, Table

CLIENT_LIMIT = 120.0
DISTURBED = 0.10
"""Share of the CPU in the hands of other programs above which a run is repeated."""
ATTEMPTS = 6
PAUSE = 0.3
"""Seconds to wait before a run is repeated."""
PATIENCE = 60.0
"""Seconds in all that repeated runs may take."""


@dataclass(frozen=True)
class Side:
    """One of the things compared: names of paths that the work uses, and who serves them."""

    name: str
    paths: Mapping[str, Path]
    daemon: Daemon | None = None
    start: int = 0
    """Where the patterned bytes begin in the file that is read."""


@dataclass(frozen=True)
class Sample:
    """What one run of the client measured."""

    operations: int
    size: int
    wall: float
    p50: float
    p90: float
    p99: float
    daemon: float
    """CPU seconds of the daemon."""
    disturbance: float
    """Share of the CPU that went to others meanwhile; 0 where it is not known."""


def speed(sample: Sample) -> float:
    """Bytes of one system call by its median time, in units of 10^9 a second: what others took does not count."""
    return sample.size / sample.operations / sample.p50 / 1e9


def rate(sample: Sample) -> float:
    """Thousands of operations a second."""
    return sample.operations / sample.wall / 1e3


def p50_us(sample: Sample) -> float:
    """Median time of one operation."""
    return sample.p50 * 1e6


def p99_us(sample: Sample) -> float:
    """99th percentile of the time of one operation."""
    return sample.p99 * 1e6


def p50_ms(sample: Sample) -> float:
    """Median time of one operation."""
    return sample.p50 * 1e3


def daemon_us(sample: Sample) -> float:
    """CPU time of the daemon for one operation."""
    return sample.daemon / sample.operations * 1e6


@dataclass(frozen=True)
class Work:
    """A command of the client; `words` makes it for a side."""

    key: str
    words: Callable[[Side], Sequence[object]]
    pinned: bool = True
    apart: bool = False
    """The client runs on another CPU than the daemon."""


@dataclass(frozen=True)
class Line:
    """A line of a table: one value of the samples of one work."""

    title: str
    work: str
    unit: str
    value: Callable[[Sample], float]
    goal: Goal | None = None


@dataclass
class Runner:
    """Runs works and keeps their samples by (work, side)."""

    tools: Tools
    cpu: int | None
    rounds: int
    say: Callable[[str], None]
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)
    patience: float = PATIENCE

    @property
    def disturbance(self) -> float:
        """The largest share of the CPU that others had during a run that was kept."""
        return max((s.disturbance for kept in self.samples.values() for s in kept), default=0.0)

    @property
    def remark(self) -> str:
        """What is to be said where others disturbed even the best samples."""
        if self.disturbance <= DISTURBED:
            return ""
        return f"Other programs took up to {self.disturbance:.0%} of the CPU: run again on a quieter machine."

    @property
    def other_cpu(self) -> int | None:
        """A CPU beside the one of the daemons; None where there is none, or nothing is pinned."""
        if self.cpu is None:
            return None
        return min(os.sched_getaffinity(0) - {self.cpu}, default=None)

    def measure(self, work: Work, sides: Sequence[Side]) -> None:
        """One run each to warm up, then `rounds` times every side in turn."""
        self.say(f"{work.key}: {', '.join(side.name for side in sides)}")
        for side in sides:
            self._once(work, side)
        for _ in range(self.rounds):
            for side in sides:
                self.samples.setdefault((work.key, side.name), []).append(self._quiet(work, side))

    def _quiet(self, work: Work, side: Side) -> Sample:
        """The first run that others left alone, or the least disturbed of some."""
        found = [self._once(work, side)]
        while found[-1].disturbance > DISTURBED and len(found) < ATTEMPTS and self.patience > 0:
            began = time.monotonic()
            time.sleep(PAUSE)
            found.append(self._once(work, side))
            self.patience -= time.monotonic() - began
        return min(found, key=lambda sample: sample.disturbance)

    def _once(self, work: Work, side: Side) -> Sample:
        cpu = self.other_cpu if work.apart else self.cpu if work.pinned else None
        watched = {cpu, self.cpu} - {None} if work.pinned else set()
        with contextlib.ExitStack() as stack:
            if self.cpu is not None and not work.pinned and side.daemon is not None:
                stack.enter_context(_roaming(side.daemon.pid, self.cpu))
            began, busy = time.perf_counter(), sum(map(busy_seconds, watched))
            served = _served(side)
            answer = self.client(work.words(side), cpu, side.daemon)
            served = _served(side) - served
            wall = time.perf_counter() - began
        ours = answer["cpu"] / 1e9 + served
        other = max(0.0, sum(map(busy_seconds, watched)) - busy - ours) if watched else 0.0
        return Sample(
            operations=int(answer["operations"]),
            size=int(answer["bytes"]),
            wall=answer["wall"] / 1e9,
            p50=answer["p50"] / 1e9,
            p90=answer["p90"] / 1e9,
            p99=answer["p99"] / 1e9,
            daemon=served,
            disturbance=other / wall / max(1, len(watched)),
        )

    def client(self, words: Sequence[object], cpu: int | None, daemon: Daemon | None) -> dict[str, float]:
        """The answer of one run of the client. A daemon that hangs is aborted; what failed is told."""
        command = [str(self.tools.client), *map(str, words)]
        with measuring(cpu):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            output, errors = process.communicate(timeout=CLIENT_LIMIT)
        except subprocess.TimeoutExpired:
            if daemon is not None:
                abort(daemon)
            raise CannotMeasureError(f"`{' '.join(command[1:])}` took longer than {CLIENT_LIMIT:.0f} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        if process.returncode:
            told = errors.strip() or f"signal {-process.returncode}"
            ended = "" if daemon is None or daemon.process.poll() is None else f"; {daemon.name} ended: "
            raise CannotMeasureError(told + (ended + daemon.last_words() if ended and daemon else ""))
        answer: dict[str, float] = json.loads(output)
        return answer

    def table(self, title: str, baseline: str, subject: str, lines: Sequence[Line]) -> Table:
        """The table of two sides."""
        rows = [
            Row(
                line.title,
                line.unit,
                [line.value(sample) for sample in self.samples[line.work, baseline]],
                [line.value(sample) for sample in self.samples[line.work, subject]],
                line.goal,
            )
            for line in lines
        ]
        return Table(title, baseline, subject, rows)


def _served(side: Side) -> float:
    return 0.0 if side.daemon is None else process_seconds(side.daemon.pid)


@contextlib.contextmanager
def _roaming(pid: int, cpu: int) -> Iterator[None]:
    """The threads of `pid` may run anywhere meanwhile."""
    _move(pid, os.sched_getaffinity(0))
    try:
        yield
    finally:
        _move(pid, {cpu})


def _move(pid: int, cpus: set[int]) -> None:
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task), cpus)
