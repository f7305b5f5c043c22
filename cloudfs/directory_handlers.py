"""The FUSE handlers of directories: opened as a snapshot of their children, and listed with attributes.

One bad child never hides the rest. Attributes of children that may block are asked for in one thread, and where they
do not come in time the children are listed with their types alone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from pyfuse3 import EntryAttributes, ReaddirToken, RequestContext

from cloudfs import errno_table
from cloudfs.inodes import Entry, InodeTable
from cloudfs.listing import attributes_of, only_type, snapshot
from cloudfs.node import Attributes, Directory, Node
from cloudfs.node_calls import Counters, NodeCalls, guarded
from cloudfs.pruning import Invalidate, Pruning
from cloudfs.shown_attributes import Owner, ShownAttributes
from cloudfs.watchdog import Watchdog
from engine.errors import NotFoundError, TargetTimeoutError

log = logging.getLogger(__name__)

DOTS = (b".", b"..")
READDIR_BATCH = 256
"""Children whose attributes are asked for in one thread; a readdir reply holds about 200."""

ReaddirReply = Callable[[ReaddirToken, bytes, EntryAttributes, int], bool]


class Listing:
    """An open directory: a snapshot, so that offsets mean the same in every readdir of one pass."""

    __slots__ = ("begun", "children", "entry", "hangs")

    def __init__(self, entry: Entry, children: list[tuple[bytes, Node]]) -> None:
        self.entry = entry
        self.children = children
        self.begun = False
        """It was read from: whoever reads from its start again wants a new snapshot."""
        self.hangs = False
        """The attributes of a child did not come in time: no more are waited for."""


class DirectoryHandlers(NodeCalls):
    """opendir, readdir and releasedir of one mount."""

    def __init__(
        self,
        inodes: InodeTable,
        timeout: float,
        counters: Counters,
        watchdog: Watchdog,
        owner: Owner,
        invalidate: Invalidate,
        readdir_reply: ReaddirReply,
        *,
        reraise: bool,
    ) -> None:
        super().__init__(timeout, counters, watchdog, reraise=reraise)
        self.inodes = inodes
        self._invalidate = invalidate
        self._readdir_reply = readdir_reply
        self._shown = ShownAttributes(owner)
        self._show = self._shown.show
        self.pruning = Pruning(inodes, invalidate, self._in_use)
        self._listings: dict[int, Listing] = {}
        self._last_handle = 0

    def _next_handle(self) -> int:
        """A number that no file and no directory was opened by."""
        self._last_handle += 1
        return self._last_handle

    def _in_use(self) -> set[int | None]:
        """What is open.

        Its names must stay valid: else getcwd(2) fails there, and /proc says of open files that they were deleted.
        """
        return {listing.entry.inode for listing in self._listings.values()}

    def _directory(self, entry: Entry) -> Directory:
        if not isinstance(entry.node, Directory):
            raise NotADirectoryError(f"{entry.identity!r} is not a directory")
        self.inodes.touch(entry)
        return entry.node

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """A handle on a snapshot of the children.

        It is taken here, as /proc checks permissions here: programs expect errors of opendir(3). One of
        readdir(3) makes ripgrep 13 ask again for ever.
        """
        entry = self.inodes.entry(inode)
        listing = Listing(entry, await self._children(entry))
        number = self._next_handle()
        self._listings[number] = listing
        return number

    @guarded
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        """Reply with the children from number `start_id` on, as many as the kernel's buffer takes."""
        listing = self._listings[fh]
        if start_id == 0 and listing.begun:
            listing.children = await self._children(listing.entry)
            listing.hangs = False
        listing.begun = True
        children = listing.children
        first = max(0, start_id - len(DOTS))
        batch = children[first : first + READDIR_BATCH]  # the kernel asks again for those behind it
        waited = await self._blocking_attributes(listing, batch)
        self.watchdog.enter()
        try:
            if self._reply_dots(listing.entry, token, start_id):
                self._reply_children(listing.entry, token, batch, first + len(DOTS) + 1, waited)
        finally:
            self.watchdog.leave()
        self.pruning.shrink()

    def _reply_dots(self, entry: Entry, token: ReaddirToken, start_id: int) -> bool:
        """Put `.` and `..` into the reply; the kernel counts no look-up for these."""
        for index in range(start_id, len(DOTS)):
            shown = self._show(entry if index == 0 else entry.parent or entry, only_type(entry.node), 0.0)
            if not self._readdir_reply(token, DOTS[index], shown, index + 1):
                return False
        return True

    async def _children(self, entry: Entry) -> list[tuple[bytes, Node]]:
        """The children that can be listed. Names gone since the last listing are invalidated."""
        directory = self._directory(entry)
        found = await self.call(directory, "listing", functools.partial(snapshot, directory))
        self.counters.skipped += found.skipped
        if found.skipped:
            log.info("%d entries of %r cannot be listed", found.skipped, entry.identity)
        error = found.take_error()
        try:
            if error is None:
                for parent, name in self.inodes.vanished(entry, {name for name, _ in found.children}):
                    self._invalidate(parent, name)
            elif found.children:
                self.report_bug(error, f"the listing of {entry.identity!r}")
            else:
                raise error
        finally:
            del error
        return found.children

    async def _blocking_attributes(
        self, listing: Listing, children: list[tuple[bytes, Node]]
    ) -> dict[int, Attributes | Exception]:
        """The attributes of the children that may block, asked for in one thread, by `id`."""
        blocking = [node for _, node in children if node.may_block]
        if not blocking:
            return {}
        found: list[Attributes | Exception] = []
        if not listing.hangs:
            nodes = [self.inodes.known(node) for node in blocking]
            ask = functools.partial(attributes_of, nodes)
            try:
                found = await self.in_thread(nodes[0].thread_group, listing.entry.node, "listing", ask)
            except TargetTimeoutError as error:
                listing.hangs = True
                log.warning("%s; its children are listed without attributes", errno_table.sentence(error))
        late = TargetTimeoutError("the attributes did not come in time")
        return {id(node): found[index] if found else late for index, node in enumerate(blocking)}

    def _reply_children(
        self,
        parent: Entry,
        token: ReaddirToken,
        children: list[tuple[bytes, Node]],
        next_id: int,
        waited: dict[int, Attributes | Exception],
    ) -> None:
        """Put children into the reply until the kernel's buffer is full.

        One that vanished meanwhile is left out, one whose attributes fail is listed with its type alone.
        """
        remember, reply = self.inodes.remember, self._readdir_reply
        for position, (name, child) in enumerate(children, next_id):
            try:
                entry = remember(parent, name, child)
            except Exception as error:
                self.counters.skipped += 1
                self.report_bug(error, f"the listing of {parent.identity!r}")
                continue
            node = entry.node
            try:
                attributes = (waited and waited.get(id(child))) or node.attributes()
                if isinstance(attributes, Exception):  # never raised: it would hold this frame, which holds it
                    shown = self._show_despite(attributes, entry)
                else:
                    shown = self._show(entry, attributes, node.timeout)
            except Exception as error:
                shown = self._show_despite(error, entry)
            if shown is None:
                self.inodes.forget(entry.inode, 1)
                continue
            if not reply(token, name, shown, position):
                self.inodes.forget(entry.inode, 1)
                break

    def _show_despite(self, error: Exception, entry: Entry) -> EntryAttributes | None:
        """The type alone of a child whose attributes failed; None where it has vanished."""
        if isinstance(error, NotFoundError | FileNotFoundError | ProcessLookupError):
            return None
        if errno_table.is_bug(error):
            self.report_bug(error, f"the attributes of {entry.node.identity!r}")
        return self._show(entry, only_type(entry.node), 0.0)

    async def releasedir(self, fh: int) -> None:
        """The directory is closed."""
        self._listings.pop(fh, None)
