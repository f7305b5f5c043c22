"""A guest that runs: QEMU with the guest's RAM in a file that we read too."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ending import ends_with_us
from guests.catalogue import MACHINES, Guest
from guests.kernels import GuestError, MissingError, provide
from guests.monitor import Debugger, Monitor, Serial
from guests.program import compiled, initramfs
from guests.truth import Truth, parse_sections

BOOT_LIMIT = 240.0
"""Seconds for a boot on a busy machine; alone it takes two to ten."""
_SURELY_LOCKED = 60.0
_SHARED_MEMORY = Path("/dev/shm")


class RunningGuest:
    """A guest whose program waits for `tell("go")`, or is told the truth and then spins in user space."""

    def __init__(self, guest: Guest, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.guest = guest
        self.folder = folder
        self.process = process
        self.monitor = Monitor(folder / "qmp")
        self.serial = Serial(folder / "serial")
        self.extents: list[tuple[int, int, int]] = []

    @property
    def ram(self) -> Path:
        """The file that is the guest's RAM."""
        return self.folder / "ram"

    def start(self) -> float:
        """Let it run until its program says so; returns the seconds."""
        started = time.monotonic()
        self.monitor.ask("cont")
        self.serial.said("booted", BOOT_LIMIT)
        self.extents = ram_extents(self.monitor.human("info mtree -f"))
        return time.monotonic() - started

    def fetch_truth(self) -> Truth:
        """What the guest left in its memory for us, see program/truth.c."""
        length, check, page, *frames = self.serial.said("truth", BOOT_LIMIT)
        size, sum_, page_size = int(length), int(check, 16), int(page)
        count = -(-size // page_size)
        index = b"".join(self.read_physical(int(frame, 16) * page_size, page_size) for frame in frames)
        pages = np.frombuffer(index, "<u8", count)
        truth = b"".join(self.read_physical(int(frame) * page_size, page_size) for frame in pages)[:size]
        if zlib.crc32(truth) != sum_:
            raise GuestError("what the guest left in its memory is not what it summed up")
        sections = parse_sections(truth)
        sections |= {"page_size": page.encode(), "vmcoreinfo": self._vmcoreinfo(sections["/sys/kernel/vmcoreinfo"])}
        return Truth(sections)

    def _vmcoreinfo(self, place: bytes) -> bytes:
        """The text of the ELF note that lies there: three words, the name "VMCOREINFO" in 12 bytes, the text."""
        address, size = (int(word, 16) for word in place.split())
        note = self.read_physical(address, size)
        return note[24 : 24 + int.from_bytes(note[4:8], "little")]

    def read_physical(self, address: int, size: int) -> bytes:
        """Bytes of the guest's physical memory."""
        for start, length, offset in self.extents:
            if start <= address and address + size <= start + length:
                with open(self.ram, "rb") as file:
                    file.seek(offset + address - start)
                    return file.read(size)
        raise GuestError(f"the guest names {address:#x}, which is not in its RAM")

    def finish(self, word: str = "go") -> None:
        """Say that the truth is fetched, and wait until the keeper has the processor for itself."""
        self.serial.tell("fetched")
        self.serial.tell(word)
        if word == "go":
            self.serial.said("ready", BOOT_LIMIT)

    def debugger(self) -> Debugger:
        """QEMU's debugger stub; stop the guest before."""
        return Debugger(self.folder / "gdb")

    def close(self) -> None:
        """End QEMU."""
        self.monitor.close()
        self.serial.close()


def ram_extents(mtree: str) -> list[tuple[int, int, int]]:
    """(physical address, length, offset in the RAM file) from `info mtree -f`, neighbours joined.

    Views of RAM that cannot be written are RAM too (a PC has some below 1 MiB). No `@offset` means offset 0.
    """
    extents: list[tuple[int, int, int]] = []
    for view in re.split(r"(?m)^FlatView #\d+", mtree):
        if not re.search(r'AS "(memory|cpu-memory-0)"', view):
            continue
        pattern = r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio [-\d]+, (?:ram|rom)\): ram(?: @([0-9a-f]{16}))?(?= |$)"
        for first, last, offset in re.findall(pattern, view, re.MULTILINE):
            start, length = int(first, 16), int(last, 16) - int(first, 16) + 1
            at = int(offset or "0", 16)
            if extents and extents[-1][0] + extents[-1][1] == start and extents[-1][2] + extents[-1][1] == at:
                extents[-1] = (extents[-1][0], extents[-1][1] + length, extents[-1][2])
            else:
                extents.append((start, length, at))
        break
    if not extents:
        raise GuestError("QEMU's `info mtree -f` shows no RAM")
    return extents


def command_line(guest: Guest, folder: Path) -> list[str]:
    """How QEMU is called; `folder` holds kernel, initramfs and sockets."""
    machine = MACHINES[guest.architecture]
    words = f"console={machine.console} rdinit=/init panic=-1 quiet transparent_hugepage=madvise"
    words = " ".join([words, machine.options, guest.options]).strip()
    return [
        machine.binary, "-accel", "tcg", "-cpu", guest.cpu, "-m", f"{guest.memory}M", "-S",
        "-machine", f"{guest.machine},memory-backend=ram",
        "-object", f"memory-backend-file,id=ram,size={guest.memory}M,mem-path={folder}/ram,share=on",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-serial", f"unix:{folder}/serial,server=on,wait=off", "-qmp", f"unix:{folder}/qmp,server=on,wait=off",
        "-gdb", f"unix:{folder}/gdb,server=on,wait=off",
        "-kernel", f"{folder}/kernel", "-initrd", f"{folder}/initramfs", "-append", words,
    ]  # fmt: skip


@contextlib.contextmanager
def started(guest: Guest, archive: bytes | None = None) -> Iterator[RunningGuest]:
    """QEMU with this guest, not yet running; killed in the end. Its files lie in memory where there is room.

    `archive` is another initramfs than that of our program.
    """
    binary = MACHINES[guest.architecture].binary
    if not shutil.which(binary):
        raise MissingError(f"{binary} is missing, which runs {guest.architecture} guests")
    kernel = provide([guest.kernel])[guest.kernel]
    archive = archive or initramfs(kernel, compiled(guest.architecture))
    with _folder_for(guest) as folder:
        (folder / "kernel").symlink_to(kernel.image)
        (folder / "initramfs").write_bytes(archive)
        with open(folder / "errors", "wb") as errors:
            process = subprocess.Popen(
                [*ends_with_us(), *command_line(guest, folder)], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors
            )
        running = None
        try:
            running = RunningGuest(guest, folder, process)
            yield running
        except MissingError:
            raise
        except (GuestError, OSError) as error:
            said = (folder / "errors").read_text(errors="replace").strip()
            raise GuestError(f"{guest.name}: {error}{'; QEMU said: ' + said if said else ''}") from error
        finally:
            if running is not None:
                running.close()
            process.kill()
            process.wait(30)


@contextlib.contextmanager
def _folder_for(guest: Guest) -> Iterator[Path]:
    """A temporary folder: in /dev/shm where twice the guest fits, else where temporary files lie.

    Its lock tells that it is in use; folders of sessions that were killed are taken away.
    """
    place = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):
        if shutil.disk_usage(_SHARED_MEMORY).free > 2 * guest.memory << 20:
            place = _SHARED_MEMORY
    for left in place.glob("cloudfs-guest-*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > _SURELY_LOCKED and _take_lock(left):
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix="cloudfs-guest-", dir=place) as name:
        (Path(name) / "lock").touch()
        with open(Path(name) / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield Path(name)


def _take_lock(folder: Path) -> bool:
    with open(folder / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True
