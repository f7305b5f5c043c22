"""lseek(2) for holes: requests that the shim brings, answered in the loop where that is quick, else by a thread."""

from __future__ import annotations

import errno
import functools
import logging

import trio
from pyfuse3 import FUSEError

from cloudfs import errno_table
from cloudfs.node import BrokenNodeError, seek_dense
from cloudfs.operations import Handle, TreeOperations
from cloudfs.shim import Reply
from cloudfs.shown_attributes import MAX_SIZE

log = logging.getLogger(__name__)


class Seeks:
    """Answers the requests of one mount, each of them once; those that take long as tasks of `nursery`.

    The nursery has to be set before the first request comes, and to be closed before the session is.
    """

    def __init__(self, operations: TreeOperations, reply: Reply) -> None:
        self.nursery: trio.Nursery | None = None
        self._operations = operations
        self._reply = reply

    def handle(self, request: int, inode: int, fh: int, offset: int, whence: int) -> None:
        """A request, in the loop. Raises nothing: it is called from C."""
        try:
            handle = self._operations.handle(fh)
            found = self._nowait(handle, offset, whence)
            if found is None:
                assert self.nursery is not None, "no request comes before the loop runs"
                self.nursery.start_soon(self._answer, request, handle, offset, whence)
                return
        except BaseException as error:
            self._reply(request, 0, self._errno(error))
        else:
            self._reply(request, found, 0)

    def _nowait(self, handle: Handle, offset: int, whence: int) -> int | None:
        watchdog = self._operations.watchdog
        watchdog.enter()
        try:
            found = handle.file.seek_nowait(offset, whence)
        finally:
            watchdog.leave()
        return found if found is None else _checked(handle, found, offset)

    async def _answer(self, request: int, handle: Handle, offset: int, whence: int) -> None:
        code, found = errno.EINTR, 0
        try:
            found, code = await self._wait(handle, offset, whence), 0
        except trio.Cancelled:
            raise
        except BaseException as error:
            code = self._errno(error)
        finally:
            self._reply(request, found, code)

    async def _wait(self, handle: Handle, offset: int, whence: int) -> int:
        seek = functools.partial(handle.file.seek, offset, whence)
        found = await self._operations.in_thread(handle.group, handle.node, "lseek", seek)
        if found is not None:
            return _checked(handle, found, offset)
        size = (await self._operations.call(handle.node, "attributes", handle.node.attributes)).size
        return seek_dense(offset, whence, min(size, MAX_SIZE))

    def _errno(self, error: BaseException) -> int:
        """What an error is to the program that asked. That there is no more data is none."""
        if isinstance(error, OSError) and error.errno == errno.ENXIO:
            return errno.ENXIO
        try:
            self._operations.refuse(error, "lseek")
        except FUSEError as refused:
            return int(refused.errno) or errno.EIO
        except BaseException:
            log.exception("lseek failed")
            return errno_table.errno_of(error)


def _checked(handle: Handle, found: object, offset: int) -> int:
    if type(found) is not int or not offset <= found <= MAX_SIZE:
        raise BrokenNodeError(f"{handle.node.identity!r} gave {found!r:.80} when sought from {offset}")
    return found
