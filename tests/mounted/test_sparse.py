"""Files full of holes on a real mount: programs that ask for holes pass over them, and nothing in the target grows.

    0              page 3           512 GiB          1 TiB
    |--------------|PAGE0|----------|PAGE1|----------|PAGE2|
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mounting import Mount, mounted
from support import require

from cloudfs import shim

PAGE = 4096
SIZE = 1 << 40
PLACES = (3 * PAGE, SIZE // 2, SIZE - PAGE)
LIMIT = 30
"""Seconds for one command; reading all of it takes minutes at the least."""
SHARED_MEMORY = Path("/dev/shm")
HUGE = 64 << 40
"""Bytes of a file that tmpfs can have, and ext4 cannot."""

_PROGRAM = f"""
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: anybody of this user may look
address = libc.mmap(None, {SIZE}, 3, 0x4022, -1, 0)  # PROT_READ | PROT_WRITE, MAP_NORESERVE | ANONYMOUS | PRIVATE
assert address != ctypes.c_void_p(-1).value, "no address space"
libc.madvise(address, {SIZE}, 15)  # MADV_NOHUGEPAGE
for number, place in enumerate({PLACES}):
    ctypes.memmove(address + place, b"PAGE%d\\n" % number, 6)
print(address, flush=True)
sys.stdin.read()
"""


@dataclass
class Reservation:
    """A program with 1 TiB of address space, three pages of it in use, and the file that shows it."""

    pid: int
    file: Path

    def held(self, *names: str) -> list[str]:
        """What the target takes of memory, by its own kernel."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return [line for line in lines if line.startswith(names)]


@pytest.fixture(scope="module")
def program() -> Iterator[tuple[int, int]]:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline()
            require(address, "there is no TiB of address space to reserve")
            yield process.pid, int(address)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def mount() -> Iterator[Mount]:
    with sparse_mount() as mount:
        yield mount


@contextlib.contextmanager
def sparse_mount(*words: str) -> Iterator[Mount]:
    """A mount that tells of holes; skips where it cannot."""
    with mounted("-v", *words) as mount:
        # Without -v the reason would not stand in the log.
        require("no shim" not in mount.errors(), "the shim cannot be compiled here")
        yield mount


@pytest.fixture(scope="module")
def region(mount, program) -> Reservation:
    pid, address = program
    folder = mount.folder / f"os/processes/{pid}/regions"
    (name,) = [name for name in os.listdir(folder) if name.startswith(f"{address:x}-")]
    return Reservation(pid, folder / name)


@pytest.fixture(autouse=True)
def untouched(region) -> Iterator[None]:
    """Every test leaves the target as it was. Pages of files on a disk are read through it: RssFile may grow."""
    names = ("VmPTE", "RssAnon", "RssShmem")
    before = region.held(*names)
    yield
    assert region.held(*names) == before


