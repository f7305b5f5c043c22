"""From the words of a command to what is opened: the chain, its OS layer, a process, an address space."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Literal

from cloudfs.commands._arguments import Shape, UsageError, Words, assign, is_pid
from engine import registry
from engine.errors import AccessDeniedError, NotFoundError, NotRecognisedError, UnsupportedError
from engine.machine import Instance, Machine
from engine.oslayer import Module, OsLayer, Process
from engine.records import dataclass
from engine.targets import Chain, Link, chain_of, open_chain, target_link
from engine.types import ProcessInfo

COMM_LIMIT = 15
"""Linux keeps so many bytes of a process's name: TASK_COMM_LEN of include/linux/sched.h, less the NUL."""
LISTED_PIDS = 20


class AbsentError(NotFoundError):
    """There is no such process, module or address space in a target that was opened."""


Need = Literal["os", "connector", "any"]
"""What a command needs of a chain: an OS layer, the connector alone, or both where there are both."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An opened chain: its last instance, and what stands below."""

    machine: Machine
    chain: Chain
    instance: Instance

    @property
    def asked(self) -> tuple[Link, ...]:
        """The links that were asked for."""
        return self.chain.links[:-1] if self.chain.implied else self.chain.links

    @property
    def name(self) -> str:
        """The chain as a person names it."""
        if len(self.asked) == 1 and self.asked[0][1].plugin == "native":
            return "this machine"
        return " ← ".join(str(spec) for _, spec in self.asked)

    @property
    def layer(self) -> OsLayer:
        """The OS layer. Raises NotRecognisedError where none recognised the memory."""
        if self.instance.kind != "oslayer":
            raise NotRecognisedError(self.instance.last_error or f"{self.name} has no OS layer")
        return self.instance.layer

    def advice(self, tool: str) -> str:
        """How a sentence ends that says what the OS layer does not show: of this machine `tool` shows it."""
        info = self.layer.info
        return f"; {tool} does" if info.kind == "native" else "; the notes of `cloudfs info` say why" * bool(info.notes)

    @property
    def connector(self) -> Instance | None:
        """The connector at the top of the chain, below the OS layer if there is one."""
        return self.instance if self.instance.kind == "connector" else self.instance.parent


def kernel_modules(target: Opened) -> Iterator[Module]:
    """The modules of its kernel. Raises UnsupportedError where they are not known."""
    if not target.layer.tells_modules:
        raise UnsupportedError(f"which modules the kernel of {target.name} has is not known{target.advice('lsmod(8)')}")
    return target.layer.modules()


def words_of(arguments: argparse.Namespace, shape: Shape) -> Words:
    """What the words of a command mean; see `assign`."""
    words = assign(arguments.words, shape, file=arguments.file, process=arguments.process)
    if shape.process == "optional" and words.target is not None and words.process is None and arguments.file is None:
        _check_target(words.target)
    return words


def _check_target(word: str) -> None:
    """Raise NotFoundError for a lone word that is neither file nor plugin, but perhaps a process's name."""
    try:
        target_link(word)
    except NotFoundError as error:
        if "/" in word or ":" in word:
            raise
        raise NotFoundError(f"{error}; a process by its name: -p {word}") from None


@contextmanager
def opened(
    arguments: argparse.Namespace,
    words: Words,
    *,
    need: Need = "os",
    writable: bool = False,
    patience: float | None = None,
) -> Iterator[Opened]:
    """The chain that is asked for, open as long as the context.

    An OS layer that nobody has named is not looked for where the connector is enough, as it may take long; where it is
    wanted if there is one (`any`) for at most `patience` seconds.
    """
    chain = chain_of(words.target, arguments.chain)
    if need == "connector" and chain.implied:
        chain = Chain(chain.links[:-1])
    with Machine(writable=writable) as machine:
        yield Opened(machine, chain, open_chain(machine, chain, need_os=need == "os", patience=patience))


@contextmanager
def process_of(target: Opened, word: str) -> Iterator[Process]:
    """The process of that number or, where only one has it, that name, as long as the context.

    Raises AbsentError where there is none, UsageError that lists the PIDs where there are several.
    """
    process = find_process(target, word)
    try:
        yield process
    finally:
        process.close()


def process_info(target: Opened, word: str) -> ProcessInfo:
    """The record of one process; see `process_of`."""
    with process_of(target, word) as process:
        return process.info


def find_process(target: Opened, word: str) -> Process:
    """The process of that number or name; the caller closes it. See `process_of`."""
    layer = target.layer
    if is_pid(word):
        return _by_pid(layer, target.name, word)
    found = list(_named(layer, word))
    if not found:
        if os.path.exists(word) or registry.find(word.split(":", 1)[0]) is not None:
            raise UsageError(f"{word!r} stands where a process is named; as TARGET it wants one more word behind it")
        raise AbsentError(f"no process of {target.name} is called {word!r}; `cloudfs ps` lists them")
    if len(found) > 1:
        shown = ", ".join(str(pid) for pid in found[:LISTED_PIDS])
        more = f" and {len(found) - LISTED_PIDS} more" if len(found) > LISTED_PIDS else ""
        raise UsageError(f"{len(found)} processes of {target.name} are called {word!r}: name one by PID: {shown}{more}")
    return _by_pid(layer, target.name, str(found[0]))


def _by_pid(layer: OsLayer, name: str, word: str) -> Process:
    if len(word) > 20:  # longer than 2^64
        raise AbsentError(f"{name} has no process {word[:20]}…: no PID is that large")
    try:
        return layer.process(int(word))
    except NotFoundError:
        raise AbsentError(f"{name} has no process {int(word)}; `cloudfs ps` lists them") from None


def _named(layer: OsLayer, name: str) -> Iterator[int]:
    for process in layer.processes():
        try:
            info = process.info
        except (NotFoundError, AccessDeniedError):
            continue
        finally:
            process.close()
        if is_called(info, name):
            yield info.pid


def is_called(info: ProcessInfo, name: str) -> bool:
    """Whether a process has that name; one that Linux has cut may be written whole, as its command line has it."""
    if info.name == name:
        return True
    if len(info.name) != COMM_LIMIT or not name.startswith(info.name) or not info.command_line:
        return False
    return PurePosixPath(info.command_line[0]).name == name
