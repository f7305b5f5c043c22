"""Files below /proc, read so that a PID that was given away again is noticed, and what stands in them.

A `ProcDirectory` is a process or a thread *as it was met*: directory and start time. What it reads belongs
to that one or is ProcessExitedError. The order makes it so: a file is opened first, and the start time is
looked at after; an open file of /proc stays with the process it was opened of.

No path that is found in a process is ever opened or asked about here: on our own mount that would wait for
ourselves. Links are only read as text.
"""

from __future__ import annotations

import errno
import os
import re
from typing import NamedTuple

from engine.errors import AccessDeniedError, NotFoundError, ProcessExitedError

PF_EXITING = 0x00000004
"""Is ending: it has no address space any more, or soon not (include/linux/sched.h)."""
PF_FORKNOEXEC = 0x00000040
"""Forked, and has run no other program since (include/linux/sched.h)."""
PF_KTHREAD = 0x00200000
"""A kernel thread (include/linux/sched.h)."""

YAMA = "/proc/sys/kernel/yama/ptrace_scope"
"""Documentation/admin-guide/LSM/Yama.rst."""
CAP_SYS_PTRACE = 19
"""Bit of capability sets (include/uapi/linux/capability.h)."""

AT_NULL, AT_PHENT = 0, 4
"""Keys of the auxiliary vector: its last one, the size of a program header (include/uapi/linux/auxvec.h)."""
ELF_BITS = {56: 64, 32: 32}
"""sizeof(Elf64_Phdr) and sizeof(Elf32_Phdr) → bits of the program."""

ARGUMENTS_LIMIT = 256 << 10
"""Bytes of a command line that a record holds."""
STRINGS_LIMIT = 8 << 20
"""Bytes of cmdline and environ. exec(2) takes 6 MiB (bprm_stack_limits in fs/exec.c, 6.1); a process may say later
that they lie elsewhere, in any size (PR_SET_MM_MAP in prctl(2))."""

_FIRST = 4096
_CHUNK = 1 << 16
_LIMITS = {"cmdline": STRINGS_LIMIT, "environ": STRINGS_LIMIT}
_IDS = re.compile(rb"^Uid:\t(\d+)\t.*\nGid:\t(\d+)\t", re.MULTILINE)
_GONE = (errno.ENOENT, errno.ESRCH)
_DENIED = (errno.EACCES, errno.EPERM)


class Stat(NamedTuple):
    """What is used of /proc/PID/stat (proc_pid_stat(5))."""

    name: bytes
    state: str
    ppid: int
    flags: int
    threads: int
    start_ticks: int


def parse_stat(data: bytes) -> Stat:
    """The fields of a stat file; the name may hold anything, spaces and parentheses too."""
    opening, closing = data.index(b"("), data.rindex(b")")
    fields = data[closing + 2 :].split(b" ", 20)
    return Stat(
        data[opening + 1 : closing],
        fields[0].decode("ascii"),
        int(fields[1]),
        int(fields[6]),
        int(fields[17]),
        int(fields[19]),
    )


def parse_ids(status: bytes) -> tuple[int, int] | tuple[None, None]:
    """Real uid and gid of a status file."""
    found = _IDS.search(status)
    return (int(found[1]), int(found[2])) if found else (None, None)


def parse_command_line(data: bytes) -> tuple[str, ...]:
    """The arguments of a cmdline file.

    A program may have written over them (setproctitle); of the NULs it then leaves behind one is taken as
    an empty last argument, more are not.
    """
    if not data:
        return ()
    text = data.rstrip(b"\0")
    if len(data) - len(text) == 2:
        text += b"\0"
    return tuple(os.fsdecode(argument) for argument in text.split(b"\0"))


