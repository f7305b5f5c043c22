"""Reads and writes that the shim answers by itself: the same answers as without it, and Python is not asked."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import Mount, mounted, require_fuse
from support import require

PAGE = 4096
SIZE = 3 * (1 << 20) + 777
LIMIT = 60
READS = 1000

_HOLDER = """
import ctypes, mmap, os, sys
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: anybody of this user may look
memory = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(48):
    memory[page * 4096 : (page + 1) * 4096] = bytes([page + 1]) * 4096
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.readline()
os.execvp("sleep", ["sleep", "60"])
"""

_MOUNT = """
import os, signal, sys, threading
from cloudfs import shim
found = shim.load()
from cloudfs.mount import mount
from cloudfs.nodes.root import build_root
from engine.machine import Machine

def read():
    try:
        file = os.open(sys.argv[2] + "/connector/raw/phys_mem", os.O_RDONLY)
        for offset in range(int(sys.argv[3])):
            assert os.pread(file, 8, offset * 8) == int(sys.argv[4]).to_bytes(1, "little") * 8
        print(0 if found is None else found.words[shim.SERVED], flush=True)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)

with Machine() as machine:
    machine.open("connector", f"raw:{sys.argv[1]}")
    mount(build_root(machine), sys.argv[2], ready=threading.Thread(target=read).start)
