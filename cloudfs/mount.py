"""The mount: start, serve, clean up.

All that is acquired stands on one AsyncExitStack, with its release on the line that acquires it. The
process is the mount's for as long as it serves: pyfuse3 has one session per process.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import select
import shutil
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pyfuse3
import trio

from cloudfs import mountpoint as mountpoints
from cloudfs import serving, shim
from cloudfs.fast_loop import FastLoop, WaitReadable, make_eager_wait
from cloudfs.inodes import DEFAULT_BOUND, ROOT_INODE
from cloudfs.mountpoint import MountEntry, MountError
from cloudfs.node import Directory
from cloudfs.node_calls import Counters
from cloudfs.operations import TreeOperations
from cloudfs.resting import Rest
from cloudfs.seeking import Seeks
from cloudfs.shortcuts import Shortcuts
from cloudfs.shown_attributes import Owner
from cloudfs.watchdog import Watchdog
from engine.errors import EngineError, InvalidArgumentError
from engine.records import dataclass

__all__ = ["Counters", "MountError", "MountOptions", "mount"]

log = logging.getLogger(__name__)

DEVICE = "/dev/fuse"
READ_AHEAD_KB = 1024
"""Of cached files: requests of 1 MiB where the kernel's 128 KiB would give 0.6 of the speed."""
MAX_TASKS = 512
"""Requests in the daemon's hands at one time; those that wait for a thread are idle tasks."""
SPARE_TASKS = 4
"""Idle tasks that are kept: making one for every request that waits costs more than keeping it."""
GRACE = 2.0
"""Seconds that requests in worker threads have to end in when the mount ends."""
GC_THRESHOLD = (20_000, 20, 20)
PASSED_ON = frozenset(
    {"allow_other", "atime", "debug", "noatime", "nodev", "noexec", "nosuid", "relatime", "strictatime", "sync"}
)
"""Mount options that may be given; `max_read` ends the mount at once, and `ro` would forbid `new`."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """How to mount."""

    source: str = "cloudfs"
    """What mount(8) and df(1) show as the source."""
    allow_other: bool = False
    """Let other users in, with the daemon's rights."""
    nonempty: bool = False
    """Mount over a directory that has something in it."""
    auto_unmount: bool = True
    """Have the FUSE helper unmount when the daemon was killed; one small process more.

    The helper of libfuse 3.14.0 does so for root alone: it may not look at the mount of another user.
    """
    fast_loop: bool = True
    """See `cloudfs.fast_loop`."""
    spin: float = 0.0
    """Seconds to poll for the next request before sleeping: for a machine with a CPU to spare."""
    timeout: float = 30.0
    """Seconds after which a request that waits ends in ETIMEDOUT."""
    stall_limit: float = 10.0
    """Seconds for which the loop may stand still before the mount is ended."""
    inode_bound: int | None = DEFAULT_BOUND
    """Nodes above which the kernel is asked to forget those it used least recently."""
    rest_after: float = 10.0
    """Seconds without a request after which memory is given back, see `cloudfs.resting`."""
    extra: tuple[str, ...] = ()
    """Further mount options, of `PASSED_ON`."""
    uid: int | None = None
    """Owner of what has no owner of its own; None: the user who mounts."""
    gid: int | None = None
    """Its group, likewise."""
    self_check: bool = False
    """Check the inode table when the mount ends."""

    def words(self) -> set[str]:
        """The options as libfuse takes them. Raises InvalidArgumentError for one that is not known."""
        for word in self.extra:
            if word not in PASSED_ON:
                raise InvalidArgumentError(
                    f"mount option {word!r} is not known; there are {', '.join(sorted(PASSED_ON))}"
                )
        words = {f"fsname={_escape(self.source)}", "subtype=cloudfs", "default_permissions"}
        words |= {"nosuid", "nodev", "noexec", *self.extra}
        if self.allow_other:
            words.add("allow_other")
        if self.auto_unmount and shutil.which(mountpoints.FUSERMOUNT):
            words.add("auto_unmount")
        return words


