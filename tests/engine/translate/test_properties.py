"""Properties of every paging mode: random trees are walked as they were built, and garbage never does harm.

CLOUDFS_LONG_RUN=10000 adds so many trees of each mode: five minutes on two idle cores.
"""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
from every_mode import EXAMPLES, LONG, MODES, WIDE, built, found, told, walked
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import FaultError, FaultKind
from engine.memory import Memory
from engine.testing import PageTableBuilder
from engine.translate.bulk import WalkReport, blocks, translate
from engine.translate.mmu import EntryKind, MmuSpec, Walker
from engine.types import PageFlags, Rights

SEEDS = st.integers(0, (1 << 32) - 1)
PAGES = st.integers(1, 12)

every_mode = pytest.mark.parametrize("name", list(MODES))
examples = settings(max_examples=EXAMPLES)


@every_mode
@examples
@given(seed=SEEDS, pages=PAGES)
def test_every_walk_finds_exactly_what_was_built(name, seed, pages):
    check(name, seed, pages)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODES) if LONG else [])
def test_every_walk_finds_exactly_what_was_built_in_the_long_run(name):
    generator = random.Random(name)
    for _ in range(LONG):
        check(name, generator.getrandbits(32), generator.randint(1, 8), looks=12)


def check(name: str, seed: int, pages: int, looks: int = 24) -> None:
    """Build one tree and walk it in all ways."""
    builder = built(MODES[name], seed, pages)
    memory = builder.memory
    addresses = list(builder.addresses(looks))
    check_walks(builder, memory, addresses, keep=bool(seed & 2))
    check_batch(builder, memory, addresses)
    check_listing(builder, memory, buffer=1 << 20 if seed & 4 else 16 << 20)


@examples
@given(seed=SEEDS, pages=PAGES)
def test_the_scalar_walk_assumes_no_64_bits(seed, pages):
    builder = built(WIDE, seed, pages)
    addresses = list(builder.addresses(24))
    assert WIDE.dtb(builder.register) == builder.dtb
    check_walks(builder, builder.memory, addresses, keep=bool(seed & 2))


def check_walks(builder: PageTableBuilder, memory: Memory, addresses: list[int], *, keep: bool) -> None:
    """The scalar walk says of each address what the record says."""
    spec = builder.spec
    walker = Walker(memory, spec, spec.dtb(builder.register), keep=keep)
    for address in addresses:
        wanted = told(builder, address)
        assert walked(walker, address) == wanted
        assert found(walker, address) == (wanted and wanted[:2])


def check_batch(builder: PageTableBuilder, memory: Memory, addresses: list[int]) -> None:
    """So does the vectorised one of all of them at once."""
    found = translate(memory, [(builder.spec, builder.dtb)], np.array(addresses, np.uint64), details=True)
    assert found.rights is not None
    assert found.flags is not None
    for row, address in enumerate(addresses):
        said = (int(found.physical[row]), int(found.page_bits[row]), Rights(int(found.rights[row])),
                PageFlags(int(found.flags[row])))  # fmt: skip
        assert told(builder, address) == (None if found.kinds[row] else said)


def check_listing(builder: PageTableBuilder, memory: Memory, buffer: int) -> None:
    """The listing ascends and holds each byte that was mapped, and no other.

    A page of several entries (64K in a 4K table) may come in pieces, each of which says the page's truth.
    """
    report, covered, last = WalkReport(), 0, -1
    for chunk in blocks(memory, (builder.spec, builder.dtb), report=report, buffer=buffer):
        for row in range(len(chunk)):
            start, size = int(chunk.starts[row]), int(chunk.sizes[row])
            assert start > last
            last = start + size - 1
            if chunk.kinds[row]:
                continue
            page = builder.find(start)
            assert page is not None
            assert last < page.address + page.size
            assert chunk.physical[row] == page.physical + start - page.address
            assert (chunk.rights[row], chunk.flags[row]) == (page.rights.value, page.flags.value)
            assert chunk.page_bits[row] == page.page_bits
            covered += size
    assert covered == sum(page.size for page in builder.record())
    assert not report.unreadable
    assert not report.malformed


