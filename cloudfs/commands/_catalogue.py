"""Which commands there are, and their parsers."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

from cloudfs.commands._arguments import Parser, UsageError, add_common_options


@functools.cache
def command_names() -> tuple[str, ...]:
    """The commands there are: the files of cloudfs/commands, but those that begin with an underscore."""
    return tuple(sorted(file.stem for file in Path(__file__).parent.glob("[!_]*.py")))


def load_command(name: str) -> Any:
    """The module of a command. Raises UsageError where there is none."""
    names = command_names()
    if name not in names:
        import difflib

        close = difflib.get_close_matches(name, names, 1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise UsageError(f"there is no command {name!r}{meant}; the commands are {', '.join(names)}")
    return importlib.import_module(f"cloudfs.commands.{name}")


def parser_of(name: str) -> Parser:
    """The parser of a command: what --help, completion and the manual page are made from."""
    command = load_command(name)
    parser = Parser(
        prog=f"cloudfs {name}", description=command.__doc__.strip(), epilog=f"examples:\n{command.EXAMPLES.rstrip()}"
    )
    command.configure(parser)
    add_common_options(parser)
    return parser


def summary(name: str) -> str:
    """What a command does, in a sentence."""
    return str(load_command(name).__doc__).strip().split("\n", 1)[0]
