"""The files of a process in the format of /proc, byte for byte: here they are /proc's own."""

from __future__ import annotations

import os
import re

from engine.errors import InvalidArgumentError, NotFoundError
from engine.oslayer import ProcFiles
from engine.oslayers.native.procfs import ProcDirectory

NAMES = frozenset(
    "arch_status autogroup auxv cgroup cmdline comm coredump_filter cpuset environ gid_map io ksm_stat limits "
    "loginuid maps mountinfo mounts mountstats numa_maps oom_adj oom_score oom_score_adj personality "
    "projid_map sched schedstat sessionid setgroups smaps smaps_rollup stack stat statm status syscall "
    "timens_offsets timers timerslack_ns uid_map wchan".split()
)
"""Text files (and auxv) which reading neither waits nor changes anything: not mem, pagemap, clear_refs …"""

_LINK = re.compile(r"exe|cwd|root|fd/\d{1,10}")


class NativeFiles(ProcFiles):
    """/proc/PID or /proc/PID/task/TID of one process."""

    def __init__(self, directory: ProcDirectory) -> None:
        self._directory = directory

    def names(self) -> tuple[str, ...]:
        """See `ProcFiles.names`; sorted."""
        try:
            names = os.listdir(self._directory.path)
        except OSError as error:
            raise self._directory.explained(error, "") from None
        self._directory.stat()
        return tuple(sorted(NAMES.intersection(names)))

    def read(self, name: str) -> bytes:
        """See `ProcFiles.read`. Raises NotFoundError for a name that is not among `names`.

        Of cmdline and environ the first 8 MiB, more than exec(2) takes: a process may say that they lie elsewhere,
        in a reservation of any size.
        """
        if name not in NAMES:
            raise NotFoundError(f"{self._directory.path} has no text file {name!r}")
        return self._directory.read(name)

    def link(self, name: str) -> str:
        """See `ProcFiles.link`; text as os.fsdecode gives it."""
        if not _LINK.fullmatch(name):
            raise NotFoundError(f"{self._directory.path} has no link {name!r}")
        return self._directory.link(name)

    def descriptors(self) -> list[int]:
        """See `ProcFiles.descriptors`."""
        return self._directory.numbers("fd")

    def thread(self, tid: int) -> ProcFiles:
        """See `ProcFiles.thread`. Raises NotFoundError where the process has no such thread."""
        if tid < 0:
            raise InvalidArgumentError(f"a thread cannot have the number {tid}")
        return NativeFiles(self._directory.of_thread(tid))
