"""Which programs are QEMU: by the name under which they run, or else by what stands in them.

A QEMU may be started by its dynamic loader (as bundles with libraries of their own do), or carry any name: then its
arguments look like QEMU's, and its program holds the words with which QEMU answers to -version.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence

from engine.connectors.qemu.words import options
from engine.mounts import Backing, backing_of_file
from engine.records import dataclass

EMULATOR = re.compile(r"\.?qemu-system-(?P<architecture>[a-z0-9_]+)(?:-(?P<flavour>[a-z0-9_-]+))?|qemu-kvm|kvm")
"""Names of QEMU's executable: `qemu-system-x86_64`, as some distributions wrap it, and those that mean this machine."""
DEBIAN = {"amd64": "x86_64", "arm64": "aarch64", "armel": "arm", "armhf": "arm", "ppc64el": "ppc64", "ppc64le": "ppc64",
          "powerpc": "ppc"}  # fmt: skip
"""Debian's words for architectures, which its links to QEMU have."""
_LOADER = re.compile(r"ld(?:-linux.*|-musl-.*|64|)\.so(?:\.[0-9]+)*")
TELLING = frozenset(
    "machine M m smp cpu accel enable-kvm device drive netdev chardev mon qmp object nodefaults nographic display "
    "kernel append serial monitor S daemonize pidfile hda cdrom".split()
)
"""Options of QEMU; who has `TELLING_LEAST` of them is looked at more closely."""
TELLING_LEAST = 3
VERSION = b"QEMU emulator version "
"""Stands in every qemu-system-*, and in none of its tools (softmmu/vl.c, system/vl.c)."""
PROGRAM_MOST = 1 << 30
"""Bytes of a program that are looked through; a QEMU with all that it can have takes 100 MiB."""
KNOWN_MOST = 256
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Called:
    """How a QEMU was called."""

    name: str
    architecture: str | None
    """That of its guest, as in its name: x86_64, aarch64; None where the name tells none (`kvm`)."""
    flavour: str
    """What stands behind that: `microvm`, `spice`; mostly nothing."""
    arguments: tuple[str, ...]
    """With its name in the first place."""


def called(executable: str | None, arguments: Sequence[str]) -> Called | None:
    """How a process runs QEMU, told by what is run and as what it was called; None of other programs."""
    if executable and _LOADER.fullmatch(os.path.basename(executable)):
        behind = next((index for index, word in enumerate(arguments) if index and _match(word)), None)
        if behind is not None:
            arguments = arguments[behind:]
    for path in (executable, arguments[0] if arguments else None):
        if path and (found := _match(path)):
            architecture = DEBIAN.get(found["architecture"], found["architecture"])
            return Called(found[0], architecture, found["flavour"] or "", tuple(arguments))
    return None


def _match(path: str) -> re.Match[str] | None:
    return EMULATOR.fullmatch(os.path.basename(path))


def disguised(pid: int, arguments: Sequence[str]) -> Called | None:
    """The same of a process of this host whose name tells nothing; None where its program is no QEMU."""
    if len(arguments) <= TELLING_LEAST or len({name for name, _ in options(arguments)} & TELLING) < TELLING_LEAST:
        return None
    try:
        return Called(os.path.basename(arguments[0]), None, "", tuple(arguments)) if _runs_qemu(pid) else None
    except OSError:
        return None


_known: dict[tuple[int, int, int, int], bool] = {}
"""What was looked through: device, inode, size and time of change → whether it is QEMU."""


def _runs_qemu(pid: int) -> bool:
    """Whether the program of a process holds QEMU's words. Raises OSError."""
    # O_PATH first: a program on a filesystem that does not answer must not be opened.
    place = os.open(f"/proc/{pid}/exe", os.O_PATH | os.O_CLOEXEC)
    try:
        status = os.fstat(place)
        if not stat.S_ISREG(status.st_mode) or backing_of_file(place) is Backing.REMOTE:
            return False
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if key not in _known:
            if len(_known) >= KNOWN_MOST:
                _known.clear()
            _known[key] = _holds_version(place)
        return _known[key]
    finally:
        os.close(place)


def _holds_version(place: int) -> bool:
    with open(f"/proc/self/fd/{place}", "rb", buffering=0) as file:
        rest, done = b"", 0
        while done < PROGRAM_MOST and (piece := file.read(_PIECE)):
            if VERSION in rest + piece:
                return True
            rest, done = piece[1 - len(VERSION) :], done + len(piece)
    return False
