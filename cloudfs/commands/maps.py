"""Prints what is mapped into a process, in the format of /proc/PID/maps."""

from __future__ import annotations

import argparse
import os

from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import opened, process_of, words_of
from cloudfs.commands._output import Output
from cloudfs.render import escape_terminal, maps_line, maps_text, region_record

EXAMPLES = """\
  cloudfs maps 1                        a process of this machine
  cloudfs maps sshd                     by name, where only one process is called so
  cloudfs maps -p 1                     the same as the first, whatever the words around it
  cloudfs maps 1 --json | jq -r '.[] | select(.permissions | test("wx")) | .start'
"""
SHAPE = Shape(process="required")


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs maps`."""
    parser.usage = f"cloudfs maps [OPTIONS] {SHAPE}"
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the regions."""
    words = words_of(arguments, SHAPE)
    output = Output("maps", json=arguments.json, no_color=arguments.no_color)
    assert words.process is not None, "the shape requires one"
    with opened(arguments, words) as target, process_of(target, words.process) as process:
        if output.json:
            output.document([region_record(region) for region in process.regions()])
        elif output.terminal:
            for region in process.regions():
                output.text(escape_terminal(maps_line(region)[:-1]) + "\n")
        else:
            output.raw(os.fsencode(maps_text(process.regions())))
    return Exit.DONE
