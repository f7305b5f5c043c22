"""The FUSE handlers: find the node, call it, convert what it gives.

They know nodes and nothing of processes. One boundary turns every error into an errno, and what a node
returns is checked before it reaches pyfuse3, which would end the mount: a bug in a node is EIO for its
caller and a traceback in the log.

What is fast runs in the loop, for a thread costs 0.25 ms; what may wait (`may_block`, or a `read_nowait`
that gives None) runs in a worker thread.
"""

from __future__ import annotations

import errno
import functools
import logging
import operator
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileInfo,
    FUSEError,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from cloudfs import errno_table
from cloudfs.bug_log import BugLog
from cloudfs.inodes import DEFAULT_BOUND, Entry, InodeTable
from cloudfs.leased_files import Expired, LeasedFiles
from cloudfs.listing import attributes_of, only_type, snapshot
from cloudfs.node import (
    NAME_MAX,
    Attributes,
    BrokenNodeError,
    Directory,
    File,
    Link,
    Node,
    OpenFile,
)
from cloudfs.shim import FLUSHED
from cloudfs.shortcuts import Shortcuts
from cloudfs.watchdog import Watchdog
from cloudfs.worker_threads import SCRATCH_SIZE, ScratchPool, WorkerThreads, new_scratch
from engine.errors import InvalidArgumentError, NotFoundError, ReadOnlyError, TargetTimeoutError
from engine.leases import Lease

log = logging.getLogger(__name__)

MAX_SIZE = (1 << 63) - 1
"""Of a file: off_t is signed."""
MAX_LINK = 4095
"""Bytes of a link's text: PATH_MAX without its NUL."""
DOTS = (b".", b"..")
ROUND = 30.0
"""Seconds after which, where many nodes are known, directories that nobody used in them are forgotten."""
READDIR_BATCH = 256
"""Children whose attributes are asked for in one thread; a readdir reply holds about 200."""
RELEASE = operator.methodcaller("release")

P = ParamSpec("P")
T = TypeVar("T")
Invalidate = Callable[[int, bytes], None]
ReaddirReply = Callable[[ReaddirToken, bytes, EntryAttributes, int], bool]


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


@dataclass(slots=True)
class Owner:
    """What a node's attributes show where they say None."""

    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    time_ns: int = field(default_factory=time.time_ns)


class Handle:
    """An open file."""

    __slots__ = ("commands", "file", "group", "node", "shortened", "spoilt")

    def __init__(self, node: File, file: OpenFile) -> None:
        self.spoilt = False
        """Somebody wanted to cut the file through it: what he writes next was meant for an empty file."""
        self.node = node
        self.file = file
        self.commands = node.takes_commands
        self.group = node.thread_group
        self.shortened = type(file).shortcut is not OpenFile.shortcut


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


