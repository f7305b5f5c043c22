"""Kernels booted without a userland, up to their panic: for what needs no more than a kernel in memory.

Kept in the cache like recordings are: the RAM, and what the console said. The oracle is the console alone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from guests.kernels import GuestError, MissingError, cache_root, locked, made_whole, provide
from guests.monitor import Monitor, Serial
from guests.recorder import sparse_copy

PANIC = rb"Kernel panic - not syncing"
_LIMIT = 240.0


@dataclass(frozen=True)
class Panic:
    """One kernel on one machine."""

    kernel: str
    """A name in kernels.KERNELS."""
    architecture: str
    """As `uname -m` prints it on it."""
    binary: str
    machine: tuple[str, ...]
    """What QEMU is told of the machine; the backend of its memory is called `ram`."""
    console: str
    memory: int = 512
    """In MiB."""


PANICS = {
    panic.kernel: panic
    for panic in (
        Panic("ppc64el-6.1", "ppc64le", "qemu-system-ppc64",
              ("-machine", "pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken", "-cpu", "power9"), "hvc0"),
        Panic("s390x-6.1", "s390x", "qemu-system-s390x", ("-machine", "s390-ccw-virtio", "-cpu", "max"), "ttysclp0"),
        Panic("mips64el-6.1", "mips64", "qemu-system-mips64el", ("-machine", "malta", "-cpu", "5KEc"), "ttyS0"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Panicked:
    """A kernel that was booted to its panic."""

    panic: Panic
    folder: Path

    @property
    def image(self) -> Path:
        """Its RAM, sparse."""
        return self.folder / "ram"

    @cached_property
    def console(self) -> str:
        """All that it printed."""
        return (self.folder / "console").read_text("utf-8", "replace")

    @property
    def release(self) -> str:
        """As it says itself on its console."""
        found = re.search(r"Linux version (\S+) \(", self.console)
        assert found is not None, "the console holds no banner"
        return found[1]


def panicked(name: str) -> Panicked:
    """A kernel of PANICS, booted now if it is not in the cache.

    Raises GuestError: no QEMU, no package, or a kernel that does not come so far.
    """
    panic = PANICS[name]
    kernel = provide([name])[name]
    parts = [name, kernel.package, kernel.version, Path(__file__).read_text()]
    place = cache_root() / "panics" / f"{name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    with locked(f"panic-{name}"):
        if not place.exists():
            with made_whole(place) as folder:
                _boot(panic, kernel.image, folder)
            for other in place.parent.glob(f"{name}-{'[0-9a-f]' * 16}"):
                if other != place:
                    shutil.rmtree(other, ignore_errors=True)
    os.utime(place)
    return Panicked(panic, place)


def _boot(panic: Panic, kernel: Path, folder: Path) -> None:
    if not shutil.which(panic.binary):
        raise MissingError(f"{panic.binary} is missing")
    with tempfile.TemporaryDirectory(prefix="cloudfs-panic-") as name:
        work = Path(name)
        process = subprocess.Popen(
            command_line(panic, kernel, work), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            monitor, serial = Monitor(work / "qmp"), Serial(work / "serial")
            monitor.ask("cont")
            console = _console_until_panic(serial)
            monitor.ask("stop")
            sparse_copy(work / "ram", folder / "ram")
            (folder / "console").write_bytes(console)
        except (GuestError, OSError) as error:
            process.kill()
            said = process.communicate(timeout=30)[1].decode("utf-8", "replace").strip()
            raise GuestError(f"{panic.kernel}: {error}{'; QEMU said: ' + said if said else ''}") from error
        finally:
            process.kill()
            process.communicate(timeout=30)


def command_line(panic: Panic, kernel: Path, folder: Path) -> list[str]:
    """How QEMU is called."""
    machine, settings, *more = panic.machine
    return [
        panic.binary, "-accel", "tcg", machine, f"{settings},memory-backend=ram", *more, "-m", f"{panic.memory}M", "-S",
        "-object", f"memory-backend-file,id=ram,size={panic.memory}M,mem-path={folder}/ram,share=on",
        "-nodefaults", "-no-user-config", "-action", "panic=pause,shutdown=pause", "-display", "none",
        "-serial", f"unix:{folder}/serial,server=on,wait=off", "-qmp", f"unix:{folder}/qmp,server=on,wait=off",
        "-kernel", str(kernel), "-append", f"console={panic.console} panic=0",
    ]  # fmt: skip


def _console_until_panic(serial: Serial) -> bytes:
    """All that is printed up to the panic and a moment more. Raises GuestError where none comes in time."""
    deadline, told = time.monotonic() + _LIMIT, b""
    while PANIC not in told or b"end Kernel panic" not in told:
        serial.socket.settimeout(max(0.1, min(5.0 if PANIC in told else _LIMIT, deadline - time.monotonic())))
        try:
            more = serial.socket.recv(65536)
        except TimeoutError:
            if PANIC in told:
                break
            raise GuestError(f"no panic within {_LIMIT:.0f} s; the console ends: {told[-1500:].decode()}") from None
        if not more:
            raise GuestError(f"QEMU ended; the console ends: {told[-1500:].decode('utf-8', 'replace')}")
        told += more
    return told
