"""A real mount for tests: started as a user would, bounded in time, always cleaned up.

    with mounted("raw:/some/file") as folder: ...

A daemon that hangs on its own mount would hang the test beyond kill -9: a timer aborts the connection then, from
a process that never looks at the mount.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ending import ends_with_us
from support import require

START_SECONDS = 15


@dataclass
class Mount:
    """A running mount."""

    folder: Path
    daemon: subprocess.Popen[bytes]
    log: Path

    def errors(self) -> str:
        """What the daemon has written to standard error and to its log so far."""
        return self.log.read_text(errors="replace")


def is_mounted(folder: Path) -> bool:
    """Whether something is mounted there, by /proc/self/mountinfo alone."""
    wanted = str(folder).encode().replace(b" ", b"\\040")
    return any(line.split(b" ")[4] == wanted for line in Path("/proc/self/mountinfo").read_bytes().splitlines())


def require_fuse() -> None:
    """Skip where nothing can be mounted."""
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse is not open to this user")


def require_unmounting_helper() -> None:
    """Skip where nobody unmounts after a daemon of this user that was killed."""
    try:
        said = subprocess.run(["fusermount3", "--version"], capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        require(condition=False, reason="there is no fusermount3")
        return
    version = tuple(int(number) for number in re.findall(r"\d+", said.stdout.partition("version:")[2])[:3])
    require(os.geteuid() == 0 or version > (3, 14, 0), "fusermount3 of libfuse 3.14.0 unmounts for root alone")


def take_away(folder: Path) -> None:
    """Abort what is mounted there, as far as this user may, and detach it."""
    for command in (["umount", "-f", "-l"], ["fusermount3", "-u", "-z"]):
        if is_mounted(folder):
            with contextlib.suppress(OSError):
                subprocess.run([*command, str(folder)], capture_output=True, timeout=30, check=False)


@contextlib.contextmanager
def mounted(*arguments: str, limit: float = 90, environment: dict[str, str] | None = None) -> Iterator[Mount]:
    """`cloudfs mount ARGUMENTS FOLDER` in the foreground; unmounted at the end by SIGTERM, as a service would be."""
    require_fuse()
    top = Path(tempfile.mkdtemp(prefix="cloudfs-test-"))
    folder, log = top / "mount", top / "log"
    folder.mkdir()
    words = ends_with_us("TERM") if threading.current_thread() is threading.main_thread() else []
    with open(log, "wb") as output:
        daemon = subprocess.Popen(
            [*words, sys.executable, "-X", "dev", "-W", "error", "-m", "cloudfs", "mount", *arguments, str(folder)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip

    def abort() -> None:
        take_away(folder)
        daemon.kill()

    timer = threading.Timer(limit, abort)
    timer.start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_mounted(folder):
            assert daemon.poll() is None, f"the mount did not start: {log.read_text(errors='replace')}"
            assert time.monotonic() < deadline, f"no mount after {START_SECONDS} s: {log.read_text(errors='replace')}"
            time.sleep(0.02)
        yield Mount(folder, daemon, log)
    finally:
        timed_out = not timer.is_alive()
        daemon.terminate()
        try:
            daemon.wait(15)
        except subprocess.TimeoutExpired:
            abort()
            daemon.wait(15)
            timed_out = True
        timer.cancel()
        left = is_mounted(folder)
        if left:
            abort()
        text = log.read_text(errors="replace")
        subprocess.run(["rm", "-rf", "--one-file-system", str(top)], timeout=30, check=False)
    assert not timed_out, f"the mount did not end in time and was aborted: {text}"
    assert not left, f"the mount was left behind: {text}"
    assert daemon.returncode == 0, f"the daemon ended with {daemon.returncode}: {text}"
    assert "Traceback" not in text, text
