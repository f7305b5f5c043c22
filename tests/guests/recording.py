"""A recorded guest: its RAM as it stood when it was stopped, and what QEMU and the guest itself say of it.

`recording.json` beside the image holds, for readers in any language:

    guest         name, architecture, kernel package and version, QEMU's version and command line, seconds taken
    paging        what is expected of the guest, in words
    registers     those that say how it translates: CR0 CR3 CR4 EFER · TTBR0_EL1 TTBR1_EL1 TCR_EL1 SCTLR …
                  · TTBR0 TTBR1 TTBCR DACR · satp
    extents       [physical address, length, offset in the image]
    translations  as_kernel, and but on x86 as_user: [virtual address, physical address or null], by QEMU's gva2gpa
    secrets       name → virtual address in the process `keeper`
    notes         what was not as it should be

`truth.zip` holds the guest's own words, a member per section, and below monitor/ the output of QEMU's monitor.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from guests.catalogue import GUESTS, Guest
from guests.truth import Truth

IMAGE, FACTS, TRUTH = "ram", "recording.json", "truth.zip"


def _members(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as members:
        return {name: members.read(name) for name in members.namelist()}


@dataclass(frozen=True)
class Recording:
    """One recorded guest; made by recorder.recorded()."""

    folder: Path

    @property
    def image(self) -> Path:
        """The RAM, sparse; `extents` tell which physical addresses lie where in it."""
        return self.folder / IMAGE

    @cached_property
    def facts(self) -> dict[str, Any]:
        """All of recording.json."""
        return dict(json.loads((self.folder / FACTS).read_text()))

    @property
    def guest(self) -> Guest:
        return GUESTS[self.facts["guest"]["name"]]

    @property
    def registers(self) -> dict[str, int]:
        return dict(self.facts["registers"])

    @property
    def extents(self) -> list[tuple[int, int, int]]:
        """(physical address, length, offset in the image)."""
        return [(start, length, offset) for start, length, offset in self.facts["extents"]]

    @property
    def translations(self) -> list[tuple[int, int | None]]:
        """(virtual address, physical address or None) in the keeper's address space, read with the kernel's rights."""
        return [(va, pa) for va, pa in self.facts["translations"]["as_kernel"]]

    @property
    def translations_as_user(self) -> list[tuple[int, int | None]]:
        """The same as user space may read; empty on x86, where QEMU's answer looks at no rights."""
        return [(va, pa) for va, pa in self.facts["translations"].get("as_user", [])]

    @cached_property
    def _told(self) -> dict[str, bytes]:
        return _members(self.folder / TRUTH)

    @cached_property
    def truth(self) -> Truth:
        """What the guest told of itself."""
        return Truth({name: told for name, told in self._told.items() if not name.startswith("monitor/")})

    @property
    def monitor(self) -> dict[str, bytes]:
        """What QEMU's monitor printed: `registers`, `mtree`, and where QEMU has them `tlb` and `mem`."""
        start = "monitor/"
        return {name.removeprefix(start): told for name, told in self._told.items() if name.startswith(start)}

    def read_physical(self, address: int, size: int) -> bytes:
        """Bytes of the image by physical address; ValueError where there is no RAM."""
        for start, length, offset in self.extents:
            if start <= address and address + size <= start + length:
                with open(self.image, "rb") as file:
                    file.seek(offset + address - start)
                    return file.read(size)
        raise ValueError(f"{self.guest.name} has no RAM at {address:#x}")
