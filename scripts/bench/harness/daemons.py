"""Programs that run beside a benchmark: started pinned, watched, and always ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.machine import CannotMeasureError, Tools, measuring

START_LIMIT = 30.0
STOP_LIMIT = 10.0


@dataclass(frozen=True)
class Daemon:
    """A running file system."""

    name: str
    process: subprocess.Popen[bytes]
    mountpoint: Path
    log: Path

    @property
    def pid(self) -> int:
        """Its process."""
        return self.process.pid

    def path(self, *parts: str) -> Path:
        """A path below its mount point."""
        return self.mountpoint.joinpath(*parts)

    def last_words(self) -> str:
        """What it said last, for an error message."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else "it said nothing"


def mount_device(mountpoint: Path) -> str | None:
    """`major:minor` of what is mounted there or None; asks the kernel, never the file system."""
    wanted = str(mountpoint).replace(" ", "\\040")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.split()
            if words[4] == wanted:
                return words[2]
    return None


def set_read_ahead(mountpoint: Path, kibibytes: int) -> None:
    """The kernel's read-ahead for a mount, where this user may set it."""
    with contextlib.suppress(OSError):
        Path(f"/sys/class/bdi/{mount_device(mountpoint)}/read_ahead_kb").write_text(str(kibibytes))


@contextlib.contextmanager
def mounted(name: str, command: Sequence[str], mountpoint: Path, cpu: int | None) -> Iterator[Daemon]:
    """The file system that `command` mounts (in the foreground) on `mountpoint`, gone afterwards."""
    mountpoint.mkdir()
    log = mountpoint.with_suffix(".log")
    with measuring(cpu), log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    daemon = Daemon(name, process, mountpoint, log)
    try:
        _wait_until_mounted(daemon)
        yield daemon
    finally:
        _stop(daemon)


def _wait_until_mounted(daemon: Daemon) -> None:
    limit = time.monotonic() + START_LIMIT
    while mount_device(daemon.mountpoint) is None:
        if daemon.process.poll() is not None:
            raise CannotMeasureError(f"{daemon.name} did not mount: {daemon.last_words()}")
        if time.monotonic() > limit:
            raise CannotMeasureError(f"{daemon.name} did not mount within {START_LIMIT:.0f} s: {daemon.last_words()}")
        time.sleep(0.02)


def _stop(daemon: Daemon) -> None:
    """SIGTERM, then ever harder; a mount that hangs is aborted so that no process waits for it."""
    daemon.process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        daemon.process.wait(STOP_LIMIT)
    if mount_device(daemon.mountpoint) is not None:
        abort(daemon)
    if daemon.process.poll() is None:
        daemon.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.process.wait(STOP_LIMIT)


def abort(daemon: Daemon) -> None:
    """End the FUSE connection: whoever waits for the daemon gets an error at once."""
    device = mount_device(daemon.mountpoint)
    if device is None:
        return
    with contextlib.suppress(OSError):
        Path(f"/sys/fs/fuse/connections/{int(device.partition(':')[2])}/abort").write_text("1")
    privileged = os.geteuid() == 0 or shutil.which("fusermount3") is None
    for options in (["-f"], ["-l"]) if privileged else (["-u"], ["-uz"]):
        command = ["umount" if privileged else "fusermount3", *options, str(daemon.mountpoint)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, capture_output=True, timeout=STOP_LIMIT)
        if mount_device(daemon.mountpoint) is None:
            return


@dataclass(frozen=True)
class Holder:
    """A process whose memory shows the pattern from `address` on."""

    pid: int
    address: int
    size: int
    seed: int


@contextlib.contextmanager
def holding(tools: Tools, size: int, seed: int) -> Iterator[Holder]:
    """A process with `size` bytes of patterned memory, gone afterwards."""
    process = subprocess.Popen(
        [str(tools.client), "hold", str(size), str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise CannotMeasureError(f"a process with {size >> 20} MiB of memory could not be started")
        yield Holder(process.pid, json.loads(line)["address"], size, seed)
    finally:
        process.kill()
        process.communicate(timeout=STOP_LIMIT)