def guarded(
    handler: Callable[Concatenate[TreeOperations, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[TreeOperations, P], Coroutine[Any, Any, T]]:
    """The boundary: whatever a handler raises leaves it as a FUSEError."""

    @functools.wraps(handler)
    async def with_boundary(self: TreeOperations, /, *arguments: P.args, **keywords: P.kwargs) -> T:
        try:
            return await handler(self, *arguments, **keywords)
        except FUSEError:
            raise
        except (Exception, SystemExit) as error:
            self.refuse(error, handler.__name__)

    return with_boundary


class TreeOperations(pyfuse3.Operations):
    """The handlers of one mount.

    `invalidate(parent inode, name)` and `readdir_reply` are pyfuse3's but in tests. With `reraise`, a bug
    in a node is raised and not turned into EIO: for tests of nodes.
    """

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(
        self,
        root: Directory,
        *,
        timeout: float = 30.0,
        owner: Owner | None = None,
        counters: Counters | None = None,
        watchdog: Watchdog | None = None,
        inode_bound: int | None = DEFAULT_BOUND,
        invalidate: Invalidate | None = None,
        invalidate_inode: Callable[[int], object] = pyfuse3.invalidate_inode,
        readdir_reply: ReaddirReply = pyfuse3.readdir_reply,
        reraise: bool = False,
    ) -> None:
        self._root = root
        self.inodes = InodeTable(root, inode_bound)
        self.counters = counters or Counters()
        self.threads = WorkerThreads(timeout)
        self.watchdog = watchdog or Watchdog(lambda: None)
        self.shortcuts: Shortcuts | None = None
        self.initialised = trio.Event()
        """Set while INIT is answered: whoever waits for it runs after the answer."""
        self._owner = owner or Owner()
        self._invalidate = invalidate or _invalidate
        self._readdir_reply = readdir_reply
        self._reraise = reraise
        self.places: Callable[[], Iterable[tuple[bytes, ...]]] = tuple
        """The directories in which processes stand, as names from the root on."""
        self._next_round = 0.0
        self._handles: dict[int, Handle] = {}
        self._leased = LeasedFiles(self._expire, invalidate_inode, self.inodes.__contains__)
        self._listings: dict[int, Listing] = {}
        self._last_handle = 0
        self._scratch = new_scratch()
        self._scratches = ScratchPool()
        self._shown = EntryAttributes()
        self._shown_attributes: Attributes | None = None
        self._shown_time: int | None = None
        self._bugs = BugLog()

    def init(self) -> None:
        """The first request of the connection."""
        self.initialised.set()

    # -- errors ------------------------------------------------------------------------------------------

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

    # -- calling nodes -----------------------------------------------------------------------------------

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

    def _show(self, entry: Entry, attributes: Attributes, timeout: float) -> EntryAttributes:
        """The one EntryAttributes object, filled: pyfuse3 copies it before anything else can run."""
        shown = self._shown
        if attributes is not self._shown_attributes:
            self._shown_attributes = None  # until all of it stands there
            self._fill(shown, attributes)
            self._shown_attributes = attributes
        shown.st_ino = entry.inode
        shown.entry_timeout = shown.attr_timeout = timeout
        return shown

    def _fill(self, shown: EntryAttributes, attributes: Attributes) -> None:
        owner = self._owner
        size = attributes.size
        if not 0 <= size <= MAX_SIZE:
            size = MAX_SIZE if size > 0 else 0
        uid, gid, when, blocks = attributes.uid, attributes.gid, attributes.mtime_ns, attributes.blocks
        shown.st_mode = attributes.mode
        shown.st_nlink = attributes.nlink
        shown.st_uid = owner.uid if uid is None else uid
        shown.st_gid = owner.gid if gid is None else gid
        shown.st_size = size
        shown.st_blocks = (size + 511) // 512 if blocks is None else blocks
        if when is None:
            when = owner.time_ns
        if when != self._shown_time:  # three setters, dearer than all the others together
            self._shown_time = None
            shown.st_atime_ns = shown.st_mtime_ns = shown.st_ctime_ns = when
            self._shown_time = when

    def _directory(self, entry: Entry) -> Directory:
        if not isinstance(entry.node, Directory):
            raise NotADirectoryError(f"{entry.identity!r} is not a directory")
        self.inodes.touch(entry)
        return entry.node

    def _shrink(self) -> None:
        for parent, name in self.inodes.surplus(self._in_use):
            self._invalidate(parent, name)
        now = time.monotonic()
        if now >= self._next_round:
            self._next_round = now + ROUND
            if self.inodes.round_is_due:
                self.forget_stale()

    def forget_stale(self, *, each: bool = False) -> None:
        """Ask the kernel to forget directories that nobody used since this was called last; with `each`, all."""
        for parent, name in self.inodes.stale(self._in_use(), each=each):
            self._invalidate(parent, name)

    def forget_remaining(self) -> None:
        """Ask the kernel to forget every node by its own name."""
        for parent, name in self.inodes.remaining(self._in_use()):
            self._invalidate(parent, name)

    def _in_use(self) -> set[int | None]:
        """What is open, and the directories in which processes stand.

        Their names must stay valid: else getcwd(2) fails there, and /proc says of open files that they were deleted.
        """
        inodes = self.inodes
        used = {inodes.inode_at(names) for names in self.places()}
        used |= {inodes.inode_of(handle.node) for handle in self._handles.values()}
        return used | {listing.entry.inode for listing in self._listings.values()}

    def rest(self) -> None:
        """Let go of what is kept for the next request alone."""
        try:
            self._root.rest()
        except Exception as error:
            self.report_bug(error, "the rest")
        self.inodes.compact()
        self._shown_attributes = None

    # -- names and attributes ----------------------------------------------------------------------------

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """The child of that name, and one look-up more of its inode."""
        parent = self.inodes.entry(parent_inode)
        directory = self._directory(parent)
        child = await self.call(directory, "look-up", functools.partial(directory.child, os.fsdecode(name)))
        if child is None:
            raise NotFoundError(f"{os.fsdecode(name)!r} does not exist")
        if not isinstance(child, Node):
            raise BrokenNodeError(f"{_name(directory)} has the child {child!r:.80}, which is no node")
        entry = self.inodes.remember(parent, name, child)
        node = entry.node
        try:
            shown = self._show(entry, await self.call(node, "attributes", node.attributes), node.timeout)
        except BaseException:
            self.inodes.forget(entry.inode, 1)
            raise
        self._shrink()
        return shown

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """The kernel gives look-ups back. Nothing may be raised: no one would catch it."""
        for inode, count in inode_list:
            self.inodes.forget(inode, count)

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """The attributes of an inode."""
        entry = self.inodes.entry(inode)
        node = entry.node
        return self._show(entry, await self.call(node, "attributes", node.attributes), node.timeout)

    @guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """Sizes and times of files that take commands are accepted and ignored; all else is EPERM.

        Editors cut a file and write it anew, whether or not it could be cut (vim): a handle through which
        that was tried writes no more, lest a whole live memory be overwritten with what it was a while ago.
        """
        node = self.inodes.node(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise PermissionError(f"mode and owner of {node.identity!r} cannot be changed")
        if not (isinstance(node, File) and node.takes_commands):
            if fh is not None and fields.update_size:
                self._handles[fh].spoilt = True
                self._withdraw(fh)
            raise PermissionError(f"size and times of {node.identity!r} cannot be changed")
        return await self.getattr(inode, ctx)

    @guarded
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """The text of a link."""
        node = self.inodes.node(inode)
        if not isinstance(node, Link):
            raise InvalidArgumentError(f"{node.identity!r} is not a link")
        text = os.fsencode(await self.call(node, "readlink", node.target))
        if not 0 < len(text) <= MAX_LINK or b"\0" in text:
            raise BrokenNodeError(f"{_name(node)} leads to {text[:80]!r}, which no link can")
        return text

    # -- directories -------------------------------------------------------------------------------------

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """A handle on a snapshot of the children.

        It is taken here, as /proc checks permissions here: programs expect errors of opendir(3). One of
        readdir(3) makes ripgrep 13 ask again for ever.
        """
        entry = self.inodes.entry(inode)
        listing = Listing(entry, await self._children(entry))
        self._last_handle += 1
        self._listings[self._last_handle] = listing
        return self._last_handle

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
        self._shrink()

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

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an instance, which may have to wait for its target."""
        directory = self._directory(self.inodes.entry(parent_inode))
        remove = functools.partial(directory.remove_child, os.fsdecode(name))
        try:
            await self.in_thread(directory.thread_group, directory, "removal", remove)
        finally:
            self._withdraw()

    # -- files -------------------------------------------------------------------------------------------

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """Open a file, unless its mode or the flags forbid it."""
        node = self.inodes.node(inode)
        if not isinstance(node, File):
            raise IsADirectoryError(f"{node.identity!r} is not a file")
        if flags & os.O_ACCMODE != os.O_RDONLY:
            attributes = await self.call(node, "attributes", node.attributes)
            if not attributes.mode & 0o222:
                raise ReadOnlyError
        if flags & (os.O_TRUNC | os.O_APPEND) and not node.takes_commands:
            raise PermissionError(f"{node.identity!r} can be neither truncated nor appended to")
        file = await self.call(node, "open", functools.partial(node.open, flags), RELEASE)
        if not isinstance(file, OpenFile):
            raise BrokenNodeError(f"{_name(node)} opened as {file!r:.80}, which is no OpenFile")
        if file.lease is not None and not self._leased.add(file.lease, inode):
            file.lease, file.direct_io, file.keep_cache = None, True, False
        self._last_handle += 1
        number = self._last_handle | FLUSHED if node.takes_commands else self._last_handle
        self._handles[number] = Handle(node, file)
        if file.keep_cache and not file.direct_io:
            self.inodes.keep(inode)
        return FileInfo(fh=number, direct_io=file.direct_io, keep_cache=file.keep_cache)

    def _withdraw(self, fh: int | None = None) -> None:
        """Answer nothing any more by the shortcut of that handle; of all where a target may have been closed."""
        if self.shortcuts is not None:
            if fh is None:
                self.shortcuts.withdraw_all()
            else:
                self.shortcuts.withdraw(fh)

    def _expire(self, lease: Lease) -> None:
        """No handle that was opened to be cached while `lease` was held gives the kernel anything any more."""
        for handle in self._handles.values():
            if handle.file.lease is lease:
                handle.file = Expired(handle.file)
        self._withdraw()

    def handle(self, fh: int) -> Handle:
        """An open file; OSError(EBADF) where there is none."""
        if fh not in self._handles:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._handles[fh]

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """At most `size` bytes from `off`. The hot path: what `guarded` and `call` do is written out."""
        watchdog = self.watchdog
        try:
            handle = self._handles[fh]
            scratch = self._scratch if size <= SCRATCH_SIZE else new_scratch(size)
            watchdog.entered += 1
            if watchdog.asleep:
                watchdog.wake()
            try:
                data = handle.file.read_nowait(off, size, scratch)
            finally:
                watchdog.left = watchdog.entered
            if data is None:
                data = await self._read_in_thread(handle, off, size)
            if type(data) is memoryview and data.c_contiguous:
                length = data.nbytes
            elif type(data) is bytes:
                length = len(data)
            else:
                raise BrokenNodeError(f"{_name(handle.node)} gave {data!r:.80} when read")
            if length > size:
                raise BrokenNodeError(f"{_name(handle.node)} gave {length} bytes when {size} were read")
            counters = self.counters
            counters.reads += 1
            counters.bytes_read += length
            if handle.shortened and self.shortcuts is not None and not handle.spoilt:
                self.shortcuts.offer(fh, handle.file)
            return data  # type: ignore[return-value]  # pyfuse3 takes any contiguous buffer
        except FUSEError:
            raise
        except (Exception, SystemExit) as error:
            self.refuse(error, "read")

    async def _read_in_thread(self, handle: Handle, offset: int, size: int) -> bytes | memoryview:
        """The same in a thread, with a buffer of its own."""
        scratch = self._scratches.take(size)
        read = functools.partial(handle.file.read, offset, size, scratch)
        try:
            data = await self.in_thread(handle.group, handle.node, "read", read)
        except TargetTimeoutError:
            raise  # and let go of the buffer: the thread may still write to it
        except Exception:
            self._scratches.give(scratch)
            raise
        self._scratches.give(scratch)
        return data

    @guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Store `buf` at `off`; gives how many bytes were stored."""
        handle = self._handles[fh]
        if handle.spoilt:
            raise PermissionError(f"what is written was meant for a new file: {handle.node.identity!r} was not cut")
        if handle.file.may_block:
            write = functools.partial(handle.file.write, off, buf)
            try:
                count = await self.in_thread(handle.group, handle.node, "write", write)
            finally:
                if handle.commands:
                    self._withdraw()
        else:
            self.watchdog.enter()
            try:
                count = handle.file.write(off, buf)
            finally:
                self.watchdog.leave()
        if type(count) is not int or not (0 < count <= len(buf) or count == len(buf)):
            raise BrokenNodeError(f"{_name(handle.node)} took {count!r:.80} of {len(buf)} bytes written")
        self.counters.writes += 1
        self.counters.bytes_written += count
        if handle.shortened and self.shortcuts is not None:
            self.shortcuts.offer(fh, handle.file)
        return count

    async def flush(self, fh: int) -> None:
        """A descriptor is closed. Only files that take commands hear of it.

        The kernel asks for every file, but for those that the shim has excepted (FOPEN_NOFLUSH, by their
        handles), which saves a request per close.
        """
        handle = self._handles.get(fh)
        if handle is not None and handle.commands:
            await self._flush(handle)

    @guarded
    async def _flush(self, handle: Handle) -> None:
        try:
            await self.in_thread(handle.group, handle.node, "flush", handle.file.flush)
        finally:
            self._withdraw()

    @guarded
    async def release(self, fh: int) -> None:
        """The last descriptor is closed; nobody sees an error.

        Never in a thread: where all of the group hang the file would never be released.
        """
        self.watchdog.enter()
        try:
            self._withdraw(fh)
            self._handles.pop(fh).file.release()
        finally:
            self.watchdog.leave()

    def close(self) -> None:
        """Release what is still open: the mount has ended."""
        handles, self._handles = self._handles, {}
        self._listings.clear()
        self._leased.close()
        self._withdraw()
        for handle in handles.values():
            try:
                handle.file.release()
            except Exception as error:
                self.report_bug(error, "release")

    # -- the file system ---------------------------------------------------------------------------------

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """No blocks, so that df(1) works and leaves it out."""
        data = StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = NAME_MAX
        return data

    async def _not_permitted(self, *arguments: object, **keywords: object) -> NoReturn:
        """EPERM: instances are made by writing to `new` and removed by rmdir, and nothing else is."""
        self.refuse(PermissionError("nothing can be made, removed or renamed here"), "a change of the tree")

    create = mkdir = mknod = symlink = link = unlink = rename = _not_permitted


def _name(node: Node) -> str:
    return f"{type(node).__name__} {node.identity!r}"


def _invalidate(parent: int, name: bytes) -> None:
    pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)