def parse_program_bits(auxv: bytes) -> int | None:
    """64 or 32 as the ELF class of the program that runs, or None where the vector does not tell.

    The vector of a 32-bit program on a 64-bit kernel has words of 32 bits; a vector of the other size never
    looks like it has the entry that is sought.
    """
    for size, header in ((8, 56), (4, 32)):
        words = memoryview(auxv)[: len(auxv) // (2 * size) * 2 * size].cast("Q" if size == 8 else "I")
        for key, value in zip(words[::2], words[1::2], strict=True):
            if key == AT_NULL:
                break
            if key == AT_PHENT and value == header:
                return ELF_BITS[value]
    return None


def read_descriptor(descriptor: int, limit: int | None = None) -> bytes:
    """All that a file of /proc gives, from where it stands; at the most `limit` bytes."""
    data = os.read(descriptor, _FIRST)
    if len(data) == 0:
        return data
    parts, size = [data], len(data)
    while data := os.read(descriptor, _CHUNK if limit is None else min(_CHUNK, limit - size)):
        parts.append(data)
        size += len(data)
    return b"".join(parts) if len(parts) > 1 else parts[0]


def read_start(path: str) -> bytes:
    """The first 4 KiB of a file, in one read(2)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, _FIRST)
    finally:
        os.close(descriptor)


def advice(whose: str = "whoever may") -> str:
    """What helps against a refusal: another user; for root, who is one already, what it is that refuses.

    `whose` names the other user who is not refused.
    """
    if os.geteuid() != 0:
        return f"run as root, or as {whose}"
    if _first_word(YAMA) == b"3":
        return "kernel.yama.ptrace_scope is 3: nobody may look into processes, root neither, until the next boot"
    capabilities = re.search(rb"^CapEff:\s*([0-9a-f]+)$", read_start("/proc/self/status"), re.MULTILINE)
    if capabilities is not None and not int(capabilities[1], 16) >> CAP_SYS_PTRACE & 1:
        return "root lacks CAP_SYS_PTRACE here, as in a container: give it that (docker run --cap-add SYS_PTRACE)"
    return "it is protected from root too, by a security module (AppArmor, SELinux) or by a user namespace"


def _first_word(path: str) -> bytes | None:
    try:
        return read_start(path).strip()
    except OSError:
        return None


class ProcDirectory:
    """/proc/PID, or /proc/PID/task/TID, of one process that was met at a known start time."""

    __slots__ = ("path", "pid", "start_ticks")

    def __init__(self, path: str, pid: int, start_ticks: int) -> None:
        self.path = path
        self.pid = pid
        self.start_ticks = start_ticks

    @classmethod
    def of_process(cls, pid: int) -> ProcDirectory:
        """The process that has that PID now. Raises ProcessExitedError, AccessDeniedError."""
        return cls._met(f"/proc/{pid}", pid)

    def of_thread(self, tid: int) -> ProcDirectory:
        """The thread of this process that has that TID now. Raises NotFoundError, ProcessExitedError."""
        try:
            thread = self._met(f"{self.path}/task/{tid}", self.pid)
        except ProcessExitedError:
            self.stat()
            raise NotFoundError(f"process {self.pid} has no thread {tid}") from None
        self.stat()
        return thread

    @classmethod
    def _met(cls, path: str, pid: int) -> ProcDirectory:
        try:
            stat = parse_stat(read_start(f"{path}/stat"))
        except OSError as error:
            if error.errno in _GONE:
                raise ProcessExitedError(pid) from None
            if error.errno in _DENIED:
                raise AccessDeniedError(
                    f"process {pid} is hidden from this user ({path}/stat: {error.strerror}, as with the mount option "
                    f"hidepid); {advice('its user')}"
                ) from None
            raise
        return cls(path, pid, stat.start_ticks)

    def stat(self) -> Stat:
        """Its stat file. Raises ProcessExitedError where it has ended, also if the PID is in use again."""
        try:
            stat = parse_stat(read_start(f"{self.path}/stat"))
        except OSError as error:
            raise self.explained(error, "stat", check=False) from None
        if stat.start_ticks != self.start_ticks:
            raise ProcessExitedError(self.pid)
        return stat

    def explained(self, error: OSError, name: str, *, check: bool = True) -> Exception:
        """The error of the engine for one of the host's: ended, not allowed, no such file; else itself."""
        if error.errno in _GONE:
            if check:
                try:
                    self.stat()
                except ProcessExitedError as ended:
                    return ended
                return NotFoundError(f"{self.path}/{name} does not exist")
            return ProcessExitedError(self.pid)
        if error.errno in _DENIED:
            return AccessDeniedError(
                f"{self.path}/{name} cannot be read: {error.strerror}; "
                + advice(f"the user of process {self.pid} with kernel.yama.ptrace_scope at 0")
            )
        return error

    def open(self, name: str) -> int:
        """A descriptor of one of its files, certain to be this one's; the caller closes it."""
        try:
            descriptor = os.open(f"{self.path}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self.explained(error, name) from None
        try:
            self.stat()
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, name: str) -> bytes:
        """The whole of one of its files, of cmdline and environ the first 8 MiB.

        Raises ProcessExitedError, AccessDeniedError, NotFoundError.
        """
        descriptor = self.open(name)
        try:
            return read_descriptor(descriptor, _LIMITS.get(name))
        except OSError as error:
            raise self.explained(error, name) from None
        finally:
            os.close(descriptor)

    def read_unchecked(self, name: str, limit: int | None = None) -> bytes | None:
        """One of its files, at the most `limit` bytes, or None; for a caller that looks at `stat` after."""
        try:
            descriptor = os.open(f"{self.path}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return read_descriptor(descriptor, limit)
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def link(self, name: str) -> str:
        """The text of one of its links, never followed. Raises like `read`."""
        try:
            text = os.readlink(f"{self.path}/{name}")
        except OSError as error:
            raise self.explained(error, name) from None
        self.stat()
        return text

    def numbers(self, name: str) -> list[int]:
        """The numeric names in one of its directories, ascending. Raises like `read`."""
        try:
            names = os.listdir(f"{self.path}/{name}")
        except OSError as error:
            raise self.explained(error, name) from None
        self.stat()
        return sorted(int(entry) for entry in names if entry.isdigit())
