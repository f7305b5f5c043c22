"""The paging modes of ARM: AArch64 with its three granules, and both formats of AArch32.

Sources: Arm Architecture Reference Manual DDI 0487, D8.2 and D8.3 (VMSAv8-64: granules, levels, descriptors,
hierarchical control, output addresses of 52 bits); DDI 0406, B3.5 (short descriptors) and B3.6 (LPAE).

AArch64 has two roots: TTBR0 translates the low end of the address space, TTBR1 the high one, with sizes and granules
of their own (TCR_EL1). TTBRs carry an ASID in bits 63:48 and CnP in bit 0; where physical addresses may have 52
bits, bits 5:2 are address bits 51:48. An entry without access flag is translated, since the frame is there: hardware
that does not set the flag itself faults on it, and Linux uses that to find old pages. The contiguous hint (bit 52)
and NSTable say nothing of where a page lies. Where Linux isolates page tables, TTBR1 of a CPU in user mode holds the
trampoline's table, and with software PAN TTBR0 of one in the kernel holds an empty one.

Taken as given: stage 1 of EL1&0, PAN and WXN as if off, permissions in the entries (no FEAT_S1PIE), 64-bit
descriptors (no FEAT_D128), all domains of short descriptors clients (DACR), TEX remap without effect on rights.
"""

from __future__ import annotations

from functools import lru_cache

from engine.errors import FaultKind, InvalidArgumentError
from engine.translate.mmu import EntryKind, FlagRow, Level, MmuSpec, Parts, RightRow
from engine.types import Extent, PageFlags, Rights

GRANULES = {"4k": 12, "16k": 14, "64k": 16}
"""Log2 of the page."""
_SIZES = {12: "4K", 14: "16K", 16: "64K", 21: "2M", 25: "32M", 29: "512M", 30: "1G", 36: "64G", 39: "512G", 42: "4T"}
_BLOCKS = {12: (21, 30), 14: (25,), 16: (29, 42)}
"""Which levels hold blocks, by granule (DDI 0487, AArch64.BlockDescSupported); 4T only where addresses have 52 bits."""
_WIDE_BLOCKS = {12: (21, 30, 39), 14: (25, 36), 16: (29, 42)}
"""The same with LPA2 (TCR_EL1.DS)."""

_AP1, _AP2, _AF, _NG, _DBM, _PXN, _UXN = 1 << 6, 1 << 7, 1 << 10, 1 << 11, 1 << 51, 1 << 53, 1 << 54
_PXN_TABLE, _UXN_TABLE, _NO_USER_TABLE, _NO_WRITE_TABLE = 1 << 59, 1 << 60, 1 << 61, 1 << 62

_LEAF: tuple[RightRow, ...] = (
    (Rights.READ, 0, 0),
    (Rights.WRITE, _AP2, 0),
    (Rights.WRITE, _DBM, _DBM),  # AP[2] is only «clean» then: hardware, or Linux, clears it with the first write
    (Rights.USER, _AP1, _AP1),
    (Rights.EXECUTE, _PXN | _AP1, 0),
    (Rights.EXECUTE, _PXN | _AP2, _AP2),  # what EL0 may write EL1 never executes
    (Rights.USER_EXECUTE, _UXN, 0),
)
_TABLE: tuple[RightRow, ...] = (
    (Rights.WRITE, _NO_WRITE_TABLE, 0),
    (Rights.USER, _NO_USER_TABLE, 0),
    (Rights.EXECUTE, _PXN_TABLE, 0),
    (Rights.USER_EXECUTE, _UXN_TABLE, 0),
)
_FLAGS: tuple[FlagRow, ...] = (
    (PageFlags.GLOBAL, _NG, 0),
    (PageFlags.ACCESSED, _AF, _AF),
    (PageFlags.DIRTY, _DBM | _AP2, _DBM),
)


def _bits(low: int, high: int) -> int:
    """Bits [low, high) set."""
    return (1 << high) - (1 << low)


def _levels(granule: int, bits: int) -> list[tuple[int, int]]:
    """(shift, index bits) of the levels, top first: each has granule - 3 bits, the top one what is left."""
    shifts = list(range(granule, bits, granule - 3))
    return [(shift, min(granule - 3, bits - shift)) for shift in reversed(shifts)]


def _output(granule: int, low: int, lpa2: bool) -> Parts:
    """The address in a descriptor, from bit `low` on (DDI 0487 D8.3)."""
    if granule == 16:
        return (_bits(low, 48), 0), (0xF000, 36)  # LPA: bits 15:12 are 51:48, zero on CPUs without
    if lpa2:
        return (_bits(low, 50), 0), (0x300, 42)  # LPA2: bits 9:8 are 51:50
    return ((_bits(low, 48), 0),)


def _root(table_bits: int, wide: bool) -> Parts:
    """The address in a TTBR; wide ones are aligned to 64 bytes, and bits 5:2 are 51:48."""
    if wide:
        return (_bits(max(table_bits, 6), 48), 0), (0x3C, 46)
    return ((_bits(table_bits, 48), 0),)


