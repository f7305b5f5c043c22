"""Finding a Linux kernel in physical memory: architecture, paging mode, DTB, the extent of its image.

VMCOREINFO says where `swapper_pg_dir` lies, virtually; how that becomes a physical address is the architecture's.
Of all guesses the one counts that proves itself: through its page tables `swapper_pg_dir` lies at the very DTB, and
`init_uts_ns` holds the word Linux. So nothing is believed that was planted, or is left of a kernel that ran before.

Sources: Linux Documentation/admin-guide/kdump/vmcoreinfo.rst; arch/{x86,arm64,riscv,arm}/mm; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from engine.errors import EngineError, FaultError, NotRecognisedError
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.memory import Memory
from engine.oslayers.linux.architectures import (
    SPLITS,
    TOP,
    X86_64_MAP,
    Candidate,
    aarch64,
    armv7l,
    i686,
    riscv64,
    x86_64,
)
from engine.oslayers.linux.kernel_memory import KernelMemory, MendedMemory
from engine.oslayers.linux.linear_maps import Claims
from engine.oslayers.linux.ram import layouts
from engine.records import dataclass
from engine.translate.mmu import Root, Walker
from engine.translate.virtual import VirtualMemory
from engine.types import Extent

IMAGE_LIMIT = 192 << 20
IMAGE_HOLE = 8 << 20
"""A kernel's image is one linear run; between its parts there may be holes so wide (freed init sections)."""
LOST_LIMIT = 64 << 20
"""More than a kernel's image has: so much of it is looked for behind tables that are damaged."""
UTS_SEARCH = 512
"""`Linux` stands within so many bytes of init_uts_ns."""
@dataclass(frozen=True, slots=True)
class Found:
    """A kernel in physical memory."""

    candidate: Candidate
    vmcoreinfo: Vmcoreinfo
    physical: Memory
    """Physical memory in the layout that proved right."""
    memory: KernelMemory
    """For reading its objects; `by_tables` of it is what page tables say."""
    image: Extent
    """Virtual addresses of the kernel's image."""
    unaided: bool = False
    """Whether there was no VMCOREINFO, and its text was put together from what else the kernel carries."""

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


def described(memory: Memory, texts: Iterable[Vmcoreinfo], *, keep: bool, dtb: int | None = None) -> Iterator[Found]:
    """The kernels that the texts describe and that prove themselves; through the top table `dtb`, where it is given."""
    for text in texts:
        found = next(_proved(memory, text, keep, dtb), None)
        if found is not None:
            yield found


def _proved(memory: Memory, text: Vmcoreinfo, keep: bool, dtb: int | None) -> Iterator[Found]:
    for physical, first in layouts(memory):
        for guess in candidates(text, first):
            candidate = guess if dtb is None else guess.at(guess.spec.dtb(dtb))
            if proves(physical, candidate, text, given=dtb is not None):
                space = kernel_memory(physical, candidate, text, keep=keep)
                with suppress(NotRecognisedError):  # cut off before the kernel: another text may lead to another one
                    yield Found(candidate, text, physical, space, image_extent(space, text))


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
        yield from _aarch64(text, (top - arm) % TOP)
        return
    if riscv is not None:
        yield from (riscv64(name, top - riscv) for name in ("riscv-sv57", "riscv-sv48", "riscv-sv39"))
        return
    base = text.number("phys_base")
    if base is None:
        return
    five = text.number("pgtable_l5_enabled")
    names = ("x86-64", "x86-64-la57")
    for name in names if not five else names[::-1]:
        yield x86_64(name, top - X86_64_MAP + base, text.number("sme_mask") or 0)


def _aarch64(text: Vmcoreinfo, dtb: int) -> Iterator[Candidate]:
    """The kernel's half has 64 - T1SZ bits, which may be less than VA_BITS on CPUs without wide addresses."""
    granule = {4096: "4k", 16384: "16k", 65536: "64k"}.get(text.number("PAGESIZE") or 4096, "4k")
    size = text.number("TCR_EL1_T1SZ")
    sizes = [64 - size] if size is not None else []
    sizes = list(dict.fromkeys([*sizes, text.number("VA_BITS") or 48, 48, 39, 52, 47]))
    yield from aarch64(granule, tuple(sizes), dtb, text.release_number())