def run(*words: str | Path) -> bytes:
    done = subprocess.run(words, capture_output=True, timeout=LIMIT, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pieces(path: Path) -> list[tuple[int, int]]:
    """(start, stop) of the data, as a program finds it."""
    found = []
    with open(path, "rb", buffering=0) as file:
        at = 0
        while True:
            try:
                data = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return found
            at = os.lseek(file.fileno(), data, os.SEEK_HOLE)
            found.append((data, at))


def pages(path: Path) -> list[bytes]:
    with open(path, "rb", buffering=0) as file:
        return [os.pread(file.fileno(), 6, place) for place in PLACES]


EXPECTED = [b"PAGE0\n", b"PAGE1\n", b"PAGE2\n"]


def test_a_walk_by_lseek_finds_the_pages_that_were_touched(region):
    assert pieces(region.file) == [(place, place + PAGE) for place in PLACES]


@pytest.mark.parametrize("how", ["auto", "always"])
def test_cp_copies_the_pages_and_leaves_the_holes(region, tmp_path, how):
    before = region.held("VmRSS", "VmPTE")
    run("cp", f"--sparse={how}", region.file, tmp_path / "copy")
    assert region.held("VmRSS", "VmPTE") == before
    status = (tmp_path / "copy").stat()
    assert status.st_size == SIZE
    assert status.st_blocks * 512 < 1 << 20
    assert pages(tmp_path / "copy") == EXPECTED


def test_grep_counts_the_lines(region):
    assert run("grep", "-c", "PAGE", region.file) == b"3\n"


def test_tar_stores_the_pages_alone(region, tmp_path):
    archive = tmp_path / "region.tar"
    run("tar", "-C", region.file.parent, "--force-local", "-Scf", archive, region.file.name)
    assert archive.stat().st_size < 1 << 20
    run("tar", "-C", tmp_path, "--force-local", "-Sxf", archive)
    (found,) = [path for path in tmp_path.iterdir() if path != archive]
    assert found.stat().st_size == SIZE
    assert pages(found) == EXPECTED


def test_all_regions_are_searched_and_copied(region, tmp_path):
    counts = run("grep", "-rc", "^PAGE[0-9]$", region.file.parent).decode().splitlines()
    assert f"{region.file}:3" in counts
    assert len(counts) == len(os.listdir(region.file.parent))
    run("cp", "-r", "--sparse=always", region.file.parent, tmp_path / "regions")
    assert pages(tmp_path / "regions" / region.file.name) == EXPECTED
    assert {path.name: path.stat().st_size for path in (tmp_path / "regions").iterdir()} == {
        path.name: path.stat().st_size for path in region.file.parent.iterdir()
    }


def test_dd_reads_where_it_is_told_to(region):
    data = run("dd", f"if={region.file}", "iflag=skip_bytes", f"skip={SIZE - PAGE}", "bs=4096", "status=none")
    assert data == EXPECTED[2] + bytes(PAGE - 6)


def test_mem_tells_where_data_begins_though_its_size_is_0(region):
    start = int(region.file.name.split("-")[0], 16)
    with open(region.file.parents[1] / "mem", "rb", buffering=0) as file:
        assert os.lseek(file.fileno(), start, os.SEEK_DATA) == start + PLACES[0]
        assert os.lseek(file.fileno(), start + PLACES[0], os.SEEK_HOLE) == start + PLACES[0] + PAGE
        assert os.lseek(file.fileno(), start, os.SEEK_HOLE) == start


def test_a_text_file_is_data_up_to_its_size(region):
    with open(region.file.parents[1] / "maps", "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        assert os.lseek(file.fileno(), 3, os.SEEK_DATA) == 3
        assert os.lseek(file.fileno(), 3, os.SEEK_HOLE) == size
        with pytest.raises(OSError, match="No such device or address"):
            os.lseek(file.fileno(), size, os.SEEK_DATA)


def test_cp_of_a_file_that_takes_commands_is_what_cat_shows(mount, region, tmp_path):
    run("cp", mount.folder / "connector/new", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == run("cat", mount.folder / "connector/new")


def test_the_loop_answers_while_others_look_for_holes(mount, region):
    code = (
        "import os, sys\nfile = os.open(sys.argv[1], os.O_RDONLY)\nprint(flush=True)\n"
        "while True: os.lseek(file, 1 << 20, os.SEEK_DATA)"
    )
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", code, region.file], stdout=subprocess.PIPE)
            )
            stack.callback(process.kill)
            process.stdout.readline()
        took = []
        for _ in range(20):
            began = time.monotonic()
            assert "os" in os.listdir(mount.folder)
            took.append(time.monotonic() - began)
        assert sorted(took)[10] < 2  # a loop that hangs takes the time limit, 30 s


# -- files of the host ---------------------------------------------------------------------------------


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    require(SHARED_MEMORY.is_dir(), "there is no tmpfs")
    with tempfile.TemporaryDirectory(prefix="cloudfs-test-", dir=SHARED_MEMORY) as folder:
        yield Path(folder)


def test_an_image_of_64_tib_is_read_at_its_far_end_in_little_memory(shared_memory, tmp_path, region):
    image = shared_memory / "image.raw"
    with open(image, "wb") as file:
        file.truncate(HUGE)
        os.pwrite(file.fileno(), b"the far end", HUGE - 11)
        os.pwrite(file.fileno(), b"the middle", HUGE // 2)
    with sparse_mount(str(image)) as mount:
        before = resident(mount)
        file = mount.folder / "phys_mem"
        file = file if file.exists() else next(mount.folder.glob("connector/*/phys_mem"))
        assert run("tail", "-c", "11", file) == b"the far end"
        assert pieces(file) == [(HUGE // 2, HUGE // 2 + PAGE), (HUGE - PAGE, HUGE)]
        run("cp", "--sparse=always", file, shared_memory / "copy")
        assert pieces(shared_memory / "copy") == pieces(image)
        assert resident(mount) - before < 100 << 20


def resident(mount: Mount) -> int:
    text = Path(f"/proc/{mount.daemon.pid}/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) << 10


def test_the_gaps_of_a_memory_map_are_holes(tmp_path, region):
    image, ranges = tmp_path / "image.raw", tmp_path / "map.toml"
    image.write_bytes(b"L" * PAGE + b"H" * PAGE)
    ranges.write_text(
        f"[[range]]\nbase = {PAGE}\nlength = {PAGE}\nreal_base = 0\n"
        f"[[range]]\nbase = {1 << 40}\nlength = {PAGE}\nreal_base = {PAGE}\n"
    )
    with sparse_mount(f"raw:{image}:map={ranges}") as mount:
        file = next(mount.folder.glob("connector/*/phys_mem"))
        assert pieces(file) == [(PAGE, 2 * PAGE), (1 << 40, (1 << 40) + PAGE)]
        run("cp", "--sparse=always", file, tmp_path / "copy")
        assert pieces(tmp_path / "copy") == pieces(file)


# -- without the shim ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--no-shim",), ()])
def test_a_small_file_is_copied_the_same_with_and_without(tmp_path, region, words):
    truth = tmp_path / "image.raw"
    with open(truth, "wb") as file:
        file.truncate(1 << 20)
        os.pwrite(file.fileno(), b"data\n" * 1000, 300_000)
    with mounted(*words, str(truth)) as mount:
        file = next(mount.folder.glob("connector/*/phys_mem"))
        for how in ("auto", "always", "never"):
            copy = tmp_path / f"copied {how}"
            run("cp", f"--sparse={how}", file, copy)
            assert copy.read_bytes() == truth.read_bytes()
        run("tar", "-C", file.parent, "-Scf", tmp_path / "image.tar", file.name)
        assert run("tar", "-xOf", tmp_path / "image.tar") == truth.read_bytes()
        assert run("grep", "-a", "-c", "data", file) == run("grep", "-a", "-c", "data", truth)
        shutil.copyfile(file, tmp_path / "copied")
        assert (tmp_path / "copied").read_bytes() == truth.read_bytes()


def test_without_the_shim_a_file_is_all_data(tmp_path, region):
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(1 << 20))
    with mounted("-v", "--no-shim", str(image)) as mount:
        assert pieces(next(mount.folder.glob("connector/*/phys_mem"))) == [(0, 1 << 20)]
        assert "no shim" in mount.errors()


def test_the_environment_switches_it_off(tmp_path, region):
    with mounted("-v", environment={shim.SWITCH: "0"}) as mount:
        assert "no shim): it is switched off" in mount.errors()