def _escape(text: str) -> str:
    """Text as the value of a mount option: printable ASCII, `,` and the backslash escaped."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text) or "cloudfs"
    ascii_text = plain.encode("ascii", "replace").decode()
    return ascii_text.replace("\\", "\\\\").replace(",", "\\,")


def mount(
    root: Directory,
    mountpoint: str | os.PathLike[str],
    options: MountOptions | None = None,
    *,
    ready: Callable[[], object] | None = None,
    counters: Counters | None = None,
    activity: Callable[[], object] | None = None,
) -> signal.Signals | None:
    """Mount `root` and serve it until it is unmounted, or SIGTERM, SIGINT or SIGHUP comes; gives the signal.

    `ready` is called once, when the mount stands. `counters` may be read by other threads meanwhile; `activity` is
    called by the loop when a request comes after some seconds without any.
    Raises MountError with a sentence where it cannot be mounted, and where the watchdog had to end it.
    """
    options, counters = options or MountOptions(), counters or Counters()
    try:
        return trio.run(_serve, root, mountpoint, options, ready, counters, activity)
    except BaseExceptionGroup as group:
        raise _first_error(group) from None


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What nurseries have wrapped; an OSError is that of the connection."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        return MountError(f"the mount has ended: its connection to the kernel failed ({error.strerror or error})")
    return error


async def _serve(
    root: Directory,
    path: str | os.PathLike[str],
    options: MountOptions,
    ready: Callable[[], object] | None,
    counters: Counters,
    activity: Callable[[], object] | None,
) -> signal.Signals | None:
    words = options.words()
    check_device()
    where = mountpoints.prepare(path, nonempty=options.nonempty)
    connection = Connection()
    watchdog = Watchdog(connection.abort, options.stall_limit, activity)
    ending = _Ending()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_told_of_stall(watchdog, where))
        operations = TreeOperations(
            root,
            timeout=options.timeout,
            owner=_owner(options),
            counters=counters,
            watchdog=watchdog,
            inode_bound=options.inode_bound,
        )
        stack.callback(operations.close)
        signals = stack.enter_context(_signals())
        seeks = stack.enter_context(_seeking(operations))
        stack.enter_context(connection.open(operations, where, words))
        operations.places = functools.partial(mountpoints.standing, where)
        stack.enter_context(serving.announced(connection.device))
        if options.fast_loop:
            wait = _eager_wait(operations, options.spin)
            await stack.enter_async_context(FastLoop(pyfuse3, options.spin, wait))
        stack.enter_context(watchdog)
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        if seeks is not None:
            seeks.nursery = nursery
        nursery.start_soon(_end_on_signal, signals, nursery.cancel_scope, ending)
        stack.enter_context(connection.noticed(nursery.cancel_scope.cancel))
        stack.enter_context(_collector_spared())
        rest = Rest(operations, watchdog, options.rest_after)
        watchdog.idle = rest.fell_idle
        nursery.start_soon(rest.run)
        nursery.start_soon(_begin, operations, connection, ready)
        await pyfuse3.main(min_tasks=SPARE_TASKS, max_tasks=MAX_TASKS)
        if options.self_check:
            operations.inodes.check()
    return ending.signal


@contextlib.contextmanager
def _seeking(operations: TreeOperations) -> Iterator[Seeks | None]:
    """Answers to lseek(2) for the session that is made within, where the shim was loaded."""
    found = shim.loaded()
    if found is None:
        yield None
        return
    seeks = Seeks(operations, found.reply)
    found.begin(seeks.handle)
    try:
        yield seeks
    finally:
        found.end()


def _eager_wait(operations: TreeOperations, spin: float) -> WaitReadable | None:
    """What waits for requests where the shim answers some by itself; None where there is no shim, or not for this."""
    found = shim.loaded()
    if found is None or found.why_not() is not None:
        return None
    shortcuts = Shortcuts(found, operations.counters)
    if not found.hasten(spin, shortcuts.count):
        return None
    operations.shortcuts = shortcuts
    operations.watchdog.shared = found.words[shim.SERVED : shim.BUSY + 1]
    return make_eager_wait(trio.lowlevel.wait_readable, found.words, operations.watchdog.came)


@contextlib.contextmanager
def _told_of_stall(watchdog: Watchdog, where: str) -> Iterator[None]:
    """MountError at the end where the watchdog fired, whatever else came of it."""
    try:
        yield
    finally:
        if watchdog.fired:
            raise MountError(
                f"{where} was unmounted: one request had held up all others for {watchdog.limit:g} s; "
                "the log says where"
            ) from None


async def _begin(
    operations: TreeOperations, connection: Connection, ready: Callable[[], object] | None
) -> None:
    """What can be done once the kernel has its answer to INIT, which sets the read-ahead back."""
    await operations.initialised.wait()
    pyfuse3.invalidate_entry_async(ROOT_INODE, b"\xff", ignore_enoent=True)  # its thread starts now, see `Rest`
    found = shim.loaded()
    if found is not None and (reason := found.why_not()) is not None:
        log.info("holes are not told to programs that ask for them (no shim): %s", reason)
    connection.set_read_ahead()
    if ready is not None:
        ready()


def _owner(options: MountOptions) -> Owner:
    owner = Owner()
    owner.uid = owner.uid if options.uid is None else options.uid
    owner.gid = owner.gid if options.gid is None else options.gid
    return owner


@dataclass(slots=True)
class _Ending:
    """How the mount came to its end."""

    signal: signal.Signals | None = None


def check_device() -> None:
    """Raise MountError where this process cannot use FUSE at all."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise MountError(
            f"nothing can be mounted: there is no {DEVICE}; load the kernel's module with `modprobe fuse` as root, "
            f"or give the container the device with `--device {DEVICE}`"
        ) from None
    except OSError as error:
        raise MountError(
            f"nothing can be mounted: {DEVICE} cannot be opened ({error.strerror}); run as root, or let users open "
            f"it with `chmod 666 {DEVICE}`"
        ) from None
    if os.geteuid() == 0:
        return
    if shutil.which(mountpoints.FUSERMOUNT) is None:
        raise MountError(
            f"nothing can be mounted: users other than root need {mountpoints.FUSERMOUNT}; install the package fuse3"
        )
    if not mountpoints.MTAB.exists():
        raise MountError(f"nothing should be mounted that could not be unmounted: {mountpoints.NO_MTAB}")


