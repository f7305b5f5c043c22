"""cloudfs read: bytes of processes and images, in every form, with every kind of hole."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from commandline import COMMAND, cloudfs, environment, in_process, sentence
from targets import running_target

from cloudfs.commands._spaces import CHUNK, Data, Hole, Space, pieces
from cloudfs.commands.read import Exit
from engine.bytes_memory import BytesMemory
from engine.connectors.dummy import made_bytes
from engine.errors import FaultError
from engine.memory import Memory
from engine.types import Extent


@pytest.fixture(scope="module")
def target():
    with running_target(b"a secret of cloudfs read") as found:
        yield found


# -- a process of this machine -----------------------------------------------------------------------


def test_into_a_pipe_go_the_bytes(target):
    done = cloudfs("read", str(target.pid), hex(target.secret), "24")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"a secret of cloudfs read", b"")


def test_numbers_may_be_written_in_every_way(target):
    for address in (hex(target.pattern), str(target.pattern)):
        for length in ("65536", "0x10000", "64K", "64k"):
            assert in_process("read", str(target.pid), address, length).stdout == bytes(range(256)) * 256


def test_a_mebibyte_and_more_comes_whole(target):
    done = in_process("read", str(target.pid), hex(target.pattern), "1M")
    assert done.stdout == bytes(range(256)) * 4096


@contextlib.contextmanager
def called(folder: Path, name: str, count: int = 1):
    """Processes of that name, which each hold the bytes of their own command line."""
    program = folder / name
    program.symlink_to(shutil.which("cat") or "/bin/cat")
    processes = [subprocess.Popen([str(program), "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                 for _ in range(count)]  # fmt: skip
    try:
        for process in processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"x")
            process.stdin.flush()
            assert process.stdout.read(1) == b"x", "it runs"
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_process_is_named_where_only_one_has_the_name(tmp_path):
    name = f"only-{os.getpid()}"
    with called(tmp_path, name) as (process,):
        address = Path(f"/proc/{process.pid}/maps").read_text().split("-")[0]
        for words in ([name], ["-p", name], ["-p", str(process.pid)]):
            assert in_process("read", *words, f"0x{address}", "4").stdout == b"\x7fELF"


def test_of_several_processes_with_a_name_the_pids_are_told(tmp_path):
    with called(tmp_path, f"two-{os.getpid()}", 2) as processes:
        for words in (["read", f"two-{os.getpid()}", "0", "8"], ["maps", "-p", f"two-{os.getpid()}"]):
            refused = in_process(*words)
            assert refused.returncode == Exit.USAGE
            assert all(str(process.pid) in sentence(refused) for process in processes)


def test_a_name_that_linux_has_cut_may_be_written_whole(tmp_path):
    name = f"a-name-of-twenty-{os.getpid()}"
    with called(tmp_path, name) as (process,):
        assert len(Path(f"/proc/{process.pid}/comm").read_text().strip()) == 15
        assert in_process("maps", name).returncode == 0
        assert in_process("maps", name + "x").returncode == 3


def test_a_hole_between_regions_is_said_and_filled_with_zeros(target):
    #   … region |  hole  | region …      the bytes behind the hole stand where they belong
    maps = Path(f"/proc/{target.pid}/maps").read_text().splitlines()
    spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps if line.split()[1][0] == "r"]
    start, stop = next(
        (one[1], two[0]) for one, two in itertools.pairwise(spans) if 0 < two[0] - one[1] < 1 << 26
    )
    done = cloudfs("read", str(target.pid), hex(start - 16), str(stop - start + 32))
    with open(f"/proc/{target.pid}/mem", "rb", buffering=0) as memory:
        before, behind = os.pread(memory.fileno(), 16, start - 16), os.pread(memory.fileno(), 16, stop)
    assert done.returncode == Exit.PARTIAL
    assert done.stdout == before + bytes(stop - start) + behind
    assert f"{start:#x}-{stop:#x} of process {target.pid}" in done.stderr.decode()


def test_the_whole_address_space_is_read_in_seconds_and_its_regions_are_all_there(target):
    done = cloudfs("read", "--json", str(target.pid), "0", "256T", limit=60)
    assert done.returncode == Exit.PARTIAL
    parts = json.loads(done.stdout)
    sizes = {part["address"]: part["size"] for part in parts if part["data"] is not None}
    total = sum(sizes.values())
    readable = 0
    for line in Path(f"/proc/{target.pid}/maps").read_text().splitlines():
        start, stop = (int(x, 16) for x in line.split()[0].split("-"))
        if stop < 1 << 47 and "[vvar" not in line:
            readable += stop - start
    assert total == readable


def test_a_process_that_has_ended_is_absent():
    with running_target() as ended:
        pass
    done = in_process("read", str(ended.pid), hex(ended.secret), "16")
    assert done.returncode == Exit.ABSENT
    assert str(ended.pid) in sentence(done)


# -- images ------------------------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.raw"
    path.write_bytes(os.urandom(300_001))
    return path


@pytest.mark.parametrize("words", ["{} physical 0 1K", "raw:{} physical 0 1K", "-f {} physical 0 1K",
                                   "-c raw:{} physical 0 1K", "physical 0 1K -f {}"])  # fmt: skip
def test_an_image_is_named_in_every_way(image, words):
    assert in_process("read", *words.format(image).split()).stdout == image.read_bytes()[:1024]


def test_a_file_that_is_called_like_a_plugin_or_a_pid(image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("native", "1234", "raw"):
        os.link(image, name)
        for words in (["-f", name], [f"./{name}"]):
            assert in_process("read", *words, "physical", "0", "16").stdout == image.read_bytes()[:16]


def test_what_lies_behind_the_end_is_said_and_not_made_up(image):
    done = in_process("read", str(image), "physical", "300000", "16")
    assert done.returncode == Exit.PARTIAL
    assert done.stdout == image.read_bytes()[300_000:]
    assert "0x493e1-0x493f0" in done.stderr.decode()
    assert "behind the end" in done.stderr.decode()


def test_nothing_at_all_behind_the_end(image):
    done = in_process("read", str(image), "physical", "1T", "16")
    assert (done.returncode, done.stdout) == (Exit.PARTIAL, b"")


def test_a_length_of_nothing_is_nothing(image):
    done = in_process("read", str(image), "physical", "5", "0")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_holes_of_an_image_are_zeros_where_bytes_follow():
    #  pages 0 … 14 are there, 15 is not, 16 … 30 are, 31 is not
    done = cloudfs("read", "dummy:size=1M,holes=yes", "physical", "0", "0x20000")
    expected = made_bytes(0, 0xF000) + bytes(0x1000) + made_bytes(0x10000, 0xF000)
    assert done.stdout == expected
    assert done.returncode == Exit.PARTIAL
    said = done.stderr.decode().splitlines()
    assert [line.split()[2] for line in said] == ["0xf000-0x10000", "0x1f000-0x20000"]


def test_a_hole_into_a_fresh_file_is_a_hole_of_the_file(tmp_path):
    out = tmp_path / "out"
    with open(out, "wb") as file:
        done = subprocess.run(
            [*COMMAND, "read", "dummy:size=5G", "physical", "0xbffff000", "0x40002000"],
            stdout=file, stderr=subprocess.PIPE, timeout=60, check=False, env=environment(),
        )  # fmt: skip
    assert done.returncode == Exit.PARTIAL
    assert out.stat().st_size == 0x40002000
    assert out.stat().st_blocks * 512 < 1 << 20
    with open(out, "rb") as file:
        assert file.read(4096) == made_bytes(0xBFFFF000, 4096)
        assert file.read(4096) == bytes(4096)
        file.seek(0x40001000)
        assert file.read() == made_bytes(1 << 32, 4096)


@pytest.mark.parametrize("mode", ["ab", "r+b"])
def test_a_hole_into_a_file_with_something_in_it_is_written(tmp_path, mode):
    out = tmp_path / "out"
    out.write_bytes(b"\xff" * (1 << 20))
    with open(out, mode) as file:
        subprocess.run(
            [*COMMAND, "read", "dummy:size=1M,holes=yes", "physical", "0xe000", "0x3000"],
            stdout=file, stderr=subprocess.PIPE, timeout=60, check=False, env=environment(),
        )  # fmt: skip
    written = out.read_bytes()[1 << 20 :] if mode == "ab" else out.read_bytes()[:0x3000]
    assert written == made_bytes(0xE000, 0x1000) + bytes(0x1000) + made_bytes(0x10000, 0x1000)


def test_hex_leaves_holes_out():
    done = in_process("read", "--hex", "dummy:size=1M,holes=yes", "physical", "0xeff0", "0x1020")
    lines = done.stdout.decode().splitlines()
    assert [line.split()[0] for line in lines] == ["0000eff0", "00010000", "00010010"]
    assert done.returncode == Exit.PARTIAL


def test_json_has_every_part_with_what_could_not_be_read():
    done = in_process("read", "--json", "dummy:size=1M,holes=yes", "physical", "0xeff0", "0x1020")
    assert json.loads(done.stdout) == [
        {"address": "0xeff0", "size": 16, "data": made_bytes(0xEFF0, 16).hex(), "problem": None},
        {"address": "0xf000", "size": 4096, "data": None, "problem": "nothing is mapped there"},
        {"address": "0x10000", "size": 16, "data": made_bytes(0x10000, 16).hex(), "problem": None},
    ]
    assert json.loads(in_process("read", "--json", "dummy", "physical", "0", "0").stdout) == []


# -- the stream --------------------------------------------------------------------------------------


class Spotted(Memory):
    """Pages of 256 bytes of which only some can be read; counts how often it is asked."""

    page_size = 256

    def __init__(self, pages: set[int], size: int) -> None:
        self.pages = pages
        self._size = size
        self.asked = 0

    @property
    def size(self) -> int:
        return self._size

    def readinto(self, address: int, buffer: memoryview) -> None:
        self.asked += 1
        for offset in range(len(buffer)):
            if (address + offset) // 256 not in self.pages:
                raise FaultError(address + offset)
            buffer[offset] = (address + offset) % 251

    def extents(self, start=0, stop=None):
        stop = self._size if stop is None else min(stop, self._size)
        for page in sorted(self.pages):
            low, high = max(start, page * 256), min(stop, page * 256 + 256)
            if low < high:
                yield Extent(low, high - low)


def read_all(space: Space, start: int, size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes with zeros in holes, and the holes; checks that the pieces follow one another without a break."""
    at, found, holes = start, bytearray(), []
    for piece in pieces(space, start, size):
        if isinstance(piece, Hole):
            assert piece.start == at < piece.stop
            holes.append((piece.start, piece.stop))
            found += bytes(piece.stop - at)
            at = piece.stop
        else:
            assert piece.address == at
            assert 0 < len(piece.view) <= CHUNK
            found += piece.view
            at += len(piece.view)
    assert at == start + size or not size
    return bytes(found), holes


