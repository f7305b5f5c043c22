"""`processes/PID/threads/TID/`: what is known of a thread beyond its files in /proc."""

from __future__ import annotations

from collections.abc import Mapping

from cloudfs import render
from cloudfs.node import Node
from cloudfs.nodes.contexts import ProcessContext, ThreadContext, process_entry, thread_facts_entry
from cloudfs.nodes.files.text import TextFile, info_file, json_file
from cloudfs.nodes.procfs import ThreadsDirectory
from engine.errors import NotFoundError, ProcessExitedError
from engine.oslayer import ThreadRegisters
from engine.types import ThreadInfo


@process_entry("threads")
def threads(process: ProcessContext) -> Node | None:
    """A directory for each thread: info, and registers where they are known."""
    return ThreadsDirectory(process, "threads", thread_facts_entry)


def _record(thread: ThreadContext) -> render.Record:
    found: ThreadInfo | None = next(
        (one for one in thread.process.process().threads() if one.tid == thread.tid), None
    )
    if found is None:
        raise ProcessExitedError(thread.tid)
    return render.thread_record(found)


@thread_facts_entry("info")
def info(thread: ThreadContext) -> Node | None:
    """Its number, name and state."""
    return info_file(thread, "info", lambda: _record(thread), may_block=thread.process.reads_block)


@thread_facts_entry("info.json")
def info_json(thread: ThreadContext) -> Node | None:
    """The same as JSON."""
    return json_file(thread, "info.json", lambda: _record(thread), may_block=thread.process.reads_block)


def _registers(thread: ThreadContext) -> Mapping[str, int]:
    source = thread.process.capability(ThreadRegisters)
    if source is None:
        raise NotFoundError(f"the registers of thread {thread.tid} are not known")
    return source.registers(thread.tid)


@thread_facts_entry("registers")
def registers(thread: ThreadContext) -> Node | None:
    """Its registers when it entered the kernel; of one that was running, a line that says so."""
    if thread.process.capability(ThreadRegisters) is None:
        return None

    def text() -> str:
        try:
            found = _registers(thread)
        except ProcessExitedError:
            raise
        except NotFoundError as error:
            return f"# {render.escape_terminal(str(error))}\n"
        return "".join(f"{name:<8} {value:#x}\n" for name, value in found.items())

    return TextFile(thread, "registers", text)


@thread_facts_entry("registers.json")
def registers_json(thread: ThreadContext) -> Node | None:
    """The same as JSON; null where they are not known."""
    if thread.process.capability(ThreadRegisters) is None:
        return None

    def record() -> dict[str, str] | None:
        try:
            return {name: f"{value:#x}" for name, value in _registers(thread).items()}
        except ProcessExitedError:
            raise
        except NotFoundError:
            return None

    return json_file(thread, "registers.json", record)
