"""`processes/PID`: one process. What /proc has too stands in `procfs`."""

from __future__ import annotations

from cloudfs import render
from cloudfs.node import Node
from cloudfs.nodes.contexts import ProcessContext, process_entry
from cloudfs.nodes.directories import EntryDirectory
from cloudfs.nodes.files.memory import MemoryFile
from cloudfs.nodes.files.text import info_file, json_file
from cloudfs.nodes.kept import KEPT
from cloudfs.nodes.modules import ModulesDirectory
from cloudfs.nodes.regions import RegionsDirectory, open_range


class ProcessDirectory(EntryDirectory[ProcessContext]):
    """One process."""

    __slots__ = ()

    def __init__(self, process: ProcessContext) -> None:
        super().__init__(process, "process", process_entry)

    @property
    def may_block(self) -> bool:
        """See `Node.may_block`."""
        return self._may_block and not self.context.at_hand

    def check(self) -> None:
        """Raise ProcessExitedError where the process has ended."""
        self.context.process()


@process_entry("info")
def info(process: ProcessContext) -> Node | None:
    """What is known of it, for people."""
    return info_file(process, "info", lambda: record(process), may_block=process.reads_block)


@process_entry("info.json")
def info_json(process: ProcessContext) -> Node | None:
    """The same as JSON, with the keys of `cloudfs ps --json`."""
    return json_file(process, "info.json", lambda: record(process), may_block=process.reads_block)


def record(process: ProcessContext) -> render.Record:
    """What `info` and `info.json` tell: one record where they are asked for together."""
    return KEPT.get(process.instance, ("record", process.key), lambda: render.process_record(process.process().info))


@process_entry("mem")
def mem(process: ProcessContext) -> Node | None:
    """Its virtual memory; offset = address, and a hole gives EIO."""
    return MemoryFile(
        process, "mem", lambda: open_range(process), whole=False, writable=process.instance.writable
    )


@process_entry("regions")
def regions(process: ProcessContext) -> Node | None:
    """One file for each mapped range, for `grep -r`; holes read as zeros."""
    return RegionsDirectory(process)


@process_entry("modules")
def modules(process: ProcessContext) -> Node | None:
    """Its executable and libraries, each a directory."""
    return ModulesDirectory(process) if process.process().tells_modules else None
