"""The open files of one address space: mem, pagemap and maps stay with it, whatever its process does next.

They are opened together and used until a read finds the address space gone. Closing is left to the last
reference: a descriptor that somebody may be reading by is never closed under them, since its number would be
given to another file at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
from collections.abc import Callable, Iterator

from engine.errors import AccessDeniedError
from engine.oslayers.native.mappings import (
    AddressSpaceGoneError,
    Mapping,
    Mappings,
    QueriedMappings,
    TextMappings,
)
from engine.oslayers.native.pagemap import Scanner
from engine.oslayers.native.procfs import PF_EXITING, PF_FORKNOEXEC, PF_KTHREAD, ProcDirectory, advice
from engine.types import ADDRESS_SPACE

_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272}
"""Number of kcmp(2); KCMP_VM (1) asks whether two processes have one address space."""
_KCMP_VM = 1


class NoMemoryError(Exception):
    """The process lives but has no address space: a kernel thread or a zombie. Never leaves this package."""


class Descriptors:
    """mem, pagemap, maps and a pidfd of one process; -1 for what this kernel does not have."""

    __slots__ = ("mappings", "maps", "mem", "pagemap", "path", "pid", "pidfd", "scanner", "vectors")

    def __init__(self, path: str, pid: int) -> None:
        self.path = path
        self.pid = pid
        self.mem = self.pagemap = self.maps = self.pidfd = -1
        self.mappings: Mappings = TextMappings(f"{path}/maps")
        self.scanner: Scanner | None = None
        self.vectors = False

    def __del__(self, close: Callable[[int], None] = os.close, error: type[OSError] = OSError) -> None:
        # Bound as defaults: at the end of the interpreter the names of the module are gone first.
        for descriptor in (self.mem, self.pagemap, self.maps, self.pidfd):
            if descriptor >= 0:
                try:  # noqa: SIM105 - contextlib may be gone by then, too
                    close(descriptor)
                except error:
                    pass

    def alive(self) -> bool:
        """Whether the address space still exists; one read of 8 bytes."""
        if self.pagemap >= 0:
            return len(os.pread(self.pagemap, 8, 0)) == 8
        try:
            return len(os.pread(self.mem, 1, 0)) == 1
        except OSError:
            return True

    def mapping_at(self, address: int) -> Mapping | None:
        """The mapping that holds `address`, or None. Raises AddressSpaceGoneError."""
        found = self.mappings.at(address)
        # The text is read by PID: it may already be that of the program that came after.
        if (found is None or not isinstance(self.mappings, QueriedMappings)) and not self.alive():
            raise AddressSpaceGoneError
        return found

    def same(self) -> bool:
        """Whether the PID has meant this process and this address space ever since they were opened."""
        if not self.alive():
            return False
        if self.pidfd < 0:  # then nothing was done by PID, see `vectors`
            return True
        try:
            signal.pidfd_send_signal(self.pidfd, 0)
        except PermissionError:
            return True
        except OSError:
            return False
        return True


class Walk:
    """The mappings that one call meets on its way up: the text of maps is gone through once for all of them.

    Where the kernel answers single questions each is asked anew. What was mapped since the walk began may be missing.
    Raises WouldWaitError, unless `wait`, where the text is long.
    """

    __slots__ = ("_files", "_last", "_rest", "_since", "_wait")

    def __init__(self, files: Descriptors, *, wait: bool = True) -> None:
        self._files = files
        self._wait = wait
        self._rest: Iterator[Mapping] | None = None
        self._last: Mapping | None = None
        self._since = 0

    def __enter__(self) -> Walk:
        return self

    def __exit__(self, *exception: object) -> None:
        # At once: an error that somebody keeps would keep the file open.
        self.again()

    def again(self) -> None:
        """Begin anew at the next question: a mapping has changed."""
        self._rest = self._last = None

    def at(self, address: int) -> Mapping | None:
        """The mapping that holds `address`, or None; cheap where it is not below the last one asked for."""
        files, mappings, rest = self._files, self._files.mappings, self._rest
        if not isinstance(mappings, TextMappings):
            return files.mapping_at(address)
        if rest is None or address < self._since:
            self.again()
            rest = self._rest = mappings.within(address, ADDRESS_SPACE, wait=self._wait)
        self._since = address
        while self._last is None or self._last.stop <= address:
            self._last = next(rest, None)
            if self._last is None:
                break
        # The text is read by PID: it may already be that of the program that came after.
        if not files.alive():
            raise AddressSpaceGoneError
        return self._last if self._last is not None and self._last.start <= address else None


def _open_one(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        # ENOENT where the kernel was built without it, EACCES where a security module forbids this one.
        if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
            return -1
        raise


def _open_all(directory: ProcDirectory, *, writable: bool) -> Descriptors:
    path, pid = directory.path, directory.pid
    files = Descriptors(path, pid)
    try:
        files.mem = os.open(f"{path}/mem", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        files.pagemap = _open_one(f"{path}/pagemap", os.O_RDONLY)
        files.maps = _open_one(f"{path}/maps", os.O_RDONLY)
    except OSError as error:
        stat = directory.stat()
        # Without an address space its files belong to root (fs/proc/base.c, task_dump_owner): to others that looks
        # like a right that they lack.
        if error.errno == errno.ESRCH or stat.flags & (PF_EXITING | PF_KTHREAD):
            raise NoMemoryError from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AccessDeniedError(
                f"memory of process {pid} ({os.fsdecode(stat.name)}) cannot be opened: {error.strerror}; "
                + advice("the process's own user with kernel.yama.ptrace_scope at 0")
            ) from None
        raise
    with contextlib.suppress(OSError, AttributeError):
        files.pidfd = os.pidfd_open(pid)
    files.vectors = files.pidfd >= 0
    if files.maps >= 0 and QueriedMappings.works(files.maps):
        files.mappings = QueriedMappings(files.maps)
    if files.pagemap >= 0 and Scanner.works(files.pagemap):
        files.scanner = Scanner(files.pagemap)
    return files


def _shares_memory(pid: int, other: int) -> bool:
    """Whether two processes have one address space; True where that cannot be found out."""
    number = _KCMP.get(platform.machine())
    if number is None:
        return True
    pids = ctypes.c_long(pid), ctypes.c_long(other)
    answer = ctypes.CDLL(None).syscall(ctypes.c_long(number), *pids, ctypes.c_long(_KCMP_VM), 0, 0)
    return answer not in (1, 2, 3)


def open_descriptors(directory: ProcDirectory, *, writable: bool) -> tuple[Descriptors, bool]:
    """The descriptors of a process's memory, and whether they may be kept.

    They may not while the process still runs in its parent's address space (vfork, posix_spawn): that one
    lives on when the process starts its program, and a kept descriptor would go on reading the parent.
    Raises ProcessExitedError, AccessDeniedError, NoMemoryError.
    """
    before = directory.stat()
    while True:
        shared = bool(before.flags & PF_FORKNOEXEC) and _shares_memory(directory.pid, before.ppid)
        files = _open_all(directory, writable=writable)
        after = directory.stat()
        if before.flags & PF_FORKNOEXEC and not after.flags & PF_FORKNOEXEC:
            before = after
            continue
        if not files.alive():
            # Before Linux 6.14 mem of a kernel thread can be opened; a zombie may have become one just now.
            raise NoMemoryError if after.flags & PF_KTHREAD or after.state in "ZX" else AddressSpaceGoneError
        return files, not shared
