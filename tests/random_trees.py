"""Page tables that nobody built: memory full of entries that match the rows of a mode and lead to random places."""

from __future__ import annotations

import numpy as np

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError
from engine.memory import Memory
from engine.translate.mmu import EntryKind, MmuSpec, Root, Walker


def random_memory(spec: MmuSpec, seed: int, size: int = 1 << 18, absent: float = 0.3) -> bytes:
    """Memory of entries: most of a row of some level that lead to somewhere in it, some zeros, some noise."""
    chance = np.random.default_rng(seed)
    count = size // spec.entry_size
    noise = chance.integers(0, 1 << 64, count, np.uint64)
    kinds = [kind for level in spec.levels for kind in level.kinds]
    kinds += [kind for kind in kinds if kind.fault is None and kind.page_bits is None] * 2
    entries = np.zeros(count, np.uint64)
    choice = chance.integers(0, len(kinds), count)
    for number, kind in enumerate(kinds):
        where = choice == number
        entries[where] = [entry_of(kind, spec, int(n), size) for n in noise[where].tolist()]
    dice = chance.random(count)
    dice[0x1000 // spec.entry_size :][:16] = 1.0  # of the table that tests begin with some are always there
    entries[dice < absent] = 0
    wild = chance.random(count) > 0.97
    entries[wild & (entries != 0)] = noise[wild & (entries != 0)]
    return entries.astype(f"<u{spec.entry_size}").tobytes()


def entry_of(kind: EntryKind, spec: MmuSpec, noise: int, size: int) -> int:
    """An entry of this kind that leads into the first `size` bytes, nearly always to the start of a page."""
    entry = noise & spec.entry_mask & ~kind.mask | kind.value
    for mask, shift in kind.address:
        wanted = noise % size & ~0xFFF
        entry &= ~mask | kind.mask
        part = wanted >> shift if shift >= 0 else wanted << -shift
        entry |= (part ^ kind.invert) & mask & ~kind.mask
    return entry


def addresses_of(spec: MmuSpec, seed: int, count: int) -> np.ndarray:
    """Addresses all over what a mode translates, and some elsewhere."""
    chance = np.random.default_rng(seed)
    parts = [chance.integers(0, 1 << 64, count // 4, np.uint64)]
    for extent in spec.extents():
        parts.append(chance.integers(0, extent.size, count, np.uint64) + np.uint64(extent.start))
        parts.append(chance.integers(0, min(extent.size, 1 << 30), count, np.uint64) + np.uint64(extent.start))
        parts.append(np.array([extent.start, extent.stop - 1], np.uint64))
    return np.concatenate(parts)


def walked(memory: Memory, roots: list[Root], address: int, absent=None) -> tuple[int, int, int, int, int]:
    """(physical, page bits, kind, rights, flags) as the scalar walk says."""
    for spec, dtb in roots:
        if spec.canonical(address) is None:
            continue
        try:
            found = Walker(memory, spec, dtb, absent).walk(address)
        except FaultError as error:
            return 0, 0, int(error.kind), 0, 0
        return found.physical, found.page_bits, 0, found.rights.value, found.flags.value
    return 0, 0, 1, 0, 0


def memory_of(spec: MmuSpec, seed: int, **more) -> BytesMemory:
    """`random_memory` as a memory."""
    return BytesMemory(random_memory(spec, seed, **more))
