"""Files that the kernel may cache for as long as a lease is held, and how that ends.

When a writer comes, or the instance is removed, this happens in order, and the writer's open(2) waits for it:

1. the lease is `held` no more: what is opened from now on is live (direct I/O);
2. in the loop, handles that were opened before answer ESTALE: what they gave the kernel would keep it;
3. the kernel drops the pages that it has. It waits for those that are being read, so the loop must be free to answer:
   this is done in the lease's thread (0.2 ms, and 0.2 s for each GiB that is cached);
4. the lease is given up, and the writer goes on.

A page that a program has mapped is gone with the others: touched again it is SIGBUS, as of a file that was cut.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from collections.abc import Callable

import trio

from cloudfs.node import OpenFile
from engine.leases import Lease

log = logging.getLogger(__name__)

PRUNE = 1024
"""Inodes of one lease from which on those that the kernel has forgotten are looked for."""


class Expired(OpenFile):
    """A file that was opened to be cached, after its lease has ended."""

    direct_io = False

    def __init__(self, file: OpenFile) -> None:
        self._file = file

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        """OSError(ESTALE): open it again."""
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def seek(self, offset: int, whence: int) -> int | None:
        """See `OpenFile.seek`: what it says is kept by nobody."""
        return self._file.seek(offset, whence)

    def seek_nowait(self, offset: int, whence: int) -> int | None:
        """See `OpenFile.seek_nowait`."""
        return self._file.seek_nowait(offset, whence)

    def flush(self) -> None:
        """See `OpenFile.flush`."""
        self._file.flush()

    def release(self) -> None:
        """See `OpenFile.release`."""
        self._file.release()


class _Inodes:
    """What was opened under one lease."""

    __slots__ = ("callback", "numbers", "prune_at")

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.prune_at = PRUNE
        self.callback: Callable[[], object] = bool


class LeasedFiles:
    """The inodes of one mount that hang on leases. Its methods belong to the thread of the loop.

    `expire(lease)` is called in the loop, `invalidate(inode)` in another thread; `known(inode)` tells whether the
    kernel still knows it.
    """

    def __init__(
        self, expire: Callable[[Lease], object], invalidate: Callable[[int], object], known: Callable[[int], bool]
    ) -> None:
        self._expire = expire
        self._invalidate = invalidate
        self._known = known
        self._leases: dict[Lease, _Inodes] = {}

    def add(self, lease: Lease, inode: int) -> bool:
        """Note that the kernel may cache an inode from now on; False where the lease has ended."""
        inodes = self._leases.get(lease)
        if inodes is None:
            inodes = _Inodes()
            inodes.callback = functools.partial(self._end, lease, trio.lowlevel.current_trio_token())
            if not lease.on_break(inodes.callback):
                return False
            self._leases[lease] = inodes
        inodes.numbers.add(inode)
        if len(inodes.numbers) >= inodes.prune_at:
            inodes.numbers = {number for number in inodes.numbers if self._known(number)}
            inodes.prune_at = max(PRUNE, 2 * len(inodes.numbers))
        return lease.held

    def close(self) -> None:
        """The mount has ended."""
        for lease, inodes in self._leases.items():
            lease.off(inodes.callback)
        self._leases.clear()

    def _end(self, lease: Lease, token: trio.lowlevel.TrioToken) -> None:
        """In the lease's thread: nothing of it is left in the kernel when this returns."""
        try:
            numbers = trio.from_thread.run_sync(self._forget, lease, trio_token=token)
        except (trio.RunFinishedError, trio.Cancelled):
            return  # the mount has ended, and its pages with it
        for number in numbers:
            try:
                self._invalidate(number)
            except FileNotFoundError:
                pass  # the kernel has forgotten it
            except OSError as error:
                log.warning("what the kernel has cached of a file cannot be dropped: %s", error)
        log.info("a lease has ended: %d files are live from now on", len(numbers))

    def _forget(self, lease: Lease) -> set[int]:
        self._expire(lease)
        inodes = self._leases.pop(lease, None)
        return set() if inodes is None else inodes.numbers
