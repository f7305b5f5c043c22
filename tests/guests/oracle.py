"""Asks QEMU where virtual addresses of a stopped guest lie: an oracle that none of us wrote.

`gva2gpa` of the monitor walks the tables of the address space in which the processor stands. On x86 it looks at no
rights. On ARM and RISC-V it answers as a load at the processor's present level would: so it is asked twice there, as
the guest was stopped (in user space) and, with the level set by the debugger stub, as the kernel. QEMU lets nobody
leave the user mode of 32-bit ARM like that: there the addresses of the kernel are asked for at a breakpoint in the
interrupt of the timer, before the guest is stopped for good.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from guests.catalogue import Guest
from guests.kernels import GuestError
from guests.machine import RunningGuest
from guests.monitor import Debugger
from guests.truth import Truth

X86 = ("amd64", "i386")
_SYSTEM_REGISTERS = {
    "amd64": (),
    "i386": (),
    "arm64": ("TTBR0_EL1", "TTBR1_EL1", "TCR_EL1", "SCTLR", "MAIR_EL1", "ID_AA64MMFR0_EL1", "ID_AA64MMFR1_EL1",
              "ID_AA64MMFR2_EL1"),
    "armhf": ("TTBR0", "TTBR1", "TTBR0_EL1", "TTBR1_EL1", "TTBCR", "DACR", "SCTLR", "MAIR0", "MAIR1"),
    "riscv64": ("satp", "sstatus", "mstatus", "priv"),
}  # fmt: skip
_PROGRAM_COUNTERS = r"\b(?:RIP|EIP|PC|R15|pc)\s*=?\s*([0-9a-f]{8,16})\b"
_ARM_TASK_SIZE = 0xBF000000
"""Above begin the kernel's modules, its memory and its devices: arch/arm/include/asm/memory.h."""
_USER_MODE = re.compile(r"CPL=3|\bEL0t\b|\busr32\b")
Translations = list[tuple[int, int | None]]


@dataclass
class Answers:
    """What QEMU told of a stopped guest."""

    registers: dict[str, int]
    texts: dict[str, str]
    """Output of monitor commands by name: registers, mtree, and where there are such commands tlb and mem."""
    as_kernel: Translations
    """(virtual address, physical address or None), read with all rights of the kernel."""
    as_user: Translations = field(default_factory=list)
    """The same for user mode; empty on x86, where QEMU looks at no rights."""


def ask_in_interrupt(running: RunningGuest, truth: Truth) -> Translations:
    """Addresses of the kernel, asked for while a 32-bit ARM guest handles an interrupt in the keeper's address space.

    The guest runs on afterwards. Empty for other architectures, which need it not.
    """
    if running.guest.architecture != "armhf":
        return []
    stop_in_user_mode(running, truth)
    addresses = [address for address in choose(running.guest, truth, {}) if address >= _ARM_TASK_SIZE]
    place = truth.symbol("update_process_times")  # called by every tick: kernel/time/timer.c
    with running.debugger() as debugger:
        keeper = debugger.read("TTBR0")
        debugger.demand(f"Z0,{place:x},4")
        debugger.ask("c")
        if debugger.read("TTBR0") != keeper:
            raise GuestError("the guest handled a tick in another address space than that of its one busy process")
        answers = _translate(running.monitor.human, addresses)
        debugger.demand(f"z0,{place:x},4")
        debugger.demand("D")
    return answers


def stop_in_user_mode(running: RunningGuest, truth: Truth) -> None:
    """Stop the guest while the keeper spins; a timer's interrupt may come between, then once more."""
    for _ in range(200):
        running.monitor.ask("stop")
        if _stands_in_keeper(running, truth):
            return
        running.monitor.ask("cont")
    raise GuestError("the guest was not met in user mode in 200 attempts")


