"""Dumps of a stopped guest beside a copy of its RAM from the same moment: by QEMU and by makedumpfile.

Made once and kept beside the recordings; the key is the recipe, as there.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guests.catalogue import GUESTS, Guest
from guests.kernels import GuestError, MissingError, cache_root, locked, made_whole, provide
from guests.machine import RunningGuest, command_line, started
from guests.program import program_digest
from guests.recorder import sparse_copy
from guests.truth import Truth
from hand_made_dumps import Load, elf_core, note

MEMORY = 256
"""MiB of the guest's RAM."""
FORMATS = {"elf": "elf", "kdump": "kdump-zlib"}
_DIRECT_MAP = 0xFFFF_8880_0000_0000
_RECIPE = "2"
"""Changed where a dump would be another than one that was kept."""
_ATTEMPTS = 2
_LIMIT = 300
"""Seconds for makedumpfile on a busy machine; alone it takes one."""


@dataclass(frozen=True)
class Dumps:
    """A folder of dumps of one moment."""

    folder: Path

    @property
    def ram(self) -> Path:
        """The guest's physical memory; its first byte is at `base`."""
        return self.folder / "ram"

    @property
    def base(self) -> int:
        """Where RAM begins."""
        return int(self._facts["base"])

    @property
    def elf(self) -> Path:
        """`dump-guest-memory`."""
        return self.folder / "elf"

    @property
    def kdump(self) -> Path:
        """`dump-guest-memory -z`, which QEMU writes flattened."""
        return self.folder / "kdump"

    @property
    def registers(self) -> str:
        """What the monitor's `info registers` printed."""
        return str(self._facts["registers"])

    @property
    def vmcoreinfo(self) -> bytes:
        """The text of the guest's own ELF note."""
        return str(self._facts["vmcoreinfo"]).encode()

    @functools.cached_property
    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.folder / "facts.json").read_text())
        return facts

    def vmcore(self) -> bytes:
        """Of a PC: an ELF core as a kernel writes it when it crashes: RAM, its VMCOREINFO, the state of a CPU."""
        ram = self.ram.read_bytes()
        loads = [
            Load(start, ram[start:stop], virtual=_DIRECT_MAP + start)
            for start, stop in ((0x1000, 0xA0000), (0x100000, len(ram)))
        ]
        return elf_core(loads, note(b"CORE", 1, bytes(336)) + note(b"VMCOREINFO", 0, self.vmcoreinfo))

    def made(self, *options: str) -> list[Path]:
        """The files that makedumpfile makes of it with these options: several with --split, one else."""
        tool = shutil.which("makedumpfile")
        if tool is None:
            raise MissingError("makedumpfile is missing")
        key = hashlib.sha256("\0".join([_version(tool), *options]).encode()).hexdigest()[:16]
        place = self.folder / f"makedumpfile-{key}"
        with locked(f"makedumpfile-{self.folder.name}"):
            if not place.exists():
                with made_whole(place) as folder:
                    _convert(tool, self.vmcore(), options, folder)
        return sorted(place.iterdir())


@functools.cache
def _version(tool: str) -> str:
    return subprocess.run([tool, "-v"], capture_output=True, text=True, timeout=60, check=True).stdout


def _convert(tool: str, core: bytes, options: Sequence[str], folder: Path) -> None:
    source = folder / "vmcore"
    source.write_bytes(core)
    names = ["part1", "part2", "part3"] if "--split" in options else ["dump"]
    targets = [str(folder / name) for name in names]
    piped = "-F" in options
    command = [tool, *options, str(source), *(() if piped else targets)]
    with open(targets[0] if piped else folder / "said", "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, timeout=_LIMIT, check=False)
    (folder / "said").unlink(missing_ok=True)
    source.unlink()
    if done.returncode:
        raise GuestError(f"makedumpfile {' '.join(options)}: {done.stderr.decode(errors='replace').strip()[-500:]}")
    for name in names:
        (folder / name).chmod(0o644)


def dumped(name: str) -> Dumps:
    """The dumps of a guest of the catalogue, with less RAM. Raises GuestError as `recorder.recorded` does."""
    guest = dataclasses.replace(GUESTS[name], memory=MEMORY)
    kernel = provide([guest.kernel])[guest.kernel]
    parts = [kernel.package, kernel.version, program_digest(), *command_line(guest, Path("FOLDER")), _RECIPE]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    place = cache_root() / "dumps" / f"{name}-{key}"
    with locked(f"dumps-{name}"):
        for attempt in range(1, _ATTEMPTS + 1):
            if place.exists():
                break
            try:
                with made_whole(place) as folder:
                    _dump(guest, folder)
            except MissingError:
                raise
            except GuestError:  # a boot may fail on a host that gives it no time
                if attempt == _ATTEMPTS:
                    raise
    os.utime(place)
    return Dumps(place)


def _dump(guest: Guest, folder: Path) -> None:
    with started(guest) as running:
        running.start()
        truth = running.fetch_truth()
        running.finish()
        running.monitor.ask("stop")
        _write(running, truth, folder)


def _write(running: RunningGuest, truth: Truth, folder: Path) -> None:
    for name, kind in FORMATS.items():
        made = running.folder / name
        running.monitor.ask("dump-guest-memory", paging=False, protocol=f"file:{made}", format=kind)
        _sparse(made, folder / name)
        made.unlink()
    sparse_copy(running.ram, folder / "ram")
    (start, _, offset), *others = running.extents
    if others or offset:
        raise GuestError(f"its RAM lies in pieces: {running.extents}")
    facts = {"base": start, "registers": running.monitor.human("info registers")}
    facts["vmcoreinfo"] = truth["vmcoreinfo"].decode()
    (folder / "facts.json").write_text(json.dumps(facts))


def _sparse(source: Path, target: Path) -> None:
    """A copy with holes for blocks of zeros, of a file of any length."""
    with open(source, "rb") as reading, open(target, "wb") as writing:
        writing.truncate(os.fstat(reading.fileno()).st_size)
        at = 0
        while block := reading.read(4096):
            if any(block):
                os.pwrite(writing.fileno(), block, at)
            at += len(block)