@pytest.mark.parametrize("known", ["nothing", "all", "what is there", "fails"])
@pytest.mark.parametrize(("start", "size"), [(0, 5120), (3, 2000), (255, 2), (700, 4420), (5000, 500)])
def test_holes_of_any_shape_are_crossed(known, start, size):
    pages = {0, 1, 4, 6, 7, 12, 13, 19}
    memory = Spotted(pages, 20 * 256)
    mapped = {
        "nothing": None,
        "all": lambda: [Extent(0, 20 * 256)],
        "what is there": lambda: [Extent(page * 256, 256) for page in sorted(pages)],
        "fails": lambda: (_ for _ in ()).throw(FaultError(0)),
    }[known]
    found, holes = read_all(Space("x", memory, mapped), start, size)
    stop = min(start + size, 20 * 256)
    expected = bytes(at % 251 if at // 256 in pages else 0 for at in range(start, stop))
    assert found == expected + bytes(start + size - stop)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(holes))


def test_a_wide_hole_costs_few_questions():
    memory = Spotted({0, 1 << 30}, 1 << 40)
    _, holes = [], [piece for piece in pieces(Space("x", memory), 0, 1 << 40) if isinstance(piece, Hole)]
    assert [(hole.start, hole.stop) for hole in holes] == [(256, 1 << 38), ((1 << 38) + 256, 1 << 40)]
    assert memory.asked < 10


