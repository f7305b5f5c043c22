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
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from cloudfs.directory_handlers import DirectoryHandlers, ReaddirReply
from cloudfs.inodes import DEFAULT_BOUND, InodeTable
from cloudfs.leased_files import Expired, LeasedFiles
from cloudfs.node import NAME_MAX, BrokenNodeError, Directory, File, Link, Node, OpenFile
from cloudfs.node_calls import Counters, broken, guarded
from cloudfs.pruning import Invalidate
from cloudfs.shim import FLUSHED
from cloudfs.shortcuts import Shortcuts
from cloudfs.shown_attributes import Owner
from cloudfs.watchdog import Watchdog
from cloudfs.worker_threads import SCRATCH_SIZE, ScratchPool, new_scratch
from engine.errors import InvalidArgumentError, NotFoundError, ReadOnlyError, TargetTimeoutError
from engine.leases import Lease

MAX_LINK = 4095
"""Bytes of a link's text: PATH_MAX without its NUL."""
RELEASE = operator.methodcaller("release")


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


class TreeOperations(DirectoryHandlers):
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
        super().__init__(
            InodeTable(root, inode_bound),
            timeout,
            counters or Counters(),
            watchdog or Watchdog(lambda: None),
            owner or Owner(),
            invalidate or _invalidate,
            readdir_reply,
            reraise=reraise,
        )
        self._root = root
        self.shortcuts: Shortcuts | None = None
        self.initialised = trio.Event()
        """Set while INIT is answered: whoever waits for it runs after the answer."""
        self.places: Callable[[], Iterable[tuple[bytes, ...]]] = tuple
        """The directories in which processes stand, as names from the root on."""
        self._handles: dict[int, Handle] = {}
        self._leased = LeasedFiles(self._expire, invalidate_inode, self.inodes.__contains__)
        self._scratch = new_scratch()
        self._scratches = ScratchPool()

    def init(self) -> None:
        """The first request of the connection."""
        self.initialised.set()

    def _in_use(self) -> set[int | None]:
        """What is open, and the directories in which processes stand."""
        inodes = self.inodes
        used = {inodes.inode_at(names) for names in self.places()}
        used |= {inodes.inode_of(handle.node) for handle in self._handles.values()}
        return used | super()._in_use()

    def rest(self) -> None:
        """Let go of what is kept for the next request alone."""
        try:
            self._root.rest()
        except Exception as error:
            self.report_bug(error, "the rest")
        self.inodes.compact()
        self._shown.forget()

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
            raise BrokenNodeError(f"{broken(directory)} has the child {child!r:.80}, which is no node")
        entry = self.inodes.remember(parent, name, child)
        node = entry.node
        try:
            shown = self._show(entry, await self.call(node, "attributes", node.attributes), node.timeout)
        except BaseException:
            self.inodes.forget(entry.inode, 1)
            raise
        self.pruning.shrink()
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
            raise BrokenNodeError(f"{broken(node)} leads to {text[:80]!r}, which no link can")
        return text

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
            raise BrokenNodeError(f"{broken(node)} opened as {file!r:.80}, which is no OpenFile")
        if file.lease is not None and not self._leased.add(file.lease, inode):
            file.lease, file.direct_io, file.keep_cache = None, True, False
        number = self._next_handle()
        if node.takes_commands:
            number |= FLUSHED
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
                raise BrokenNodeError(f"{broken(handle.node)} gave {data!r:.80} when read")
            if length > size:
                raise BrokenNodeError(f"{broken(handle.node)} gave {length} bytes when {size} were read")
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
            raise BrokenNodeError(f"{broken(handle.node)} took {count!r:.80} of {len(buf)} bytes written")
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


def _invalidate(parent: int, name: bytes) -> None:
    pyfuse3.invalidate_entry_async(parent, name, ignore_enoent=True)
