"""Calling nodes for the kernel: in the loop or in a thread, and what they raise becomes an errno.

What is fast runs in the loop, for a thread costs 0.25 ms; what may wait (`may_block`) runs in a worker thread. A bug
in a node is EIO for its caller and a traceback in the log, never the end of the mount.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import FUSEError

from cloudfs import errno_table
from cloudfs.bug_log import BugLog
from cloudfs.node import Node
from cloudfs.watchdog import Watchdog
from cloudfs.worker_threads import WorkerThreads
from engine.errors import NotFoundError
from engine.records import dataclass

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Self = TypeVar("Self", bound="NodeCalls")


@dataclass(slots=True)
class Counters:
    """What the mount did so far; another thread may read it."""

    reads: int = 0
    bytes_read: int = 0
    writes: int = 0
    bytes_written: int = 0
    errors: int = 0
    """Requests that were refused, look-ups of what does not exist aside."""
    bugs: int = 0
    """Exceptions that nobody raises on purpose."""
    skipped: int = 0
    """Entries left out of listings: impossible names, nodes that are none."""


def guarded(
    handler: Callable[Concatenate[Self, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Self, P], Coroutine[Any, Any, T]]:
    """The boundary: whatever a handler raises leaves it as a FUSEError."""

    @functools.wraps(handler)
    async def with_boundary(self: Self, /, *arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            return await handler(self, *arguments, **keywords)
        except FUSEError:
            raise
        except (Exception, SystemExit) as error:
            self.refuse(error, handler.__name__)

    return with_boundary


class NodeCalls(pyfuse3.Operations):
    """What all handlers of a mount have in common. With `reraise`, a bug in a node is raised: for tests of nodes."""

    def __init__(self, timeout: float, counters: Counters, watchdog: Watchdog, *, reraise: bool) -> None:
        self.counters = counters
        self.threads = WorkerThreads(timeout)
        self.watchdog = watchdog
        self._reraise = reraise
        self._bugs = BugLog()

    def refuse(self, error: BaseException, what: str) -> NoReturn:
        """Raise the FUSEError that `error` becomes, and log it."""
        if errno_table.is_bug(error):
            self.report_bug(error, what)
            if self._reraise:
                raise error
        elif log.isEnabledFor(logging.DEBUG):
            log.debug("%s refused: %s", what, errno_table.sentence(error))
        if not (what == "lookup" and isinstance(error, NotFoundError)):
            self.counters.errors += 1
        raise FUSEError(errno_table.errno_of(error)) from None

    def report_bug(self, error: BaseException, what: str) -> None:
        """Count a bug, and log it."""
        self.counters.bugs += 1
        self._bugs.report(error, what)

    async def call(
        self, node: Node, verb: str, function: Callable[[], T], discard: Callable[[T], object] | None = None
    ) -> T:
        """What `function` of a node gives; in a thread where the node may block."""
        if node.may_block:
            return await self.in_thread(node.thread_group, node, verb, function, discard)
        self.watchdog.enter()
        try:
            return function()
        finally:
            self.watchdog.leave()

    async def in_thread(
        self,
        group: object,
        node: Node,
        verb: str,
        function: Callable[[], T],
        discard: Callable[[T], object] | None = None,
    ) -> T:
        """The same in a thread."""
        return await self.threads.run(group, function, f"{verb} of {node.identity!r}", discard)


def broken(node: Node) -> str:
    """How a node that broke its contract is called in the log; its class comes first (`BugLog`)."""
    return f"{type(node).__name__} {node.identity!r}"
