"""How long commands take from nothing to their first line, what they import, and what they must not.

    .venv/bin/python scripts/bench/start.py [--quick] [--json FILE]

`cloudfs ps` shall print its first line within 0.3 seconds and import neither pyfuse3 nor trio.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.machine import CannotMeasureError, cloudfs_program, describe, measuring, quietest_cpu

LIMIT = 30.0
FIRST_LINE_GOAL_MS = 300.0
FORBIDDEN = ("pyfuse3", "trio")
PACKAGES = ("engine.memory", "engine.machine", "cloudfs.cli", "numpy", "psutil", "trio", "pyfuse3")
SHOWN = 12


@dataclass
class Command:
    """A command and the milliseconds of its runs."""

    title: str
    words: Sequence[str]
    goal: float | None = None
    """Milliseconds to the first byte."""
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def first_ms(self) -> float | None:
        """Median time to the first byte, None for a command that says nothing."""
        return statistics.median(self.first) if self.first else None

    @property
    def whole_ms(self) -> float:
        """Median time to the end."""
        return statistics.median(self.whole)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        return None if self.goal is None or self.first_ms is None else self.first_ms < self.goal

    def run(self) -> None:
        """One more run; its output goes into a pipe, as for a program."""
        began = time.perf_counter()
        process = subprocess.Popen(
            self.words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            if not select.select([process.stdout], [], [], LIMIT)[0]:
                raise CannotMeasureError(f"`{self.title}` said nothing for {LIMIT:.0f} s")
            if os.read(process.stdout.fileno(), 1):
                self.first.append(1e3 * (time.perf_counter() - began))
            _, errors = process.communicate(timeout=LIMIT)
            self.whole.append(1e3 * (time.perf_counter() - began))
        finally:
            process.kill()
            process.communicate()
        if process.returncode:
            words = errors.decode(errors="replace").strip().splitlines()
            raise CannotMeasureError(f"`{self.title}` failed: {words[-1] if words else process.returncode}")


def commands() -> list[Command]:
    """What is timed."""
    program = str(cloudfs_program())
    found = [
        Command("python -c pass", [sys.executable, "-c", "pass"]),
        Command("ps aux", ["ps", "aux"]),
        Command("cloudfs --version", [program, "--version"]),
        Command("cloudfs ps", [program, "ps"], FIRST_LINE_GOAL_MS),
        Command("cloudfs ps --json", [program, "ps", "--json"]),
        Command("cloudfs maps PID", [program, "maps", str(os.getpid())]),
    ]
    found += [Command(f"import {name}", [sys.executable, "-c", f"import {name}"]) for name in PACKAGES]
    return found


def imports_of(words: Sequence[str]) -> dict[str, float]:
    """Module → milliseconds of its own, for everything that a run of our program imports."""
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise CannotMeasureError(f"`{' '.join(words)}` failed with exit code {done.returncode}")
    found: dict[str, float] = {}
    for line in done.stderr.splitlines():
        # import time:   self [us] | cumulative | name
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdecimal():
            found[parts[2].strip()] = int(parts[0]) / 1e3
    return found


def by_package(imports: dict[str, float]) -> list[tuple[str, float, int]]:
    """(top-level package, milliseconds, modules), the dearest first."""
    totals: dict[str, tuple[float, int]] = {}
    for name, spent in imports.items():
        top = name.partition(".")[0]
        before, count = totals.get(top, (0.0, 0))
        totals[top] = (before + spent, count + 1)
    return sorted(((top, *total) for top, total in totals.items()), key=lambda item: -item[1])


def forbidden(imports: dict[str, float]) -> list[str]:
    """The imported modules that should not have been."""
    return sorted(name for name in imports if name.partition(".")[0] in FORBIDDEN)


def show(timed: Sequence[Command], imports: dict[str, float]) -> None:
    """Tables for people."""
    nothing = timed[0].whole_ms
    width = max(len(command.title) for command in timed)
    print(f"{'':{width}}  first byte   to the end  over python      goal  met")
    for command in timed:
        first = "-" if command.first_ms is None else f"{command.first_ms:.1f} ms"
        goal = "-" if command.goal is None else f"< {command.goal:.0f} ms"
        met = {None: "-", True: "yes", False: "NO"}[command.met]
        over = f"{command.whole_ms - nothing:.1f} ms"
        print(f"{command.title:{width}}  {first:>10}  {command.whole_ms:>8.1f} ms  {over:>11}  {goal:>8}  {met:>3}")
    print(f"\nImports of `cloudfs ps`: {len(imports)} modules, {sum(imports.values()):.0f} ms (traced)")
    for top, spent, count in by_package(imports)[:SHOWN]:
        print(f"  {top:20}  {spent:6.1f} ms  {count:4} modules")
    bad = forbidden(imports)
    print(f"  pyfuse3 and trio: {'IMPORTED: ' + ', '.join(bad) if bad else 'not imported'}")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 runs of each")
    parser.add_argument("--rounds", type=int, help="runs of each command (default 15, quick 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there; - for the output")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a goal is missed")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    try:
        timed = commands()
        with measuring(quietest_cpu()):
            for number in range(rounds + 1):
                for command in timed:
                    command.run()
                    if number == 0:  # files come into the page cache
                        command.first.clear()
                        command.whole.clear()
            imports = imports_of([str(cloudfs_program()), "ps"])
    except (CannotMeasureError, FileNotFoundError) as error:
        print(f"start.py: {error}", file=sys.stderr)
        return 1
    document = {
        "machine": describe(),
        "commands": [
            {
                "command": command.title,
                "first_ms": command.first_ms,
                "whole_ms": command.whole_ms,
                "goal_ms": command.goal,
                "met": command.met,
                "first_samples": command.first,
                "whole_samples": command.whole,
            }
            for command in timed
        ],
        "imports_ms": imports,
        "forbidden": forbidden(imports),
    }
    if str(arguments.json) == "-":
        print(json.dumps(document, indent=1))
    else:
        print(f"{describe()}; medians of {rounds} runs, page cache warm\n")
        show(timed, imports)
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    failed = bool(forbidden(imports)) or any(command.met is False for command in timed)
    return 1 if arguments.strict and failed else 0


if __name__ == "__main__":
    sys.exit(main())
