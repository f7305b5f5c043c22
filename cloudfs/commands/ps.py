"""Lists the processes.

With a PID (of this machine) or -p only that one. STATE is the letter that ps(1) prints.
"""

from __future__ import annotations

import argparse
import functools
import pwd
import time
from collections.abc import Iterator
from typing import Any

from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import COMM_LIMIT, Opened, opened, process_info, words_of
from cloudfs.commands._output import Output, clip
from cloudfs.render import Column, process_record, time_text
from engine.errors import NotFoundError
from engine.types import ProcessInfo

EXAMPLES = """\
  cloudfs ps                            the processes of this machine
  cloudfs ps 1                          one of them
  cloudfs ps -p sshd                    by name, where only one process is called so
  cloudfs ps memory.raw                 of the machine in an image, whatever its format
  cloudfs ps -c qemu                    of the only guest of QEMU that runs here; -c qemu:NAME of one of several
  cloudfs ps --json | jq '.[] | select(.uid == 0) | .pid'
"""
SHAPE = Shape(process="optional")
HIDDEN_LIMIT = 20
"""Processes of which standard error says that they are in one list alone."""
COLUMNS = (
    Column("pid", "PID", right=True),
    Column("ppid", "PPID", right=True),
    Column("user", "USER"),
    Column("state", "S"),
    Column("threads", "THREADS", right=True),
    Column("start", "START", right=True),
    Column("name", "NAME"),
    Column("command", "COMMAND"),
)


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs ps`."""
    parser.usage = f"cloudfs ps [OPTIONS] {SHAPE}"
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the processes."""
    words = words_of(arguments, SHAPE)
    output = Output("ps", json=arguments.json, no_color=arguments.no_color)
    with opened(arguments, words) as target:
        infos = list(_infos(target)) if words.process is None else [process_info(target, words.process)]
        _say_hidden(infos, output)
        if output.json:
            output.document([process_record(info) for info in infos])
        else:
            local = target.name == "this machine"
            output.table((_row(info, local, output.terminal) for info in infos), COLUMNS)
        return _say_skipped(target, output)


def _infos(target: Opened) -> Iterator[ProcessInfo]:
    for process in target.layer.processes():
        try:
            yield process.info
        except NotFoundError:
            continue  # it ended while we looked
        finally:
            process.close()


def _say_hidden(infos: list[ProcessInfo], output: Output) -> None:
    """What is not in every list that the kernel has of its processes: a rootkit takes them out of one."""
    most = max((len(info.extra.get("sources") or ()) for info in infos), default=0)
    hidden = [info for info in infos if len(info.extra.get("sources") or ()) < most]
    for info in hidden[:HIDDEN_LIMIT]:
        output.say(
            f"process {info.pid} ({info.name}) is in the kernel's {' and '.join(info.extra['sources'])} alone: "
            "hidden from the rest, or beginning or ending just then"
        )
    if len(hidden) > HIDDEN_LIMIT:
        output.say(f"so are {len(hidden) - HIDDEN_LIMIT} more: the key `sources` of --json tells of each")


def _say_skipped(target: Opened, output: Output) -> int:
    skipped = target.layer.info.skipped
    if not any(skipped.values()):
        return Exit.DONE
    counts = ", ".join(f"{count} {kind}" for kind, count in skipped.items() if count)
    output.say(f"not all of {target.name} could be read; left out: {counts}")
    return Exit.PARTIAL


def _row(info: ProcessInfo, local: bool, terminal: bool) -> dict[str, Any]:
    """A row of the table."""
    command = " ".join(info.command_line or ())
    return {
        "pid": info.pid,
        "ppid": info.ppid,
        "user": _user(info.uid) if local and info.uid is not None else info.uid,
        "state": info.state,
        "threads": info.threads,
        "start": _start(info.start_time) if terminal else time_text(info.start_time),
        "name": clip(info.name, COMM_LIMIT) if terminal else info.name,
        "command": command or f"[{info.name}]",
    }


@functools.cache
def _user(uid: int) -> str:
    """The name of a user of this host; his number where he has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


def _start(seconds: float | None) -> str | None:
    """When a process began, as ps(1) shortens it: today's time, this year's day, or the year."""
    if seconds is None:
        return None
    try:
        begun, now = time.localtime(seconds), time.localtime()
    except (OverflowError, ValueError, OSError):
        return None
    if begun[:3] == now[:3]:
        return time.strftime("%H:%M", begun)
    return time.strftime("%b%d" if begun.tm_year == now.tm_year else "%Y", begun)
