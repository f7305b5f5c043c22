"""Prints memory: as `hexdump -C` does on a terminal, raw bytes into a pipe.

SPACE is a PID, a process's name where only one has it, `kernel` or `physical`, or `PID/files/N`: the file behind a
descriptor, up to its end, as far as the page cache of a captured machine holds it. What cannot be read is said on
standard error (exit code 4): hexdump lines leave it out, raw bytes have zeros for it where bytes follow, so that
offsets stay true.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

from cloudfs.commands._arguments import Exit, Parser, Shape, UsageError, add_chain_options
from cloudfs.commands._hexdump import HexDump
from cloudfs.commands._opening import opened, words_of
from cloudfs.commands._output import Output
from cloudfs.commands._spaces import Data, Hole, address_of, need_of, pieces, space_of
from cloudfs.commands._streams import writing
from cloudfs.render import address_text
from engine.errors import InvalidArgumentError
from engine.numbers import parse_number

EXAMPLES = """\
  cloudfs read 1 0x7ffd0000 256                 a process of this machine
  cloudfs read -p sshd 0x7ffd0000 1M > part     by name, raw bytes into a file
  cloudfs read memory.raw 812/files/3 0 1M      the file behind a descriptor, from the page cache
  cloudfs read memory.raw physical 0 4K         an image of physical memory
  cloudfs read -c raw:memory.raw:base=1M physical 1M 64    one that begins at 1M
  cloudfs read 1 0x7ffd0000 256 --hex | less    lines in a pipe too
"""
SHAPE = Shape(process="required", rest=("ADDRESS", "LENGTH"), process_word="SPACE")
ZEROS = bytes(1 << 20)


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs read`."""
    parser.usage = f"cloudfs read [OPTIONS] {SHAPE}"
    form = parser.add_argument_group("how to print").add_mutually_exclusive_group()
    form.add_argument("--hex", action="store_true", help="lines as hexdump -C prints them, in a pipe too")
    form.add_argument("--raw", action="store_true", help="bytes as they are, on a terminal too")
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Print the bytes."""
    words = words_of(arguments, SHAPE)
    output = Output("read", json=arguments.json, no_color=arguments.no_color)
    address = address_of(words.rest[0])
    length = length_of(words.rest[1])
    if output.json and (arguments.hex or arguments.raw):
        raise UsageError("--json excludes --hex and --raw")
    assert words.process is not None, "the shape requires one"
    is_process = arguments.process is not None
    need = need_of(words.process, is_process=is_process)
    with (
        opened(arguments, words, need=need) as target,
        space_of(target, words.process, is_process=is_process) as space,
    ):
        printer = _printer(arguments, output)
        code = Exit.DONE
        for piece in pieces(space, address, length):
            if isinstance(piece, Hole):
                code = Exit.PARTIAL
                output.say(f"{piece.start:#x}-{piece.stop:#x} of {space.name} cannot be read: {piece.reason}")
            printer.put(piece)
        printer.finish()
    return code


def length_of(word: str) -> int:
    """A length as a person writes it."""
    try:
        return parse_number(word, "the length")
    except InvalidArgumentError as error:
        raise UsageError(str(error)) from None


class _Printer(ABC):
    """Prints pieces in one form."""

    def __init__(self, output: Output) -> None:
        self.output = output

    @abstractmethod
    def put(self, piece: Data | Hole) -> None:
        """Print the next piece."""

    def finish(self) -> None:
        """All was put."""


class _Lines(_Printer):
    """As hexdump -C; holes are left out."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._dump = HexDump()

    def put(self, piece: Data | Hole) -> None:
        if isinstance(piece, Data):
            for block in self._dump.feed(piece.address, piece.view):
                self.output.raw(block)

    def finish(self) -> None:
        for block in self._dump.finish():
            self.output.raw(block)


class _Bytes(_Printer):
    """As they are. A hole is zeros as soon as bytes follow it; into a fresh file it becomes one of the file's."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._missing = 0
        self._seek = _skipper()

    def put(self, piece: Data | Hole) -> None:
        if isinstance(piece, Hole):
            self._missing += piece.stop - piece.start
            return
        if self._missing and self._seek is not None:
            self.output.flush()
            self._seek(self._missing)
            self._missing = 0
        while self._missing:
            step = min(self._missing, len(ZEROS))
            self.output.raw(memoryview(ZEROS)[:step])
            self._missing -= step
        self.output.raw(piece.view)


def _skipper() -> Callable[[int], None] | None:
    """What skips bytes of standard output, leaving zeros; None where it must be written."""
    descriptor = sys.stdout.fileno()
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode):
        return None
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND or os.lseek(descriptor, 0, os.SEEK_CUR) < state.st_size:
        return None  # there are bytes behind, which would stand where zeros are meant

    def skip(count: int) -> None:
        with writing():
            os.lseek(descriptor, count, os.SEEK_CUR)

    return skip


class _Document(_Printer):
    """As one JSON array, in a stream: `data` is hexadecimal, null where `problem` says why it could not be read."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self._separator = "[\n"

    def put(self, piece: Data | Hole) -> None:
        if isinstance(piece, Data):
            record = {"address": address_text(piece.address), "size": len(piece.view), "data": piece.view.hex()}
        else:
            record = {"address": address_text(piece.start), "size": piece.stop - piece.start, "data": None}
        record["problem"] = piece.reason if isinstance(piece, Hole) else None
        self.output.text(f"{self._separator}  {json.dumps(record)}")
        self._separator = ",\n"

    def finish(self) -> None:
        self.output.text("\n]\n" if self._separator == ",\n" else "[]\n")


def _printer(arguments: argparse.Namespace, output: Output) -> _Printer:
    if output.json:
        return _Document(output)
    as_lines = arguments.hex or (output.terminal and not arguments.raw)
    return _Lines(output) if as_lines else _Bytes(output)
