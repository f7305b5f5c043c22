"""A processor of QEMU without any guest: it walks page tables that we put into its memory, and says what it finds.

So QEMU's own walk is an oracle for modes that no guest of ours uses: the registers are set through the debugger stub,
on ARM by executing instructions that stand in memory, and `gva2gpa` of the monitor is asked.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from guests.kernels import GuestError, MissingError
from guests.monitor import Debugger, Monitor

RAM_SIZE = 96 << 20
CODE, TABLES = 2 << 20, 16 << 20
"""Offsets from the start of RAM."""


@dataclass(frozen=True)
class Processor:
    """What QEMU is told for one kind."""

    binary: str
    machine: str
    cpu: str
    ram: int
    """Physical address of RAM."""
    more: tuple[str, ...] = ()


PROCESSORS = {
    "i386": Processor("qemu-system-i386", "pc", "max", 0),
    "amd64": Processor("qemu-system-x86_64", "pc", "max", 0),
    "arm64": Processor("qemu-system-aarch64", "virt", "max", 1 << 30),
    "armhf": Processor("qemu-system-arm", "virt", "cortex-a15", 1 << 30),
    "riscv32": Processor("qemu-system-riscv32", "virt", "rv32,pmp=false", 1 << 31, ("-bios", "none")),
    "riscv64": Processor("qemu-system-riscv64", "virt", "rv64,pmp=false,svnapot=true", 1 << 31, ("-bios", "none")),
}


class _Debugger(Debugger):
    """One that does not count registers which QEMU's description of x86 has commented out."""

    def _description(self, name: str) -> str:
        return re.sub(r"<!--.*?-->", "", super()._description(name), flags=re.DOTALL)


class BareMachine:
    """One processor, stopped, with memory of its own."""

    def __init__(self, processor: Processor, folder: Path) -> None:
        self.processor = processor
        self.monitor = Monitor(folder / "qmp")
        self.debugger = _Debugger(folder / "gdb")
        self._ram = folder / "ram"

    def put(self, address: int, data: bytes) -> None:
        """Write physical memory."""
        with open(self._ram, "r+b") as file:
            file.seek(address - self.processor.ram)
            file.write(data)

    def execute(self, instructions: list[int], registers: dict[str, int]) -> None:
        """Execute instructions of 32 bits, one step each, with these registers set before."""
        place = self.processor.ram + CODE
        self.put(place, struct.pack(f"<{len(instructions)}I", *instructions))
        for name, value in {**registers, "pc": place}.items():
            self.debugger.write(name, value)
        for _ in instructions:
            self.debugger.ask("s")

    def translate(self, address: int) -> int | None:
        """The physical address that the processor finds, or None."""
        told = self.monitor.human(f"gva2gpa {address:#x}").strip()
        if told == "Unmapped":
            return None
        found = re.fullmatch(r"gpa: (?:0x)?([0-9a-f]+)", told)
        if found is None:
            raise GuestError(f"QEMU answered gva2gpa {address:#x} with {told!r}")
        return int(found[1], 16)


@contextlib.contextmanager
def bare_machine(kind: str) -> Iterator[BareMachine]:
    """QEMU with nothing to run; killed in the end. Raises MissingError where it is not there."""
    processor = PROCESSORS[kind]
    if not shutil.which(processor.binary):
        raise MissingError(f"{processor.binary} is missing")
    with tempfile.TemporaryDirectory(prefix="cloudfs-bare-") as name:
        folder = Path(name)
        command = [
            processor.binary, "-accel", "tcg", "-cpu", processor.cpu, "-m", str(RAM_SIZE >> 20), "-S", "-nodefaults",
            "-machine", f"{processor.machine},memory-backend=ram", "-no-user-config", "-display", "none",
            "-object", f"memory-backend-file,id=ram,size={RAM_SIZE},mem-path={folder}/ram,share=on", *processor.more,
            "-qmp", f"unix:{folder}/qmp,server=on,wait=off", "-gdb", f"unix:{folder}/gdb,server=on,wait=off",
        ]  # fmt: skip
        with open(folder / "errors", "wb") as errors:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        machine = None
        try:
            machine = BareMachine(processor, folder)
            yield machine
        except (GuestError, OSError) as error:
            raise GuestError(f"{kind}: {error}; QEMU said: {(folder / 'errors').read_text().strip()}") from error
        finally:
            if machine is not None:
                machine.debugger.__exit__()
                machine.monitor.close()
            process.kill()
            process.wait(30)


Switch = Callable[[BareMachine, int], None]
"""Switches translation on, with the top table at a physical address."""


def x86(cr4: int, efer: int) -> Switch:
    """Intel SDM vol. 3A 4.1.1: CR0.PG last, so that EFER.LMA follows from EFER.LME."""

    def switch(machine: BareMachine, table: int) -> None:
        for name, value in (("cr4", cr4), ("efer", efer), ("cr3", table), ("cr0", 0x8000_0011)):
            machine.debugger.write(name, value)

    return switch


def aarch64(tcr: int, register: Callable[[int], int], high: bool) -> Switch:
    """MSR TTBR0_EL1, TTBR1_EL1, TCR_EL1, ISB, MSR SCTLR_EL1 with its M bit."""

    def switch(machine: BareMachine, table: int) -> None:
        values = {"x0": 0 if high else register(table), "x1": register(table) if high else 0, "x2": tcr}
        machine.execute([0xD5182000, 0xD5182021, 0xD5182042, 0xD5033FDF, 0xD5181003], {**values, "x3": 0x30D00801})

    return switch


def arm(ttbcr: int, high: bool, everything: bool) -> Switch:
    """MCR TTBCR, MCR or MCRR TTBR0 and TTBR1, MCR DACR, SCTLR with its M bit; `everything`: managers of all domains."""
    wide = ttbcr >> 31

    def switch(machine: BareMachine, table: int) -> None:
        values = {"r0": 0 if high else table, "r1": table if high else 0, "r2": ttbcr, "r3": 0x00C5_0079, "r5": 0}
        roots = [0xEC450F02, 0xEC451F12] if wide else [0xEE020F10, 0xEE021F30]
        domains = 0xFFFF_FFFF if everything else 0x5555_5555
        machine.execute([0xEE022F50, *roots, 0xEE034F10, 0xEE013F10], {**values, "r4": domains})

    return switch


def riscv(mode: int, everything: bool) -> Switch:
    """satp in supervisor mode; `everything`: it may read pages of users and what is only executed (SUM, MXR)."""

    def switch(machine: BareMachine, table: int) -> None:
        status = 0xC0000 if everything else 0
        for name, value in (("mstatus", status), ("satp", mode | table >> 12), ("priv", 1)):
            machine.debugger.write(name, value)

    return switch


def become_user(machine: BareMachine, kind: str) -> None:
    """Go to EL0, user mode, U: the next answers are those to a load of a user."""
    name, value = {"arm64": ("cpsr", 0), "armhf": ("cpsr", 0x10)}.get(kind, ("priv", 0))
    machine.debugger.write(name, value)
