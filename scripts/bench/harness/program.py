"""What the programs have in common: their options, how they print what was measured, how they end."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from harness.machine import CannotMeasureError, describe, measuring, quietest_cpu, unwinding_on_signals
from harness.table import Table, missed

B = TypeVar("B")


def options(
    description: str | None, *, quick: str, rounds: tuple[int, int], sections: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser with the options of every program; `rounds` are those of a whole run and of a quick one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick}, {rounds[1]} rounds")
    told = f"samples of each figure and side (default {rounds[0]}, quick {rounds[1]})"
    parser.add_argument("--rounds", type=int, help=told)
    parser.add_argument("--unpinned", action="store_true", help="let the scheduler place what is measured")
    if sections:
        parser.add_argument("--only", choices=list(sections), action="append", help="these sections (repeatable)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there; - for the output")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a goal is missed")
    parser.set_defaults(rounds_by_default=rounds)
    return parser


def rounds_of(arguments: argparse.Namespace) -> int:
    """How many samples are wanted."""
    whole, quick = arguments.rounds_by_default
    return int(arguments.rounds or (quick if arguments.quick else whole))


@contextlib.contextmanager
def pinned(arguments: argparse.Namespace) -> Iterator[None]:
    """This program on the quietest CPU, before all others, unless that is not wanted."""
    with measuring(None if arguments.unpinned else quietest_cpu()):
        yield


def in_sections(
    arguments: argparse.Namespace, sections: Mapping[str, Callable[[B], Iterable[Table]]], bench: B
) -> list[Table]:
    """The tables of the sections that are wanted."""
    return [table for name in arguments.only or sections for table in sections[name](bench)]


@dataclass
class Outcome:
    """What a program found."""

    tables: Sequence[Table] = ()
    remark: str = ""
    """A last line for people."""
    heading: str = ""
    """What is said of how it was measured, behind the machine."""


def finish(
    arguments: argparse.Namespace, work: Callable[[], Outcome], *known: type[Exception], code: int = 1
) -> int:
    """Do the work and show it; the exit code. What is `known` to happen ends it with `code` and one line."""
    name = Path(sys.argv[0]).name
    try:
        with unwinding_on_signals():
            outcome = work()
    except (CannotMeasureError, *known) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what it had started is ended", file=sys.stderr)
        return 130
    _show(arguments, outcome)
    return 1 if arguments.strict and missed(outcome.tables) else 0


def _show(arguments: argparse.Namespace, outcome: Outcome) -> None:
    pinned = not arguments.unpinned
    document = {"machine": describe(), "pinned": pinned, "tables": [table.json() for table in outcome.tables]}
    text = json.dumps(document, indent=1)
    if str(arguments.json) == "-":
        print(text)
        return
    print(f"{describe()}; {outcome.heading or f'medians of {rounds_of(arguments)} rounds'}\n")
    for table in outcome.tables:
        print(table)
    if outcome.remark:
        print(outcome.remark)
    failed = missed(outcome.tables)
    print(f"{len(failed)} goals missed." if failed else "All goals met.")
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")
