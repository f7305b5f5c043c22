"""Read leases: to hear of it before another program writes to a file (fcntl(2), F_SETLEASE; Linux 2.4 on).

    lease = take(descriptor)          # a Lease, or a sentence: why there is none
    lease.on_break(drop_my_copies)    # called in a thread; the writer's open(2) returns when it has returned
    lease.held                        # once false, never true again

While a read lease is held nobody has the file open for writing, a shared writable mapping included. open(2) for
writing and truncate(2) of others then wait for us, at the longest /proc/sys/fs/lease-break-time (45 s): let
readers of mappings finish, call the callbacks, give the lease up. Renaming, deleting or a change of mode breaks none.

The kernel tells of a break by a signal. It is sent to one thread that has all signals blocked and waits for it, so
that neither handlers nor the masks of other threads matter: SIGIO, which does not queue and so is never lost to a
full queue; that thread then asks all leases. It sleeps without a timer.

What it cannot do: a process that was stopped for longer than the kernel waits is asked in vain, and believes in its
lease until it runs again. A forked child has no leases: what it inherits counts as broken.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import signal
import stat
import struct
import threading
import weakref
from collections.abc import Callable, Sequence

from engine.mounts import Backing, backing_of_type, filesystem_of

log = logging.getLogger(__name__)

_F_SETOWN_EX = 15
"""include/uapi/asm-generic/fcntl.h; fcntl lacks it."""
_F_OWNER_TID = 0
_OWNER = struct.Struct("ii")
"""struct f_owner_ex: type, pid."""
_START_LIMIT = 10.0
"""Seconds for which a thread may take to start."""

_REFUSALS = {
    errno.EAGAIN: "another program has it open for writing",
    errno.EACCES: "only the owner of a file and root are told before somebody writes to it",
}


class Lease:
    """A read lease on a file, from `take`. It ends when a writer comes, with `release`, or with the object."""

    __slots__ = ("__weakref__", "_callbacks", "_descriptor", "_ending", "_pins", "_state", "held")

    def __init__(self, descriptor: int | None) -> None:
        """`descriptor`, with a lease already on it, belongs to this object from now on."""
        self.held = True
        """Whether the file is as it was: false before any writer gets in."""
        self._descriptor: int | None = descriptor
        self._state = threading.Condition(threading.Lock())
        self._pins = 0
        self._ending = False
        self._callbacks: list[Callable[[], object]] = []

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Bound as default: at the end of the interpreter the module's names are gone first. Closing ends the lease.
        if self._descriptor is not None:
            close(self._descriptor)

    def pin(self) -> bool:
        """Keep writers out until `unpin`, for a moment; False, and nothing to undo, where it is held no more."""
        with self._state:
            self._pins += self.held
            return self.held

    def unpin(self) -> None:
        """Undo one `pin` that gave True."""
        with self._state:
            self._pins -= 1
            if not self._pins:
                self._state.notify_all()

    def on_break(self, callback: Callable[[], object]) -> bool:
        """Call `callback` when it ends, while the writer waits; False, and never called, where that has begun.

        It is called once, in a thread of its own kind with every signal blocked; what it raises is logged. It is
        kept alive until then, or until `off`.
        """
        with self._state:
            if self.held:
                self._callbacks.append(callback)
            return self.held

    def off(self, callback: Callable[[], object]) -> None:
        """Take a callback back; it may be running."""
        with self._state:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def release(self) -> None:
        """End it as a writer would. Returns at once: where somebody has to be told it ends in the thread."""
        with self._state:
            self.held = False
            idle = not (self._callbacks or self._pins or self._ending)
            if idle:
                self._ending = True
                self._give_up()
        if not idle:
            _watcher.wake()

    def _notice(self) -> bool:
        """Whether it has to be ended: somebody wants to write, or it was released. `held` is right afterwards."""
        with self._state:
            if self._descriptor is None:
                return False
            if self.held:
                # While a break is pending this gives what the lease is to become: F_UNLCK.
                try:
                    self.held = fcntl.fcntl(self._descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
                except OSError:  # somebody has closed all descriptors of the process
                    self.held = False
            return not self.held

    def _end(self) -> None:
        """Let readers finish, tell everybody, let the writer in."""
        with self._state:
            if self._ending:
                return
            self._ending = True
            self._state.wait_for(lambda: not self._pins)
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception:
                log.exception("what follows a lease that ends has failed")
        with self._state:
            self._give_up()

    def _give_up(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # the kernel has taken it already
                # Closing alone would leave it to a forked child that has the descriptor too.
                fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _disown(self) -> None:
        """In a forked child: the lease is the parent's, and no thread here would hear of its end."""
        self._state = threading.Condition(threading.Lock())  # the other may be held by a thread that is not here
        self.held, self._ending, self._pins, self._callbacks = False, True, 0, []
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class JointLease(Lease):
    """The leases of several files as one: it ends with the first of them, before that one's writer gets in."""

    __slots__ = ("_parts",)

    def __init__(self, parts: Sequence[Lease]) -> None:
        super().__init__(None)
        self._parts = tuple(parts)
        _watcher.add(self)  # so that a forked child disowns it
        for part in self._parts:
            if not part.on_break(self._part_ends):
                self._part_ends()

    def _part_ends(self) -> None:
        with self._state:
            self.held = False
        self._end()

    def release(self) -> None:
        """See `Lease.release`: of every part."""
        with self._state:
            self.held = False
        for part in self._parts:
            part.release()