def _stands_in_keeper(running: RunningGuest, truth: Truth) -> bool:
    told = running.monitor.human("info registers")
    found = re.search(_PROGRAM_COUNTERS, told)
    if found is None or (running.guest.architecture != "riscv64" and not _USER_MODE.search(told)):
        return False
    counter = int(found[1], 16)
    return any(
        start <= counter < stop and path == "/bin/keeper" for start, stop, _, path in truth.maps(truth.keeper)
    )


def ask(running: RunningGuest, truth: Truth, of_kernel: Translations) -> Answers:
    """All that is to be known of the stopped guest's address space; `of_kernel` is from ask_in_interrupt()."""
    guest, human = running.guest, running.monitor.human
    texts = {"registers": human("info registers -a"), "mtree": human("info mtree -f")}
    five_levels = _x86_registers(texts["registers"]).get("CR4", 0) & 1 << 12
    for name in ("tlb",) if five_levels else ("mem", "tlb"):  # QEMU 7.2: with 5 levels `mem` takes 30 s, prints nothing
        told = human(f"info {name}")
        if "unknown command" not in told:
            texts[name] = told
    addresses = choose(guest, truth, texts)
    if guest.architecture in X86:
        return Answers(_x86_registers(texts["registers"]), texts, _translate(human, addresses))
    with running.debugger() as debugger:
        registers = {}
        for name in _SYSTEM_REGISTERS[guest.architecture]:
            value = debugger.read(name) if name in debugger.numbers else None
            if value is not None:
                registers[name] = value
        as_user = _translate(human, addresses)
        if of_kernel:
            mine = [(address, physical) for address, physical in as_user if address < _ARM_TASK_SIZE]
            return Answers(registers, texts, mine + of_kernel, as_user)
        _become_kernel(debugger, guest)
        return Answers(registers, texts, _translate(human, addresses), as_user)


def _become_kernel(debugger: Debugger, guest: Guest) -> None:
    """Give the stopped processor every right to read, so that the tables alone decide."""
    if guest.architecture == "arm64":
        debugger.write("cpsr", 0x3C5)  # EL1h, PAN clear (Arm ARM C5.2.18, SPSR_EL1)
    else:
        sstatus = debugger.read("sstatus") or 0
        debugger.write("sstatus", sstatus | 1 << 18 | 1 << 19)  # SUM and MXR (RISC-V privileged, 4.1.1)
        debugger.write("priv", 1)


def _x86_registers(told: str) -> dict[str, int]:
    return {name: int(value, 16) for name, value in re.findall(r"\b(CR[0-4]|EFER)=([0-9a-f]+)", told)}


def _translate(human: Callable[[str], str], addresses: Iterable[int]) -> Translations:
    answers: Translations = []
    for address in addresses:
        told = human(f"gva2gpa {address:#x}")
        found = re.match(r"gpa: (?:0x)?([0-9a-f]+)$", told.strip())
        if found is None and told.strip() != "Unmapped":
            raise GuestError(f"QEMU answered gva2gpa {address:#x} with {told!r}")
        answers.append((address, int(found[1], 16) if found else None))
    return answers


def choose(guest: Guest, truth: Truth, texts: dict[str, str]) -> list[int]:
    """Two to three thousand addresses: known things, edges of ranges and pages, holes, non-canonical ones, random ones.

    The same for the same truth.
    """
    chance = random.Random(guest.name)
    bits = 32 if guest.architecture in ("i386", "armhf") else 64
    page = truth.page_size
    found = [*truth.secrets.values(), *_of_user_space(truth, chance, page), *_of_kernel(truth, chance, page)]
    found += _of_listings(texts, chance)
    found += _linear(guest, truth, chance, page)
    found += _corners(bits, page)
    found += [chance.getrandbits(chance.randrange(12, bits + 1)) for _ in range(150)]
    found += [(1 << bits) - 1 - chance.getrandbits(chance.randrange(12, bits)) for _ in range(150)]
    return sorted({address % (1 << bits) for address in found})


