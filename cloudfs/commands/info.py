"""Tells what a target is: its source of memory and its operating system; with a PID, all that is known of a process."""

from __future__ import annotations

import argparse
from typing import Any

from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import Opened, opened, process_of, words_of
from cloudfs.commands._output import Output
from cloudfs.render import connector_record, info_text, os_record, process_count, process_record
from engine.errors import AccessDeniedError
from engine.machine import Instance
from engine.oslayer import Process

EXAMPLES = """\
  cloudfs info                          this machine
  cloudfs info 1                        a process of this machine
  cloudfs info memory.raw               an image of a machine's memory
  cloudfs info -p sshd                  by name, where only one process is called so
  cloudfs info --json | jq -r .os.version
"""
SHAPE = Shape(process="optional")


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs info`."""
    parser.usage = f"cloudfs info [OPTIONS] {SHAPE}"
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the record."""
    words = words_of(arguments, SHAPE)
    output = Output("info", json=arguments.json, no_color=arguments.no_color)
    code = Exit.DONE
    with opened(arguments, words, need="any" if words.process is None else "os") as target:
        if words.process is None:
            record = _target_record(target)
        else:
            with process_of(target, words.process) as process:
                record, problem = _process_record(process)
            if problem is not None:
                output.say(f"the maps of process {record['pid']} cannot be read: {problem}")
                code = Exit.PARTIAL
    if output.json:
        output.document(record)
    else:
        output.text(info_text(record))
    return code


def _target_record(target: Opened) -> dict[str, Any]:
    """`connector` and `os`, each None where there is none; `problem` says why there is no OS."""
    instance, connector = target.instance, target.connector
    if connector is not None:
        connector.connector.ask()  # so that its state is known
    has_os = instance.kind == "oslayer"
    system = {**os_record(instance.layer.info, process_count(instance)), "live": instance.live} if has_os else None
    return {
        "target": target.name,
        "connector": None if connector is None else _connector_record(connector),
        "os": system,
        "problem": None if has_os else instance.last_error,
    }


def _connector_record(connector: Instance) -> dict[str, Any]:
    """With `metrics` behind the others: what was read for this answer; None where it was opened without metrics=yes."""
    figures = getattr(connector.memory_view, "figures", None)
    return {**connector_record(connector.connector.info), "metrics": None if figures is None else figures()}


def _process_record(process: Process) -> tuple[dict[str, Any], str | None]:
    """The keys of `ps`, then what is counted in the maps, and why they cannot be read."""
    record = process_record(process.info)
    counts: dict[str, int | None] = {"regions": None, "mapped_bytes": None, "modules": None}
    record.update(counts)
    try:
        regions = list(process.regions())
        record["regions"] = len(regions)
        if any(region.source is not None for region in regions):
            return record, None  # of pages in memory alone: what is mapped beside them, and what of it, is not known
        record["mapped_bytes"] = sum(region.size for region in regions)
        record["modules"] = sum(1 for _ in process.modules())
    except AccessDeniedError as error:
        return record, str(error)
    return record, None
