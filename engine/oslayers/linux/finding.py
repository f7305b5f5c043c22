"""Finding a Linux kernel in physical memory: architecture, paging mode, DTB, the extent of its image.

VMCOREINFO says where `swapper_pg_dir` lies, virtually; how that becomes a physical address is the architecture's.
Of all guesses the one counts that proves itself: through its page tables `swapper_pg_dir` lies at the very DTB, and
`init_uts_ns` holds the word Linux. So nothing is believed that was planted, or is left of a kernel that ran before.

Sources: Linux Documentation/admin-guide/kdump/vmcoreinfo.rst; arch/{x86,arm64,riscv,arm}/mm; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from engine.errors import EngineError, FaultError, InvalidArgumentError, NotRecognisedError
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.memory import Memory
from engine.oslayers.linux.ram import layouts
from engine.translate.linux_rows import (
    ARM64_PRESENT_INVALID,
    ARM64_PROT_NONE,
    ARM_LPAE_PROT_NONE,
    RISCV_PROT_NONE,
    X86_PROT_NONE,
    with_prot_none,
)
from engine.translate.mmu import MmuSpec, Root, Walker
from engine.translate.modes import mode
from engine.translate.virtual import VirtualMemory
from engine.types import Extent

X86_64_MAP = 0xFFFF_FFFF_8000_0000
"""__START_KERNEL_map (arch/x86/include/asm/page_64_types.h)."""
SPLITS = (0xC000_0000, 0x8000_0000, 0x4000_0000, 0xB000_0000)
"""PAGE_OFFSET of 32-bit kernels (VMSPLIT): 3G/1G in all distributions, then 2G/2G, 1G/3G, 3G with 256M less."""
IMAGE_LIMIT = 192 << 20
IMAGE_HOLE = 8 << 20
"""A kernel's image is one linear run; between its parts there may be holes so wide (freed init sections)."""
UTS_SEARCH = 512
"""`Linux` stands within so many bytes of init_uts_ns."""
RECOGNISED_ONLY = {
    "NUMBER(RADIX_MMU)": "ppc64le",
    "KERNELOFFPHYS": "s390x",
    "SYMBOL(high_memory)": "mips64",
}
"""Keys that tell architectures whose page tables are not walked yet."""


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


@dataclass(frozen=True, slots=True)
class Found:
    """A kernel in physical memory."""

    candidate: Candidate
    vmcoreinfo: Vmcoreinfo
    physical: Memory
    """Physical memory in the layout that proved right."""
    memory: VirtualMemory
    image: Extent
    """Virtual addresses of the kernel's image."""

    @property
    def machine(self) -> str:
        """The architecture, as `uname -m` prints it."""
        return self.candidate.machine

    @property
    def release(self) -> str | None:
        """As `uname -r` prints it."""
        return self.vmcoreinfo.text("OSRELEASE")

    @property
    def root(self) -> Root:
        """The kernel's page tables."""
        return self.memory.roots[0]


def find_kernel(memory: Memory, texts: Iterable[Vmcoreinfo], *, keep: bool) -> Found:
    """The kernel that one of the texts describes and that proves itself.

    Raises NotRecognisedError that says what was found and why it was not enough.
    """
    reasons = []
    for text in texts:
        release = text.text("OSRELEASE") or "of an unknown release"
        for physical, first in layouts(memory):
            for candidate in candidates(text, first):
                if _proves(physical, candidate, text):
                    space = VirtualMemory(physical, [(candidate.spec, candidate.dtb)], keep=keep)
                    return Found(candidate, text, physical, space, image_extent(space, text))
        other = next((machine for key, machine in RECOGNISED_ONLY.items() if text.text(key) is not None), None)
        reasons.append(f"Linux {release}" + (f" ({other}: recognised, not read yet)" if other else ": no page tables"))
    if reasons:
        raise NotRecognisedError("there is VMCOREINFO of " + "; ".join(dict.fromkeys(reasons)))
    raise NotRecognisedError("there is no VMCOREINFO in this memory")


def candidates(text: Vmcoreinfo, first: int) -> Iterator[Candidate]:
    """What the text may mean, likeliest first; `first` is where RAM begins."""
    top = text.symbol("swapper_pg_dir")
    if top is None:
        return
    if top >> 32:
        yield from _wide(text, top)
    else:
        yield from _narrow(text, top, first)


