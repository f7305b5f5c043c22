"""What a guest runs: our program, compiled for its architecture and kept by what it is made of, in an initramfs."""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from guests.kernels import GuestError, KernelFiles, MissingError, cache_root, locked, made_whole

SOURCES = Path(__file__).with_name("program")
FLAGS = ("-static", "-std=gnu11", "-O1", "-pthread", "-s", "-Wall", "-Wextra", "-Wno-format-truncation", "-Werror")
COMPILERS = {
    "amd64": "x86_64-linux-gnu-gcc",
    "i386": "i686-linux-gnu-gcc",
    "arm64": "aarch64-linux-gnu-gcc",
    "armhf": "arm-linux-gnueabihf-gcc",
    "riscv64": "riscv64-linux-gnu-gcc",
}
APPLETS = (
    "sh cat sleep tail nc httpd syslogd true rm ls ps dmesg mount grep head hexdump top free uptime kill id cp mv dd"
    " mkdir vi less lsmod netstat ifconfig"
).split()
_COMPILE_LIMIT = 120.0


def program_digest() -> str:
    """A sum over all that the program is made of."""
    sum_ = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        sum_.update(source.name.encode() + source.read_bytes())
    return sum_.hexdigest()[:16]


def compiled(architecture: str) -> Path:
    """Our program for an architecture; GuestError where its compiler or its libc is missing."""
    place = cache_root() / "programs" / f"{architecture}-{program_digest()}"
    with locked(f"program-{architecture}"):
        if not place.exists():
            with made_whole(place) as folder:
                _compile(architecture, folder / "init")
    return place / "init"


def _compile(architecture: str, output: Path) -> None:
    compiler = COMPILERS[architecture]
    if architecture == "amd64" and platform.machine() == "x86_64" and not shutil.which(compiler):
        compiler = "gcc"
    if not shutil.which(compiler):
        raise MissingError(f"{compiler} is missing, which compiles the program of {architecture} guests")
    command = [compiler, *FLAGS, "-o", str(output), *map(str, sorted(SOURCES.glob("*.c")))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_LIMIT, check=False)
    if done.returncode:
        raise GuestError(f"{compiler} could not compile the program of guests: {done.stderr[-2000:]}")


def initramfs(kernel: KernelFiles, program: Path) -> bytes:
    """A compressed archive with our program as /init, busybox, modules and a few files of /etc."""
    archive = Archive()
    for folder in "bin dev etc lib lib/modules jail jail/bin proc sys tmp".split():
        archive.add(folder, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("dev/null", 0o020666, device=(1, 3))
    archive.add("init", 0o100755, program.read_bytes())
    busybox = kernel.busybox.read_bytes()
    archive.add("bin/busybox", 0o100755, busybox)
    archive.add("jail/bin/busybox", 0o100755, busybox)
    archive.add("jail/bin/sleep", 0o120777, b"busybox")
    for name in APPLETS:
        archive.add(f"bin/{name}", 0o120777, b"busybox")
    for number, module in enumerate(kernel.modules):
        archive.add(f"lib/modules/{number:02}-{module.name}", 0o100644, module.read_bytes())
    users = b"root:x:0:0::/:/bin/sh\nada:x:1000:1000::/home/ada:\nbob:x:1001:1001::/home/bob:\n"
    archive.add("etc/passwd", 0o100644, users)
    archive.add("etc/group", 0o100644, b"root:x:0:\nada:x:1000:\nbob:x:1001:\n")
    return gzip.compress(archive.finished(), compresslevel=1, mtime=0)


class Archive:
    """The cpio format "newc" (Documentation/driver-api/early-userspace/buffer-format.rst), which needs no root here."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """A folder, file, link or device, by the type bits of its mode."""
        self._inode += 1
        path = os.fsencode(name) + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + path
        self._parts += [header, bytes(-len(header) % 4), content, bytes(-len(content) % 4)]

    def finished(self) -> bytes:
        """The archive with its last entry."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)
