"""What the tests of things that hang share: a look at the mount from outside throughout, and limits on all answers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from mounting import Mount

RESPONSIVE = 0.1
"""Seconds that a listing of the root may take: half of them, and 19 of 20. It takes 1 ms where nothing else runs."""
SLOWEST = 2.0
"""Seconds for the slowest one, which other programs of a busy machine may have held up; a loop that hangs takes 10."""
SWITCHES = 8
"""Times that a CPU must be had for one listing, which asks the daemon four times: each may come late."""
ENOUGH = 40
"""Listings from which on 19 of 20 are more than all but the slowest."""

PROBER = """
import json, os, sys, threading, time
took, late, stop = [], [], threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
print("ready", flush=True)
before = time.monotonic()
while not stop.wait(0.005):
    began = time.monotonic()
    os.listdir(sys.argv[1])
    took.append(time.monotonic() - began)
    late.append(began - before - 0.005)
    before = time.monotonic()
def share(found, percent):
    return sorted(found)[min(len(found) - 1, len(found) * percent // 100)] if found else 0
print(json.dumps([len(took), *(share(took, percent) for percent in (50, 95, 100)), share(late, 95)]))
"""


@contextlib.contextmanager
def responsive(mount: Mount) -> Iterator[None]:
    """`ls` of the root answers throughout; prints how fast."""
    prober = subprocess.Popen(
        [sys.executable, "-c", PROBER, str(mount.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert prober.stdout is not None
        assert prober.stdout.readline() == "ready\n"
        yield
        said, _ = prober.communicate(timeout=30)
    finally:
        prober.kill()
        prober.communicate(timeout=10)
    count, median, most, slowest, late = json.loads(said)
    assert count, "the root was not listed once"
    figures = (
        f"{count} listings of the root: median {median * 1e3:.1f} ms, 95 % below {most * 1e3:.1f} ms, the slowest "
        f"{slowest * 1e3:.0f} ms (95 % of the prober's own sleeps ended {late * 1e3:.1f} ms late at the most)"
    )
    print(figures)
    allowed = RESPONSIVE + SWITCHES * late
    assert median < allowed, figures
    assert most < allowed or count < ENOUGH, figures
    assert slowest < SLOWEST + SWITCHES * late, figures


CLIENT = """
import ctypes, mmap, os, signal, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [
    ctypes.c_long]
def map_file(path, size, offset=0):
    descriptor = os.open(path, os.O_RDONLY)
    return libc.mmap(None, size, 1, 2, descriptor, offset)  # PROT_READ, MAP_PRIVATE
secret = ctypes.create_string_buffer(b"a known secret")
folder = sys.argv[1]
"""


@contextlib.contextmanager
def client(code: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that runs `code` after CLIENT and stays; with the numbers that it has printed."""
    code = f"{CLIENT}\n{code}\nprint(ctypes.addressof(secret), *said, flush=True)\nsys.stdin.read()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, [int(word) for word in process.stdout.readline().split()]
    finally:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs ends once the connection is aborted
            process.wait(5)


def outcome(act: Callable[[], object], limit: float = 30) -> object:
    """What `act` gives, or the errno that it raises; in a thread, given up after `limit` seconds."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(act())
        except OSError as error:
            found.append(error.errno)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    assert found, f"no answer after {limit} s"
    return found[0]


def read_at(path: Path, size: int, offset: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)