def _wide(text: Vmcoreinfo, top: int) -> Iterator[Candidate]:
    arm, riscv = text.number("kimage_voffset"), text.number("va_kernel_pa_offset")
    if arm is not None:
        yield from _aarch64(text, (top - arm) % (1 << 64))
        return
    if riscv is not None:
        for name in ("riscv-sv57", "riscv-sv48", "riscv-sv39"):
            spec = with_prot_none(mode(name), RISCV_PROT_NONE)
            yield _candidate("riscv64", spec, top - riscv, (1 << 64) - (1 << spec.high_bits))
        return
    base = text.number("phys_base")
    if base is None:
        return
    five = text.number("pgtable_l5_enabled")
    names = ("x86-64", "x86-64-la57")
    for name in names if not five else names[::-1]:
        spec = with_prot_none(mode(name), X86_PROT_NONE)
        mask = text.number("sme_mask") or 0
        spec = spec.without_bits(mask) if mask else spec
        yield _candidate("x86_64", spec, top - X86_64_MAP + base, (1 << 64) - (1 << spec.high_bits))


def _aarch64(text: Vmcoreinfo, dtb: int) -> Iterator[Candidate]:
    """The kernel's half has 64 - T1SZ bits, which may be less than VA_BITS on CPUs without wide addresses."""
    granule = {4096: "4k", 16384: "16k", 65536: "64k"}.get(text.number("PAGESIZE") or 4096, "4k")
    size = text.number("TCR_EL1_T1SZ")
    built = text.number("VA_BITS") or 48
    sizes = [64 - size] if size is not None else []
    for bits in dict.fromkeys([*sizes, built, 48, 39, 52, 47]):
        for bit in (ARM64_PROT_NONE, ARM64_PRESENT_INVALID):
            try:
                high = with_prot_none(mode(f"aarch64-{granule}-{bits}-high"), bit)
                low = with_prot_none(mode(f"aarch64-{granule}-{bits}"), bit)
            except InvalidArgumentError:
                break
            # From 6.11 on PROT_NONE is marked by another bit; which one it is no table of the kernel's own tells.
            if (bit == ARM64_PRESENT_INVALID) == (text.release_number() >= (6, 11)):
                yield Candidate("aarch64", high, low, dtb, (1 << 64) - (1 << bits))


def _narrow(text: Vmcoreinfo, top: int, first: int) -> Iterator[Candidate]:
    """32-bit kernels: lowmem is linear from PAGE_OFFSET on; whether x86 or ARM only the page tables tell."""
    for split in SPLITS:
        if top < split:
            continue
        if text.text("CONFIG_X86_PAE") == "y":
            yield _candidate("i686", with_prot_none(mode("x86-pae"), X86_PROT_NONE), top - split, split)
        elif text.text("CONFIG_ARM_LPAE") == "y":
            yield _candidate("armv7l", with_prot_none(mode("arm-lpae"), ARM_LPAE_PROT_NONE), top - split + first, split)
        else:
            yield _candidate("i686", with_prot_none(mode("x86"), X86_PROT_NONE), top - split, split)
            yield _candidate("armv7l", mode("arm-short"), top - split + first, split)


def _candidate(machine: str, spec: MmuSpec, dtb: int, kernel_start: int) -> Candidate:
    return Candidate(machine, spec, replace(spec, high_bits=0) if spec.high_bits else spec, dtb, kernel_start)


def _proves(physical: Memory, candidate: Candidate, text: Vmcoreinfo) -> bool:
    """Whether the page tables map their own top table to itself, and the word Linux stands where it must."""
    top, names = text.symbol("swapper_pg_dir"), text.symbol("init_uts_ns")
    if top is None or names is None or not 0 <= candidate.dtb < physical.size:
        return False
    walker = Walker(physical, candidate.spec, candidate.dtb)
    try:
        if walker.find(top)[0] != candidate.dtb:
            return False
        space = VirtualMemory(physical, [(candidate.spec, candidate.dtb)])
        return b"Linux\0" in space.read_padded(names, UTS_SEARCH)
    except (FaultError, EngineError):
        return False


def image_extent(memory: VirtualMemory, text: Vmcoreinfo) -> Extent:
    """The kernel's image: from `_stext` on what is mapped linearly, over holes of at most 8 MiB.

    Raises NotRecognisedError where nothing is mapped there.
    """
    start = text.symbol("_stext") or text.symbol("swapper_pg_dir") or 0
    start &= ~0xFFFF
    stop, delta = start, None
    for run in memory.physical_maps(start, start + IMAGE_LIMIT):
        if delta is None:
            delta = run.physical - run.start
        if run.physical - run.start != delta or run.start - stop > IMAGE_HOLE:
            if run.start - stop > IMAGE_HOLE:
                break
            continue
        stop = run.stop
    if stop == start:
        raise NotRecognisedError(f"the kernel's image is not mapped at {start:#x}")
    return Extent(start, stop - start)