@lru_cache
def aarch64(
    granule: int,
    bits: int,
    *,
    high: bool = False,
    lpa2: bool = False,
    tagged: bool = False,
    hierarchical: bool = True,
) -> MmuSpec:
    """The mode of one half of an AArch64 address space.

    `granule` is log2 of the page (12, 14, 16), `bits` the size of the half (64 - TxSZ), `high` TTBR1's. `lpa2`:
    TCR_EL1.DS, which 4K and 16K need, and have, beyond 48 bits; `tagged`: TBIx; not `hierarchical`: HPDx.
    Raises InvalidArgumentError for sizes that the architecture has not.
    """
    if granule not in _BLOCKS or not (17 if granule == 16 else 16) <= bits <= 52:
        raise InvalidArgumentError(f"AArch64 has granules of 12, 14, 16 and 16 to 52 bits; not {granule}, {bits}")
    lpa2 = granule != 16 and (lpa2 or bits > 48)
    blocks = (_WIDE_BLOCKS if lpa2 else _BLOCKS)[granule]
    table = EntryKind("table", 3, 3, address=_output(granule, granule, lpa2), rights=_TABLE if hierarchical else ())
    levels = []
    for shift, index_bits in _levels(granule, bits):
        page = shift == granule
        if page or shift in blocks:
            address = _output(granule, shift, lpa2)
            leaf = EntryKind(_SIZES[shift], 3, 3 if page else 1, shift, address, _LEAF, _FLAGS)
        else:
            leaf = _reserved(3, 1)
        levels.append(Level(shift, index_bits, (leaf, _reserved(3, 1)) if page else (table, leaf)))
    size = next(name for name, log in GRANULES.items() if log == granule)
    suffixes = ((lpa2 and bits <= 48, "-lpa2"), (high, "-high"), (tagged, "-tbi"), (not hierarchical, "-hpd"))
    return MmuSpec(
        f"aarch64-{size}-{bits}" + "".join(suffix for given, suffix in suffixes if given),
        "Arm ARM DDI 0487 D8.2, D8.3",
        8,
        tuple(levels),
        low_bits=0 if high else bits,
        high_bits=bits if high else 0,
        ignored_bits=0xFF << 56 if tagged else 0,
        root=_root(levels[0].bits + 3, lpa2 or granule == 16),
    )


def _reserved(mask: int, value: int) -> EntryKind:
    return EntryKind("reserved", mask, value, fault=FaultKind.MALFORMED)


# -- AArch32, short descriptors (DDI 0406 B3.5) ------------------------------------------------------------------


def _short_leaf(
    name: str, mask: int, value: int, page_bits: int, address: Parts, ap: int, ap2: int, ng: int, never: int, flag: bool
) -> EntryKind:
    """A section or page: AP[1:0] from bit `ap` on, AP[2], nG, and the bits that forbid to execute (XN; PXN if any).

    Where SCTLR.AFE is set (`flag`), AP[0] is the access flag (B3.7.1).
    AP = 010 lets PL0 only read, which these rights cannot say: WRITE is the kernel's there.
    """
    ap0, ap1, ap2, ng = 1 << ap, 2 << ap, 1 << ap2, 1 << ng
    some = (0,) if flag else (ap0, ap1)  # any of these set: PL1 may read
    xn = never & ~1 if page_bits >= 20 else never  # of sections bit 0 is PXN, which is PL1's alone
    rights: list[RightRow] = []
    for bit in some:
        rights += [(Rights.READ, bit, bit), (Rights.WRITE, ap2 | bit, bit), (Rights.EXECUTE, never | bit, bit)]
    rights += [(Rights.USER, ap1, ap1), (Rights.USER_EXECUTE, xn | ap1, ap1)]
    flags: list[FlagRow] = [(PageFlags.GLOBAL, ng, 0)]
    if flag:
        flags.append((PageFlags.ACCESSED, ap0, ap0))
    return EntryKind(name, mask, value, page_bits, address, tuple(rights), tuple(flags))