def test_a_wide_range_that_should_be_readable_and_is_not_costs_bounded_questions():
    memory = Spotted({0, 1 << 30}, 1 << 40)
    space = Space("x", memory, lambda: [Extent(0, 1 << 40)])
    found = list(pieces(space, 0, 1 << 40))
    assert sum(isinstance(piece, Data) for piece in found) == 2
    assert memory.asked < 1000


def test_a_chunk_is_not_held_twice():
    memory = BytesMemory(bytes(3 * CHUNK + 1))
    views = [piece.view for piece in pieces(Space("x", memory), 0, 3 * CHUNK + 1) if isinstance(piece, Data)]
    assert [len(view) for view in views] == [CHUNK, CHUNK, CHUNK, 1]
    assert len({id(view.obj) for view in views}) == 1


# -- a file of a process -----------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "size", "found"), [(0, 1 << 20, [(0, 5000)]), (4096, 4096, [(4096, 904)]),
                                                     (0, 5000, [(0, 5000)]), (7, 5, [(7, 5)])])  # fmt: skip
def test_a_file_is_read_up_to_its_end(start, size, found):
    space = Space("file 3", BytesMemory(bytes(5000)), ends=True)
    assert [(piece.address, len(piece.view)) for piece in pieces(space, start, size)] == found


def test_what_lies_behind_the_end_of_a_file_is_a_hole():
    space = Space("file 3", BytesMemory(bytes(5000)), ends=True)
    (hole,) = pieces(space, 5000, 8)
    assert (hole.start, hole.stop) == (5000, 5008)
