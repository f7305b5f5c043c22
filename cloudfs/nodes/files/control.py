"""The files `new`: a line written is a command, and reading tells how, what there is, and what came of the last.

What programs really send: a command runs inside the write() that brings its newline, since that write's errno is
the one that bash, dash and tee report. Offsets, O_TRUNC, O_APPEND and truncate(2) mean nothing. Every descriptor
has a buffer of its own; what has no newline runs when the descriptor is closed. Of several lines in one write
those up to a failing one count as written; the failing one gives its errno, and from then on the descriptor
repeats it and runs nothing (Python writes a failed line twice). Empty lines and those that begin with `#` are
ignored, and all that is printed here begins with `#`: an editor may write it back.

While a write runs, the kernel holds the lock of the inode and every other write, and open with O_TRUNC, waits for it
(fuse_direct_write_iter in fs/fuse/file.c, do_truncate in fs/open.c), though it be for a target that never answers.
So whoever opens the file for writing takes its inode with him: the name leads to another from then on.
"""

from __future__ import annotations

import os
import stat as st
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import ClassVar

from cloudfs.node import Attributes, File, OpenFile
from cloudfs.nodes.contexts import TreeContext
from cloudfs.nodes.results import Result, Results
from cloudfs.render import escape_terminal
from engine.chain import LINE_LIMIT
from engine.errors import EngineError, InvalidArgumentError, TargetTimeoutError
from engine.machine import Kind

Run = Callable[[str], str]
"""Carries out a line and gives a sentence that says what was done."""


class ControlFile(File):
    """A file that takes commands; `usage` gives the lines that stand above the result."""

    __slots__ = ("_group", "_identity", "_results", "_run", "_usage")

    takes_commands: ClassVar[bool] = True

    def __init__(self, tree: TreeContext, kind: Kind, run: Run, usage: Callable[[], Iterator[str]]) -> None:
        self._run = run
        self._usage = usage
        self._results = tree.results[kind]
        self._group = ("new", kind, tree.key)
        self._identity = (self._group, self._results.writers)

    @property
    def identity(self) -> Hashable:
        """See `Node.identity`."""
        return self._identity

    @property
    def thread_group(self) -> Hashable:
        """See `Node.thread_group`."""
        return self._group

    @property
    def timeout(self) -> float:
        """See `Node.timeout`: the name is looked up whenever it is used."""
        return 0.0

    def attributes(self) -> Attributes:
        """See `Node.attributes`. The size is 0: what stands in it depends on who reads."""
        return Attributes(st.S_IFREG | 0o644)

    def open(self, flags: int) -> OpenFile:
        """See `File.open`."""
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self._results.writers += 1
        return OpenControl(self._run, self._usage, self._results)


class OpenControl(OpenFile):
    """One descriptor."""

    def __init__(self, run: Run, usage: Callable[[], Iterator[str]], results: Results) -> None:
        self._run = run
        self._usage = usage
        self._results = results
        self._rest = b""
        self._failure: Exception | None = None
        self._own: Result | None = None
        self._text = b""
        self._at_work = threading.Lock()

    @property
    def may_block(self) -> bool:
        """See `OpenFile.may_block`: opening a target may, and plugins are loaded to be listed."""
        return True

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        """See `OpenFile.read`; the text is made anew whenever it is read from its beginning.

        Where the first read lies further back (`tail -c +N`, `dd skip=`) it is made too.
        """
        if offset == 0 or not self._text:
            self._text = self._render()
        return self._text[offset : offset + size]

    def write(self, offset: int, data: bytes) -> int:
        """See `OpenFile.write`. Raises what a command raises.

        TargetTimeoutError while one still runs: the kernel sends one write at a time, so that one was given up, and
        whoever writes again what was not taken (Python, when it closes) gets the same errno again.
        """
        if not self._at_work.acquire(blocking=False):
            raise TargetTimeoutError("the last command written to this descriptor still runs")
        try:
            return self._take(data)
        finally:
            self._at_work.release()

    def _take(self, data: bytes) -> int:
        if self._failure is not None:
            raise self._failure
        start = 0
        while (newline := data.find(b"\n", start)) >= 0:
            line, self._rest = self._rest + data[start:newline], b""
            try:
                self._carry_out(line)
            except Exception as error:
                self._failure = error
                if not start:
                    raise
                return start
            start = newline + 1
        self._rest += data[start:]
        if len(self._rest) > LINE_LIMIT:
            self._rest = b""
            self._failure = InvalidArgumentError("a line has at most 64 KiB")
            raise self._failure
        return len(data)

    def flush(self) -> None:
        """See `OpenFile.flush`: runs the rest that has no newline."""
        if self._rest and self._at_work.acquire(blocking=False):
            line, self._rest = self._rest, b""
            try:
                self._carry_out(line)
            except Exception as error:
                self._failure = error
                raise
            finally:
                self._at_work.release()

    def _carry_out(self, raw: bytes) -> None:
        line = raw.decode("utf-8", "surrogateescape").strip()
        if not line or line.startswith("#"):
            return
        result = self._own = self._results.begin(line)
        try:
            done = self._run(line)
        except (EngineError, OSError) as error:
            self._results.end(result, _sentence(error), failed=True)
            raise
        except BaseException as error:
            self._results.end(result, f"a bug, {type(error).__name__}: {error}", failed=True)
            raise
        self._results.end(result, done)

    def _render(self) -> bytes:
        lines = [*self._usage(), ""]
        running = self._results.running()
        lines += [f"running for {time.monotonic() - one.begun:.0f} s: {one.line}" for one in running]
        last = self._own or self._results.last
        if last is not None and last.text is not None:
            lines.append(f"{'failed' if last.failed else 'done'}: {last.line}")
            lines.append(f"  {last.text}")
        elif not running:
            lines.append("nothing was written here yet")
        return "".join(comment(line) for line in lines).encode()


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def comment(text: str) -> str:
    """One line that begins with `#`, whatever stands in the text."""
    return f"# {escape_terminal(text)}".rstrip() + "\n"
