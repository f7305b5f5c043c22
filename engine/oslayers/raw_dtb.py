"""OS layer `raw-dtb`: one address space from a DTB that the user knows, so that any image can be looked into.

    -o raw-dtb:dtb=0x1ad002,arch=x86-64                       a CR3 as a debugger prints it; its PCID is dropped
    -o raw-dtb:dtb=0x41f39000,dtb1=0x41a33000,arch=aarch64-4k-48     TTBR0 and TTBR1

It recognises nothing and knows no processes: its one «process» has PID 1, and its regions are what the page tables
map, joined where rights are equal. Nothing that only an operating system knows is made up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from engine.errors import FaultError, InvalidArgumentError, NotRecognisedError, ProcessExitedError
from engine.memory import Memory
from engine.numbers import parse_number
from engine.oslayer import Base, Options, OsLayer, PhysicalMaps, Process
from engine.translate.maps import regions
from engine.translate.mmu import Root
from engine.translate.modes import roots_for
from engine.translate.virtual import VirtualMemory
from engine.types import OsInfo, PhysicalMap, ProcessInfo, Region, TargetHints

PID = 1
CR4_PAE, CR4_LA57 = 1 << 5, 1 << 12
"""Which paging mode an x86 CPU uses (Intel SDM volume 3, 2.5)."""


class RawDtbLayer(OsLayer):
    """One address space from a DTB that the user gives."""

    kind = "raw-dtb"
    summary = "one address space from a DTB that you know: -o raw-dtb:dtb=ADDRESS,arch=MODE"
    options_help = {
        "dtb": "physical address of the top page table, or the register that names it (CR3, TTBR0, satp)",
        "dtb1": "that of the high half, where the architecture has two (TTBR1)",
        "arch": "the paging mode (x86-64); a wrong one prints the list",
        "encryption": "bits of entries that are no address: AMD's C-bit, NUMBER(sme_mask)",
    }

    def __init__(self, base: Base, memory: VirtualMemory, architecture: str) -> None:
        self._base = base
        self._memory = memory
        self._architecture = architecture

    @classmethod
    def open(cls, base: Base, options: Options) -> Self:
        """Take the DTB. Raises NotRecognisedError without one, InvalidArgumentError where no page table is there."""
        if "dtb" not in options:
            raise NotRecognisedError(f"name the page table yourself: -o {_advice(base.hints)}")
        if base.memory is None:
            raise InvalidArgumentError("raw-dtb stands on a connector: name one with -c")
        architecture = options.get("arch", "x86-64")
        registers = [parse_number(options[key], f"{key}=") for key in ("dtb", "dtb1") if key in options]
        roots = roots_for(architecture, *registers)
        if "encryption" in options:
            bits = parse_number(options["encryption"], "encryption=")
            roots = tuple((spec.without_bits(bits), dtb & ~bits) for spec, dtb in roots)
        for spec, dtb in roots:
            if not _is_there(base.memory, dtb):
                where = f"physical memory goes to {base.memory.size:#x}"
                raise InvalidArgumentError(f"there is no memory at the DTB {dtb:#x} ({spec.name}); {where}")
        memory = VirtualMemory(base.memory, roots, keep=not base.live)
        if next(memory.extents(), None) is None:
            tables = " and ".join(f"{dtb:#x}" for _, dtb in roots)
            raise InvalidArgumentError(
                f"no address leads to memory by the page table at {tables} as {architecture} reads it: another DTB, or"
                " another arch=, is meant"
            )
        return cls(base, memory, architecture)

    @property
    def info(self) -> OsInfo:
        """See `OsLayer.info`."""
        return OsInfo(
            self.kind,
            architecture=self._architecture,
            page_size=1 << min(spec.page_bits for spec, _ in self._memory.roots),
            dtb=self._memory.roots[0][1],
            live=self._base.live,
            writable=self._base.writable,
            notes=("one address space; whose it is, only you know",),
        )

    @property
    def physical_memory(self) -> Memory | None:
        """See `OsLayer.physical_memory`."""
        return self._base.memory

    @property
    def kernel_memory(self) -> Memory | None:
        """See `OsLayer.kernel_memory`: the same address space."""
        return self._memory

    @property
    def tells_modules(self) -> bool:
        """See `OsLayer.tells_modules`: page tables do not."""
        return False

    def pids(self) -> list[int]:
        """See `OsLayer.pids`: PID 1 alone."""
        return [PID]

    def process(self, pid: int) -> Process:
        """See `OsLayer.process`."""
        if pid != PID:
            raise ProcessExitedError(pid)
        return AddressSpace(self._memory, self._architecture)

    def close(self) -> None:
        """See `OsLayer.close`: nothing is held."""


class AddressSpace(Process, PhysicalMaps):
    """The one «process»: an address space, and no more."""

    def __init__(self, memory: VirtualMemory, architecture: str) -> None:
        self._memory = memory
        self._architecture = architecture

    @property
    def info(self) -> ProcessInfo:
        """See `Process.info`."""
        root: Root = self._memory.roots[0]
        return ProcessInfo(
            PID, f"dtb-{root[1]:x}", architecture=self._architecture, dtb=root[1], extra={"sources": ["page tables"]}
        )

    @property
    def memory(self) -> Memory:
        """See `Process.memory`."""
        return self._memory

    @property
    def tells_modules(self) -> bool:
        """See `Process.tells_modules`: page tables do not."""
        return False

    def regions(self) -> Iterator[Region]:
        """See `Process.regions`: what the page tables map, joined where rights are equal."""
        return regions(self._memory.translation_blocks())

    def physical_maps(self) -> Iterator[PhysicalMap]:
        """See `PhysicalMaps.physical_maps`."""
        return self._memory.physical_maps()


def _advice(hints: TargetHints) -> str:
    """How to name the page table: the one that a CPU used, where a dump tells its registers."""
    registers = next((each for each in hints.registers if "cr3" in each), None)
    if hints.dtb is None or registers is None:
        return "raw-dtb:dtb=ADDRESS,arch=MODE"
    extensions = registers.get("cr4", 0)
    if hints.architecture == "x86_64":
        architecture = "x86-64-la57" if extensions & CR4_LA57 else "x86-64"
    else:
        architecture = "x86-pae" if extensions & CR4_PAE else "x86"
    return f"raw-dtb:dtb={hints.dtb:#x},arch={architecture} is what a CPU of this dump used"


def _is_there(memory: Memory, address: int) -> bool:
    """Whether `address` can be read."""
    try:
        memory.u8(address)
    except FaultError:
        return False
    return True
