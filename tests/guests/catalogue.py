"""The test guests: which kernel, on which machine, with which options."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What QEMU is told for an architecture."""

    binary: str
    package: str
    """The Debian package that has it."""
    console: str
    options: str = ""
    """Words of the kernel's command line."""


_BUSY = "no_timer_check"  # on a busy host the kernel takes a late tick for a broken timer, and panics
MACHINES = {
    "amd64": Machine("qemu-system-x86_64", "qemu-system-x86", "ttyS0", _BUSY),
    "i386": Machine("qemu-system-i386", "qemu-system-x86", "ttyS0", _BUSY),
    "arm64": Machine("qemu-system-aarch64", "qemu-system-arm", "ttyAMA0"),
    "armhf": Machine("qemu-system-arm", "qemu-system-arm", "ttyAMA0"),
    "riscv64": Machine("qemu-system-riscv64", "qemu-system-misc", "ttyS0"),
}


@dataclass(frozen=True)
class Guest:
    """One guest; `guest(name)` of the fixtures gives its recording."""

    name: str
    kernel: str
    """A name in kernels.KERNELS."""
    machine: str
    cpu: str
    paging: str
    """What is expected of it, in words of manuals; tests compare it with the registers."""
    memory: int = 512
    """In MiB."""
    options: str = ""
    """Words of the kernel's command line."""
    in_ci: bool = False
    """Booted by every run of the tests; the others with --all-guests."""

    @property
    def architecture(self) -> str:
        return self.kernel.partition("-")[0]


_ARM64 = "max,pauth-impdef=on"  # with QEMU's own way of pointer authentication a boot takes a third of the time

GUESTS = {
    guest.name: guest
    for guest in (
        Guest("amd64-6.1-4level", "amd64-6.1", "pc", "max,la57=off", "x86-64, 4 levels", in_ci=True),
        Guest("amd64-6.1-5level", "amd64-6.1", "q35", "max", "x86-64, 5 levels"),
        Guest("amd64-6.1-pti", "amd64-6.1", "pc", "max,la57=off", "x86-64, 4 levels", options="pti=on", in_ci=True),
        Guest("amd64-6.1-5gib", "amd64-6.1", "pc", "max", "x86-64, 5 levels", memory=5120),
        Guest("amd64-6.12", "amd64-6.12", "q35", "max", "x86-64, 5 levels", in_ci=True),
        Guest("amd64-6.12-rt", "amd64-6.12-rt", "pc", "max,la57=off", "x86-64, 4 levels"),
        Guest("amd64-7", "amd64-7", "q35", "max", "x86-64, 5 levels"),
        Guest("amd64-5.10", "amd64-5.10", "pc", "max", "x86-64, 4 levels"),
        Guest("i386-6.1", "i386-6.1", "pc", "max", "x86, 2 levels", in_ci=True),
        Guest("i386-6.1-pae", "i386-6.1-pae", "pc", "max", "x86, PAE", in_ci=True),
        Guest("arm64-6.1", "arm64-6.1", "virt", _ARM64, "AArch64, 4K, 48 bits", in_ci=True),
        Guest("arm64-6.1-kpti", "arm64-6.1", "virt", "cortex-a57", "AArch64, 4K, 48 bits", options="kpti=on"),
        Guest("arm64-6.12-16k", "arm64-6.12-16k", "virt", _ARM64, "AArch64, 16K, 52 bits"),
        Guest("armhf-6.1", "armhf-6.1", "virt", "cortex-a15", "ARM, short descriptors"),
        Guest("armhf-6.1-lpae", "armhf-6.1-lpae", "virt", "cortex-a15", "ARM, LPAE"),
        Guest("riscv64-6.12", "riscv64-6.12", "virt", "rv64", "RISC-V, Sv57"),
        Guest("riscv64-6.12-sv48", "riscv64-6.12", "virt", "rv64", "RISC-V, Sv48", options="no5lvl"),
        Guest("riscv64-6.12-sv39", "riscv64-6.12", "virt", "rv64", "RISC-V, Sv39", options="no4lvl"),
    )
}


BTF = ("amd64", "arm64", "riscv64")
"""Architectures whose Debian kernels carry their types."""


def selected(everything: bool) -> list[str]:
    """Names of the guests of a run of the tests."""
    return [guest.name for guest in GUESTS.values() if guest.in_ci or everything]
