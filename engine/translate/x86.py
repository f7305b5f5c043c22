"""The paging modes of x86: two-level, PAE, four and five levels; EPT and NPT for guests.

Sources: Intel SDM vol. 3A chapter 4 (4.3 32-bit, 4.4 PAE, 4.5 4-level and 5-level; tables 4-4 … 4-20), vol. 3C,
«the extended page table mechanism (EPT)» (28.3; 29.3 in editions since 2022); AMD64 manual vol. 2 chapter 5 and
15.25 (NPT). CR3 carries a PCID in bits 11:0 (4.10.1) and, where Linux isolates page tables, the choice between
kernel's and user's table in bit 12, which only an OS layer can know; bit 63 of a value written to CR3 is no part of
it. Bit 12 of a large page is PAT, not address. Bits that memory encryption takes from the address (AMD's C-bit,
Intel's KeyID and TDX's shared bit) are taken away with `MmuSpec.without_bits`.
Taken as given: EFER.NXE and CR4.PSE on, as on every system of this century; EPT without mode-based execute control
(bit 10), SPP and supervisor shadow stacks. Global is read from the leaf alone, as the CPU does.
"""

from __future__ import annotations

from dataclasses import replace

from engine.errors import FaultKind
from engine.translate.mmu import EntryKind, FlagRow, Level, MmuSpec, RightRow
from engine.types import PageFlags, Rights

_P, _W, _U, _A, _D, _PS, _G, _NX = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8, 1 << 63

_READ: RightRow = (Rights.READ, 0, 0)
_TABLE: tuple[RightRow, ...] = ((Rights.WRITE, _W, _W), (Rights.USER, _U, _U))
_RUN: tuple[RightRow, ...] = ((Rights.EXECUTE, 0, 0), (Rights.USER_EXECUTE, _U, _U))
_RUN_NX: tuple[RightRow, ...] = ((Rights.EXECUTE, _NX, 0), (Rights.USER_EXECUTE, _NX | _U, _U))
_FLAGS: tuple[FlagRow, ...] = ((PageFlags.GLOBAL, _G, _G), (PageFlags.ACCESSED, _A, _A), (PageFlags.DIRTY, _D, _D))


def _address(low: int, high: int = 52) -> tuple[tuple[int, int], ...]:
    """Bits [low, high) of an entry, in place."""
    return (((1 << high) - (1 << low), 0),)


def _table(mask: int, high: int, run: tuple[RightRow, ...]) -> EntryKind:
    return EntryKind("table", mask, _P, address=_address(12, high), rights=_TABLE + run)


def _leaf(name: str, page_bits: int, mask: int, value: int, high: int, run: tuple[RightRow, ...]) -> EntryKind:
    return EntryKind(name, mask, value, page_bits, _address(page_bits, high), (_READ, *_TABLE, *run), _FLAGS)


X86 = MmuSpec(
    "x86",
    "Intel SDM vol. 3A 4.3, with 4-MByte pages and PSE-36 (table 4-4)",
    4,
    (
        Level(22, 10, (
            _table(_P | _PS, 32, _RUN),
            # PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
            replace(_leaf("4M", 22, _P | _PS, _P | _PS, 32, _RUN), address=(*_address(22, 32), (0x1FE000, 19))),
        )),
        Level(12, 10, (_leaf("4K", 12, _P, _P, 32, _RUN),)),
    ),
    low_bits=32, address_bits=32, root=_address(12, 32),
)  # fmt: skip

_LEAVES = (
    Level(21, 9, (_table(_P | _PS, 52, _RUN_NX), _leaf("2M", 21, _P | _PS, _P | _PS, 52, _RUN_NX))),
    Level(12, 9, (_leaf("4K", 12, _P, _P, 52, _RUN_NX),)),
)

X86_PAE = MmuSpec(
    "x86-pae",
    "Intel SDM vol. 3A 4.4; the four entries of the top table carry no rights (table 4-8)",
    8,
    (Level(30, 2, (EntryKind("table", _P, _P, address=_address(12)),)), *_LEAVES),
    low_bits=32, address_bits=32, root=_address(5, 32),
)  # fmt: skip

_DIRECTORIES = Level(30, 9, (_table(_P | _PS, 52, _RUN_NX), _leaf("1G", 30, _P | _PS, _P | _PS, 52, _RUN_NX)))
_TOP = EntryKind("table", _P | _PS, _P, address=_address(12), rights=_TABLE + _RUN_NX)

X86_64 = MmuSpec(
    "x86-64",
    "Intel SDM vol. 3A 4.5, 4-level paging; AMD64 manual vol. 2 5.3",
    8,
    (Level(39, 9, (_TOP,)), _DIRECTORIES, *_LEAVES),
    low_bits=47, high_bits=47,
)  # fmt: skip

X86_64_LA57 = replace(
    X86_64,
    name="x86-64-la57",
    source="Intel SDM vol. 3A 4.5, 5-level paging (CR4.LA57)",
    levels=(Level(48, 9, (_TOP,)), *X86_64.levels),
    low_bits=56,
    high_bits=56,
)

NPT = replace(
    X86_64, name="npt", source="AMD64 manual vol. 2 15.25: a host's long-mode tables", low_bits=48, high_bits=0
)
NPT_5 = replace(X86_64_LA57, name="npt-5", source=NPT.source + ", five levels", low_bits=57, high_bits=0)

_EPT_TABLE: tuple[RightRow, ...] = (
    (Rights.READ, 1, 1), (Rights.WRITE, 2, 2), (Rights.EXECUTE, 4, 4), (Rights.USER_EXECUTE, 4, 4),
)  # fmt: skip
_EPT_LEAF: tuple[RightRow, ...] = (*_EPT_TABLE, (Rights.USER, 0, 0))
_EPT_FLAGS: tuple[FlagRow, ...] = ((PageFlags.ACCESSED, 1 << 8, 1 << 8), (PageFlags.DIRTY, 1 << 9, 1 << 9))


def _ept(shift: int, name: str) -> Level:
    """A level of EPT: an entry is present where it may be read, or only executed (28.3.2).

    Writable without readable is a misconfiguration (28.3.3.1). Bit 7 tells leaf from table above the last level.
    """
    last, largest = shift == 12, shift > 30
    kinds = [EntryKind("misconfigured", 3, 2, fault=FaultKind.MALFORMED)]
    for suffix, mask, value in (("", 1, 1), (" execute-only", 7, 4)):
        if not last:
            kinds.append(EntryKind("table" + suffix, mask | _PS, value, address=_address(12), rights=_EPT_TABLE))
        if not largest:
            kinds.append(
                EntryKind(name + suffix, mask if last else mask | _PS, value if last else value | _PS,
                          shift, _address(shift), _EPT_LEAF, _EPT_FLAGS)
            )  # fmt: skip
    return Level(shift, 9, tuple(kinds))


EPT = MmuSpec(
    "ept",
    "Intel SDM vol. 3C 28.3: extended page tables, four levels; EPTP in 24.6.11",
    8,
    (_ept(39, ""), _ept(30, "1G"), _ept(21, "2M"), _ept(12, "4K")),
    low_bits=48,
)
EPT_5 = replace(
    EPT, name="ept-5", source="Intel SDM vol. 3C 28.3: five levels", levels=(_ept(48, ""), *EPT.levels), low_bits=57
)

MODES = (X86, X86_PAE, X86_64, X86_64_LA57, NPT, NPT_5, EPT, EPT_5)
