"""Runs a tool on a file of a mount and on a plain copy of it, and says how the two compare."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import signal
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clients.kinds import SMALL_DISK, Kind
from clients.tools import Tool

SECONDS = 30.0
SECONDS_OF_THE_ENDLESS = 2.0
"""How long a tool is watched that reads a file of hours."""
OUTPUT = 256 << 20
"""Bytes that a tool may write, to a file or to its standard output."""
ADDRESS_SPACE = 3 << 20
"""KiB that a tool may ask for."""
SIGPIPE = 128 + signal.SIGPIPE
"""What bash gives for `tail | head` where tail had more to say."""
BOUNDED = (None, -signal.SIGXFSZ, 128 + signal.SIGXFSZ)
"""It had to be ended, or wrote more than it may."""
TIMED_OUT = 124
"""What timeout(1) gives, here for `tail -f`."""
_one_at_a_time = threading.Lock()
WORKS, ENDLESS, NOTHING, EMPTY = "✓", "hours", "no bytes", "size 0"

_WORDS = {
    os.strerror(number): errno.errorcode[number]
    for number in (errno.EIO, errno.EPERM, errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENODEV, errno.EINVAL,
                   errno.ENOENT, errno.ESPIPE, errno.EFBIG, errno.ENOMEM, errno.EOVERFLOW, errno.EBUSY,
                   errno.ENOSPC, errno.ENXIO, errno.EOPNOTSUPP)
}  # fmt: skip
_OWN_WORDS = {
    "cannot mmap an empty file|mmap length is greater": "ValueError",
    "which is empty|cannot skip past end": "refused",
    "E514: Write error|E212: Can't open": "refused",
    "not recognized|Not an ELF": "not ELF",
    "Failed to read file's magic number": "not ELF",
    "is a directory|omitting directory|s a directory|is not a regular file|is not an ordinary file": "EISDIR",
    "memory exhausted|memory allocation of|out of memory|cannot allocate|MemoryError|Cannot allocate": "ENOMEM",
    "shrank by": "EIO",
    "Invalid argument": "EINVAL",
}


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    code: int | None
    """None: it had to be ended."""
    output: bytes
    complaint: str
    left: tuple[tuple[str, str], ...]
    """(name, what it is) of all it has left in its directory."""

    def same(self, other: Outcome) -> bool:
        return (self.code, self.output, self.left) == (other.code, other.output, other.left)


def _describe(path: Path) -> str:
    if path.is_symlink():
        return f"link {os.readlink(path)}"
    if path.is_dir():
        return "directory"
    return f"{path.stat().st_size} bytes {_digest(path)}"


def _digest(path: Path) -> str:
    """A digest of the pages of a file that are not zeros, holes or not."""
    digest, at, page = hashlib.md5(usedforsecurity=False), 0, 4096
    with open(path, "rb", buffering=0) as file:
        descriptor, size = file.fileno(), os.fstat(file.fileno()).st_size
        while at < size:
            try:
                at = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError:
                break  # only a hole is left
            stop = os.lseek(descriptor, at, os.SEEK_HOLE)
            for start in range(at, stop, page):
                data = os.pread(descriptor, page, start)
                if data.strip(b"\0"):
                    digest.update(b"%d %b" % (start, data.rstrip(b"\0")))
            at = stop
    return digest.hexdigest()


def run(tool: Tool, kind: Kind, path: Path, seconds: float) -> Outcome:
    """One run, bounded in time, in what it writes and in what it allocates."""
    sparse = kind.endless and tool.skips_holes
    with contextlib.ExitStack() as stack:
        if sparse:
            stack.enter_context(_one_at_a_time)
        parent = kind.copy.parents[1] / SMALL_DISK if sparse else kind.copy.parents[1]
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="cloudfs-tool-", dir=parent))
        out, printed = Path(folder) / "o", Path(folder) / "printed"
        out.mkdir()
        largest = "unlimited" if sparse else OUTPUT // 1024
        limits = f"ulimit -f {largest} -v {ADDRESS_SPACE} -c 0; set -o pipefail; IFS=; "
        environment = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "dumb", "f": path.name, "o": str(out),
                       "at": str(kind.offset), "copy": str(kind.copy), "PYTHONMALLOC": "malloc"}  # fmt: skip
        environment.pop("LESSOPEN", None)
        with open(printed, "wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", limits + tool.line], cwd=path.parent, env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            try:
                _, complaint = process.communicate(timeout=seconds)
                code: int | None = 0 if process.returncode == SIGPIPE else process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                _, complaint = process.communicate(timeout=20)
                code = None
        left = tuple(sorted((str(one.relative_to(out)), _describe(one)) for one in out.rglob("*")))
        return Outcome(code, printed.read_bytes(), complaint.decode(errors="replace")[:2000], left)


def compare(tool: Tool, kind: Kind) -> tuple[str, str]:
    """(cell of the table, what is wrong: empty where nothing is)."""
    endless = kind.endless and tool.whole and not (tool.skips_holes and kind.tells_holes)
    got = run(tool, kind, kind.path, SECONDS_OF_THE_ENDLESS if endless else SECONDS)
    if got.code is None and not endless:
        return "HANGS", f"it did not end within {SECONDS:.0f} s"
    if endless and (got.code in BOUNDED or errno_word(got.complaint) in ("ENOMEM", "EFBIG", "ENOSPC")):
        return ENDLESS, ""
    # Of what cannot be read at its beginning, nothing and an error are wanted.
    want = Outcome(0, b"", "", ()) if kind.faulty and tool.whole else run(tool, kind, kind.copy, SECONDS)
    if not got.same(want) or (kind.faulty and tool.whole):
        return _difference(tool, kind, got, want)
    if got.code in (0, TIMED_OUT) or not got.complaint.strip():
        return WORKS, ""
    word = errno_word(got.complaint)
    return word or "an error", "" if word and word != "ENOENT" else f"an unclear error: {_short(got)}"


def _difference(tool: Tool, kind: Kind, got: Outcome, want: Outcome) -> tuple[str, str]:
    word = errno_word(got.complaint)
    partial = want.output.startswith(got.output) or len(got.output) < 200
    if got.complaint.strip() and got.code:
        return word or "an error", "" if word and partial else f"an unclear error: {got}\nwanted {_short(want)}"
    if kind.faulty and b"read error" in got.output:
        return "EIO", ""
    if kind.unsized:
        if tool.name in ("stat", "du", "ls -l", "wc -c", "find"):
            return EMPTY, ""
        stored_nothing = got.output.strip() in (b"", b"0") and all(text.startswith("0 bytes") for _, text in got.left)
        if stored_nothing or (tool.program == "file" and b"empty" in got.output):
            return NOTHING, ""
    return "FALSE", f"got {_short(got)}\nwanted {_short(want)}"


def _short(outcome: Outcome) -> str:
    return f"{outcome.code} {outcome.output[:300]!r} ({len(outcome.output)}) {outcome.left} {outcome.complaint!r}"


def errno_word(said: str) -> str:
    """The error that a tool says, as the name of its errno or in a word; empty where it says none."""
    for text, name in _WORDS.items():
        if text in said:
            return name
    for text, name in _OWN_WORDS.items():
        if re.search(text, said):
            return name
    return ""


Cells = dict[tuple[str, str], tuple[str, str]]


def matrix(tools: tuple[Tool, ...], kinds: tuple[Kind, ...]) -> Cells:
    """Every tool on every kind of file, a few at a time."""
    pairs = [(tool, kind) for kind in kinds for tool in tools]
    with ThreadPoolExecutor(4) as pool:
        cells = pool.map(lambda pair: compare(*pair), pairs)
        return {(tool.name, kind.name): cell for (tool, kind), cell in zip(pairs, cells, strict=True)}

