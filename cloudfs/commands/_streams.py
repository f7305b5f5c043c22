"""Standard output and standard error, without anything heavy: what goes wrong with them, and sentences on them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

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
        why = "it is closed" if error.errno == errno.EBADF else error.strerror
        raise OutputError(f"standard output cannot be written: {why}") from None


def put(text: str) -> None:
    """Print text that is safe for a terminal already."""
    with writing():
        sys.stdout.write(text)


def flush() -> None:
    """Hand what was printed to the kernel."""
    with writing():
        sys.stdout.flush()


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream ends at a person; False for a closed one."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def wants_colour(stream: TextIO, no_color: bool) -> bool:
    """Whether to colour a stream: a terminal that can, unless --no-color, NO_COLOR (no-color.org) or TERM=dumb."""
    return not no_color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and is_terminal(stream)


def say(name: str, sentence: str, *, no_color: bool) -> None:
    """Print a sentence of the command `name` on standard error; what a terminal could be deceived by is escaped."""
    if not (sentence.isascii() and sentence.isprintable()):
        from cloudfs.render import escape_terminal  # brings the engine with it

        sentence = escape_terminal(sentence)
    head = f"cloudfs {name}:" if name else "cloudfs:"
    if wants_colour(sys.stderr, no_color):
        head = f"{RED}{head}{PLAIN}"
    sys.stderr.write(f"{head} {sentence}\n")
    sys.stderr.flush()
