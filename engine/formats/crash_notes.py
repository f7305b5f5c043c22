"""What the ELF notes of a dump say of the machine in it: registers of its CPUs, VMCOREINFO.

A kernel that crashed writes one NT_PRSTATUS note for each CPU and its VMCOREINFO; QEMU writes NT_PRSTATUS and one of
its own, with the control registers. ELF dumps have them in PT_NOTE segments, kdump files behind their sub header.

Sources: Linux include/linux/elfcore.h, arch/{x86,arm64,arm,riscv}/include/asm/{elf,ptrace}.h (release 6.12);
QEMU target/i386/arch_dump.c (release 7.2).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from itertools import islice

from engine.formats.elf.notes import Note
from engine.types import TargetHints

CPU_LIMIT = 1 << 16
"""CPUs whose registers are kept."""
NT_PRSTATUS = 1
NT_PRPSINFO, NT_AUXV, NT_FILE = 3, 6, 0x46494C45
"""Only the core of a process has the last two: they tell its command, its auxiliary vector, its mapped files."""

_WORDS = "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30".split()
_X86_64 = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss"
    " fs_base gs_base ds es fs gs"
)
_I386 = "ebx ecx edx esi edi ebp eax ds es fs gs orig_eax eip cs eflags esp ss"
_RISCV = "pc ra sp gp tp t0 t1 t2 s0 s1 a0 a1 a2 a3 a4 a5 a6 a7 s2 s3 s4 s5 s6 s7 s8 s9 s10 s11 t3 t4 t5 t6"
# architecture → where pr_reg begins in elf_prstatus, bytes of a register, their names
_STATUS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "x86_64": (112, 8, tuple(_X86_64.split())),
    "i386": (72, 4, tuple(_I386.split())),
    "aarch64": (112, 8, (*(f"x{n}" for n in _WORDS), "sp", "pc", "pstate")),
    "arm": (72, 4, (*(f"r{n}" for n in _WORDS[:13]), "sp", "lr", "pc", "cpsr")),
    "riscv64": (112, 8, tuple(_RISCV.split())),
}
_SIZES = {336: "x86_64", 144: "i386", 392: "aarch64", 148: "arm", 376: "riscv64"}
"""Bytes of elf_prstatus → whose it is, for dumps that do not say: QEMU's kdump headers do for x86 alone."""
# QEMUCPUState: two words (version, size), 18 registers, 10 segments of 24 bytes, cr0 … cr4, kernel_gs_base
_QEMU_VERSION = 1
_QEMU_REGISTERS = tuple("rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip eflags".split())
_QEMU_CONTROL = 8 + 18 * 8 + 10 * 24
_QEMU_SIZE = _QEMU_CONTROL + 6 * 8
_CR3_ADDRESS = 0x000F_FFFF_FFFF_F000
"""CR3 without PCID and flags (Intel SDM volume 3, 4.5.2)."""


def hints_of(notes: Iterable[Note], architecture: str | None, order: str = "<") -> TargetHints:
    """What the notes of a dump say; `order` is the byte order as struct writes it. Notes that are cut are left out.

    Where the architecture is not known the size of NT_PRSTATUS tells it.
    """
    status: list[dict[str, int]] = []
    own: list[dict[str, int]] = []
    text: bytes | None = None
    for note in notes:
        if note.owner == b"VMCOREINFO" and text is None:
            text = note.data.partition(b"\0")[0] or None
        elif note.owner == b"QEMU" and len(own) < CPU_LIMIT:
            own.append(_of_qemu(note.data))
        elif note.kind == NT_PRSTATUS and note.owner == b"CORE" and len(status) < CPU_LIMIT:
            architecture = architecture or _SIZES.get(len(note.data))
            status.append(_of_status(note.data, architecture, order))
    registers = _merged(status, own)
    cr3 = next((each["cr3"] for each in registers if "cr3" in each), None)
    dtb = cr3 & _CR3_ADDRESS if cr3 is not None else None
    return TargetHints(architecture, dtb, None, registers, text)


def is_of_process(notes: Iterable[Note]) -> bool:
    """Whether the notes are those of a process's core, not of a machine's dump."""
    return any(note.owner == b"CORE" and note.kind in (NT_AUXV, NT_FILE) for note in islice(notes, CPU_LIMIT))


def _merged(status: list[dict[str, int]], own: list[dict[str, int]]) -> tuple[Mapping[str, int], ...]:
    both = [
        {**(status[index] if index < len(status) else {}), **(own[index] if index < len(own) else {})}
        for index in range(max(len(status), len(own)))
    ]
    return tuple(each for each in both if each)


def _of_status(data: bytes, architecture: str | None, order: str) -> dict[str, int]:
    """The registers in an elf_prstatus; none of an architecture that is not known here, or where it is cut."""
    start, width, names = _STATUS.get(architecture or "", (0, 0, ()))
    if not names or len(data) < start + width * len(names):
        return {}
    values = struct.unpack_from(f"{order}{len(names)}{'Q' if width == 8 else 'I'}", data, start)
    return dict(zip(names, values, strict=True))


def _of_qemu(data: bytes) -> dict[str, int]:
    """The registers of QEMU's note, which it writes for x86 alone, whatever the width of the CPU."""
    if len(data) < _QEMU_CONTROL + 5 * 8 or struct.unpack_from("<I", data)[0] != _QEMU_VERSION:
        return {}
    found = dict(zip(_QEMU_REGISTERS, struct.unpack_from("<18Q", data, 8), strict=True))
    found.update(zip(("cr0", "cr1", "cr2", "cr3", "cr4"), struct.unpack_from("<5Q", data, _QEMU_CONTROL), strict=True))
    if len(data) >= _QEMU_SIZE:
        found["kernel_gs_base"] = struct.unpack_from("<Q", data, _QEMU_CONTROL + 40)[0]
    return found
