"""Lists the images (executables, libraries, drivers) in a process, or, without a PID, in the kernel."""

from __future__ import annotations

import argparse
from typing import Any

from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import kernel_modules, opened, process_of, words_of
from cloudfs.commands._output import Output
from cloudfs.render import Column, module_record
from engine.errors import UnsupportedError

EXAMPLES = """\
  cloudfs modules                       the kernel modules of this machine
  cloudfs modules 1                     executable and libraries of a process
  cloudfs modules -p sshd --json        by name, where only one process is called so
"""
BUILD_ID_SHOWN = 12
"""Digits on a terminal; a pipe and --json get all."""
SHAPE = Shape(process="optional")
COLUMNS = (
    Column("base", "BASE", right=True),
    Column("size", "SIZE", right=True),
    Column("architecture", "ARCH"),
    Column("build_id", "BUILD-ID"),
    Column("name", "NAME"),
    Column("path", "PATH"),
)


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs modules`."""
    parser.usage = f"cloudfs modules [OPTIONS] {SHAPE}"
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the modules."""
    words = words_of(arguments, SHAPE)
    output = Output("modules", json=arguments.json, no_color=arguments.no_color)
    with opened(arguments, words) as target:
        if words.process is None:
            rows = [module_record(module.info) for module in kernel_modules(target)]
        else:
            with process_of(target, words.process) as process:
                if not process.tells_modules:
                    raise UnsupportedError(f"which files are mapped into a process of {target.name} is not known")
                rows = [module_record(module.info) for module in process.modules()]
        if output.json:
            output.document(rows)
        else:
            output.table(map(_shortened, rows) if output.terminal else rows, COLUMNS)
    return Exit.DONE


def _shortened(row: dict[str, Any]) -> dict[str, Any]:
    """A row for people: so much of the build ID that it can be told from others, and the room to the path."""
    return {**row, "build_id": row["build_id"] and row["build_id"][:BUILD_ID_SHOWN]}
