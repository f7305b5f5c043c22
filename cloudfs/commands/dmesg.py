"""Prints the log of a target's kernel, as dmesg does."""

from __future__ import annotations

import argparse

from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import opened, words_of
from cloudfs.commands._output import Output
from cloudfs.render import escape_terminal, log_lines, log_record
from engine.errors import UnsupportedError
from engine.oslayer import KernelLog

EXAMPLES = """\
  cloudfs dmesg memory.raw
  cloudfs dmesg memory.raw --raw | grep '^<[0-3]>'          errors and worse
  cloudfs dmesg memory.raw --json | jq -r '.[] | select(.level == "err") | .text'
"""
SHAPE = Shape()


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs dmesg`."""
    parser.usage = f"cloudfs dmesg [OPTIONS] {SHAPE}"
    parser.add_argument("--raw", action="store_true", help="each line with its priority in front, as dmesg --raw")
    add_chain_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the log."""
    words = words_of(arguments, SHAPE)
    output = Output("dmesg", json=arguments.json, no_color=arguments.no_color)
    with opened(arguments, words) as target:
        log = target.layer.capability(KernelLog)
        if log is None:
            raise UnsupportedError(f"{target.name} shows no kernel log{target.advice('dmesg(1)')}")
        records = list(log.records())
    if output.json:
        output.document([log_record(record) for record in records])
    else:
        for record in records:
            for line in log_lines(record, raw=arguments.raw):
                output.text(escape_terminal(line[:-1]) + "\n")
    return Exit.DONE
