"""Writes to memory; needs --writable.

SPACE is a PID, a process's name where only one has it, `kernel` or `physical`; DATA is hexadecimal, or `-` for
standard input.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterable, Iterator

from cloudfs.commands._arguments import Exit, Parser, Shape, UsageError, add_chain_options
from cloudfs.commands._opening import opened, words_of
from cloudfs.commands._output import Output
from cloudfs.commands._spaces import CHUNK, Space, address_of, need_of, space_of
from cloudfs.render import address_text
from engine.errors import FaultError

EXAMPLES = """\
  cloudfs write --writable 4711 0x7ffd0010 2a000000             four bytes of a process of this machine
  cloudfs write --writable 4711 0x7ffd0010 "2a 00 00 00"        the same
  cloudfs write --writable memory.raw physical 4K - < page      from standard input
"""
SHAPE = Shape(process="required", rest=("ADDRESS", "DATA"), process_word="SPACE")

log = logging.getLogger("cloudfs.write")


def configure(parser: Parser) -> None:
    """The words and options of `cloudfs write`."""
    parser.usage = f"cloudfs write --writable [OPTIONS] {SHAPE}"
    parser.add_argument("--writable", action="store_true", help="allow it: nothing is ever written without this")
    add_chain_options(parser, process=True)


def run(arguments: argparse.Namespace) -> int:
    """Write the bytes."""
    words = words_of(arguments, SHAPE)
    output = Output("write", json=arguments.json, no_color=arguments.no_color)
    address = address_of(words.rest[0])
    data = _standard_input() if words.rest[1] == "-" else [bytes_of(words.rest[1])]
    if not arguments.writable:
        raise UsageError("writing changes the target: allow it with --writable")
    assert words.process is not None, "the shape requires one"
    is_process = arguments.process is not None
    need = need_of(words.process, is_process=is_process)
    with (
        opened(arguments, words, need=need, writable=True) as target,
        space_of(target, words.process, is_process=is_process) as space,
    ):
        written, fault = _store(space, address, data)
    if output.json:
        output.document({"address": address_text(address), "written": written})
    if fault is not None:
        count = f"only {written} bytes were" if written else "nothing was"
        output.say(f"{count} written to {space.name} from {address:#x} on: {fault}")
        return Exit.FAILED
    log.info("%d bytes were written to %s from %#x on", written, space.name, address)
    return Exit.DONE


def bytes_of(word: str) -> bytes:
    """The bytes that hexadecimal digits stand for; spaces may stand between bytes. Raises UsageError."""
    digits = re.sub(r"[ \t\n]+", "", word.removeprefix("0x"))
    if len(digits) % 2 or not re.fullmatch(r"[0-9a-fA-F]*", digits):
        raise UsageError(f"DATA {word[:40]!r} is not hexadecimal: want two digits a byte, or - for standard input")
    return bytes.fromhex(digits)


def _standard_input() -> Iterator[bytes]:
    if sys.stdin is None:
        raise UsageError("standard input is closed")
    while block := sys.stdin.buffer.read(CHUNK):
        yield block


def _store(space: Space, address: int, data: Iterable[bytes]) -> tuple[int, FaultError | None]:
    """How many bytes were written, and what stopped it."""
    written = 0
    for block in data:
        try:
            space.memory.write(address + written, block)
        except FaultError as error:
            return written + max(0, error.address - address - written), error
        written += len(block)
    return written, None
