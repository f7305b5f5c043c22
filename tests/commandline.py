"""Running the real command: `python -m cloudfs …` in a process of its own, bounded in time, in a pipe or a terminal.

    done = cloudfs("ps", "--json")
    assert done.returncode == 0, done.stderr
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cloudfs.cli import main

LIMIT = 60.0
SHOWN_MOST = 64 << 20
"""Bytes on a terminal that no command of the tests needs."""
COMMAND = (sys.executable, "-X", "dev", "-W", "error", "-m", "cloudfs")
"""As strict as the tests themselves: a warning is an error."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: that of the tests, without what would colour its output."""
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES", "TERM")}
    return {**plain, "TERM": "xterm", **extra}


def cloudfs(
    *words: str, standard_input: bytes = b"", limit: float = LIMIT, **extra: str
) -> subprocess.CompletedProcess[bytes]:
    """Run one command line in a pipe. Keywords are added to its environment. Its errors never hold a traceback."""
    done = subprocess.run(
        [*COMMAND, *words], input=standard_input, capture_output=True, timeout=limit, check=False,
        env=environment(**extra),
    )  # fmt: skip
    if not any(word.startswith("-vv") for word in words):
        assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done


def in_process(*words: str) -> subprocess.CompletedProcess[bytes]:
    """The same without a process of its own, ten times as fast: for tables of what goes wrong."""
    root = logging.getLogger()
    handlers, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    on_interrupt = signal.getsignal(signal.SIGINT)
    with tempfile.TemporaryFile("w+") as shown, tempfile.TemporaryFile("w+") as said:
        try:
            with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
                code = main(words)
        finally:
            logging.captureWarnings(capture=False)
            root.handlers[:] = handlers
            root.setLevel(level)
            logging.raiseExceptions = raises
            signal.signal(signal.SIGINT, on_interrupt)
        printed = []
        for stream in (shown, said):
            stream.flush()
            size = os.fstat(stream.fileno()).st_size
            printed.append(os.pread(stream.fileno(), size, 0))
    return subprocess.CompletedProcess(words, code, *printed)


def unprivileged(*words: str, limit: float = LIMIT) -> subprocess.CompletedProcess[bytes]:
    """Run one command line as a user who is not root: as nobody where the tests run as root."""
    # Everything is imported before: nobody may not be able to read this checkout.
    code = (
        "import os, sys; from cloudfs import cli; main = cli.main\n"
        "out = sys.stdout; sys.stdout = open(os.devnull, 'w')\n"
        "names = cli.command_names(); [cli.load_command(name) for name in names]; cli.command_names = lambda: names\n"
        "main(['ps']); main(['info', str(os.getpid())]); main(['maps', str(os.getpid())]); main(['plugins'])\n"
        "main(['read', 'dummy', 'physical', '0', '16']); sys.stdout = out\n"
        "if sys.argv[1] == 'mount':\n"
        "    import importlib, queue, cloudfs.mount, cloudfs.nodes.root\n"
        "    for name in cloudfs.nodes.ENTRY_MODULES: importlib.import_module(f'cloudfs.nodes.{name}')\n"
        "if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, timeout=limit, check=False, cwd="/",
        env=environment(),
    )  # fmt: skip


def sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one sentence that a failed command has printed, and nothing else."""
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1, lines
    assert done.stdout == b""
    return lines[0]


@dataclass
class Terminal:
    """A command on a pseudo-terminal."""

    process: subprocess.Popen[bytes]
    master: int
    shown: bytearray = field(default_factory=bytearray)

    def read(self, seconds: float) -> bytes:
        """What is printed within some time, or up to the first pause."""
        found = bytearray()
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and select.select([self.master], [], [], left)[0]:
            with contextlib.suppress(OSError):  # EIO: the other side is closed
                block = os.read(self.master, 1 << 16)
                found += block
                if block:
                    continue
            break
        self.shown += found
        return bytes(found)

    def wait_for(self, text: bytes, limit: float = 20.0) -> bytes:
        """All that was shown since the start, as soon as it holds `text`."""
        until = time.monotonic() + limit
        while text not in self.shown:
            assert time.monotonic() < until, f"{text!r} was not shown, but {bytes(self.shown[-4096:])!r}"
            self._more(until)
        return bytes(self.shown)

    def finish(self, limit: float = LIMIT) -> int:
        """Read until the command ends; its exit code."""
        until = time.monotonic() + limit
        while self.process.poll() is None:
            assert time.monotonic() < until, f"it does not end: {bytes(self.shown[-4096:])!r}"
            assert len(self.shown) < SHOWN_MOST, f"it prints for ever: {bytes(self.shown[-4096:])!r}"
            self._more(min(until, time.monotonic() + 0.1))
        self.read(0.05)
        return self.process.returncode

    def _more(self, until: float) -> None:
        if select.select([self.master], [], [], max(0.0, until - time.monotonic()))[0]:
            try:
                self.shown += os.read(self.master, 1 << 16)
            except OSError:
                self.process.wait(5)

    def keys(self, text: bytes) -> None:
        """Type; b"\\3" is Ctrl-C."""
        os.write(self.master, text)


@contextlib.contextmanager
def on_terminal(
    words: Sequence[str], columns: int = 80, *, program: Sequence[str] = COMMAND, **extra: str
) -> Iterator[Terminal]:
    """A command with a terminal as its standard input, output and error, of which it is the foreground job."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", _LEADER, *program, *words],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment(**extra),
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)
        os.close(master)


_LEADER = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
