"""Programs that write to a file which somebody else holds a lease on: `from outside_writers import outside`."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MOMENT = 20.0
"""Seconds after which a writer was held up, also on a busy machine: unasked the kernel lets it in after 45."""
_OUTSIDE = """
import mmap, os, sys, time
path, act = sys.argv[1:]
begun = time.monotonic()
"""
_IN = "; waited = time.monotonic() - begun\n"
ACTS = {
    "overwrites": f"file = os.open(path, os.O_RDWR){_IN}os.pwrite(file, b'NEW!' * 1024, 0)",
    "overwrites all": (
        f"file = os.open(path, os.O_RDWR){_IN}os.pwrite(file, b'NEW!' * (os.fstat(file).st_size // 4), 0)"
    ),
    "appends": f"file = os.open(path, os.O_WRONLY | os.O_APPEND){_IN}os.write(file, b'NEW!')",
    "cuts it by its name": f"os.truncate(path, 100){_IN}",
    "cuts it as it opens it": f"file = os.open(path, os.O_WRONLY | os.O_TRUNC){_IN}",
    "writes by a shared mapping": (
        f"file = os.open(path, os.O_RDWR){_IN}mapped = mmap.mmap(file, 4096); os.close(file)\n"
        "mapped[:] = b'NEW!' * 1024"
    ),
}


def outside(path: str | Path, act: str) -> float:
    """Let another program do one of `ACTS`; gives the seconds for which it had to wait until it could."""
    return float(_run(path, ACTS[act]))


def runs(path: str | Path, code: str) -> str:
    """What another program prints; `path` is the file."""
    return _run(path, f"waited = ''\n{code}")


def _run(path: str | Path, code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"{_OUTSIDE}{code}\nprint(waited)", str(path), ""],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def holding(path: str | Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """Another program that has done `code` with the file `path`, and stays."""
    program = f"{_OUTSIDE}{code}\nprint('done', flush=True)\nsys.stdin.readline()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path), ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "done\n"
            yield process
        finally:
            process.kill()
