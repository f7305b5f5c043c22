"""Page tables that are written anew: only what is damaged, and only what is plain arithmetic."""

from __future__ import annotations

import random

import pytest

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError
from engine.oslayers.linux.linear_maps import LinearMap, Ram
from engine.oslayers.linux.table_repair import PatchedTables, Repair, encoded, lost_table, repaired
from engine.testing import PageTableBuilder
from engine.translate.modes import mode
from engine.translate.virtual import VirtualMemory
from engine.types import Extent

PAGE = 4096
START = 0xFFFF_8880_0000_0000
SIZE = 8 << 20
HOLE = START + 0x5000
NOISE = random.Random(7).randbytes(PAGE)


@pytest.fixture(scope="module")
def built() -> tuple[PageTableBuilder, bytes]:
    """8 MiB of RAM, all mapped but for one page, by tables that lie at the end of it."""
    builder = PageTableBuilder(mode("x86-64"), base=SIZE - (64 << 10), noise=False)
    for at in range(0, SIZE, PAGE):
        if START + at != HOLE:
            builder.map(START + at, at, "4K")
    return builder, bytes([1]) * builder.base + bytes(builder.data).ljust(SIZE - builder.base, b"\1")


def space(built: tuple[PageTableBuilder, bytes], level: int, wipe: bytes) -> VirtualMemory:
    """The address space with the table of a level that leads to START wiped; of none where the level is 0."""
    builder, data = built
    memory = bytearray(data)
    if level:
        sound = VirtualMemory(BytesMemory(data), [(builder.spec, builder.dtb)])
        place = [entry & -PAGE for _, entry, _, _ in sound.path(START)][level]
        memory[place : place + PAGE] = wipe
    return VirtualMemory(BytesMemory(bytes(memory)), [(builder.spec, builder.dtb)], keep=True)


def mended(memory: VirtualMemory, known: tuple[int, ...] | None = None) -> tuple[VirtualMemory, Repair]:
    repair = repaired(memory, Ram(memory.physical), [LinearMap(Extent(START, SIZE), START, known)])
    tables = PatchedTables(memory.physical, repair.pages)
    return VirtualMemory(memory.physical, memory.roots, keep=True, tables=tables), repair


def test_sound_tables_stay_as_they_are(built):
    assert mended(space(built, 0, b""))[1].pages == {}


@pytest.mark.parametrize("wipe", [bytes(PAGE), NOISE], ids=["zeros", "noise"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_what_a_damaged_table_mapped_is_mapped_again(built, level, wipe):
    memory, repair = mended(space(built, level, wipe))
    assert len(repair.damaged) == 1
    for at in range(0, SIZE, 3 * PAGE + 8):
        assert memory.virt_to_phys(START + at) == at


@pytest.mark.parametrize("wipe", [bytes(PAGE), NOISE], ids=["zeros", "noise"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_nothing_is_mapped_beyond_the_linear_map(built, level, wipe):
    memory, _ = mended(space(built, level, wipe))
    for address in (START - 1, START + SIZE):
        with pytest.raises(FaultError):
            memory.virt_to_phys(address)


def test_a_hole_among_sound_entries_stays_one(built):
    memory, _ = mended(space(built, 3, bytes(PAGE)))
    assert memory.virt_to_phys(HOLE) == HOLE - START  # its table is lost, and with it that there was a hole
    elsewhere, _ = mended(space(built, 0, b""))
    with pytest.raises(FaultError):
        elsewhere.virt_to_phys(HOLE)


def test_an_empty_table_of_an_image_is_believed_unless_something_tells_otherwise(built):
    sparse = space(built, 3, bytes(PAGE))
    assert mended(sparse, known=(START + 8 * PAGE,))[1].damaged
    assert mended(sparse, known=())[1].damaged  # what lies behind it is mapped, in front there is nothing
    builder, data = built
    memory = bytearray(data)
    sound = VirtualMemory(BytesMemory(data), [(builder.spec, builder.dtb)])
    for start in (START, START + (2 << 20)):
        place = list(sound.path(start))[3][1] & -PAGE
        memory[place : place + PAGE] = bytes(PAGE)
    emptied = VirtualMemory(BytesMemory(bytes(memory)), sound.roots, keep=True)
    assert not mended(emptied, known=())[1].damaged


@pytest.mark.parametrize(("level", "size"), [(1, 1 << 39), (2, 1 << 30), (3, 1 << 21)])
def test_a_lost_table_is_told_by_what_it_mapped(built, level, size):
    assert lost_table(space(built, 0, b""), START) is None
    for wipe in (bytes(PAGE), NOISE):
        lost = lost_table(space(built, level, wipe), START)
        assert lost is not None
        assert lost.span == Extent(START & -size, size)
        assert lost.empty == (wipe == bytes(PAGE))


@pytest.mark.parametrize(
    "name", ["x86-64", "x86-64-la57", "x86-pae", "aarch64-4k-48-high", "aarch64-16k-47-high", "aarch64-64k-48-high",
             "riscv-sv39", "riscv-sv57", "arm-lpae"]
)  # fmt: skip
def test_an_entry_that_is_written_leads_where_it_should(name):
    spec = mode(name)
    for number, level in enumerate(spec.levels):
        place = 3 << level.shift
        last = number == len(spec.levels) - 1
        entry = encoded(level, place, level.shift) if last else encoded(level, PAGE << 6, None)
        assert entry is not None
        kind = next(kind for kind in level.kinds if kind.matches(entry))
        assert kind.base(entry) == (place if last else PAGE << 6)
