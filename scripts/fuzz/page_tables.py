"""Fuzz the walks of page tables: random, cyclic, self-referencing, all-ones and noisy trees of every mode.

    .venv/bin/python scripts/fuzz/page_tables.py [SECONDS] [--seed N] [--most SECONDS]

Each case is translated and listed in C and by numpy, which have to agree, and a few addresses by the scalar walk,
which has to agree too. It ends with an error where two differ or one case takes longer than `--most` seconds of CPU,
and prints how many cases there were, the slowest one, and how much memory the program held over time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before tests/engine

from random_trees import addresses_of, random_memory, walked

from engine import accelerator
from engine.bytes_memory import BytesMemory
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.translate import modes
from engine.translate.bulk import WalkReport, blocks, translate
from engine.translate.mmu import MmuSpec, Root

EXTRA = ("aarch64-16k-47-high", "aarch64-64k-52-tbi", "aarch64-4k-52-lpa2", "arm-short-1", "arm-lpae-1-2-high")
ROWS_MOST = 200_000
"""Rows of a listing that are looked at; a case that has more is bounded all the same."""
BUFFER = 1 << 20
_TRIM = ctypes.CDLL(None).malloc_trim


class DifferenceError(Exception):
    """Two walks do not agree, or one takes too long."""


@dataclass
class Totals:
    """What was done."""

    cases: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    tables: int = 0
    repeated: int = 0
    limited: int = 0
    slowest: tuple[float, str] = (0.0, "")
    resident: list[int] = field(default_factory=list)


def resident() -> int:
    """Bytes of memory that this program holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def data_of(shape: str, spec: MmuSpec, chance: np.random.Generator, seed: int) -> bytes:
    """The bytes of a memory full of page tables of this shape."""
    size = 1 << int(chance.integers(13, 19))
    if shape == "random":
        return random_memory(spec, seed, size, absent=float(chance.choice([0.0, 0.3, 0.9, 0.99])))
    if shape == "noise":
        return chance.bytes(size)
    if shape == "ones":
        return b"\xff" * size
    words: npt.NDArray[np.uint64] = np.zeros(size // spec.entry_size, np.uint64)
    tables = [kind for level in spec.levels for kind in level.kinds if kind.page_bits is None and kind.fault is None]
    kind = tables[int(chance.integers(0, len(tables)))]
    step = 1 if shape == "cyclic" else 0  # each page leads to the next one, or to itself
    per_page = 4096 // spec.entry_size
    for page in range(size >> 12):
        base = ((page + step) << 12) % size
        entry = kind.value
        for mask, shift in kind.address:
            entry |= ((base >> shift if shift >= 0 else base << -shift) ^ kind.invert) & mask & ~kind.mask
        words[page * per_page : (page + 1) * per_page] = entry & spec.entry_mask
    words[chance.random(len(words)) < float(chance.choice([0.0, 0.5, 0.95]))] = 0
    return words.astype(f"<u{spec.entry_size}").tobytes()


def memory_of(data: bytes, chance: np.random.Generator) -> Memory:
    """The bytes as they are, or torn apart by a memory map."""
    whole = BytesMemory(data)
    if chance.random() < 0.6:
        return whole
    cuts = sorted({0, len(data), *chance.integers(1, len(data), 3).tolist()})
    ranges = [MapRange(start + 64 * i, stop - start, start) for i, (start, stop) in enumerate(pairwise(cuts))]
    return MappedMemory(whole, MemoryMap(ranges))


def listing(memory: Memory, root: Root, report: WalkReport, *, gaps: bool) -> list[npt.NDArray[np.uint64]]:
    """The columns of a whole listing, cut off at ROWS_MOST."""
    parts: list[npt.NDArray[np.uint64]] = []
    rows = 0
    for chunk in blocks(memory, root, buffer=BUFFER, gaps=gaps, report=report):
        columns = (chunk.starts, chunk.sizes, chunk.physical, chunk.page_bits, chunk.rights, chunk.flags, chunk.kinds)
        rows += len(chunk)
        if rows <= ROWS_MOST:
            parts.append(np.stack([column.astype(np.uint64) for column in columns]))
    return parts


def one_case(spec: MmuSpec, memory: Memory, dtb: int, seed: int, totals: Totals) -> None:
    """Translate and list; raise DifferenceError where walks differ."""
    addresses = addresses_of(spec, seed, 60)
    found, lists, reports = [], [], []
    for way in ("accelerator", "numpy"):
        report = WalkReport()
        with accelerator.without() if way == "numpy" else contextlib.nullcontext():
            out = translate(memory, [(spec, dtb)], addresses, details=True)
            assert out.rights is not None
            assert out.flags is not None
            columns = (out.physical, out.page_bits, out.kinds, out.rights, out.flags)
            found.append(np.stack([column.astype(np.uint64) for column in columns]))
            lists.append(listing(memory, (spec, dtb), report, gaps=bool(seed % 2)))
        reports.append(report)
        totals.rows += sum(part.shape[1] for part in lists[-1])
        totals.tables += report.tables
        totals.repeated += report.repeated
        totals.limited += report.limited
    if not np.array_equal(*found):
        raise DifferenceError("translations differ")
    for row in range(0, len(addresses), 7):
        if tuple(found[0][:, row].tolist()) != walked(memory, [(spec, dtb)], int(addresses[row])):
            raise DifferenceError(f"the scalar walk of {int(addresses[row]):#x} differs")
    if not any(report.limited for report in reports):
        one, two = (np.concatenate(parts, axis=1) if parts else np.empty((7, 0), np.uint64) for parts in lists)
        width = min(one.shape[1], two.shape[1]) if max(one.shape[1], two.shape[1]) >= ROWS_MOST // 2 else None
        if not np.array_equal(one[:, :width], two[:, :width]):
            raise DifferenceError("listings differ")


def fuzz(seconds: float, seed: int, most: float) -> Totals:
    """Cases until the time is over."""
    totals = Totals()
    specs = [modes.mode(name) for name in (*modes.names(), *EXTRA)]
    specs = [spec for spec in specs if spec.entry_size <= 8 and spec.address_bits <= 64]
    shapes = ("random", "noise", "ones", "cyclic", "self")
    stop, number = time.monotonic() + seconds, 0
    while time.monotonic() < stop:
        chance = np.random.default_rng((seed, number))
        spec, shape = specs[int(chance.integers(0, len(specs)))], shapes[number % len(shapes)]
        memory = memory_of(data_of(shape, spec, chance, number), chance)
        dtb = int(chance.integers(0, 1 << 13)) & ~int(chance.choice([0xFFF, 0x7]))
        name = f"case {number} of seed {seed}: {shape}, {spec.name}, {memory.size:#x} bytes, table at {dtb:#x}"
        begun = time.process_time()
        try:
            one_case(spec, memory, dtb, number, totals)
        except Exception as error:
            error.add_note(name)
            raise
        took = time.process_time() - begun
        if took > most:
            raise DifferenceError(f"{name} took {took:.1f} s of CPU")
        totals.slowest = max(totals.slowest, (took, name))
        totals.cases[shape] += 1
        if number % 10 == 0:
            _TRIM(0)  # what the C library keeps of freed memory is no growth of ours
            totals.resident.append(resident())
        number += 1
    return totals


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most", type=float, default=60.0, help="seconds of CPU that one case may take")
    arguments = parser.parse_args()
    if accelerator.library() is None:
        print(f"numpy alone: {accelerator.why_not()}", file=sys.stderr)
    totals = fuzz(arguments.seconds, arguments.seed, arguments.most)
    print(f"{sum(totals.cases.values())} cases: {dict(totals.cases)}")
    print(f"{totals.rows} rows; {totals.tables} tables walked, {totals.repeated} not again; {totals.limited} limited")
    print(f"slowest: {totals.slowest[0]:.2f} s of CPU, {totals.slowest[1]}")
    sizes = [size >> 20 for size in totals.resident]
    print(f"resident MiB: {sizes[0]} at the start, {sizes[len(sizes) // 2]} half-way, {sizes[-1]} at the end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
