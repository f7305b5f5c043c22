"""Top tables found by what they do, against the record of the builder that made them, among pages of noise."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.bytes_memory import BytesMemory
from engine.oslayers.linux.architectures import family, image_region, paging_modes
from engine.oslayers.linux.roots import addresses_of, aligned, entry_counts, mapping_roots, pages_of, table_like
from engine.testing import PageTableBuilder
from engine.types import Extent

PAGE = 4096
MODES = {guess.spec.name: guess for guess in paging_modes(None, (6, 1)) if guess.wide or guess.split == 0xC000_0000}
NOISE = 64


def built(name: str) -> tuple[PageTableBuilder, BytesMemory, int, int]:
    """(builder, memory with noise behind the tables, a mapped address in the kernel's region, its place)."""
    guess = MODES[name]
    builder = PageTableBuilder(guess.spec, seed=3, base=0, noise=False)
    region = image_region(guess)
    start = region.start + region.size // 2 & -(1 << 26)
    place = 0x0340_0000
    pages = [kind for _, kind in builder.pages() if kind.page_bits == guess.spec.page_bits and not kind.invert]
    size = 1 << guess.spec.page_bits
    for number in range(4):
        builder.map(start + number * size, place + number * size, pages[0].name)
    data = bytes(builder.data)
    noise = random.Random(name).randbytes(NOISE * PAGE)
    return builder, BytesMemory(data + bytes(-len(data) % PAGE) + noise), start + size + 0x123, place + size + 0x123


@pytest.mark.parametrize("name", MODES)
def test_of_many_pages_the_one_top_table_is_found(name):
    builder, memory, address, place = built(name)
    pages = aligned(pages_of(memory), builder.spec)
    assert len(pages) > 2
    assert builder.dtb in mapping_roots(memory, builder.spec, pages, address, place).tolist()
    wrong = mapping_roots(memory, builder.spec, pages, address, place + PAGE * 7)
    assert builder.dtb not in wrong.tolist()


@pytest.mark.parametrize("name", [name for name, guess in MODES.items() if guess.wide])
def test_the_address_of_a_place_is_read_from_the_tables(name):
    builder, memory, address, place = built(name)
    region = image_region(MODES[name])
    assert addresses_of(memory, builder.spec, builder.dtb, region, [place, 0x1234]) == [(address, place)]
    below = Extent(region.start, address - PAGE * 64 - region.start)
    assert addresses_of(memory, builder.spec, builder.dtb, below, [place]) == []


@pytest.mark.parametrize("name", [name for name, guess in MODES.items() if guess.wide])
def test_a_top_table_looks_like_one_and_noise_does_not(name):
    builder, memory, _, _ = built(name)
    pages = pages_of(memory)
    found = table_like(memory, builder.spec, pages, image_region(MODES[name]), 1 << 40).tolist()
    assert builder.dtb in found
    assert not [page for page in found if page >= memory.size - NOISE * PAGE]


def test_entries_are_counted_on_both_sides_of_the_kernel_s_start():
    builder, memory, _, _ = built("x86-64")
    low, high = entry_counts(memory, builder.spec, builder.dtb, MODES["x86-64"].kernel_start)
    assert (low, high) == (0, 1)


@pytest.mark.parametrize("name", [name for name, guess in MODES.items() if guess.wide])
def test_tables_that_name_themselves_end(name):
    """Every word of the only page leads to it again."""
    guess = MODES[name]
    kind = next(kind for kind in guess.spec.levels[0].kinds if kind.page_bits is None and kind.fault is None)
    memory = BytesMemory(kind.value.to_bytes(8, "little") * 512)
    region = image_region(guess)
    assert len(addresses_of(memory, guess.spec, 0, region, [0])) <= 1 << 20
    roots = mapping_roots(memory, guess.spec, np.zeros(1, np.uint64), region.start, 0x5000)
    assert roots.tolist() == []


def test_noise_alone_holds_no_top_table_for_three_places():
    memory = BytesMemory(random.Random(1).randbytes(2 << 20))
    for guess in MODES.values():
        pages = aligned(pages_of(memory), guess.spec)
        for place in (0x10_0000, 0x12_3000, 0x19_9000):
            address = (guess.kernel_start if not guess.wide else image_region(guess).start) + place
            pages = mapping_roots(memory, guess.spec, pages, address, place)
        assert not len(pages), guess.spec.name


@pytest.mark.parametrize(
    ("machine", "expected"),
    [("x86_64", "x86_64"), ("i386", "i686"), ("i586", "i686"), ("armv7l", "armv7l"), ("arm", "armv7l"),
     ("aarch64", "aarch64"), ("riscv64", "riscv64"), ("riscv32", None), ("s390x", None), ("mips64", None)],
)  # fmt: skip
def test_names_of_architectures_fall_into_families(machine, expected):
    assert family(machine) == expected
