"""From memory to its Linux kernel: by VMCOREINFO, without it, or as far as recognising what cannot be read yet.

What a person gives (`dtb=`, `kaslr=`) narrows the search; it is never needed, and a wrong value ends it in a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeVar

from engine.errors import FaultError, InvalidArgumentError, NotRecognisedError
from engine.formats.vmcoreinfo import Vmcoreinfo
from engine.memory import Memory
from engine.oslayers.linux.architectures import LINKED_AT, family
from engine.oslayers.linux.finding import Found, described
from engine.oslayers.linux.guided import guided_kernels, kernel_spaces
from engine.records import dataclass

if TYPE_CHECKING:
    from engine.oslayers.linux.claims import Lead

ALIGNMENT = 2 << 20
"""KASLR moves kernels by multiples of this, or of less on 32-bit x86 (CONFIG_PHYSICAL_ALIGN)."""
KEYS = {"NUMBER(RADIX_MMU)": "ppc64le", "KERNELOFFPHYS": "s390x"}
"""Keys of VMCOREINFO that tell architectures whose page tables are not walked."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Recognised:
    """A kernel of an architecture whose page tables are not walked: it can be named, and no more."""

    release: str
    machine: str
    """As `uname -m` prints it."""
    vmcoreinfo: Vmcoreinfo | None = None


class Remembered(Iterable[T]):
    """What can be gone through again, each looked for once, and no sooner than it is asked for."""

    def __init__(self, source: Iterable[T]) -> None:
        self._source = iter(source)
        self._known: list[T] = []

    def __iter__(self) -> Iterator[T]:
        yield from self._known
        for each in self._source:
            self._known.append(each)
            yield each


def _leads_of(memory: Memory) -> Iterator[Lead]:
    """`leads`, looked for as soon as the first is asked for: that reads all of memory."""
    from engine.oslayers.linux.claims import leads

    yield from leads(memory)


def find_kernel(
    memory: Memory,
    texts: Iterable[Vmcoreinfo],
    *,
    keep: bool,
    dtb: int | None = None,
    slide: int | None = None,
    registers: Sequence[Mapping[str, int]] = (),
    architecture: str | None = None,
) -> Found | Recognised:
    """The kernel that proves itself, and fits what was given: a top page table, how far KASLR has moved it.

    Where more than one does (a machine that was booted again keeps much of the kernel before) the one is right that
    a processor with these registers is in; the first, where none tells.
    Raises InvalidArgumentError where kernels are there, but none that fits; NotRecognisedError, saying what was found
    and why that was not enough, where there is none.
    """
    texts, claimed = Remembered(texts), Remembered(_leads_of(memory))
    others = []
    guided = guided_kernels(memory, architecture, registers, keep=keep) if dtb is None else iter(())
    near = (found for found in guided if runs(found, registers))
    for kernels in _kernels(memory, texts, claimed, keep, dtb, near):
        first = None
        for found in kernels:
            if slide is not None and slide not in slides(found):
                moved = " or ".join(map(hex, slides(found)))
                others.append(f"Linux {found.release} is moved by {moved or 'nobody knows how much'}")
                continue
            first = first or found
            if not registers or runs(found, registers):
                return found
        if first is not None:
            return first
    if others:
        raise InvalidArgumentError(f"kaslr={slide:#x} fits no kernel here: {'; '.join(dict.fromkeys(others))}")
    if dtb is not None:
        without = next(chain.from_iterable(_kernels(memory, texts, claimed, keep, None, iter(()))), None)
        if without is not None:
            right = f"its own is {without.candidate.dtb:#x} ({without.candidate.spec.name})"
            raise InvalidArgumentError(f"dtb={dtb:#x} is no page table of the Linux {without.release} here: {right}")
    found_only = recognised(claimed, texts)
    if found_only is not None:
        return found_only
    raise NotRecognisedError(_why_not(claimed, texts))


