"""A daemon over time: what it takes of memory and CPU at the beginning and at the end, and when nobody asks."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from harness.daemons import Holder
from harness.figures import Amounts
from harness.machine import process_seconds
from harness.runs import Runner, Side
from harness.table import Row, Table, at_most

ROUNDS = 60
JOBS = 4
REST_LIMIT = 60.0
"""Seconds after which the daemon should have come to rest."""
IDLE_SECONDS = 2.0


@dataclass(frozen=True)
class State:
    """The daemon after a round."""

    anonymous: float
    """MiB."""
    descriptors: int
    read_us: float
    """CPU of one 8 byte read in that round."""


def tables(runner: Runner, side: Side, holder: Holder, amounts: Amounts) -> list[Table]:
    """The two tables. A round: reads by several clients, files opened, names that are missing, a listing."""
    assert side.daemon is not None
    pid = side.daemon.pid
    rounds = max(10, amounts.count(ROUNDS * 100) // 100)
    runner.say(f"time: {rounds} rounds")
    began, served = time.perf_counter(), process_seconds(pid)
    states = [_round(runner, side, holder, amounts) for _ in range(rounds)]
    busy = (process_seconds(pid) - served) / (time.perf_counter() - began) * 1e3
    few = max(3, rounds // 10)
    first, last = states[1 : 1 + few], states[-few:]
    rows = [
        Row("anonymous memory", "MiB", [s.anonymous for s in first], [s.anonymous for s in last], at_most(1.1)),
        Row("descriptors", "", [s.descriptors for s in first], [s.descriptors for s in last], at_most(1.1)),
        Row("CPU of an 8 byte read", "us", [s.read_us for s in first], [s.read_us for s in last]),
    ]
    idle = Row("CPU of the daemon", "ms/s", [busy], [_at_rest(pid)], at_most(0.001))
    return [
        Table(f"The daemon over {rounds} rounds of mixed work by {JOBS} clients", "first", "last", rows),
        Table("The daemon when nobody asks", "at work", "at rest", [idle]),
    ]


def _round(runner: Runner, side: Side, holder: Holder, amounts: Amounts) -> State:
    assert side.daemon is not None
    pid, path, count = side.daemon.pid, side.paths["memory"], amounts.count(10_000)
    before = process_seconds(pid)
    runner.client(["pick", path, holder.address, holder.size, 8, count, JOBS], None, side.daemon)
    read_us = (process_seconds(pid) - before) / (count * JOBS) * 1e6
    processes = path.parent.parent
    runner.client(["reopen", path, count // 10], None, side.daemon)
    runner.client(["missing", processes, count // 10], None, side.daemon)
    runner.client(["run", 1, "ls", "-l", processes], None, side.daemon)
    status = Path(f"/proc/{pid}/status").read_text("ascii").split("RssAnon:")[1]
    return State(int(status.split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), read_us)


def _at_rest(pid: int) -> float:
    """CPU milliseconds a second, once it has come to rest; as it is where that takes too long."""
    limit = time.monotonic() + REST_LIMIT
    while True:
        before = process_seconds(pid)
        time.sleep(IDLE_SECONDS)
        spent = process_seconds(pid) - before
        if not spent or time.monotonic() > limit:
            return spent / IDLE_SECONDS * 1e3