@lru_cache
def arm_short(split: int = 0, *, high: bool = False, access_flag: bool = False) -> MmuSpec:
    """Short descriptors: TTBR0's tree, or with `high` TTBR1's, for TTBCR.N = `split` (0 to 7).

    With N = 0 TTBR0 translates all, else the lowest 2^(32-N) bytes and TTBR1 the rest. `access_flag`: SCTLR.AFE.
    """
    if not 0 <= split <= 7 or (high and not split):
        raise InvalidArgumentError(f"TTBCR.N is 0 to 7, and TTBR1 is used above 0; not {split}")
    super_section = (_bits(24, 32), 0), (0xF << 20, 12), (0xF << 5, 31)  # 23:20 are 35:32, 8:5 are 39:36
    first = (
        EntryKind("table", 3, 1, address=((_bits(10, 32), 0),), rights=((Rights.EXECUTE, 1 << 2, 0),)),
        _short_leaf("1M", 1 << 18 | 2, 2, 20, ((_bits(20, 32), 0),), 10, 15, 17, 1 << 4 | 1, access_flag),
        _short_leaf("16M", 1 << 18 | 2, 1 << 18 | 2, 24, super_section, 10, 15, 17, 1 << 4 | 1, access_flag),
    )
    second = (
        _short_leaf("64K", 3, 1, 16, ((_bits(16, 32), 0),), 4, 9, 11, 1 << 15, access_flag),
        _short_leaf("4K", 2, 2, 12, ((_bits(12, 32), 0),), 4, 9, 11, 1, access_flag),
    )
    used = 0 if high else split
    return MmuSpec(
        "arm-short" + (f"-{split}" if split else "") + ("-high" if high else "") + ("-afe" if access_flag else ""),
        "Arm ARM DDI 0406 B3.5",
        4,
        (Level(20, 12 - used, first), Level(12, 8, second)),
        low_bits=32 - used,
        address_bits=32,
        elsewhere=Extent(0, 1 << 32 - split) if high else None,
        root=((_bits(14 - used, 32), 0),),
    )


# -- AArch32, long descriptors (DDI 0406 B3.6) -------------------------------------------------------------------

_LPAE_LEAF: tuple[RightRow, ...] = (
    (Rights.READ, 0, 0),
    (Rights.WRITE, _AP2, 0),
    (Rights.USER, _AP1, _AP1),
    (Rights.EXECUTE, _PXN | _UXN, 0),  # XN, bit 54, is for both levels here
    (Rights.USER_EXECUTE, _UXN | _AP1, _AP1),
)
_LPAE_TABLE: tuple[RightRow, ...] = (
    (Rights.WRITE, _NO_WRITE_TABLE, 0),
    (Rights.USER, _NO_USER_TABLE, 0),
    (Rights.EXECUTE, _PXN_TABLE | _UXN_TABLE, 0),
    (Rights.USER_EXECUTE, _UXN_TABLE | _NO_USER_TABLE, 0),
)


@lru_cache
def arm_lpae(t0sz: int = 0, t1sz: int = 0, *, high: bool = False) -> MmuSpec:
    """Long descriptors: TTBR0's tree, or with `high` TTBR1's, for TTBCR.T0SZ and T1SZ (B3.6.4, table B3-5).

    Both 0: TTBR0 translates all. Linux with 3 GiB for processes has T1SZ = 2: TTBR1 the last GiB, TTBR0 the rest.
    """
    if not (0 <= t0sz <= 7 and 0 <= t1sz <= 7) or (high and not (t0sz or t1sz)):
        raise InvalidArgumentError(f"TTBCR has sizes 0 to 7, and TTBR1 is used where one is not 0; not {t0sz}, {t1sz}")
    bits = 32 - (t1sz if high else t0sz)
    low_part, high_part = Extent(0, 1 << 32 - t0sz), Extent((1 << 32) - (1 << 32 - t1sz), 1 << 32 - t1sz)
    cut = None
    if not high and t1sz and not t0sz:
        cut = high_part
    elif high and t0sz and not t1sz:
        cut = low_part
    kinds = []
    for shift in (30, 21, 12):
        address = ((_bits(shift, 40), 0),)
        table = EntryKind("table", 3, 3, address=((_bits(12, 40), 0),), rights=_LPAE_TABLE)
        leaf = EntryKind(_SIZES[shift], 3, 3 if shift == 12 else 1, shift, address, _LPAE_LEAF, _FLAGS[:2])
        kinds.append((leaf, _reserved(3, 1)) if shift == 12 else (table, leaf))
    shifts = _levels(12, bits)
    levels = tuple(Level(*place, rows) for place, rows in zip(shifts, kinds[-len(shifts) :], strict=True))
    whole = bits == 32
    return MmuSpec(
        "arm-lpae" + (f"-{t0sz}-{t1sz}" if t0sz or t1sz else "") + ("-high" if high else ""),
        "Arm ARM DDI 0406 B3.6",
        8,
        levels,
        low_bits=0 if high and not whole else bits,
        high_bits=bits if high and not whole else 0,
        address_bits=32,
        elsewhere=cut,
        root=((_bits(levels[0].bits + 3, 40), 0),),
    )


MODES = (
    *(aarch64(12, bits) for bits in (39, 42, 48, 52)),
    aarch64(12, 48, lpa2=True),
    *(aarch64(14, bits) for bits in (36, 47, 48, 52)),
    aarch64(14, 48, lpa2=True),
    *(aarch64(16, bits) for bits in (42, 48, 52)),
    aarch64(12, 48, high=True),
    arm_short(),
    arm_lpae(),
)
"""The usual ones, those of Linux's configurations; the functions give the others."""
