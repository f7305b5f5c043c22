"""A guest under load: 200 processes a second that are forked, call exec and end, each with a stamp of its own.

`churn_readers` reads them, in programs of their own.
"""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path

from guests.catalogue import MACHINES
from guests.compiling import compiled_alone
from guests.kernels import GuestError, provide
from guests.living import Living, qemu
from guests.machine import BOOT_LIMIT
from guests.monitor import Serial
from guests.program import Archive

RATE = 200
"""Processes in a second. They live for 50 ms to 5 s, most of them less than 400 ms, 0.55 s on average."""
PIDS = 500
"""kernel.pid_max: but for the first 300 (kernel/pid.c, RESERVED_PIDS) numbers are given out again within a second."""
LASTING = 40
"""Processes that live on."""
KERNEL = "amd64-6.1"
SOURCE = Path(__file__).with_name("churner.c")


@contextlib.contextmanager
def churning(
    ram: str = "memfd", *, size: int = 256, rate: int = RATE, pids: int = PIDS
) -> Iterator[tuple[Living, Serial]]:
    """(QEMU, the guest's console), once processes come and go."""
    archive = Archive()
    archive.add("dev", 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("init", 0o100755, compiled_alone(SOURCE))
    found, initramfs = provide([KERNEL])[KERNEL], gzip.compress(archive.finished(), compresslevel=1, mtime=0)
    told = f"console=ttyS0 rdinit=/init panic=-1 quiet {MACHINES['amd64'].options} rate={rate} pids={pids}"

    def put(folder: Path) -> None:
        (folder / "kernel").symlink_to(found.image)
        (folder / "initramfs").write_bytes(initramfs)

    words = ["-no-reboot", "-kernel", "{folder}/kernel", "-initrd", "{folder}/initramfs", "-append", told,
             "-cpu", "max,la57=off", "-serial", "unix:{folder}/serial,server=on,wait=off"]  # fmt: skip
    with qemu(ram, size=size, more=words, prepare=put) as living, contextlib.ExitStack() as stack:
        serial = stack.enter_context(contextlib.closing(Serial(living.folder / "serial")))
        serial.said("churning", BOOT_LIMIT)
        yield living, serial


def made(serial: Serial) -> int:
    """How many processes were begun up to now, or up to a second ago."""
    words = serial.said("made", 30)
    with contextlib.suppress(GuestError):  # lines that were said before and not read yet
        while True:
            words = serial.said("made", 0.1)
    return int(words[0])
