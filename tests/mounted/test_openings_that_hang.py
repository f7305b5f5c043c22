"""An image on a file system that does not answer: whoever opens it waits, and nobody else does."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from dead_filesystem import abort, dead_filesystem, guarded
from mounting import Mount, is_mounted, mounted
from patience import outcome, read_at, responsive

from cloudfs.nodes.instances import OPENINGS

LIMIT = 80
AT_ONCE = 1.0
"""Seconds within which those answer who have nothing to do with the target that hangs: they take milliseconds."""
NOT_ANSWERED = {"its look-up": "nowhere", "its opening": "closed"}


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    with dead_filesystem(tmp_path / "dead", LIMIT) as folder:
        yield folder


@contextlib.contextmanager
def mount_beside(dead: Path, timeout: str) -> Iterator[Mount]:
    """A mount; before it ends `dead` does, since the kernel lets no process end that waits for an answer."""
    with mounted("--timeout", timeout, limit=LIMIT) as mount, guarded(LIMIT, mount.folder, dead):
        try:
            yield mount
        finally:
            abort(dead)


def quickly(act: Callable[[], object]) -> object:
    """What `act` comes to, in less than a second."""
    began = time.monotonic()
    found = outcome(act, 20)
    took = time.monotonic() - began
    assert took < AT_ONCE, f"it took {took:.1f} s"
    return found


def begin(mount: Mount, name: str, target: Path) -> threading.Thread:
    """An opening that hangs, with its name taken."""
    line = f"{name} raw:{target}\n"
    thread = threading.Thread(target=lambda: outcome((lambda: write(mount, line)), 70), daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while f"{name} is being opened" not in said(mount):
        assert time.monotonic() < until, said(mount)
        time.sleep(0.01)
    return thread


def write(mount: Mount, line: str) -> int:
    return (mount.folder / "connector/new").write_text(line)


def said(mount: Mount) -> str:
    return (mount.folder / "connector/new").read_text()


@pytest.mark.parametrize("hangs", NOT_ANSWERED)
def test_while_an_opening_hangs_others_open_list_read_and_remove(dead: Path, tmp_path: Path, hangs: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"an image" * 1024)
    with mount_beside(dead, "60") as mount:
        begin(mount, "late", dead / NOT_ANSWERED[hangs])
        with responsive(mount):
            for name in ("one", "two"):
                line = f"{name} raw:{image}\n"
                assert quickly(lambda line=line: write(mount, line)) == len(line)
            assert quickly(lambda: sorted(os.listdir(mount.folder / "connector"))) == ["new", "one", "two"]
            assert quickly(lambda: read_at(mount.folder / "connector/one/phys_mem", 8, 0)) == b"an image"
            assert quickly(lambda: os.rmdir(mount.folder / "connector/one")) is None
            assert quickly(lambda: os.rmdir(mount.folder / "connector/late")) == errno.ENOENT
            assert quickly(lambda: write(mount, f"late raw:{image}\n")) == errno.EEXIST
            assert quickly(lambda: (mount.folder / "os/new").write_text("web -c late auto\n")) == errno.EBUSY
            assert quickly(lambda: len(os.listdir(mount.folder / "os/processes")) > 3) is True
        text = said(mount)
        assert "late is being opened" in text
        assert "running for" in text


def test_an_opening_that_hangs_is_refused_after_the_time_limit_and_keeps_its_name_until_it_ends(dead: Path) -> None:
    with mount_beside(dead, "1") as mount:
        line = f"late raw:{dead}/closed\n"
        assert outcome(lambda: write(mount, line)) == errno.ETIMEDOUT
        assert quickly(lambda: write(mount, line)) == errno.EEXIST
        abort(dead)
        until = time.monotonic() + 10
        while "late is being opened" in said(mount):
            assert time.monotonic() < until
            time.sleep(0.02)
        assert "failed: late raw:" in said(mount)
        assert quickly(lambda: write(mount, "late dummy:size=1M\n")) == len("late dummy:size=1M\n")


def test_many_openings_that_hang_leave_new_answering(dead: Path) -> None:
    with mount_beside(dead, "60") as mount:
        for number in range(OPENINGS):
            begin(mount, f"late-{number}", dead / "closed")
        assert quickly(lambda: write(mount, f"one-more raw:{dead}/closed\n")) == errno.EBUSY
        assert f"one-more is not opened while {OPENINGS} others are" in said(mount)
        assert quickly(lambda: len(said(mount)) > 100) is True


def umount(mount: Mount, *words: str) -> None:
    command = [sys.executable, "-m", "cloudfs", "umount", *words, str(mount.folder)]
    done = subprocess.run(command, timeout=20, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


END: dict[str, Callable[[Mount], None]] = {
    "cloudfs umount": umount,  # of a mount that is not in use: the request has been given up before
    "cloudfs umount --force": lambda mount: umount(mount, "--force"),
    "SIGTERM": lambda mount: mount.daemon.send_signal(signal.SIGTERM),
}
WRITER = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"


@pytest.mark.parametrize("end", END)
def test_a_mount_ends_at_once_while_an_opening_hangs(dead: Path, end: str) -> None:
    timeout = "1" if end == "cloudfs umount" else "60"
    with mount_beside(dead, timeout) as mount:
        words = [sys.executable, "-c", WRITER, mount.folder / "connector/new", f"late raw:{dead}/closed\n"]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL) as writer:
            until = time.monotonic() + 10
            while "late is being opened" not in said(mount):
                assert time.monotonic() < until
                time.sleep(0.01)
            if timeout == "1":
                writer.wait(10)
            began = time.monotonic()
            END[end](mount)
            while is_mounted(mount.folder):
                assert time.monotonic() < began + 5
                time.sleep(0.02)
            writer.wait(10)
        abort(dead)
        assert mount.daemon.wait(10) == 0