def _of_user_space(truth: Truth, chance: random.Random, page: int) -> Iterator[int]:
    for start, stop, _, _ in truth.maps(truth.keeper):
        yield from (start - 1, start, stop - 1, stop, chance.randrange(start, stop), chance.randrange(start, stop))
    for start, count, _, flags in truth.pagemap(truth.keeper):
        if flags & truth.PRESENT:
            yield from (start, start + count * page - 1, start + chance.randrange(count * page))
    present = [run for run in truth.pagemap(truth.keeper) if run[3] & truth.PRESENT]
    for start, count, _, _ in chance.choices(present, k=200):
        yield start + chance.randrange(count * page)


def _of_kernel(truth: Truth, chance: random.Random, page: int) -> Iterator[int]:
    symbols = truth.symbol_addresses()
    yield from chance.sample(symbols, min(400, len(symbols)))
    for line in truth["/proc/modules"].decode().splitlines():
        start = int(line.split()[5], 16)
        yield from (start - 1, start, start + int(line.split()[1]) - 1)
    ranges = re.findall(r"^0x([0-9a-f]+)-0x([0-9a-f]+)", truth["/proc/vmallocinfo"].decode(), re.MULTILINE)
    for first, after in chance.sample(ranges, min(120, len(ranges))):
        start, stop = int(first, 16), int(after, 16)
        yield from (start, chance.randrange(start, stop), stop - page - 1, stop - page, stop)


def _of_listings(texts: dict[str, str], chance: random.Random) -> Iterator[int]:
    """Edges of what `info mem` and `info tlb` list, and addresses inside."""
    ranges, pages = texts.get("mem", ""), texts.get("tlb", "")
    on_x86 = re.findall(r"^([0-9a-f]{8,16})-[0-9a-f]{8,16} ([0-9a-f]{8,16}) ", ranges, re.MULTILINE)
    on_riscv = re.findall(r"^([0-9a-f]{16}) [0-9a-f]{16} ([0-9a-f]{16}) ", ranges, re.MULTILINE)
    starts = [(int(first, 16), int(size, 16)) for first, size in on_x86 + on_riscv]
    starts += [(int(first, 16), 4096) for first in re.findall(r"^([0-9a-f]{8,16}): [0-9a-f]", pages, re.MULTILINE)]
    for first, size in chance.sample(starts, min(250, len(starts))):
        yield from (first - 1, first, first + chance.randrange(max(size, 1)), first + size - 1, first + size)


def _linear(guest: Guest, truth: Truth, chance: random.Random, page: int) -> Iterator[int]:
    """Where the kernel maps all of RAM: told by VMCOREINFO on arm64, by the usual split on 32 bits."""
    physical = [int(part, 16) for part in re.findall(r"^([0-9a-f]+)-[0-9a-f]+ : System RAM", truth.iomem, re.MULTILINE)]
    start, size = physical[0], guest.memory << 20
    told = truth.vmcoreinfo
    if guest.architecture == "arm64" and "NUMBER(PHYS_OFFSET)" in told:
        bits = int(told["NUMBER(VA_BITS)"])
        offset = -(1 << bits) - int(told["NUMBER(PHYS_OFFSET)"], 0)
    elif guest.architecture in ("armhf", "i386"):
        offset = 0xC0000000 - (start if guest.architecture == "armhf" else 0)
    else:
        return
    for _ in range(250):
        yield start + chance.randrange(size) + offset
    yield from (start + offset - 1, start + offset, start + size + offset - 1, start + size + offset, page)


def _corners(bits: int, page: int) -> Iterator[int]:
    yield from (0, 1, page - 1, page, (1 << bits) - 1, (1 << bits) - page, (1 << bits) - page - 1)
    for bit in (20, 21, 22, 25, 29, 30, 31, 36, 38, 39, 42, 47, 48, 51, 52, 55, 56, 57, 62, 63):
        if bit < bits:
            yield from ((1 << bit) - 1, 1 << bit, (1 << bits) - (1 << bit) - 1, (1 << bits) - (1 << bit))
