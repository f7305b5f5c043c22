"""Paging modes by name, and the roots of an address space from a CPU's registers.

    >>> mode("aarch64-4k-48").page_bits
    12
    >>> [(spec.name, hex(dtb)) for spec, dtb in roots_of("x86-64", {"cr3": 0x235500002, "cr4": 0x170678})]
    [('x86-64', '0x235500000')]

Names: the ones of `names()`, and for AArch64 `aarch64-GRANULE-BITS` with any granule (4k, 16k, 64k) and 16 to 52
bits, then any of `-lpa2` (TCR_EL1.DS), `-high` (TTBR1's half), `-tbi` (the top byte is a tag), `-hpd`; for ARM
`arm-short-N` and `arm-lpae-T0SZ-T1SZ` with the fields of TTBCR, and `-high`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from engine.errors import InvalidArgumentError
from engine.translate import arm, riscv, x86
from engine.translate.mmu import MmuSpec, Root

_KNOWN = {spec.name: spec for spec in (*x86.MODES, *arm.MODES, *riscv.MODES)}
_AARCH64 = re.compile(r"aarch64-(4k|16k|64k)-(\d{1,2})(-lpa2)?(-high)?(-tbi)?(-hpd)?")
_SHORT = re.compile(r"arm-short(?:-([0-7]))?(-high)?(-afe)?")
_LPAE = re.compile(r"arm-lpae(?:-([0-7])-([0-7]))?(-high)?")

_FAMILIES = {
    "x86": ("x86", "x86-64", "x86_64", "amd64", "i386", "i486", "i586", "i686"),
    "aarch64": ("aarch64", "arm64"),
    "arm": ("arm", "armhf", "armel", "armv7l", "armv6l", "armv8l"),
    "riscv": ("riscv", "riscv64", "riscv32"),
}
_LONG_MODE = ("x86-64", "x86_64", "amd64")
_FAMILY = {name: family for family, names in _FAMILIES.items() for name in names}


def names() -> list[str]:
    """The usual modes."""
    return list(_KNOWN)


def mode(name: str) -> MmuSpec:
    """The paging mode of that name. Raises InvalidArgumentError that lists what there is."""
    if name in _KNOWN:
        return _KNOWN[name]
    if found := _AARCH64.fullmatch(name):
        size, bits, lpa2, high, tagged, flat = found.groups()
        return arm.aarch64(arm.GRANULES[size], int(bits), lpa2=bool(lpa2), high=bool(high), tagged=bool(tagged),
                           hierarchical=not flat)  # fmt: skip
    if found := _SHORT.fullmatch(name):
        return arm.arm_short(int(found[1] or 0), high=bool(found[2]), access_flag=bool(found[3]))
    if found := _LPAE.fullmatch(name):
        return arm.arm_lpae(int(found[1] or 0), int(found[2] or 0), high=bool(found[3]))
    raise InvalidArgumentError(f"there is no paging mode {name!r}; there are {', '.join(_KNOWN)}")


def high_half(name: str) -> MmuSpec | None:
    """The mode of the other tree of a mode with two (ARM's TTBR1); None where there is one alone."""
    spec = mode(name)
    if not spec.name.startswith(("aarch64-", "arm-")) or "-high" in spec.name:
        return None
    if spec.name.startswith("aarch64-"):
        words = re.fullmatch(r"(aarch64-\w+-\d+(?:-lpa2)?)(.*)", spec.name)
    else:
        words = re.fullmatch(r"(arm-(?:short|lpae)(?:-\d)+)(.*)", spec.name)
    return mode(f"{words[1]}-high{words[2]}") if words else None


def roots_for(name: str, register: int, high_register: int | None = None) -> tuple[Root, ...]:
    """The roots of an address space of the mode `name`: what the registers hold (CR3; TTBR0, TTBR1; satp), or DTBs.

    Raises InvalidArgumentError where there is no such mode, or none with two roots.
    """
    spec = mode(name)
    roots = [(spec, spec.dtb(register))]
    if high_register is not None:
        high = high_half(name)
        if high is None:
            raise InvalidArgumentError(f"an address space of the paging mode {name} has one root, not two")
        roots.append((high, high.dtb(high_register)))
    return tuple(roots)


def roots_of(architecture: str, registers: Mapping[str, int]) -> tuple[Root, ...]:
    """The roots of the address space that a CPU with these registers is in.

    `architecture` as `uname -m` or Debian names it; names of registers in any case. Wanted are, of x86: cr3, and cr0,
    cr4, efer where known; of AArch64: tcr_el1, ttbr0_el1, ttbr1_el1; of ARM: ttbr0, ttbr1, ttbcr, and sctlr where
    known; of RISC-V: satp. A half that the registers switch off (EPDx) is left out.
    Raises InvalidArgumentError for an architecture that is not known, where a register is missing or holds no mode,
    and where paging is off.
    """
    family = _FAMILY.get(architecture.lower())
    if family is None:
        raise InvalidArgumentError(f"no paging modes are known of {architecture!r}, only of {', '.join(_FAMILIES)}")
    known = {name.lower(): value for name, value in registers.items()}
    if family == "x86":
        found = _x86(known, architecture.lower() in _LONG_MODE)
    elif family == "riscv":
        found = _riscv(known, architecture.lower() == "riscv32")
    else:
        found = _aarch64(known) if family == "aarch64" else _arm(known)
    if not found:
        raise InvalidArgumentError(f"the registers of this {architecture} switch all of its page tables off")
    return found


def _wanted(registers: Mapping[str, int], *names: str) -> tuple[int, ...]:
    missing = [name for name in names if name not in registers]
    if missing:
        raise InvalidArgumentError(f"to find the page tables the registers {', '.join(missing)} are needed too")
    return tuple(registers[name] for name in names)


def _root(spec: MmuSpec, register: int) -> Root:
    return spec, spec.dtb(register)


def _x86(registers: Mapping[str, int], wide: bool) -> tuple[Root, ...]:
    """Intel SDM vol. 3A 4.1.1: CR0.PG (31), CR4.PAE (5), CR4.LA57 (12), EFER.LMA (10)."""
    (cr3,) = _wanted(registers, "cr3")
    if not registers.get("cr0", 1 << 31) >> 31 & 1:
        raise InvalidArgumentError("CR0.PG is off: this CPU does not translate addresses")
    long_mode = bool(registers["efer"] >> 10 & 1) if "efer" in registers else wide
    if long_mode:
        return (_root(x86.X86_64_LA57 if registers.get("cr4", 0) >> 12 & 1 else x86.X86_64, cr3),)
    (cr4,) = _wanted(registers, "cr4")
    return (_root(x86.X86_PAE if cr4 >> 5 & 1 else x86.X86, cr3),)


def _aarch64(registers: Mapping[str, int]) -> tuple[Root, ...]:
    """DDI 0487 D19.2, TCR_EL1: TxSZ, EPDx, TGx, TBIx, HPDx, DS. TG0 and TG1 count differently."""
    tcr, ttbr0, ttbr1 = _wanted(registers, "tcr_el1", "ttbr0_el1", "ttbr1_el1")
    wide = bool(tcr >> 59 & 1)
    roots = []
    for high, ttbr, size, off, granule, coded, tag, flat in (
        (False, ttbr0, 0, 7, tcr >> 14 & 3, {0: 12, 1: 16, 2: 14}, 37, 41),
        (True, ttbr1, 16, 23, tcr >> 30 & 3, {2: 12, 3: 16, 1: 14}, 38, 42),
    ):
        if tcr >> off & 1:
            continue
        if granule not in coded:
            raise InvalidArgumentError(f"TCR_EL1 {tcr:#x} names a granule that is reserved")
        log = coded[granule]
        most = 52 if wide or log == 16 else 48  # smaller TxSZ count as the least that there is (D8.2.3)
        spec = arm.aarch64(
            log, min(most, 64 - (tcr >> size & 0x3F)), high=high, lpa2=wide and log != 16,
            tagged=bool(tcr >> tag & 1), hierarchical=not tcr >> flat & 1,
        )  # fmt: skip
        roots.append(_root(spec, ttbr))
    return tuple(roots)


def _arm(registers: Mapping[str, int]) -> tuple[Root, ...]:
    """DDI 0406 B4.1.153, TTBCR: EAE (31), then N, PD0, PD1, or T0SZ, T1SZ, EPD0, EPD1; SCTLR.M (0), AFE (29)."""
    ttbcr, ttbr0 = _wanted(registers, "ttbcr", "ttbr0")
    sctlr = registers.get("sctlr", 1)
    if not sctlr & 1:
        raise InvalidArgumentError("SCTLR.M is off: this CPU does not translate addresses")
    if ttbcr >> 31 & 1:
        sizes = ttbcr & 7, ttbcr >> 16 & 7
        two, off = any(sizes), (7, 23)
        specs = [arm.arm_lpae(*sizes), *([arm.arm_lpae(*sizes, high=True)] if two else [])]
    else:
        split, flag = ttbcr & 7, bool(sctlr >> 29 & 1)
        two, off = split > 0, (4, 5)
        specs = [arm.arm_short(split, access_flag=flag)]
        specs += [arm.arm_short(split, access_flag=flag, high=True)] if two else []
    values = (ttbr0, *(_wanted(registers, "ttbr1") if two else ()))
    rows = zip(specs, values, off, strict=False)
    return tuple(_root(spec, value) for spec, value, bit in rows if not ttbcr >> bit & 1)


def _riscv(registers: Mapping[str, int], narrow: bool) -> tuple[Root, ...]:
    """Privileged architecture 4.1.11: MODE in bits 63:60 of satp, of 32-bit machines in bit 31."""
    (satp,) = _wanted(registers, "satp")
    if narrow:
        found = riscv.SV32 if satp >> 31 & 1 else None
    else:
        found = {8: riscv.SV39, 9: riscv.SV48, 10: riscv.SV57}.get(satp >> 60)
    if found is None:
        raise InvalidArgumentError(f"satp {satp:#x} names no paging mode: this hart does not translate addresses")
    return (_root(found, satp),)