class _Watcher:
    """The thread that the kernel tells of breaks, and the leases that it asks then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._thread: threading.Thread | None = None

    def thread(self) -> int:
        """The kernel's number of the thread, which runs. Raises RuntimeError where none can be started."""
        with self._lock:
            if self._thread is None:
                ready = threading.Event()
                thread = threading.Thread(target=self._run, args=(ready,), name="cloudfs-leases", daemon=True)
                thread.start()
                if not ready.wait(_START_LIMIT):
                    raise RuntimeError("the thread does not start")
                self._thread = thread
            assert self._thread.native_id is not None, "it runs"
            return self._thread.native_id

    def add(self, lease: Lease) -> None:
        """Ask it too from now on; what was signalled before is asked for at once."""
        with self._lock:
            self._leases.add(lease)
        self.wake()

    def leases(self) -> list[Lease]:
        """Those that still live."""
        with self._lock:
            return list(self._leases)

    def wake(self) -> None:
        """Let the thread ask all leases."""
        if self._thread is not None and self._thread.ident is not None:
            signal.pthread_kill(self._thread.ident, signal.SIGIO)

    def _run(self, ready: threading.Event) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ready.set()
        while True:
            signal.sigwaitinfo({signal.SIGIO})
            ending = [lease for lease in self.leases() if lease._notice()]
            while ending:
                lease = ending.pop()
                lease._end()
                del lease  # this frame lives for as long as the program


_watcher = _Watcher()


def _in_child() -> None:
    global _watcher
    leases, _watcher = list(_watcher._leases), _Watcher()
    for lease in leases:
        lease._disown()


os.register_at_fork(after_in_child=_in_child)


def take(descriptor: int) -> Lease | str:
    """A read lease on an open file, or a sentence (no subject, no stop) that says why there is none.

    The lease has a descriptor of its own. None is taken where writers could come in unseen: on network
    filesystems and FUSE, and on files of no mount, as memfd_create(2) makes them: the kernel does not count who has
    those open for writing (fs/file_table.c, alloc_file).
    """
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return "a block device tells nobody when it is written to"
    filesystem = filesystem_of(descriptor)
    if filesystem is None:
        return "it lies on no mount that is seen here, as memory that programs share: nobody is told of writers there"
    if backing_of_type(filesystem) is Backing.REMOTE:
        return f"on a filesystem of type {filesystem} others may write without this machine being told"
    try:
        thread = _watcher.thread()
        own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, RuntimeError) as error:
        return f"no lease can be taken: {error}"
    try:
        # Before the lease, which would make the whole process the owner: SIGIO ends a process.
        fcntl.fcntl(own, _F_SETOWN_EX, _OWNER.pack(_F_OWNER_TID, thread))
        fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        os.close(own)
        return _REFUSALS.get(error.errno or 0, f"the filesystem ({filesystem}) gives no leases: {error.strerror}")
    lease = Lease(own)
    _watcher.add(lease)
    return lease
