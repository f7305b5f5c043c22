"""A guest in a guest: QEMU runs Linux, which runs QEMU, which runs Linux and one program with a secret.

Made once: the outer machine is stopped as soon as the inner program speaks, and kept as a migration stream; a test
starts it from there, in a second. The outer guest's init is a script of BusyBox, the inner one a program of ours.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from guests.compiling import compile_alone
from guests.kernels import GuestError, MissingError, cache_root, locked, made_whole, provide
from guests.living import Living, qemu
from guests.monitor import Serial
from guests.program import Archive
from guests.recorder import version_of

OUTER_SIZE, INNER_SIZE = 512, 128
"""MiB."""
KERNEL = "amd64-6.1"
BINARY = "qemu-system-x86_64"
BOOT_LIMIT = 400.0
SECRET = b"cloudfs secret of the inner guest "
WORDS = (
    "console=ttyS0 rdinit=/init panic=-1 nokaslr lpj=4000000 no_timer_check tsc=unstable mitigations=off quiet "
    "cryptomgr.notests"
)
PROGRAM = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* The text, and how often 100 ms have passed: written anew each time. */
static struct { char text[64]; volatile uint64_t count; volatile uint64_t same; } secret __attribute__((aligned(4096)));

int main(void)
{
    struct timespec pause = {0, 100000000};
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mkdir("/dev", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    strcpy(secret.text, "cloudfs secret of the ");
    strcat(secret.text, "inner guest ");
    dprintf(console, "\n@cloudfs inner %d %lx\n", getpid(), (unsigned long)&secret);
    for (;;) {
        secret.count++;
        secret.same = secret.count;
        nanosleep(&pause, NULL);
    }
}
"""
SCRIPT = f"""#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
echo '@cloudfs outer'
/usr/bin/{BINARY} -name guest=inner -icount shift=3,sleep=on -cpu qemu64 -m {INNER_SIZE} -L /share \\
  -machine microvm,isa-serial=on -nodefaults -no-user-config -display none \\
  -chardev file,id=s,path=/dev/ttyS0 -serial chardev:s -kernel /kernel -initrd /initramfs -append '{WORDS}' &
read word
kill -9 $!
wait
dd if=/dev/zero of=/tmp/more bs=1M count=300
echo '@cloudfs ended'
sleep 100000
"""
"""A line on the outer guest's console ends the inner one, and its memory is used for other things."""


def _made_program(place: Path) -> bytes:
    (place / "init.c").write_text(PROGRAM)
    compile_alone(place / "init.c", place / "init")
    return (place / "init").read_bytes()


def _libraries() -> list[str]:
    """The libraries that QEMU and its translator need, by name."""
    binary = shutil.which(BINARY)
    if binary is None:
        raise MissingError(f"{BINARY} is missing")
    told = subprocess.run(["ldd", binary, *_modules()], capture_output=True, text=True, timeout=60, check=True).stdout
    return sorted(set(re.findall(r"(?:=> )?(/\S+) \(0x", told)))


def _modules() -> list[str]:
    """Where TCG is a module, in Debian: the module."""
    return [str(path) for path in Path("/usr/lib").glob("*/qemu/accel-tcg-x86_64.so")]


def _outer_archive(kernel_image: Path, busybox: bytes, inner: bytes) -> bytes:
    archive = Archive()
    for folder in "bin dev proc tmp share lib lib64 usr usr/bin usr/lib".split():
        archive.add(folder, 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("bin/busybox", 0o100755, busybox)
    for name in ("sh", "mount", "sleep", "dd"):
        archive.add(f"bin/{name}", 0o120777, b"busybox")
    archive.add("init", 0o100755, SCRIPT.encode())
    archive.add(f"usr/bin/{BINARY}", 0o100755, Path(str(shutil.which(BINARY))).read_bytes())
    made: set[str] = {"usr", "usr/bin", "usr/lib", "lib", "lib64"}
    for path in (*_libraries(), *_modules()):
        parents = [str(parent)[1:] for parent in reversed(Path(path).parents)][1:]
        for parent in parents:
            if parent not in made:
                made.add(parent)
                archive.add(parent, 0o040755)
        archive.add(path[1:], 0o100755, Path(path).read_bytes())
    for folder in ("/usr/share/qemu", "/usr/share/seabios"):
        for name in ("bios-microvm.bin", "qboot.rom", "linuxboot_dma.bin", "kvmvapic.bin", "bios-256k.bin"):
            if (Path(folder) / name).exists() and f"share/{name}" not in made:
                made.add(f"share/{name}")
                archive.add(f"share/{name}", 0o100644, (Path(folder) / name).read_bytes())
    archive.add("kernel", 0o100644, kernel_image.read_bytes())
    archive.add("initramfs", 0o100644, inner)
    return gzip.compress(archive.finished(), compresslevel=1, mtime=0)


def _inner_archive(program: bytes) -> bytes:
    archive = Archive()
    archive.add("dev", 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("init", 0o100755, program)
    return gzip.compress(archive.finished(), compresslevel=1, mtime=0)


def _key(version: str) -> str:
    parts = [PROGRAM, SCRIPT, version, version_of(BINARY), str(OUTER_SIZE), KERNEL, *_words(Path("K"), Path("I"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _words(kernel: Path, initramfs: Path) -> list[str]:
    """The same when it is made and when it goes on: a stream fits one machine alone."""
    return [
        "-cpu", "qemu64", "-no-reboot", "-serial", "unix:{folder}/serial,server=on,wait=off",
        "-kernel", str(kernel), "-initrd", str(initramfs), "-append", OUTER_WORDS,
    ]  # fmt: skip


OUTER_WORDS = "console=ttyS0 rdinit=/init panic=-1 quiet no_timer_check transparent_hugepage=madvise mitigations=off"


def recorded() -> Path:
    """The folder with the stream of the outer machine (`state`) and what the inner program said (`said`)."""
    kernel = provide([KERNEL])[KERNEL]
    place = cache_root() / "nested" / _key(kernel.version)
    with locked("nested"):
        if not place.exists():
            with made_whole(place) as folder:
                _record(folder, kernel.image, kernel.busybox.read_bytes())
    return place


def _record(folder: Path, image: Path, busybox: bytes) -> None:
    with tempfile.TemporaryDirectory(prefix="cloudfs-nested-") as name:
        program = _made_program(Path(name))
        outer = folder / "initramfs"
        outer.write_bytes(_outer_archive(image, busybox, _inner_archive(program)))
        with qemu("memfd", size=OUTER_SIZE, more=_words(image, outer)) as living:
            serial = Serial(living.folder / "serial")
            with contextlib.closing(serial):
                try:
                    said = serial.said("inner", BOOT_LIMIT)
                except GuestError as error:
                    raise GuestError(f"{error}; its console: {serial.log[-2000:].decode(errors='replace')}") from None
            living.save(folder / "state")
            (folder / "said").write_text(" ".join(said))


@contextlib.contextmanager
def nested(ram: str = "memfd") -> Iterator[tuple[Living, int, int]]:
    """(the outer QEMU, PID of the inner program, address of its secret): both guests run."""
    place = recorded()
    pid, address = (place / "said").read_text().split()
    incoming = f"exec:cat '{place}/state'"
    words = _words(provide([KERNEL])[KERNEL].image, place / "initramfs")
    with qemu(ram, size=OUTER_SIZE, more=["-incoming", incoming, *words]) as living:
        living.go_on()
        yield living, int(pid), int(address, 16)


def main() -> None:
    """Make the recording."""
    print(recorded(), os.stat(recorded() / "state").st_size >> 20, "MiB")


if __name__ == "__main__":
    main()