@contextlib.contextmanager
def _signals() -> Iterator[AsyncIterator[int] | None]:
    """The signals that end the mount; None in a thread that cannot have them."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as receiver:
        yield receiver


async def _end_on_signal(signals: AsyncIterator[int] | None, scope: trio.CancelScope, ending: _Ending) -> None:
    """End the session at a signal; requests that still wait then are given up after a while."""
    if signals is None:
        return
    ending.signal = signal.Signals(await anext(signals))
    log.info("%s: unmounting", ending.signal.name)
    pyfuse3.terminate()
    scope.deadline = trio.current_time() + GRACE


class Connection:
    """The FUSE session: from init to close, and its abort from another thread."""

    def __init__(self) -> None:
        self.entry: MountEntry | None = None
        self._descriptor: int | None = None

    @contextlib.contextmanager
    def open(self, operations: TreeOperations, where: str, words: set[str]) -> Iterator[None]:
        """Mount; at the end unmount, also where the connection was aborted from outside."""
        before = _descriptors()
        lowest = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _init(operations, where, words)
            try:
                self.entry = mountpoints.find_mount(where)
                self._adopt({number: text for number, text in _descriptors().items() if number not in before}, lowest)
                yield
            finally:
                entry, self.entry, self._descriptor = self.entry, None, None
                pyfuse3.close(unmount=True)
                _detach_rest(entry)
        finally:
            os.close(lowest)

    def _adopt(self, made: dict[int, str], lowest: int) -> None:
        """Note the connection's descriptor, and give the socket to the FUSE helper the number `lowest`.

        The helper unmounts when its socket is closed, unless the mount still seems to live. When a process is
        killed, the kernel finishes with its descriptors from the highest number to the lowest (task_work_run
        goes backwards since 4.3): the connection has to have the higher one.
        """
        for number, text in made.items():
            if text == DEVICE:
                self._descriptor = number
            elif text.startswith("socket:"):
                os.dup2(number, lowest, inheritable=False)
                os.close(number)

    @property
    def device(self) -> tuple[int, int] | None:
        """Of the mount, as stat(2) has it."""
        return None if self.entry is None else self.entry.device

    def set_read_ahead(self) -> None:
        """Let the kernel read 1 MiB ahead in cached files; needs root, and goes without."""
        if self.entry is not None:
            major, minor = self.entry.device
            with contextlib.suppress(OSError):
                Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb").write_text(str(READ_AHEAD_KB))

    @contextlib.contextmanager
    def noticed(self, ended: Callable[[], object]) -> Iterator[None]:
        """Call `ended` when the kernel has ended the connection.

        pyfuse3's loop ends then, but waits for requests in worker threads whose askers are gone.
        """
        poll = select.poll()
        if self._descriptor is not None:
            poll.register(self._descriptor, 0)  # POLLERR and nothing else: fs/fuse/dev.c, fuse_dev_poll

        class Notice(trio.abc.Instrument):
            def task_exited(self, task: trio.lowlevel.Task) -> None:
                if poll.poll(0):
                    ended()

        notice = Notice()
        trio.lowlevel.add_instrument(notice)
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(notice)

    def abort(self) -> None:
        """End the connection from the watchdog's thread, while the loop hangs in a system call.

        Where neither fusectl nor the rights of root are there, the last descriptor of the connection goes:
        /dev/null takes its number, so that nobody else gets it.
        """
        entry, descriptor = self.entry, self._descriptor
        try:
            if entry is None:
                raise MountError("the mount is gone")
            mountpoints.abort(entry)
        except (EngineError, OSError) as error:
            log.warning("%s; closing the connection instead", error)
            if descriptor is not None:
                nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                os.dup2(nothing, descriptor, inheritable=False)
                os.close(nothing)


def _init(operations: TreeOperations, where: str, words: set[str]) -> None:
    """pyfuse3.init; what libfuse and its helper print in case of failure goes into the error."""
    caught, kept = os.memfd_create("stderr"), os.dup(2)
    try:
        os.dup2(caught, 2)
        pyfuse3.init(operations, where, words)
    except RuntimeError as error:
        said = " ".join(os.pread(caught, 4096, 0).decode(errors="replace").split())
        raise MountError(f"{where} cannot be mounted on: {said or error}") from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(caught)


def _descriptors() -> dict[int, str]:
    """The open descriptors of this process, and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


@contextlib.contextmanager
def _collector_spared() -> Iterator[None]:
    """The garbage collector looks less often, and not at what was there before the first request.

    A listing makes thousands of nodes, none of them in a cycle: it takes 15 % less time so.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLD)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _detach_rest(entry: MountEntry | None) -> None:
    """Detach what pyfuse3 leaves behind when the connection was aborted."""
    if entry is None or mountpoints.find_mount(entry.mountpoint) != entry:
        return
    try:
        mountpoints.detach(entry.mountpoint)
    except (EngineError, OSError) as error:
        log.warning("%s is left mounted: %s", entry.mountpoint, error)
