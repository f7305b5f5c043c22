"""Architectures of Linux kernels: their names, their paging modes, where a kernel's image lies in virtual memory.

Sources: Linux Documentation/arch/{x86/x86_64/mm,arm64/memory,riscv/vm-layout}.rst, arch/arm/Kconfig (VMSPLIT); releases
5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engine.errors import InvalidArgumentError
from engine.records import dataclass
from engine.translate.linux_rows import (
    ARM64_PRESENT_INVALID,
    ARM64_PROT_NONE,
    ARM_LPAE_PROT_NONE,
    RISCV_PROT_NONE,
    X86_PROT_NONE,
    arm_of_linux,
    with_prot_none,
)
from engine.translate.mmu import MmuSpec
from engine.translate.modes import mode
from engine.types import Extent

X86_64_MAP = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map (arch/x86/include/asm/page_64_types.h)."""
SPLITS = (0xC000_0000, 0x8000_0000, 0x4000_0000, 0xB000_0000)
"""PAGE_OFFSET of 32-bit kernels (VMSPLIT): 3G/1G in all distributions, then 2G/2G, 1G/3G, 3G with 256M less."""
ARM_MODULES = 16 << 20
"""Bytes below PAGE_OFFSET that are ARM kernels' too, for modules: TASK_SIZE of arch/arm/include/asm/memory.h."""
TOP = 1 << 64
RELEASE_OF_PRESENT_INVALID = (6, 11)
"""From this release on arm64 marks PROT_NONE by another bit; which one it is no table of the kernel's own tells."""
LINKED_AT = {
    "x86_64": (0xFFFF_FFFF_8100_0000,),
    "i686": (0xC100_0000, 0x8100_0000, 0x4100_0000, 0xB100_0000),
    "aarch64": (0xFFFF_8000_8000_0000, 0xFFFF_8000_0800_0000, 0xFFFF_8000_1000_0000),
    "riscv64": (0xFFFF_FFFF_8000_0000,),
}
"""Where a kernel's image begins when KASLR does not move it: each release has one of these."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A guess: an architecture, a paging mode, and where its top table would be."""

    machine: str
    """As `uname -m` prints it."""
    spec: MmuSpec
    user: MmuSpec
    """The mode of a process's half, walked from `mm->pgd`."""
    dtb: int
    kernel_start: int
    """First address of the kernel's half."""

    @property
    def split(self) -> int:
        """PAGE_OFFSET, where addresses have 32 bits: there RAM begins."""
        return self.kernel_start + (ARM_MODULES if self.machine == "armv7l" else 0)

    def at(self, dtb: int) -> Candidate:
        """The same with another top table."""
        return replace(self, dtb=dtb)

    @property
    def wide(self) -> bool:
        """Whether addresses have 64 bits."""
        return bool(self.kernel_start >> 32)


def family(machine: str) -> str | None:
    """The name under which an architecture stands here: i386 to i686 are one; None where its tables are not walked."""
    if machine in ("x86_64", "aarch64", "riscv64"):
        return machine
    if machine in ("i386", "i486", "i586", "i686"):
        return "i686"
    return "armv7l" if machine.startswith("arm") else None


def paging_modes(machine: str | None, release: tuple[int, int]) -> Iterator[Candidate]:
    """The paging modes of a family, of all where None; their top table is 0.

    Those of more levels come first: a table of their second level is like a top table of fewer.
    """
    if machine in (None, "x86_64"):
        yield from (x86_64(name, 0, 0) for name in ("x86-64-la57", "x86-64"))
    if machine in (None, "aarch64"):
        for granule, sizes in (("4k", (52, 48, 39)), ("16k", (52, 48, 47, 36)), ("64k", (52, 48, 42))):
            yield from aarch64(granule, sizes, 0, release)
    if machine in (None, "riscv64"):
        yield from (riscv64(name, 0) for name in ("riscv-sv57", "riscv-sv48", "riscv-sv39"))
    for split in SPLITS:
        if machine in (None, "i686"):
            yield from (i686(name, 0, split) for name in ("x86-pae", "x86"))
        if machine in (None, "armv7l"):
            yield from (armv7l(name, 0, split) for name in ("arm-short", "arm-lpae"))


def x86_64(name: str, dtb: int, encryption: int) -> Candidate:
    """One mode of x86-64; `encryption`: bits of entries that are no address (sme_mask)."""
    spec = with_prot_none(mode(name), X86_PROT_NONE)
    return _candidate("x86_64", spec.without_bits(encryption) if encryption else spec, dtb)


def aarch64(granule: str, sizes: tuple[int, ...], dtb: int, release: tuple[int, int]) -> Iterator[Candidate]:
    """The kernel's half of AArch64 in these sizes (64 - T1SZ), as far as there is such a mode."""
    bit = ARM64_PRESENT_INVALID if release >= RELEASE_OF_PRESENT_INVALID else ARM64_PROT_NONE
    for bits in sizes:
        try:
            high = with_prot_none(mode(f"aarch64-{granule}-{bits}-high"), bit)
            low = with_prot_none(mode(f"aarch64-{granule}-{bits}"), bit)
        except InvalidArgumentError:
            continue
        yield Candidate("aarch64", high, low, dtb, TOP - (1 << bits))


def riscv64(name: str, dtb: int) -> Candidate:
    """One mode of RISC-V."""
    return _candidate("riscv64", with_prot_none(mode(name), RISCV_PROT_NONE), dtb)


def i686(name: str, dtb: int, split: int) -> Candidate:
    """One mode of 32-bit x86."""
    return replace(_candidate("i686", with_prot_none(mode(name), X86_PROT_NONE), dtb), kernel_start=split)


def armv7l(name: str, dtb: int, split: int) -> Candidate:
    """One mode of 32-bit ARM; with short descriptors PROT_NONE has no entry of the hardware's."""
    short = name == "arm-short"
    spec = mode(name) if short else with_prot_none(mode(name), ARM_LPAE_PROT_NONE)
    return Candidate("armv7l", spec, arm_of_linux(spec) if short else spec, dtb, split - ARM_MODULES)


def _candidate(machine: str, spec: MmuSpec, dtb: int) -> Candidate:
    user = replace(spec, high_bits=0) if spec.high_bits else spec
    return Candidate(machine, spec, user, dtb, TOP - (1 << spec.high_bits))


def image_region(candidate: Candidate) -> Extent:
    """Where a kernel's image may lie in virtual memory: not in the map of all physical memory."""
    start = candidate.kernel_start
    if candidate.machine in ("x86_64", "riscv64"):
        start = X86_64_MAP
    elif candidate.machine == "aarch64":
        start = max(start, TOP - (1 << 47)) if start <= TOP - (1 << 48) else (start + TOP) // 2
    return Extent(start, (TOP if candidate.wide else 1 << 32) - start)
