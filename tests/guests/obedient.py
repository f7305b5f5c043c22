"""A guest that does as it is told on its console: reboots, panics, changes its kernel; see obedient.c.

Booted once, and kept as a migration stream; a test starts it from there.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guests.catalogue import MACHINES
from guests.compiling import compiled_alone
from guests.kernels import cache_root, locked, made_whole, provide
from guests.living import Living, qemu
from guests.machine import BOOT_LIMIT
from guests.monitor import Serial
from guests.program import FLAGS, Archive
from guests.recorder import version_of

KERNEL, NEXT = "amd64-6.1", "amd64-6.12"
SECRET = b"cloudfs secret of the obedient guest \0"
COUNT, SAME, WORD = 64, 72, 80
"""Where in the secret these stand."""
SOURCE = Path(__file__).with_name("obedient.c")


def _archive(files: dict[str, bytes]) -> bytes:
    archive = Archive()
    archive.add("dev", 0o040755)
    archive.add("dev/console", 0o020600, device=(5, 1))
    archive.add("init", 0o100755, compiled_alone(SOURCE))
    if files:
        archive.add("next", 0o040755)
    for name, content in files.items():
        archive.add(f"next/{name}", 0o100644, content)
    return gzip.compress(archive.finished(), compresslevel=1, mtime=0)


@dataclass
class Obedient:
    """The guest, and what its program said of itself."""

    living: Living
    serial: Serial
    boots: list[tuple[int, int, str]] = field(default_factory=list)
    """(PID, address of the secret, first or second kernel) of each boot."""

    @property
    def pid(self) -> int:
        return self.boots[-1][0]

    @property
    def address(self) -> int:
        return self.boots[-1][1]

    @property
    def name(self) -> str:
        return self.living.name

    def await_boot(self) -> None:
        """Wait until the program says that it has begun."""
        self.note(self.serial.said("ready", BOOT_LIMIT))

    def note(self, said: Sequence[str]) -> None:
        """Take note of what a program said when it had begun."""
        pid, address, which = said
        self.boots.append((int(pid), int(address, 16), which))

    def tell(self, line: str) -> None:
        """Have it do something."""
        self.serial.tell(line)

    def spin(self) -> tuple[int, int]:
        """(PID, address of three free bytes): a process writes the bytes around them from now on."""
        self.tell("spin")
        pid, address = self.serial.said("spinning", 60)
        return int(pid), int(address, 16) + 1

    def still(self) -> tuple[int, int]:
        """(how often that process found other bytes than it had written, how often it looked); it is ended."""
        self.tell("still")
        overwritten, rounds = self.serial.said("overwritten", 60)
        return int(overwritten), int(rounds)

    def word(self) -> int:
        """The word as the program reads it."""
        self.tell("word")
        return int(self.serial.said("word", 60)[0])


WORDS = f"console=ttyS0 rdinit=/init quiet panic=-1 {MACHINES['amd64'].options}"
SIZE = 384
"""MiB."""


def _words(folder: Path) -> list[str]:
    """The same when it is recorded and when it goes on: a stream fits one machine alone."""
    return [
        "-cpu", "max,la57=off", "-device", "pvpanic", "-action", "panic=pause", "-append", WORDS,
        "-kernel", str(folder / "kernel"), "-initrd", str(folder / "initramfs"),
        "-serial", "unix:{folder}/serial,server=on,wait=off",
    ]  # fmt: skip


def _key(versions: str) -> str:
    parts = [SOURCE.read_text(), versions, version_of("qemu-system-x86_64"), str(SIZE), *FLAGS, *_words(Path("F"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def recorded() -> Path:
    """The folder with the stream of the machine (`state`), what it boots, and what the program said (`said`)."""
    kernels = provide([KERNEL, NEXT])
    place = cache_root() / "obedient" / _key(kernels[KERNEL].version + kernels[NEXT].version)
    with locked("obedient"):
        if not place.exists():
            with made_whole(place) as folder:
                shutil.copy(kernels[KERNEL].image, folder / "kernel")
                following = {"kernel": kernels[NEXT].image.read_bytes(), "initramfs": _archive({})}
                (folder / "initramfs").write_bytes(_archive(following))
                with qemu("memfd", size=SIZE, more=_words(folder)) as living:
                    with contextlib.closing(Serial(living.folder / "serial")) as serial:
                        (folder / "said").write_text(" ".join(serial.said("ready", BOOT_LIMIT)))
                    living.save(folder / "state")
    return place


@contextlib.contextmanager
def obedient(
    ram: str = "memfd", *, more: Sequence[str] = (), monitor: str = "free", incoming: str | None = None
) -> Iterator[Obedient]:
    """The guest, whose program has begun, within a second; it may reboot. `incoming` names where it comes from."""
    place = recorded()
    words = ["-incoming", incoming or f"exec:cat '{place}/state'", *_words(place), *more]
    with (
        qemu(ram, size=SIZE, more=words, monitor=monitor) as living,
        contextlib.closing(Serial(living.folder / "serial")) as serial,
    ):
        guest = Obedient(living, serial)
        guest.note((place / "said").read_text().split())
        if incoming is None:
            living.go_on()
        yield guest