"""


@pytest.fixture
def image() -> Iterator[Path]:
    """A file in memory, of random bytes."""
    with tempfile.NamedTemporaryFile(prefix="cloudfs-test-", dir="/dev/shm") as file:
        file.write(random.Random(5).randbytes(SIZE))
        file.flush()
        yield Path(file.name)


@pytest.fixture(params=["with the shim", "without it"])
def how(request: pytest.FixtureRequest) -> list[str]:
    return [] if request.param == "with the shim" else ["--no-shim"]


@contextlib.contextmanager
def opened(mount: Mount, path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    number = os.open(mount.folder / path, flags)
    try:
        yield number
    finally:
        os.close(number)


@pytest.fixture
def raw(image: Path, how: list[str]) -> Iterator[Mount]:
    with mounted("--writable", *how, f"raw:{image}") as mount:
        yield mount


PHYS_MEM = "connector/raw/phys_mem"


def test_all_sizes_at_all_places_are_the_bytes_of_the_file(raw: Mount, image: Path) -> None:
    chance, whole = random.Random(6), image.read_bytes()
    with opened(raw, PHYS_MEM) as file:
        for size in [8, 1, 4096, 65536, 65537, 131072, 1 << 20, SIZE] * 40:
            offset = chance.choice([chance.randrange(SIZE), SIZE - size, SIZE - size // 2, SIZE, SIZE + PAGE])
            offset = max(0, offset)
            assert os.pread(file, size, offset) == whole[offset : offset + size]


def test_an_image_that_begins_above_0_is_read_from_there_and_is_zeros_below(image: Path, how: list[str]) -> None:
    data = image.read_bytes()
    with mounted(*how, f"raw:{image}:base=1M,live=yes") as mount, opened(mount, PHYS_MEM) as file:
        base = 1 << 20
        for offset in (0, 1, 4095, 100_000 % len(data), len(data) - 100):
            assert os.pread(file, 100, base + offset) == data[offset : offset + 100]
            assert os.pread(file, 200, base - 100) == bytes(100) + data[:100]
            assert os.pread(file, 100, base - 4096) == bytes(100)
            assert os.pread(file, 100, base + offset) == data[offset : offset + 100]


def test_a_hole_of_a_sparse_file_stays_one(raw: Mount, image: Path) -> None:
    with open(image, "r+b") as file:
        file.truncate(1 << 20)
        file.truncate(8 << 20)
    before = image.stat().st_blocks
    with opened(raw, PHYS_MEM) as file_descriptor:
        for size in (8, 4096, 65536, 1 << 20) * 3:
            assert os.pread(file_descriptor, size, 4 << 20) == bytes(size)
    assert image.stat().st_blocks == before


def test_a_file_with_holes_is_read_out_of_its_mapping_and_its_holes_stay(image: Path) -> None:
    require(shim_compiles(), "the shim cannot be compiled here")
    with open(image, "r+b") as file:
        file.truncate(1 << 20)
        file.truncate(8 << 20)
    before, whole = image.stat().st_blocks, image.read_bytes()
    with mounted(f"raw:{image}:live=yes") as mount, opened(mount, PHYS_MEM) as number:
        for offset in (0, 4 << 20, (1 << 20) - (64 << 10)) * 3:
            for size in (128 << 10, 1 << 20):
                assert os.pread(number, size, offset) == whole[offset : offset + size]
        smaps = Path(f"/proc/{mount.daemon.pid}/smaps").read_text().splitlines()
        at = next(index for index, line in enumerate(smaps) if line.endswith(str(image)))
        resident = next(line for line in smaps[at:] if line.startswith("Rss:"))
    assert int(resident.split()[1]) >= 512, "all was copied by read(2) first"
    assert image.stat().st_blocks == before


def test_a_file_that_is_cut_under_its_mapping_costs_nobody_his_life(raw: Mount, image: Path) -> None:
    with opened(raw, PHYS_MEM) as file:
        for _ in range(3):
            assert len(os.pread(file, 1 << 20, 0)) == 1 << 20
        os.truncate(image, 100)
        assert len(os.pread(file, 1 << 20, 0)) == 100
        assert os.pread(file, 1 << 20, 1 << 20) == b""
    assert raw.daemon.poll() is None


def test_a_file_that_is_cut_ends_there_and_one_that_grows_goes_on(raw: Mount, image: Path) -> None:
    with opened(raw, PHYS_MEM) as file:
        for _ in range(3):
            assert len(os.pread(file, 16, SIZE - 16)) == 16
        os.truncate(image, SIZE - 8)
        assert len(os.pread(file, 16, SIZE - 16)) == 8
        with open(image, "ab") as longer:
            longer.write(b"grown up" * 2)
        assert os.pread(file, 16, SIZE - 8) == b"grown up" * 2


def test_what_is_written_stands_in_the_file_and_never_behind_its_end(raw: Mount, image: Path) -> None:
    chance, expected = random.Random(7), bytearray(image.read_bytes())
    with opened(raw, PHYS_MEM, os.O_RDWR) as file:
        for size in [8, 1, 4096, 131072, 1 << 20, (1 << 20) + 5] * 10:
            offset, data = chance.randrange(SIZE - size), chance.randbytes(size)
            assert os.pwrite(file, data, offset) == size
            expected[offset : offset + size] = data
            assert os.pread(file, size, offset) == data
        assert os.pwrite(file, b"x" * 16, SIZE - 8) == 8
        with pytest.raises(OSError) as failed:
            os.pwrite(file, b"x", SIZE)
        assert failed.value.errno == errno.EIO
    expected[-8:] = b"x" * 8
    assert image.read_bytes() == expected


def test_a_file_that_somebody_wanted_to_cut_is_not_written_through_that_descriptor_again(raw: Mount) -> None:
    with opened(raw, PHYS_MEM, os.O_RDWR) as file:
        for _ in range(3):
            assert os.pwrite(file, b"12345678", 0) == 8
        for attempt in (lambda: os.ftruncate(file, 0), lambda: os.pwrite(file, b"87654321", 0)):
            with pytest.raises(OSError) as failed:
                attempt()
            assert failed.value.errno == errno.EPERM
        assert os.pread(file, 8, 0) == os.pread(file, 8, 0) == b"12345678"


def test_an_open_file_of_a_removed_instance_gives_nothing_more(raw: Mount) -> None:
    with opened(raw, PHYS_MEM, os.O_RDWR) as file:
        for _ in range(3):
            os.pread(file, 8, 0)
        os.rmdir(raw.folder / "connector/raw")
        for attempt in (lambda: os.pread(file, 8, 0), lambda: os.pwrite(file, b"x", 0)):
            with pytest.raises(OSError) as failed:
                attempt()
            assert failed.value.errno == errno.ENODEV


def test_every_request_is_counted_once(raw: Mount) -> None:
    with opened(raw, PHYS_MEM, os.O_RDWR) as file:
        for _ in range(20):
            os.pread(file, 100, 5)
            os.pwrite(file, b"seven b", 9)
        found = json.loads((raw.folder / "connector/raw/info.json").read_text())["counters"]
    assert {key: found[key] for key in ("reads", "bytes_read", "writes", "bytes_written")} == {
        "reads": 20, "bytes_read": 2000, "writes": 20, "bytes_written": 140,
    }  # fmt: skip


@pytest.fixture
def holder() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process with 48 pages of its own and 16 that it never touched."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.fixture
def native(how: list[str]) -> Iterator[Mount]:
    with mounted(*how) as mount:
        yield mount


def present(pid: int, address: int, count: int) -> list[bool]:
    """What pagemap tells of pages from `address` on."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as file:
        entries = os.pread(file.fileno(), 8 * count, address // PAGE * 8)
    return [bool(entries[at + 7] & 0x80) for at in range(0, len(entries), 8)]


def test_memory_of_a_process_is_what_the_kernel_shows(native: Mount, holder: tuple[subprocess.Popen[str], int]) -> None:
    process, start = holder
    chance = random.Random(8)
    with opened(native, f"os/processes/{process.pid}/mem") as file, open(f"/proc/{process.pid}/mem", "rb", 0) as mem:
        for size in [8, 100, 5000, 70_000, 190_000] * 60:
            address = start + chance.randrange(48 * PAGE - size)
            assert os.pread(file, size, address) == os.pread(mem.fileno(), size, address)


def test_pages_that_were_never_touched_stay_so(native: Mount, holder: tuple[subprocess.Popen[str], int]) -> None:
    process, start = holder
    before = present(process.pid, start, 64)
    with opened(native, f"os/processes/{process.pid}/mem") as file:
        for page in [*range(40, 64)] * 3:
            expected = bytes([page + 1]) * 8 if page < 48 else bytes(8)
            assert os.pread(file, 8, start + page * PAGE) == expected
        assert os.pread(file, 64 * PAGE, start)[47 * PAGE :] == bytes([48]) * PAGE + bytes(16 * PAGE)
    assert before[:48] == [True] * 48
    assert present(process.pid, start, 64) == before


def test_nothing_of_the_program_before_is_seen_when_a_process_runs_another(
    native: Mount, holder: tuple[subprocess.Popen[str], int]
) -> None:
    process, start = holder
    with opened(native, f"os/processes/{process.pid}/mem") as file:
        for size in (8, 100_000) * 3:
            assert os.pread(file, size, start)[:8] == b"\1" * 8
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            os.sched_yield()
        for size in (8, 100_000) * 3:
            with contextlib.suppress(OSError):
                assert os.pread(file, size, start)[:8] != b"\1" * 8
        process.kill()
        process.wait(10)
        with pytest.raises(OSError):
            os.pread(file, 8, start)


def shim_compiles() -> bool:
    """Asked in a program of its own: where it was loaded it stands in front of libfuse."""
    words = [sys.executable, "-c", "from cloudfs import shim; print(shim.load() is not None)"]
    return subprocess.run(words, capture_output=True, timeout=LIMIT, check=True).stdout == b"True\n"


def test_python_is_asked_for_few_of_many_reads(tmp_path: Path) -> None:
    require_fuse()
    folder = tmp_path / "mount"
    folder.mkdir()
    with tempfile.NamedTemporaryFile(prefix="cloudfs-test-", dir="/dev/shm") as file:
        file.write(b"\7" * READS * 8)
        file.flush()
        done = subprocess.run(
            [sys.executable, "-c", _MOUNT, file.name, str(folder), str(READS), "7"],
            capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    served = int(done.stdout)
    require(served, "the shim cannot be compiled here")
    assert served > READS // 2


@pytest.mark.parametrize("options", [["--spin", "100"], ["--spin", "100", "--no-shim"]])
def test_spinning_ends_with_the_activity(options: list[str], image: Path) -> None:
    with mounted(*options, f"raw:{image}") as mount:
        with opened(mount, PHYS_MEM) as file:
            for offset in range(100):
                os.pread(file, 8, offset)

        def ran() -> int:
            tasks = Path(f"/proc/{mount.daemon.pid}/task")
            return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir())

        limit = time.monotonic() + LIMIT
        while (before := ran()) != (time.sleep(1.5), ran())[1]:
            assert time.monotonic() < limit, "it never comes to rest"
        assert ran() == before
