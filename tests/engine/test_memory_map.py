"""Memory maps: the ranges, their file format, and a memory seen through them."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, InvalidArgumentError
from engine.file_memory import FileMemory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.testing import Truth, check_memory, check_writes
from engine.types import Extent

DATA = os.urandom(0x9000)
# target   0x1000    0x3000    0x4000          0x9000    0xa000
#          | s+0x2000 |  hole   | s+0 … 0x5000  |  s+0x8000 |     (the last two join only in the target)
MAP = MemoryMap([MapRange(0x4000, 0x5000, 0), MapRange(0x1000, 0x2000, 0x2000), MapRange(0x9000, 0x1000, 0x8000)])
TRUTH = Truth(
    known=[
        (0x1000, DATA[0x2000:0x4000]),
        (0x4000, DATA[:0x5000] + DATA[0x8000:0x9000]),
        (0x8FF0, DATA[0x4FF0:0x5000] + DATA[0x8000:0x8800]),
    ],
    holes=[Extent(0, 0x1000), Extent(0x3000, 0x1000)],
)


def test_mapped_memory_holds_the_contract():
    check_memory(lambda: MappedMemory(BytesMemory(DATA), MAP), TRUTH)


def test_mapped_memory_holds_the_contract_of_writing():
    check_writes(MappedMemory(BytesMemory(bytearray(DATA)), MAP), Truth(TRUTH.known[:2], TRUTH.holes))


def test_a_single_range_with_a_base_holds_the_contract():
    memory_map = MemoryMap([MapRange(0x8000_0000, 0x9000, 0)])
    truth = Truth(known=[(0x8000_0000, DATA)], holes=[Extent(0x7FFF_F000, 0x1000)])
    check_memory(lambda: MappedMemory(BytesMemory(DATA), memory_map), truth)


def test_a_map_longer_than_its_source_faults_behind_the_source():
    memory = MappedMemory(BytesMemory(DATA), MemoryMap([MapRange(0x1000, 0x20000, 0)]))
    with pytest.raises(FaultError) as caught:
        memory.read(0x9FF0, 0x20)
    assert caught.value.address == 0xA000


def test_the_file_format_is_memflows():
    text = """
    [[range]]
    base = 0x1000
    length = 0x1000
    real_base = 0x3000

    [[range]]
    base = 0x4000
    length = 0x100
    """
    assert MemoryMap.from_toml(text).ranges == (MapRange(0x1000, 0x1000, 0x3000), MapRange(0x4000, 0x100, 0x4000))


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(1, 1 << 20), st.integers(0, 1 << 40)), max_size=8))
def test_written_and_read_a_map_is_the_same_or_overlaps(entries):
    ranges = sorted(MapRange(*entry) for entry in entries)
    if any(a.stop > b.base for a, b in itertools.pairwise(ranges)):
        with pytest.raises(InvalidArgumentError, match="overlap"):
            MemoryMap(ranges)
    else:
        memory_map = MemoryMap(ranges)
        assert MemoryMap.from_toml(memory_map.to_toml()) == memory_map
        assert memory_map.real_size == sum(r.length for r in ranges)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[range]]\nbase = 0\nlength = 0\n", "length"),
        ("[[range]]\nbase = -4096\nlength = 4096\n", "negative"),
        ("[[range]]\nbase = 0\n", "range 1 wants base and length"),
        ("[[range]]\nbase = 0\nlength = 1\nbsae = 2\n", "range 1"),
        ('[[range]]\nbase = "0"\nlength = 1\n', "not an integer"),
        ("[[range]]\nbase = true\nlength = 1\n", "not an integer"),
        ("[[range]]\nbase = 0x8000000000000000\nlength = 0x7fffffffffffffff\nreal_base = 0x7fffffffffffffff\n"
         "[[range]]\nbase = 0xffffffff\nlength = 0x7fffffffffffffff\n", "overlap"),
        ("[[range]]\nbase = 0xfffffffffffff000\nlength = 0x1001\n", "leaves the 64-bit"),
        ("range = 3", "tables"),
        ("[other]\n", "nothing else"),
        ("[[range", "not TOML"),
    ],
)  # fmt: skip
def test_a_wrong_map_says_what_is_wrong(text, says):
    with pytest.raises(InvalidArgumentError, match=says):
        MemoryMap.from_toml(text, "map.toml")


def test_the_last_byte_of_the_address_space_can_be_mapped():
    memory = MappedMemory(BytesMemory(DATA), MemoryMap([MapRange((1 << 64) - 0x1000, 0x1000, 0)]))
    assert memory.read((1 << 64) - 8, 8) == DATA[0xFF8:0x1000]
    assert memory.size == 1 << 64


def test_extents_follow_the_map():
    memory = MappedMemory(BytesMemory(DATA), MAP)
    found = list(memory.extents(0x2800, 0x9800))
    assert found == [Extent(0x2800, 0x800), Extent(0x4000, 0x5000), Extent(0x9000, 0x800)]


def test_a_map_of_the_whole_address_space_is_one():
    memory = MappedMemory(BytesMemory(DATA), MemoryMap([MapRange(0, 1 << 64, 0)]))
    values, faults = memory.words([8] * 20)
    assert not faults
    assert values[0] == int.from_bytes(DATA[8:16], "little")


@pytest.mark.parametrize("text", ["a=" + "[" * 100_000, "[[range]]\nbase = " + "9" * 5000])
def test_a_map_that_breaks_the_parser_is_an_error_too(text):
    with pytest.raises(InvalidArgumentError):
        MemoryMap.from_toml(text)


def test_a_shortcut_leads_to_the_bytes_of_the_first_range(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(os.urandom(5 * 4096))
    ranges = [MapRange(0x10000, 0x2000, 0x1000), MapRange(0x20000, 0x1000, 0)]
    memory = MappedMemory(FileMemory(str(path)), MemoryMap(ranges))
    way = memory.shortcut()
    assert way is not None
    assert way.size == 0x12000, "the second range is not where the first one leads"
    for address in (0x10000, 0x10FFF, 0x11FF8):
        assert os.pread(way.descriptor, 8, way.base + address) == memory.read(address, 8)
    with pytest.raises(OSError, match="Invalid argument"):
        os.pread(way.descriptor, 8, way.base + 0x8000)


def test_a_map_without_ranges_has_no_shortcut(tmp_path):
    (tmp_path / "image").write_bytes(b"x")
    assert MappedMemory(FileMemory(str(tmp_path / "image")), MemoryMap([])).shortcut() is None
