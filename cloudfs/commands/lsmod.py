"""Lists the modules (drivers) of a target's kernel; `cloudfs modules` without a PID tells more of each."""

from __future__ import annotations

import argparse

from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import kernel_modules, opened, words_of
from cloudfs.commands._output import Output
from cloudfs.render import Column, module_record

EXAMPLES = """\
  cloudfs lsmod                         this machine
  cloudfs lsmod memory.raw --json | jq -r '.[].name'
"""
SHAPE = Shape()
COLUMNS = (Column("name", "NAME"), Column("size", "SIZE", right=True), Column("base", "BASE", right=True))


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs lsmod`."""
    parser.usage = f"cloudfs lsmod [OPTIONS] {SHAPE}"
    add_chain_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the modules."""
    words = words_of(arguments, SHAPE)
    output = Output("lsmod", json=arguments.json, no_color=arguments.no_color)
    with opened(arguments, words) as target:
        rows = [module_record(module.info) for module in kernel_modules(target)]
    if output.json:
        output.document(rows)
    else:
        output.table(rows, COLUMNS)
    return Exit.DONE