def _kernels(
    memory: Memory, texts: Iterable[Vmcoreinfo], claimed: Iterable[Lead], keep: bool, dtb: int | None,
    near: Iterator[Found],
) -> Iterator[Iterator[Found]]:  # fmt: skip
    """The kernels that prove themselves, by each way to find them, the cheapest first; `near`: by registers."""
    yield described(memory, texts, keep=keep, dtb=dtb)
    yield near

    from engine.oslayers.linux.concatenated import concatenated  # not before one is needed: so are those below

    yield concatenated(memory, claimed, keep=keep, dtb=dtb)

    if dtb is None:
        from engine.oslayers.linux.lost_tables import with_lost_tables

        yield with_lost_tables(memory, texts, keep=keep)

    from engine.oslayers.linux.unaided import unaided

    yield unaided(memory, claimed, keep=keep, dtb=dtb)


def runs(found: Found, registers: Sequence[Mapping[str, int]]) -> bool:
    """Whether a processor is in an address space in which this kernel's image lies where it lies."""
    start = found.image.start
    for space in kernel_spaces(found.physical, found.machine, registers):
        try:
            if space.virt_to_phys(start) == found.memory.virt_to_phys(start):
                return True
        except FaultError:
            continue
    return False


def are_off(registers: Sequence[Mapping[str, int]]) -> bool:
    """Whether no processor of an x86 translates addresses (CR0.PG): then none is in any kernel of 64 bits."""
    told = [value for one in registers for name, value in one.items() if name.lower() == "cr0"]
    return bool(told) and not any(value >> 31 & 1 for value in told)


def is_inside(found: Found, registers: Sequence[Mapping[str, int]]) -> bool | None:
    """`runs`; None where these registers cannot tell: of ARM those are not printed that hold the kernel's half."""
    told = {name.lower() for one in registers for name in one}
    if found.machine in ("x86_64", "i686"):
        return runs(found, registers) if {"cr0", "cr3"} <= told else None
    return runs(found, registers) if told & {"satp", "ttbr1_el1"} else None


def slides(found: Found) -> list[int]:
    """How far KASLR may have moved a kernel: one answer where it says so itself, else one for each place of linking."""
    told = found.vmcoreinfo.kernel_offset
    if told is not None:
        return [told]
    start = found.vmcoreinfo.symbol("_text") or found.vmcoreinfo.symbol("_stext") or found.image.start
    possible = [start // ALIGNMENT * ALIGNMENT - linked for linked in LINKED_AT.get(found.machine, ())]
    exact = [start - linked for linked in LINKED_AT.get(found.machine, ())]
    return sorted({slide for slide in (*possible, *exact) if 0 <= slide < 1 << 47})


def recognised(claimed: Iterable[Lead], texts: Iterable[Vmcoreinfo]) -> Recognised | None:
    """A kernel of another architecture that its names and its banner, or its names and VMCOREINFO, both tell."""
    described_by = {text.release: text for text in texts}
    for lead in claimed:
        machines = {claim.machine for claim in lead.names if claim.machine and family(claim.machine) is None}
        if len(machines) == 1 and (lead.banners or lead.release in described_by):
            return Recognised(lead.release, machines.pop(), described_by.get(lead.release))
    for text in described_by.values():
        for key, machine in KEYS.items():
            if text.text(key) is not None:
                return Recognised(text.release, machine, text)
    return None


def _why_not(claimed: Iterable[Lead], texts: Iterable[Vmcoreinfo]) -> str:
    told = list(dict.fromkeys(f"VMCOREINFO of Linux {text.release or 'of an unknown release'}" for text in texts))
    told += [f"{'the banner' if lead.banners else 'the names'} of Linux {lead.release}" for lead in claimed]
    if not told:
        return "this memory holds neither VMCOREINFO nor a kernel's banner"
    holds = f"this memory holds {'; '.join(dict.fromkeys(told))}"
    return f"{holds}, but no page tables that lead to that kernel: they may lie in a part that is missing"
