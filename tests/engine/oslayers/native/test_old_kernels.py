"""Before Linux 6.11 mappings are found in the text of maps: it is opened once for a call, however much that reads.

    data | - | data | - | data | - |       every second page may be written and the other one not: mappings of one
                                           page each, of which nobody has touched any
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from native_program import PAGE, without

from engine.errors import FaultError
from engine.oslayers.native import looks

COUNT = 1000
CODE = f"""
import ctypes, sys
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
base = libc.mmap(None, (COUNT + 2) * {PAGE}, 1, 0x4022, -1, 0)
for number in range(0, COUNT, 2):
    libc.mprotect(base + number * {PAGE}, {PAGE}, 3)
libc.munmap(ctypes.c_void_p(base + COUNT * {PAGE}), ctypes.c_size_t(2 * {PAGE}))
print(base, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def chequered(count: int) -> Iterator[tuple[int, int]]:
    """A process with so many mappings of one page: (its PID, the address of the first)."""
    code = f"COUNT = {count}\n{CODE}"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


@pytest.fixture(scope="module")
def many() -> Iterator[tuple[int, int]]:
    with chequered(COUNT) as found:
        yield found


@pytest.fixture
def openings(monkeypatch) -> list[str]:
    """The maps files that were opened since; on a kernel without ioctls."""
    without(monkeypatch, "without ioctls")
    found: list[str] = []
    original = os.open

    def opened(path, *arguments, **keywords):
        if str(path).endswith("/maps"):
            found.append(path)
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", opened)
    return found


def ready(layer, pid, openings):
    """Its memory with open descriptors, after a look at its mappings; nothing counted yet."""
    process = layer.process(pid)
    looks.LOOKS.look(process.directory)
    with contextlib.suppress(FaultError):
        process.memory.read(0, 1)
    openings.clear()
    return process.memory


def test_a_read_of_a_thousand_mappings_opens_maps_once(layer, many, openings):
    pid, base = many
    memory = ready(layer, pid, openings)
    assert memory.read(base, COUNT * PAGE) == bytes(COUNT * PAGE)
    assert len(openings) == 1


def test_rows_in_a_thousand_mappings_and_in_none_open_maps_a_few_times(layer, many, openings):
    pid, base = many
    memory = ready(layer, pid, openings)
    addresses = base + np.random.default_rng(1).permutation(COUNT + 1).astype(np.uint64) * np.uint64(PAGE)
    out = np.full((COUNT + 1, PAGE), 0xAA, np.uint8)
    faults = memory.gather(addresses, out)
    hole = base + COUNT * PAGE
    assert (faults.addresses.tolist(), faults.rows.tolist()) == ([hole], np.flatnonzero(addresses == hole).tolist())
    assert not out.any()
    assert len(openings) <= 2


def test_rows_over_two_mappings_open_maps_a_few_times(layer, many, openings):
    pid, base = many
    memory = ready(layer, pid, openings)
    addresses = base + PAGE - 4 + np.arange(COUNT - 1, dtype=np.uint64)[::-1] * np.uint64(PAGE)
    out = np.full((COUNT - 1, 8), 0xAA, np.uint8)
    assert len(memory.gather(addresses, out).rows) == 0
    assert not out.any()
    assert len(openings) <= 2


def test_a_write_over_a_thousand_mappings_opens_maps_once(writable_layer, openings):
    with chequered(COUNT) as (pid, base):
        memory = ready(writable_layer, pid, openings)
        memory.write(base, b"\x11" * COUNT * PAGE)
        assert len(openings) == 1
        assert memory.read(base, COUNT * PAGE) == b"\x11" * COUNT * PAGE


def test_the_text_of_many_mappings_is_not_gone_through_in_the_loop(layer, many, openings):
    pid, base = many
    memory = ready(layer, pid, openings)
    assert not memory.may_block
    buffer = memoryview(bytearray(PAGE))
    assert memory.readinto_nowait(base + (COUNT - 1) * PAGE, buffer) is False
    assert memory.readinto_nowait(base + (COUNT - 1) * PAGE, buffer) is False
    assert len(openings) == 1


def test_the_text_of_few_mappings_is_gone_through_in_the_loop(layer, openings):
    with chequered(20) as (pid, base):
        memory = ready(layer, pid, openings)
        assert memory.readinto_nowait(base, memoryview(bytearray(20 * PAGE))) is True
        assert len(openings) == 1


def test_an_error_that_is_kept_keeps_no_file_open(layer, many, openings):
    pid, base = many
    memory = ready(layer, pid, openings)
    before = len(os.listdir("/proc/self/fd"))
    requests = [(base + COUNT * PAGE, size) for size in range(1, 40)]
    kept = memory.read_many(requests)
    assert all(isinstance(error, FaultError) for error in kept)
    assert len(os.listdir("/proc/self/fd")) == before
