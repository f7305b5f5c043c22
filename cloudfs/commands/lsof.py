"""Lists what a process, or every process, of a target has open.

FLAGS are those that open(2) took, in octal.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cloudfs.commands._arguments import Exit, Parser, Shape, add_chain_options
from cloudfs.commands._opening import Opened, opened, process_of, words_of
from cloudfs.commands._output import Output
from cloudfs.render import Column, open_file_record
from cloudfs.render.records import Record
from engine.errors import NotFoundError, UnsupportedError
from engine.oslayer import OpenFiles, Process

EXAMPLES = """\
  cloudfs lsof memory.raw                          every process
  cloudfs lsof memory.raw 4711                     one
  cloudfs lsof memory.raw --json | jq -r '.[] | select(.path // "" | endswith("(deleted)")) | .path'
"""
SHAPE = Shape(process="optional")
COLUMNS = (
    Column("name", "NAME"),
    Column("pid", "PID", right=True),
    Column("descriptor", "FD", right=True),
    Column("kind", "KIND"),
    Column("flags", "FLAGS", right=True),
    Column("position", "POSITION", right=True),
    Column("size", "SIZE", right=True),
    Column("inode", "INODE", right=True),
    Column("path", "PATH"),
)


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs lsof`."""
    parser.usage = f"cloudfs lsof [OPTIONS] {SHAPE}"
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the open files."""
    words = words_of(arguments, SHAPE)
    output = Output("lsof", json=arguments.json, no_color=arguments.no_color)
    with opened(arguments, words) as target:
        if words.process is None:
            rows = [row for process in target.layer.processes() for row in _rows(target, process)]
        else:
            with process_of(target, words.process) as process:
                rows = list(_rows(target, process))
    if output.json:
        output.document(rows)
    else:
        output.table(rows, COLUMNS)
    return Exit.DONE


def _rows(target: Opened, process: Process) -> Iterator[Record]:
    files = process.capability(OpenFiles)
    if files is None:
        raise UnsupportedError(f"{target.name} does not show what its processes have open{target.advice('lsof(8)')}")
    try:
        info = process.info
        for file in files.open_files():
            yield {"pid": info.pid, "name": info.name, **open_file_record(file)}
    except NotFoundError:
        return
