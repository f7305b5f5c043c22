"""Lists the connectors and OS layers that are installed, and says why a broken one is broken.

With `doctor`: what of this machine a mount uses, and why it goes without the rest. The exit code is 1 where nothing
can be mounted.
"""

from __future__ import annotations

import argparse

from cloudfs.commands._arguments import Exit, Parser, UsageError
from cloudfs.commands._output import Output
from cloudfs.nodes.plugins_file import entry_statuses
from cloudfs.render import Column, cell_text, plugin_record, table
from engine import registry

EXAMPLES = """\
  cloudfs plugins
  cloudfs plugins doctor
  cloudfs plugins --json | jq -r '.[] | select(.problem) | .name, .problem'
"""
COLUMNS = (
    Column("kind", "KIND"),
    Column("name", "NAME"),
    Column("distribution", "FROM"),
    Column("summary", "SUMMARY"),
    Column("problem", "PROBLEM"),
)
DOCTOR_COLUMNS = (Column("name", "WHAT"), Column("used", "USED"), Column("detail", "WHY"))


def configure(parser: Parser) -> None:
    """The options of `cloudfs plugins`."""
    parser.usage = "cloudfs plugins [OPTIONS] [doctor]"


def run(arguments: argparse.Namespace) -> int:
    """Print the plugins, or what a mount can use."""
    if arguments.words not in ([], ["doctor"]):
        raise UsageError("plugins takes no words but `doctor`")
    output = Output("plugins", json=arguments.json, no_color=arguments.no_color)
    if arguments.words:
        return _doctor(output)
    kinds: tuple[registry.Kind, ...] = ("connector", "oslayer")
    statuses = [status for kind in kinds for status in registry.statuses(kind)]
    rows = [plugin_record(status) for status in (*statuses, *entry_statuses())]
    if output.json:
        output.document(rows)
    elif output.terminal:
        output.table(rows, COLUMNS[:-1])  # a problem is a sentence: it stands below, whole
        for row in (row for row in rows if row["problem"] is not None):
            output.text(f"{cell_text(row['name'])} is broken: {cell_text(row['problem'])}\n")
    else:
        output.table(rows, COLUMNS)
    return Exit.DONE


def _doctor(output: Output) -> int:
    from cloudfs.doctor import examine  # it imports pyfuse3

    findings = examine()
    rows = [{"name": one.name, "used": one.used, "needed": one.needed, "detail": one.detail} for one in findings]
    if output.json:
        output.document(rows)
    else:
        output.text(table(rows, DOCTOR_COLUMNS, terminal=output.terminal))  # whole: sentences are not cut
    return Exit.FAILED if any(one.needed and not one.used for one in findings) else Exit.DONE
