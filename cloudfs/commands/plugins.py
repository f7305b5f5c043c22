"""Lists the connectors and OS layers that are installed, and says why a broken one is broken."""

from __future__ import annotations

import argparse

from cloudfs.commands._arguments import Exit, Parser, UsageError
from cloudfs.commands._output import Output
from cloudfs.render import Column, plugin_record
from engine import registry

EXAMPLES = """\
  cloudfs plugins
  cloudfs plugins --json | jq -r '.[] | select(.problem) | .name, .problem'
"""
COLUMNS = (
    Column("kind", "KIND"),
    Column("name", "NAME"),
    Column("distribution", "FROM"),
    Column("summary", "SUMMARY"),
    Column("problem", "PROBLEM"),
)


def configure(parser: Parser) -> None:
    """The options of `cloudfs plugins`."""
    parser.usage = "cloudfs plugins [OPTIONS]"


def run(arguments: argparse.Namespace) -> int:
    """Print the plugins."""
    if arguments.words:
        raise UsageError("plugins takes no words")
    output = Output("plugins", json=arguments.json, no_color=arguments.no_color)
    kinds: tuple[registry.Kind, ...] = ("connector", "oslayer")
    rows = [plugin_record(status) for kind in kinds for status in registry.statuses(kind)]
    if output.json:
        output.document(rows)
    else:
        output.table(rows, COLUMNS)
    return Exit.DONE