def _narrow(text: Vmcoreinfo, top: int, first: int) -> Iterator[Candidate]:
    """32-bit kernels: lowmem is linear from PAGE_OFFSET on; whether x86 or ARM only the page tables tell."""
    for split in SPLITS:
        if top < split:
            continue
        if text.text("CONFIG_X86_PAE") == "y":
            yield i686("x86-pae", top - split, split)
        elif text.text("CONFIG_ARM_LPAE") == "y":
            yield armv7l("arm-lpae", top - split + first, split)
        else:
            yield i686("x86", top - split, split)
            yield armv7l("arm-short", top - split + first, split)


def proves(physical: Memory, candidate: Candidate, text: Vmcoreinfo, *, given: bool = False) -> bool:
    """Whether the page tables map their own top table to itself, and the word Linux stands where it must.

    A table that was `given` may be a process's: then the kernel's must be mapped, wherever it is.
    """
    top, names = text.symbol("swapper_pg_dir"), text.symbol("init_uts_ns")
    if top is None or names is None or not 0 <= candidate.dtb < physical.size:
        return False
    walker = Walker(physical, candidate.spec, candidate.dtb)
    try:
        if walker.find(top)[0] != candidate.dtb and not given:
            return False
        space = VirtualMemory(physical, [(candidate.spec, candidate.dtb)])
        return b"Linux\0" in space.read_padded(names, UTS_SEARCH)
    except (FaultError, EngineError):
        return False


def kernel_memory(
    physical: Memory, candidate: Candidate, text: Vmcoreinfo, *, keep: bool, distance: int | None = None
) -> KernelMemory:
    """The memory of a kernel; `distance` of its image's virtual from physical addresses is what its tables say."""
    root: Root = (candidate.spec, candidate.dtb)
    top = text.symbol("swapper_pg_dir") or 0
    if distance is None:
        distance = (top - Walker(physical, candidate.spec, candidate.dtb).find(top)[0]) % TOP
    kind = MendedMemory if keep else KernelMemory
    return kind(physical, [root], Claims(candidate, text, distance), keep=keep)


def image_extent(memory: KernelMemory, text: Vmcoreinfo) -> Extent:
    """The kernel's image: from `_stext` on what is mapped linearly, over holes of at most 8 MiB.

    What damaged tables mapped counts as mapped so, too. What lies behind the end of an image that was cut off is not
    counted: to read it takes long, and gives nothing. Raises NotRecognisedError where nothing is mapped there.
    """
    start = text.symbol("_stext") or text.symbol("_text") or text.symbol("swapper_pg_dir") or 0
    start &= ~0xFFFF
    distance = memory.claims.image_distance
    limit = min(start + IMAGE_LIMIT, distance + memory.physical.size)
    stop, gaps = _mapped_stop(memory.by_tables, start, limit, distance)
    from engine.oslayers.linux.table_repair import lost_table

    damaged = any(_is_lost(memory, gap, text) for gap in gaps)
    limit = min(limit, start + LOST_LIMIT)
    while stop < limit and (lost := lost_table(memory.by_tables, stop)) is not None:
        damaged = True
        stop, _ = _mapped_stop(memory.by_tables, min(lost.span.stop, limit), limit, distance)
    if stop <= start:
        raise NotRecognisedError(f"the kernel's image is not mapped at {start:#x}")
    memory.claims.image = Extent(start, stop - start)
    if damaged:
        memory.mend()
    return memory.claims.image


def _is_lost(memory: KernelMemory, gap: Extent, text: Vmcoreinfo) -> bool:
    """Whether a gap in an image is one that a damaged table leaves, and none that the kernel has made."""
    from engine.oslayers.linux.table_repair import lost_table

    lost = lost_table(memory.by_tables, gap.start)
    if lost is None or not lost.empty:
        return lost is not None
    return lost.span.stop == gap.stop or any(address in lost.span for address in text.symbols.values())


def _mapped_stop(memory: VirtualMemory, start: int, limit: int, distance: int) -> tuple[int, list[Extent]]:
    """Up to where an image is mapped at its distance from `start` on, and the gaps in between."""
    stop = start
    gaps: list[Extent] = []
    for run in memory.physical_maps(start, limit):
        if run.start - stop > IMAGE_HOLE:
            break
        if (run.start - run.physical) % TOP == distance % TOP:
            if run.start > stop:
                gaps.append(Extent(stop, run.start - stop))
            stop = min(run.stop, limit)
    return stop, gaps
