"""Standard output and standard error of the command line: for people on a terminal, for programs in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from cloudfs.render import Column, display_width, escape_terminal, table, to_json

BOLD, RED, PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[0m"


class OutputError(Exception):
    """Standard output takes no more: its disk is full, its terminal is gone."""


class ReaderGoneError(OutputError):
    """Whoever read standard output has read enough, as `head` does: nothing is wrong."""


@contextmanager
def writing() -> Iterator[None]:
    """Tells failures of standard output from those of a target."""
    try:
        yield
    except BrokenPipeError:
        raise ReaderGoneError from None
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from None


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream ends at a person; False for a closed one."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def wants_colour(stream: TextIO, no_color: bool) -> bool:
    """Whether to colour a stream: a terminal that can, unless --no-color, NO_COLOR (no-color.org) or TERM=dumb."""
    return not no_color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and is_terminal(stream)


def clip(line: str, width: int) -> str:
    """A line cut to `width` columns of a terminal; what was cut shows as `…`."""
    if display_width(line) <= width:
        return line
    while display_width(line) > width - 1:
        line = line[: len(line) - max(1, (display_width(line) - width) // 2)]
    return line + "…"


class Output:
    """Where a command prints. What it prints is escaped; only `raw` passes bytes as they are."""

    def __init__(self, name: str, *, json: bool = False, no_color: bool = False) -> None:
        self.name = name
        self.json = json
        self.terminal = is_terminal(sys.stdout)
        self.colour = wants_colour(sys.stdout, no_color)
        self.error_colour = wants_colour(sys.stderr, no_color)

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return max(20, shutil.get_terminal_size().columns)

    def text(self, text: str) -> None:
        """Print text that is safe for a terminal already."""
        with writing():
            sys.stdout.write(text)

    def raw(self, data: bytes | memoryview) -> None:
        """Print bytes as they are."""
        with writing():
            sys.stdout.flush()
            sys.stdout.buffer.write(data)

    def flush(self) -> None:
        """Hand what was printed to the kernel."""
        with writing():
            sys.stdout.flush()

    def document(self, value: Any) -> None:
        """Print one JSON document."""
        self.text(to_json(value))

    def table(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> None:
        """Print rows below bold titles, cut at the terminal's edge; in a pipe tab-separated, whole, without titles."""
        text = table(rows, columns, terminal=self.terminal)
        if not self.terminal:
            self.text(text)
            return
        width = self.width
        title, *lines = [clip(line, width) for line in text.splitlines()]
        self.text(f"{BOLD}{title}{PLAIN}\n" if self.colour else title + "\n")
        self.text("".join(line + "\n" for line in lines))

    def say(self, sentence: str) -> None:
        """Print a sentence on standard error, behind all that was printed so far."""
        self.flush()
        head = f"cloudfs {self.name}:" if self.name else "cloudfs:"
        if self.error_colour:
            head = f"{RED}{head}{PLAIN}"
        sys.stderr.write(f"{head} {escape_terminal(sentence)}\n")
