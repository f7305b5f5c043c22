"""Lists the sockets that the processes of a target have open, then those that its kernel has for itself."""

from __future__ import annotations

import argparse

from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import opened, words_of
from cloudfs.commands._output import Output
from cloudfs.render import Column, socket_record
from engine.errors import UnsupportedError
from engine.oslayer import Sockets

EXAMPLES = """\
  cloudfs netstat memory.raw
  cloudfs netstat memory.raw --json | jq '.[] | select(.state == "LISTEN") | .local'
"""
SHAPE = Shape()
COLUMNS = (
    Column("family", "FAMILY"),
    Column("protocol", "PROTOCOL"),
    Column("kind", "KIND"),
    Column("state", "STATE"),
    Column("local", "LOCAL"),
    Column("remote", "REMOTE"),
    Column("inode", "INODE", right=True),
    Column("uid", "UID", right=True),
    Column("pid", "PID", right=True),
    Column("descriptor", "FD", right=True),
)
TERMINAL_ORDER = ("family", "protocol", "state", "pid", "descriptor", "local", "remote", "kind", "inode", "uid")


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs netstat`."""
    parser.usage = f"cloudfs netstat [OPTIONS] {SHAPE}"
    add_chain_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the sockets."""
    words = words_of(arguments, SHAPE)
    output = Output("netstat", json=arguments.json, no_color=arguments.no_color)
    with opened(arguments, words) as target:
        source = target.layer.capability(Sockets)
        if source is None:
            raise UnsupportedError(f"{target.name} shows no sockets{target.advice('ss(8)')}")
        rows = [socket_record(socket) for socket in source.sockets()]
    if output.json:
        output.document(rows)
    else:
        output.table(rows, on_a_terminal() if output.terminal else COLUMNS)
    return Exit.DONE


def on_a_terminal() -> list[Column]:
    """The columns with what tells most first: a terminal's edge cuts the rest."""
    return sorted(COLUMNS, key=lambda column: TERMINAL_ORDER.index(column.key))
