"""Guests whose memory holds all kinds of contents: pages in swap, a disk half cached, large folios, 32-bit programs.

They are recorded apart from the others, with a program of their own (contents_program), kernels' modules that the
others do not load, and a small disk in a file. What they tell is the truth of the others and, in /tmp/secrets, where
each thing is and what /proc/PID/syscall said of all who slept.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
from guests import machine, program
from guests.catalogue import GUESTS, Guest
from guests.kernels import (
    GuestError,
    KernelFiles,
    MissingError,
    cache_root,
    fetch_package,
    locked,
    made_whole,
    provide,
)
from guests.recorder import _forget_unused as forget_unused
from guests.recorder import _qemu_version as qemu_version
from guests.recorder import sparse_copy
from guests.recording import FACTS, IMAGE, TRUTH, Recording

HERE = Path(__file__).parent
SOURCES = (HERE / "contents_program" / "contents.c", HERE / "program" / "truth.c", HERE / "program" / "console.c")
NARROW_SOURCE = HERE / "narrow_program" / "narrow.c"
NARROW = {"amd64": "i686-linux-gnu-gcc", "arm64": "arm-linux-gnueabihf-gcc"}
"""Architecture → the compiler of its 32-bit programs."""
MODULES = ("crc32c_generic", "lzo-rle", "zram", "loop", "ext4")
"""What the guest needs and some kernels have as modules, with what those need."""
DISK_BYTES = (1 << 20) + 100
_ATTEMPTS = 3
_LIMIT = 240.0


def words(name: str, pages: int, page_size: int, first: int = 0) -> bytes:
    """What stands in pages of the thing of that name; computed apart from the program, after the same rule."""
    count = pages * page_size // 8
    numbers = np.arange(first * page_size // 8 + 1, first * page_size // 8 + 1 + count, dtype=np.uint64)
    return ((np.uint64(ord(name)) << np.uint64(56) ^ numbers) * np.uint64(0x9E3779B97F4A7C15)).tobytes()


@dataclass(frozen=True)
class ContentsRecording(Recording):
    """A recording of such a guest."""

    @cached_property
    def lines(self) -> list[list[str]]:
        """The words of each line of /tmp/secrets."""
        return [line.split() for line in self.truth.text("/tmp/secrets").splitlines()]

    def told(self, word: str) -> list[str]:
        """What follows a word at the start of a line; KeyError where there is none."""
        found = next((line[1:] for line in self.lines if line[0] == word), None)
        if found is None:
            raise KeyError(word)
        return found

    @property
    def holder(self) -> int:
        """The process that holds most of it."""
        return int(self.told("pid")[0])


def recorded(name: str) -> ContentsRecording:
    """The recording of such a guest on the machine of that name of the catalogue; made now if it is not in the cache.

    Raises GuestError like `recorder.recorded`.
    """
    guest = GUESTS[name]
    kernel = provide([guest.kernel])[guest.kernel]
    place = cache_root() / "contents" / f"{name}-{_key(guest, kernel)}"
    with locked(f"contents-{name}"):
        if not place.exists():
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    with made_whole(place) as folder:
                        _record(guest, kernel, folder)
                    break
                except MissingError:
                    raise
                except GuestError:  # a boot may fail under an emulator
                    if attempt == _ATTEMPTS:
                        raise
            forget_unused(guest, place)
    os.utime(place)
    return ContentsRecording(place)


def _key(guest: Guest, kernel: KernelFiles) -> str:
    parts = [guest.name, kernel.package, kernel.version, program.program_digest(), qemu_version(guest)]
    parts += machine.command_line(guest, Path("FOLDER"))
    parts += [path.read_text() for path in (Path(__file__), *SOURCES, NARROW_SOURCE)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _record(guest: Guest, kernel: KernelFiles, folder: Path) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cloudfs-contents-") as work:
        init = _compiled(program.COMPILERS[guest.architecture], SOURCES, Path(work) / "init")
        more = program.Archive()
        if guest.architecture in NARROW:
            narrow = _compiled(NARROW[guest.architecture], [NARROW_SOURCE], Path(work) / "narrow")
            more.add("bin/narrow", 0o100755, narrow.read_bytes())
        more.add("disk", 0o100644, _disk(Path(work)))
        for folder_of_mount in ("mnt", "huge"):
            more.add(folder_of_mount, 0o040755)
        chosen = replace(kernel, modules=_modules(guest.kernel, kernel))
        archive = program.initramfs(chosen, init) + gzip.compress(more.finished(), compresslevel=1, mtime=0)
    with machine.started(guest, archive) as running:
        running.start()
        truth = running.fetch_truth()
        running.finish()
        running.monitor.ask("stop")
        sparse_copy(running.ram, folder / IMAGE)
        notes, extents = running.serial.notes(), running.extents
    facts = {
        "guest": {"name": guest.name, "architecture": guest.architecture, "kernel": kernel.package,
                  "version": kernel.version, "seconds": round(time.monotonic() - began, 1)},
        "extents": extents, "notes": notes,
    }  # fmt: skip
    (folder / FACTS).write_text(json.dumps(facts))
    with zipfile.ZipFile(folder / TRUTH, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archived:
        for name, content in truth.items():
            archived.writestr(name, content)


def _compiled(compiler: str, sources: tuple[Path, ...] | list[Path], output: Path) -> Path:
    if not shutil.which(compiler):
        raise MissingError(f"{compiler} is missing, which compiles programs of guests")
    command = [compiler, *program.FLAGS, f"-I{HERE / 'program'}", "-o", str(output), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    if done.returncode:
        raise GuestError(f"{compiler} could not compile a program of guests: {done.stderr[-2000:]}")
    return output


def _disk(work: Path) -> bytes:
    """An ext4 file system with one file, /data."""
    if not shutil.which("mke2fs"):
        raise MissingError("mke2fs is missing, which makes the guest's disk")
    content = work / "content"
    content.mkdir()
    (content / "data").write_bytes(words("d", 257, 4096)[:DISK_BYTES])
    command = ["mke2fs", "-q", "-t", "ext4", "-b", "4096", "-O", "^has_journal,^metadata_csum,^64bit,^orphan_file",
               "-d", str(content), str(work / "disk"), "4M"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    if done.returncode:
        raise GuestError(f"mke2fs could not make the guest's disk: {done.stderr[-500:]}")
    return (work / "disk").read_bytes()


# -- modules of kernels ---------------------------------------------------------------------------------


def _modules(name: str, kernel: KernelFiles) -> tuple[Path, ...]:
    """The modules that the guest loads, those first that others need."""
    place = cache_root() / "contents" / "modules" / f"{name}-{kernel.version}-{'-'.join(MODULES)}"
    with locked(f"contents-modules-{name}"):
        if not place.exists():
            with made_whole(place) as folder:
                _fetch_modules(name, kernel, folder)
    return tuple(sorted(place.glob("*.ko")))


def _fetch_modules(name: str, kernel: KernelFiles, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="cloudfs-modules-") as downloads:
        found = _all_modules(fetch_package(name, kernel, Path(downloads)))
    order: list[str] = []

    def want(wanted: str) -> None:
        wanted = wanted.replace("-", "_")
        if wanted in order or wanted not in found:
            return
        for other in _needs(found[wanted]):
            want(other)
        order.append(wanted)

    for wanted in MODULES:
        want(wanted)
    for number, wanted in enumerate(order):
        (folder / f"{number:02}-{wanted}.ko").write_bytes(found[wanted])


def _needs(module: bytes) -> list[str]:
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return match[1].decode().split(",") if match and match[1] else []


def _all_modules(deb: Path) -> dict[str, bytes]:
    """Modules by name, of the folders in which those lie that we may need."""
    wanted = re.compile(r"\./(usr/)?lib/modules/[^/]+/kernel/(drivers/block|mm|crypto|lib|fs/(ext4|jbd2)|fs/[^/]+\.ko)")
    found: dict[str, bytes] = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and wanted.match(member.name) and re.search(r"\.ko(\.xz)?$", member.name):
                    source = archive.extractfile(member)
                    assert source is not None
                    data = source.read()
                    name = PurePosixPath(member.name).name.split(".ko")[0].replace("-", "_")
                    found[name] = lzma.decompress(data) if member.name.endswith(".xz") else data
    return found
