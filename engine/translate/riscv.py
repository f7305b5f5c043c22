"""The paging modes of RISC-V: Sv32, Sv39, Sv48, Sv57.

Source: The RISC-V Instruction Set Manual, volume II, privileged architecture: 4.3 (Sv32), 4.4 to 4.6 (Sv39, Sv48,
Sv57), 4.3.2 (the walk), the chapters Svnapot (bit 63: 16 equal entries are one page of 64 KiB) and Svpbmt (bits
62:61: memory type, without effect on translation); 4.1.11 satp.

An entry is a leaf iff it may be read or executed, at any level; its page number stands two bits lower than the
address. A leaf above the last level that is not aligned to its size, and reserved bits that are set in an entry that
leads to a table, match no row: absent, as hardware faults on them. Global is read from the leaf, though a table's
entry may say it for all below. Taken as given: no shadow stacks (Zicfiss makes W without R one), MXR and SUM off.
"""

from __future__ import annotations

from engine.errors import FaultKind
from engine.translate.mmu import EntryKind, FlagRow, Level, MmuSpec, Parts, RightRow
from engine.types import PageFlags, Rights

_V, _R, _W, _X, _U, _G, _A, _D, _N = 1, 2, 4, 8, 1 << 4, 1 << 5, 1 << 6, 1 << 7, 1 << 63
_RWX = _R | _W | _X

_RIGHTS: tuple[RightRow, ...] = (
    (Rights.READ, _R, _R),
    (Rights.WRITE, _W, _W),
    (Rights.USER, _U, _U),
    (Rights.EXECUTE, _X | _U, _X),  # a supervisor never executes pages of users
    (Rights.USER_EXECUTE, _X | _U, _X | _U),
)
_FLAGS: tuple[FlagRow, ...] = ((PageFlags.GLOBAL, _G, _G), (PageFlags.ACCESSED, _A, _A), (PageFlags.DIRTY, _D, _D))


def _leaves(name: str, page_bits: int, mask: int, value: int, address: Parts) -> tuple[EntryKind, EntryKind]:
    """A page that may be read, and one that may only be executed."""
    return (
        EntryKind(name, mask | _V | _R, value | _V | _R, page_bits, address, _RIGHTS, _FLAGS),
        EntryKind(f"{name} execute-only", mask | _V | _RWX, value | _V | _X, page_bits, address, _RIGHTS, _FLAGS),
    )


def _level(shift: int, bits: int, name: str, entry_bits: int) -> Level:
    numbers = (1 << (54 if entry_bits == 64 else 32)) - (1 << 10)  # the page number: bits 53:10, of Sv32 31:10
    address = ((numbers, 2),)
    high = (1 << entry_bits) - (1 << 54) if entry_bits == 64 else 0  # N, memory type, reserved
    n = _N & high
    below = numbers & ((1 << shift - 2) - 1)  # bits of the page number that a leaf of this level has as zeros
    kinds = [*_leaves(name, shift, n | below, 0, address),
             EntryKind("write without read", _V | _R | _W, _V | _W, fault=FaultKind.MALFORMED)]  # fmt: skip
    if shift > 12:
        reserved = high | _U | _A | _D
        kinds.append(EntryKind("table", reserved | _V | _RWX, _V, address=address))
    else:
        kinds.append(EntryKind("table below the last level", _V | _RWX, _V, fault=FaultKind.MALFORMED))
        if n:
            # The low four bits of the page number are 1000 and no address: 64 KiB.
            kinds += _leaves("64K", 16, n | 0xF << 10, n | 8 << 10, ((numbers & ~(0xF << 10), 2),))
    return Level(shift, bits, tuple(kinds))


SV32 = MmuSpec(
    "riscv-sv32",
    "RISC-V privileged architecture 4.3: 34-bit physical addresses",
    4,
    (_level(22, 10, "4M", 32), _level(12, 10, "4K", 32)),
    low_bits=32,
    address_bits=32,
    root=(((1 << 22) - 1, 12),),
)

_NAMES = {48: "256T", 39: "512G", 30: "1G", 21: "2M", 12: "4K"}


def _sv(bits: int, section: str) -> MmuSpec:
    """Sv39, Sv48, Sv57: tables of 512 entries; bits 43:0 of satp are the page number, above are ASID and mode."""
    levels = tuple(_level(shift, 9, name, 64) for shift, name in _NAMES.items() if shift < bits)
    source = f"RISC-V privileged architecture {section}, Svnapot, Svpbmt"
    return MmuSpec(
        f"riscv-sv{bits}", source, 8, levels, low_bits=bits - 1, high_bits=bits - 1, root=(((1 << 44) - 1, 12),)
    )


SV39 = _sv(39, "4.4")
SV48 = _sv(48, "4.5")
SV57 = _sv(57, "4.6")

MODES = (SV32, SV39, SV48, SV57)
