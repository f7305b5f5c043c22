"""QEMUs of which the connector `qemu` is to find the memory: with every kind of RAM, with monitors of every kind."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ending import ends_with_us
from guests.catalogue import MACHINES
from guests.kernels import GuestError, MissingError, provide
from guests.machine import BOOT_LIMIT
from guests.monitor import Monitor, Serial
from guests.program import compiled, initramfs
from guests.truth import Truth


@dataclass
class Living:
    """A QEMU that we started."""

    process: subprocess.Popen[bytes]
    folder: Path
    monitor: Monitor | None
    """Ours, on a socket of its own, so that the others are free."""
    serial: Serial | None = None
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def name(self) -> str:
        return self.folder.name

    def ask(self, line: str) -> str:
        """What the monitor for people prints."""
        assert self.monitor is not None
        return self.monitor.human(line)

    def host_address(self, address: int) -> int:
        """Where QEMU says that it has a physical address."""
        return int(self.ask(f"gpa2hva {address:#x}").rsplit(" ", 1)[1], 16)

    def put(self, address: int, data: bytes) -> None:
        """Store bytes in the guest's RAM, page by page where QEMU says that it lies."""
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as file:
            for offset in range(0, len(data), 4096):
                file.seek(self.host_address(address + offset))
                file.write(data[offset : offset + 4096])

    def at(self, place: int, size: int) -> bytes:
        """What QEMU's own memory holds."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, place)

    def saved(self, address: int, size: int) -> bytes:
        """Physical memory as QEMU itself reads it."""
        place = self.folder / "saved"
        assert self.monitor is not None
        self.monitor.ask("pmemsave", val=address, size=size, filename=str(place))
        return place.read_bytes()

    def save(self, place: Path) -> None:
        """Keep the whole machine as a migration stream; it stands still from then on."""
        assert self.monitor is not None
        self.monitor.ask("stop")
        self.monitor.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 33})
        self.migrate(f"exec:cat > '{place}'")

    def migrate(self, uri: str) -> None:
        """Migrate away, and wait until that is done."""
        assert self.monitor is not None
        self.monitor.ask("migrate", uri=uri)
        wait_until(self._has_migrated, 120, "the migrated machine")

    def _has_migrated(self) -> bool:
        assert self.monitor is not None
        told = self.monitor.ask("query-migrate").get("status")
        if told in ("failed", "cancelled"):
            raise GuestError(f"migration {told}")
        return bool(told == "completed")

    def go_on(self) -> None:
        """Run a machine that came in by -incoming, once it is there."""
        assert self.monitor is not None
        ask = self.monitor.ask
        wait_until(lambda: ask("query-status")["status"] != "inmigrate", 120, "the saved machine")
        ask("cont")

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait(30)


RAM: dict[str, Callable[[Path, int], list[str]]] = {
    "private": lambda folder, size: ["-m", f"{size}M"],
    "file": lambda folder, size: [
        "-m", f"size={size << 10}k,slots=4,maxmem={size * 4}M",
        "-object", f"memory-backend-file,id=ram,size={size}M,mem-path={folder}/ram,share=on",
        "-machine", "memory-backend=ram"],
    "private-file": lambda folder, size: [
        "-m", f"{size}M", "-object", f"memory-backend-file,id=ram,size={size}M,mem-path={folder}/ram,share=off",
        "-machine", "memory-backend=ram"],
    "memfd": lambda folder, size: [
        "-m", f"{size}", "-object", f'{{"qom-type":"memory-backend-memfd","id":"pc.ram","size":{size << 20}}}',
        "-machine", "memory-backend=pc.ram"],
    "shared": lambda folder, size: [
        "-m", f"{size}M", "-object", f"memory-backend-ram,id=ram,size={size}M,share=on",
        "-machine", "memory-backend=ram"],
    "nodes": lambda folder, size: [
        "-m", f"{size}M", "-smp", "2",
        "-object", f"memory-backend-memfd,id=m0,size={size // 2}M", "-numa", "node,nodeid=0,memdev=m0,cpus=0",
        "-object", f"memory-backend-ram,id=m1,size={size // 2}M", "-numa", "node,nodeid=1,memdev=m1,cpus=1"],
    "equal-nodes": lambda folder, size: [
        "-m", f"{size}M", "-smp", "2",
        "-object", f"memory-backend-ram,id=m0,size={size // 2}M", "-numa", "node,nodeid=0,memdev=m0,cpus=0",
        "-object", f"memory-backend-ram,id=m1,size={size // 2}M", "-numa", "node,nodeid=1,memdev=m1,cpus=1"],
}  # fmt: skip
"""What QEMU is told of RAM, by a name for tests: (folder, MiB) → words."""


@contextlib.contextmanager
def qemu(
    ram: str = "private",
    *,
    size: int = 64,
    machine: str = "pc",
    binary: str = "qemu-system-x86_64",
    more: Sequence[str] = (),
    monitor: str = "free",
    before: Sequence[str] = (),
    own_monitor: bool = True,
    accelerator: str = "tcg",
    keep: Sequence[int] = (),
    prepare: Callable[[Path], None] = lambda folder: None,
) -> Iterator[Living]:
    """A QEMU; `monitor` says what stands on its command line: a `free` QMP, or `none`. It is killed in the end.

    `more` may hold {folder}, for the folder of its files.
    """
    if not shutil.which(binary):
        raise MissingError(f"{binary} is missing")
    with tempfile.TemporaryDirectory(prefix="cloudfs-living-", dir="/dev/shm") as name:
        folder = Path(name)
        prepare(folder)
        words = [
            *ends_with_us(), *(word.replace("{folder}", str(folder)) for word in before), binary,
            "-accel", accelerator, *(["-machine", machine] if machine else []), "-nodefaults", "-no-user-config",
            "-display", "none", "-name", f"guest={folder.name},debug-threads=on",
            *(RAM[ram](folder, size) if ram else []),
            *(word.replace("{folder}", str(folder)) for word in more),
        ]  # fmt: skip
        if monitor == "free":
            words += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
        if own_monitor:  # first of all monitors would be ours: it is the last
            words += ["-chardev", f"socket,id=ours,path={folder}/ours,server=on,wait=off"]
            words += ["-mon", "chardev=ours,mode=control"]
        with open(folder / "errors", "wb") as errors:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, pass_fds=keep)
        ours: Monitor | None = None
        try:
            ours = Monitor(folder / "ours") if own_monitor else None
            yield Living(process, folder, ours)
        except GuestError as error:
            raise GuestError(f"{error}; QEMU said: {(folder / 'errors').read_text(errors='replace')}") from error
        finally:
            if ours is not None:
                ours.close()
            process.kill()
            process.wait(30)


def boot_words(kernel: str = "amd64-6.1", words: str = "") -> tuple[list[str], Callable[[Path], None]]:
    """(words of the command line that boot a guest, what puts its files into QEMU's folder)."""
    found = provide([kernel])[kernel]
    architecture = kernel.partition("-")[0]
    machine = MACHINES[architecture]
    program = compiled(architecture)
    told = f"console={machine.console} rdinit=/init panic=-1 quiet {machine.options} {words}"

    def put(folder: Path) -> None:
        (folder / "kernel").symlink_to(found.image)
        (folder / "initramfs").write_bytes(initramfs(found, program))

    return ["-no-reboot", "-kernel", "{folder}/kernel", "-initrd", "{folder}/initramfs", "-append", told], put


def wait_until(condition: Callable[[], bool], limit: float = 30.0, what: str = "it") -> None:
    """Ask until it is so. Raises GuestError where it takes too long."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise GuestError(f"{what} did not come within {limit:.0f} s")
        time.sleep(0.01)


__all__ = ["BOOT_LIMIT", "Living", "Truth", "boot_words", "qemu", "wait_until"]
