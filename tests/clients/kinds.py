"""Every kind of file of a mount, each with a plain copy that holds the same bytes: what tools are tried on."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mounting import Mount, mounted

from engine.connectors.dummy import made_bytes

NEEDLE = "needle-in-memory"
SMALL_DISK = "small disk"
"""A directory with little space, for copies that are meant to be sparse."""
PAGE = 4096
HUGE = 1 << 40

_PROGRAM = r"""
import ctypes, mmap, os, sys
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: anybody of this user may look
pattern, backing = bytes.fromhex(sys.argv[1]), sys.argv[2]
shared = os.memfd_create("pattern")  # a file, so that no neighbour joins the region
os.truncate(shared, 1 << 18)
small = mmap.mmap(shared, 1 << 18, mmap.MAP_SHARED)
small[:] = (pattern * 64)[:1 << 18]
with open(backing, "wb+") as file:
    file.truncate(1 << 16)
    holed = mmap.mmap(file.fileno(), 1 << 16, mmap.MAP_SHARED)
    holed[:] = (pattern * 16)[:1 << 16]
    file.truncate(1 << 15)  # the pages behind cannot be read any more: SIGBUS for the program, EIO for us
huge = mmap.mmap(-1, 1 << 40, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
huge[4096:8192] = pattern
held = [(ctypes.c_char * 1).from_buffer(one) for one in (small, holed, huge)]
print(*map(ctypes.addressof, held), flush=True)
sys.stdin.read()
"""


def pattern() -> bytes:
    """4 KiB: lines of text, the needle, and bytes that are no text."""
    text = b"".join(b"line %d of the pattern, %s\n" % (n, NEEDLE.encode() if n % 7 == 3 else b"hay") for n in range(60))
    return (text + bytes(range(256)) * 16)[:PAGE]


@dataclass(frozen=True)
class Kind:
    """A kind of file: where one stands, and a plain copy of it."""

    name: str
    path: Path
    copy: Path
    offset: int = PAGE
    """Where in it bytes are known, for tools that are told an offset."""
    unsized: bool = False
    """It says size 0 and has bytes."""
    endless: bool = False
    """Reading all of it takes hours."""
    tells_holes: bool = False
    """lseek(2) says where it has data."""
    faulty: bool = False
    """What lies at its beginning cannot be read."""


@dataclass(frozen=True)
class World:
    """A mount with one of each kind."""

    mount: Mount
    kinds: tuple[Kind, ...]

    @property
    def tells_holes(self) -> bool:
        """Whether the shim is at work."""
        return any(kind.tells_holes for kind in self.kinds)


def await_rest(pid: int) -> None:
    """Until the process sleeps and goes on sleeping: what the kernel counts of it stands still then."""
    before = ""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ran = Path(f"/proc/{pid}/schedstat").read_text()
        if ran == before and Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0] == b"S":
            return
        before = ran
        time.sleep(0.1)
    raise AssertionError("the target does not come to rest")


@contextlib.contextmanager
def _target(folder: Path) -> Iterator[tuple[int, dict[str, int]]]:
    command = [sys.executable, "-S", "-c", _PROGRAM, pattern().hex(), str(folder / "backing")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        addresses = map(int, process.stdout.readline().split())
        await_rest(process.pid)
        yield process.pid, dict(zip(("small", "holed", "huge"), addresses, strict=True))
    finally:
        process.kill()
        process.communicate()


def _loader(pid: int) -> tuple[Path, int]:
    """The dynamic loader of a process and where it lies: a small module."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if re.search(r"/ld[-.][^/]*$", line):
            return Path(line.split(None, 5)[5]), int(line.split("-")[0], 16)
    raise AssertionError("the target has no dynamic loader")


def _section_of_file(path: Path, name: str) -> bytes:
    done = subprocess.run(["readelf", "-SW", str(path)], capture_output=True, text=True, timeout=30, check=True)
    found = re.search(rf" {re.escape(name)} +\S+ +[0-9a-f]+ ([0-9a-f]+) ([0-9a-f]+) ", done.stdout)
    assert found, done.stdout
    start, size = (int(field, 16) for field in found.groups())
    return path.read_bytes()[start : start + size]


def _tells_holes(path: Path) -> bool:
    with open(path, "rb", buffering=0) as file:
        return os.lseek(file.fileno(), PAGE, os.SEEK_HOLE) < HUGE


class _Copies:
    """Plain copies of files, each in a directory of its own and under its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, kind: str, path: Path, data: bytes) -> Path:
        copy = self.folder / re.sub(r"\W", "_", kind) / path.name
        copy.parent.mkdir()
        copy.write_bytes(data)
        return copy

    def sparse(self, kind: str, path: Path, size: int, pieces: dict[int, bytes]) -> Path:
        copy = self.of(kind, path, b"")
        with open(copy, "r+b") as file:
            file.truncate(size)
            for offset, data in pieces.items():
                file.seek(offset)
                file.write(data)
        return copy


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A filesystem of 512 MiB: what should have been sparse and is not fills it, and nothing else."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512M", "cloudfs-test", str(folder)]
    subprocess.run(command, check=True, timeout=30)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """A mount of this machine and two images; `folder` must take sparse files of 2^47 bytes (tmpfs does)."""
    image = folder / "image.raw"
    image.write_bytes(pattern() * 64)
    (folder / "copies").mkdir()
    with _small_disk(folder / "copies" / SMALL_DISK), _target(folder) as (pid, addresses), mounted(limit=500) as mount:
        new = mount.folder / "connector/new"
        new.write_text(f"raw1 raw:{image}\n")
        new.write_text(f"fixed raw:{image}:immutable=yes\n")
        new.write_text("made dummy:size=1M,seed=3,holes=yes\n")
        yield World(mount, tuple(_kinds(mount.folder, pid, addresses, image, _Copies(folder / "copies"))))


def _kinds(top: Path, pid: int, addresses: dict[str, int], image: Path, copies: _Copies) -> Iterator[Kind]:
    process, proc = top / "os/processes" / str(pid), Path(f"/proc/{pid}")

    def plain(name: str, path: Path, truth: bytes, **facts: bool) -> Kind:
        offset = PAGE if len(truth) > 2 * PAGE else 64
        return Kind(name, path, copies.of(name, path, truth), offset, **facts)

    for name in ("info", "info.json"):
        yield plain(name, process / name, (process / name).read_bytes())
    for name in ("maps", "cmdline"):
        yield plain(name, process / name, (proc / name).read_bytes())
    yield plain("new", top / "connector/new", (top / "connector/new").read_bytes(), unsized=True)
    loader, base = _loader(pid)
    module = process / "modules" / loader.name
    yield plain("exports", module / "exports", (module / "exports").read_bytes(), unsized=True)
    known = addresses["small"]
    mem = copies.sparse("mem", process / "mem", known + (1 << 18), {known: pattern() * 64})
    yield Kind("process mem", process / "mem", mem, known, unsized=True, faulty=True)
    regions = {path.name.split("-")[0]: path for path in (process / "regions").iterdir()}

    def region(name: str) -> Path:
        return regions[f"{addresses[name]:08x}"]

    yield plain("region", region("small"), pattern() * 64)
    yield plain("region with a hole", region("holed"), pattern() * 8 + bytes(1 << 15))
    huge = copies.sparse("huge", region("huge"), HUGE, {PAGE: pattern()})
    yield Kind("region of 1 TiB", region("huge"), huge, PAGE, endless=True, tells_holes=_tells_holes(region("huge")))
    yield plain("phys_mem, raw", top / "connector/raw1/phys_mem", image.read_bytes())
    yield plain("phys_mem, immutable", top / "connector/fixed/phys_mem", image.read_bytes())
    made = bytearray(made_bytes(0, 1 << 20, 3))
    for hole in range(15 * PAGE, len(made), 16 * PAGE):
        made[hole : hole + PAGE] = bytes(PAGE)
    yield plain("phys_mem with holes", top / "connector/made/phys_mem", bytes(made))
    yield plain("section", module / "sections/.text", _section_of_file(loader, ".text"))
    yield plain("module image", module / "image", (module / "image").read_bytes())
    with open(proc / "mem", "rb", buffering=0) as file:
        file.seek(base)
        yield plain("module mem", module / "mem", file.read((module / "mem").stat().st_size))
    sections = module / "sections"
    tree = copies.folder / "directory" / sections.name
    tree.mkdir(parents=True)
    for section in sections.iterdir():
        (tree / section.name).write_bytes(section.read_bytes())
    yield Kind("directory", sections, tree, 64)
    link = copies.folder / "link/exe"
    link.parent.mkdir()
    link.symlink_to(os.readlink(proc / "exe"))
    yield Kind("link", process / "exe", link)
