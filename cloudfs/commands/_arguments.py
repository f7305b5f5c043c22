"""The words of the command line: options that every command knows, and what TARGET, PID and SPACE mean.

Nothing heavy is imported here: `cloudfs mount --daemon` forks before it imports the engine.
"""

from __future__ import annotations

import argparse
import enum
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NoReturn

from engine.records import dataclass

Kind = Literal["connector", "oslayer"]


class Exit(enum.IntEnum):
    """What the command line's exit codes mean."""

    DONE = 0
    FAILED = 1
    """The target is not there, failed or was not recognised."""
    USAGE = 2
    ABSENT = 3
    """No such process, module or address space."""
    PARTIAL = 4
    """Done, but part of what was asked could not be read; standard error says what."""
    INTERRUPTED = 130


class UsageError(Exception):
    """The command line cannot be carried out as it is written; the text says how it is written."""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with paragraphs as they stand."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


_PLAIN = (
    (r"argument (\S+): invalid (?:float|int) value: (.*)", r"\1 wants a number, not \2"),
    (r"argument (\S+): not allowed with argument (\S+)", r"\1 and \2 exclude each other"),
    (r"argument (\S+): expected one argument", r"\1 wants a value behind it"),
    (r"argument (\S+): ignored explicit argument (.*)", r"\1 takes no value, not even \2"),
)
"""What argparse says, and how the house says it."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError, and takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, add_help=False, formatter_class=_Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; argparse would print its usage and exit."""
        for pattern, plain in _PLAIN:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                raise UsageError(found.expand(plain))
        raise UsageError(message)


class _Append(argparse.Action):
    """-c and -o, kept in the order in which they stand on one another."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        kind: Kind = "connector" if option in ("-c", "--connector") else "oslayer"
        namespace.chain = [*namespace.chain, (kind, values)]


def add_common_options(parser: Parser) -> None:
    """The options of every command; they may also stand in front of the command word."""
    group = parser.add_argument_group("options of every command")
    group.add_argument("--json", action="store_true", help="print one JSON document")
    group.add_argument("-v", "--verbose", action="count", default=0, help="log more; -vv: with tracebacks of errors")
    group.add_argument("--log-file", metavar="FILE", help="append the log to FILE instead of standard error")
    group.add_argument("--no-color", action="store_true", help="no colours (also: environment variable NO_COLOR)")
    group.add_argument("--version", action="store_true", help="print the version")
    group.add_argument("-h", "--help", action="store_true", help="show this help")
    parser.set_defaults(chain=[], file=None, process=None)


def add_chain_options(parser: Parser, *, process: bool = False, os_option: str = "-o --os") -> None:
    """The options that say what to open, and, with `process`, which process is meant."""
    group = parser.add_argument_group("what to open (nothing said: this machine)")
    group.add_argument("-f", "--file", metavar="FILE", help="TARGET is an image file, whatever it is called")
    if process:
        group.add_argument("-p", "--process", metavar="PID|NAME", help="the process, by number or by its only name")
    group.add_argument("--no-cache", action="store_true", help="use and keep nothing of earlier runs: slower to open")
    words = {"-c --connector": "a source of memory", os_option: "the OS layer on it; -c and -o may alternate"}
    for names, text in words.items():
        group.add_argument(*names.split(), action=_Append, dest="chain", default=[], metavar="PLUGIN[:…]", help=text)


VALUE_OPTIONS = frozenset("-c --connector -o --os -f --file -p --process --log-file --timeout --spin".split())
"""Options whose value is the next word: the command word is looked for behind it."""


def split_command(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The command word and all other words in their order; options may stand in front of it."""
    index = 0
    while index < len(words) and words[index] != "--":
        word = words[index]
        if not word.startswith("-") or word == "-":
            return word, [*words[:index], *words[index + 1 :]]
        index += 2 if word in VALUE_OPTIONS else 1
    return None, list(words)


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The options, and in `words` all that is none; behind `--` nothing is an option. Raises UsageError."""
    cut = words.index("--") if "--" in words else len(words)
    arguments, rest = parser.parse_known_args(list(words[:cut]))
    for word in rest:
        if re.match("-[0-9]", word):
            raise UsageError(f"{word}: addresses are not negative, nor are lengths and PIDs")
        if word.startswith("-") and word != "-":
            raise UsageError(f"there is no option {word}")
    arguments.words = [*rest, *words[cut + 1 :]]
    return arguments


# -- what a word means -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """The words that a command takes: [TARGET], then a process (or SPACE), then `rest`, each exactly once."""

    process: Literal["never", "optional", "required"] = "never"
    rest: tuple[str, ...] = ()
    process_word: str = "PID"

    def __str__(self) -> str:
        process = {"never": [], "optional": [f"[{self.process_word}]"], "required": [self.process_word]}[self.process]
        return " ".join(["[TARGET]", *process, *self.rest])


@dataclass(frozen=True, slots=True)
class Words:
    """What the words of a command mean."""

    target: str | None
    process: str | None
    rest: tuple[str, ...] = ()


def is_pid(word: str) -> bool:
    """Whether a word is a number of a process: nothing but ASCII digits."""
    return word.isascii() and word.isdigit()


def assign(words: Sequence[str], shape: Shape, *, file: str | None = None, process: str | None = None) -> Words:
    """What each word means. `file` and `process` are those of -f and -p: their places are taken then.

    Words are given out from the right: what the command cannot do without comes first. Where one word is
    left for an optional TARGET and an optional PID, digits are a PID, all else a TARGET. Raises UsageError.
    """
    _check_count(words, shape, process)
    cut = len(words) - len(shape.rest)
    head, rest = list(words[:cut]), tuple(words[cut:])
    given = process
    takes_process = shape.process != "never" and given is None
    target = path_target(file) if file is not None else None
    if head and takes_process:
        alone = len(head) == 1
        if not alone or shape.process == "required" or is_pid(head[0]) or file is not None:
            process = head.pop()
    if head and file is None:
        target = head.pop()
    if not head and target is not None and process is not None and given is None and file is None:
        _check_order(target, process, shape.process_word)
    if head:
        taken = [f"-f {file} is the TARGET"] if file is not None else []
        taken += [f"-p {given} is the process"] if given is not None else []
        raise UsageError("; ".join([f"{len(words)} words are too many: want {shape}", *taken]))
    return Words(target, process, rest)


def _check_count(words: Sequence[str], shape: Shape, process: str | None) -> None:
    """Raise UsageError where fewer words came than the command can do with."""
    wanted = shape if process is None else replace(shape, process="never")
    needed = [wanted.process_word] * (wanted.process == "required") + list(wanted.rest)
    if len(words) >= len(needed):
        return
    instead = ", or -p PID|NAME" if wanted.process == "required" else ""
    if words:
        came = "1 word came" if len(words) == 1 else f"{len(words)} words came"
        raise UsageError(f"{came}, at least {len(needed)} are wanted: {wanted}{instead}")
    listed = " and ".join([", ".join(needed[:-1]), needed[-1]] if len(needed) > 1 else needed)
    raise UsageError(f"{listed} {'is' if len(needed) == 1 else 'are'} missing: want {wanted}{instead}")


def _check_order(target: str, process: str, word: str) -> None:
    """Raise UsageError where TARGET and PID have changed places: digits that name no file, then what is no number."""
    if is_pid(target) and not is_pid(process) and not os.path.exists(target):
        raise UsageError(f"{word} comes behind TARGET, and there is no file {target!r}: write {process} {target}")


def path_target(path: str) -> str:
    """A TARGET that can be nothing but the file at `path`."""
    return path if path.startswith(("/", "./", "../")) else f"./{path}"