def garbage(spec: MmuSpec, seed: int) -> PageTableBuilder:
    """Tables of random entries, half of which lead back into the same tables."""
    generator = random.Random(seed)
    builder = PageTableBuilder(spec, seed=seed, base=0)
    size = max(1 << 12, *(spec.entry_size << level.bits for level in spec.levels))
    builder.allocate(4 * size, size)
    ends = [level for level in range(len(spec.levels)) if any(leads(kind) for kind in spec.levels[level].kinds)]
    for place in generator.sample(range(0, len(builder.data), spec.entry_size), 200):
        entry = generator.getrandbits(8 * spec.entry_size) | generator.choice((0, 1, 3))
        if ends and generator.random() < 0.5:
            table = generator.randrange(len(builder.data)) // size * size
            entry = builder.table_entry(generator.choice(ends), table)
        builder.data[place : place + spec.entry_size] = entry.to_bytes(spec.entry_size, "little")
    return builder


def leads(kind: EntryKind) -> bool:
    return kind.page_bits is None and kind.fault is None


@every_mode
@examples
@given(seed=SEEDS)
def test_garbage_gives_faults_or_pages_and_both_walks_agree(name, seed):
    spec = MODES[name]
    builder = garbage(spec, seed)
    memory, generator = builder.memory, random.Random(seed + 1)
    walker = Walker(memory, spec, builder.dtb)
    top = (1 << spec.address_bits) - 1
    near = [extent.start + generator.randrange(extent.size) for extent in spec.extents() for _ in range(30)]
    addresses = np.array([*near, 0, top, *(generator.randrange(top + 1) for _ in range(4))], np.uint64)
    found = translate(memory, [(spec, builder.dtb)], addresses, details=True)
    for row, address in enumerate(addresses.tolist()):
        kind, said = 0, None
        try:
            one = walker.walk(address)
            said = one.physical, one.page_bits, one.rights.value, one.flags.value
        except FaultError as error:
            kind = error.kind
        assert found.kinds[row] == kind
        if said is not None:
            assert said == (found.physical[row], found.page_bits[row], found.rights[row], found.flags[row])


@every_mode
@examples
@given(seed=SEEDS)
def test_a_listing_of_garbage_ascends_and_every_mapped_row_is_what_a_walk_finds(name, seed):
    spec = MODES[name]
    builder = garbage(spec, seed)
    memory, walker = builder.memory, Walker(builder.memory, spec, builder.dtb)
    last = -1
    for chunk in islice(blocks(memory, (spec, builder.dtb), buffer=1 << 20), 8):
        assert set(chunk.kinds.tolist()) <= {0, *(int(kind) for kind in FaultKind)}
        for row in range(0, len(chunk), max(1, len(chunk) // 10)):
            start, size = int(chunk.starts[row]), int(chunk.sizes[row])
            assert start > last
            last = start + size - 1
            for address in (start, last):
                said = walked(walker, address)
                if not chunk.kinds[row]:
                    assert said == (int(chunk.physical[row]) + address - start, int(chunk.page_bits[row]),
                                    Rights(int(chunk.rights[row])), PageFlags(int(chunk.flags[row])))  # fmt: skip
                elif chunk.kinds[row] != FaultKind.NOT_WALKED:
                    assert said is None


@every_mode
def test_tables_that_all_lead_to_themselves_cost_bounded_work(name):
    spec = MODES[name]
    builder = PageTableBuilder(spec, base=0)
    size = max(spec.entry_size << level.bits for level in spec.levels)
    home = builder.allocate(size, size)
    ends = [level for level in range(len(spec.levels)) if any(leads(kind) for kind in spec.levels[level].kinds)]
    if not ends:
        return  # one level: nothing leads anywhere
    entry = builder.table_entry(ends[0], home).to_bytes(spec.entry_size, "little")
    builder.data[home : home + size] = entry * (size // spec.entry_size)
    report = WalkReport()
    for chunk in blocks(builder.memory, (spec, home), report=report):
        assert len(chunk)
    assert report.tables <= 4096
