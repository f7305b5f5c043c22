"""Connector `lime`: images of LiME and AVML, sound and damaged."""

from __future__ import annotations

import os
import random
import struct
from contextlib import suppress

import pytest
from dump_samples import AVML_BLOCK, avml_blocks, avml_image, lime_header, lime_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import require

from engine.connectors.lime import LimeConnector
from engine.errors import EngineError, FaultError, NotRecognisedError, PluginError, SourceFaultError
from engine.targets import chain_of, open_target
from engine.testing import Truth, check_connector
from engine.types import Extent

MIB = 1 << 20
BIOS = [(0x1000, os.urandom(0x9EC00)), (0x100000, os.urandom(3 * 65536 + 777)), (1 << 32, b"high" * 30000)]
"""Ranges as a PC has them: the first stops in the middle of a page."""


@pytest.fixture(autouse=True)
def library():
    try:
        import cramjam  # noqa: F401  # what unpacks AVML
    except ImportError:
        require(False, "the library cramjam is not installed")


@pytest.fixture
def opened(tmp_path):
    made = []

    def make(data: bytes, **options: str) -> LimeConnector:
        path = tmp_path / f"image-{len(made)}"
        path.write_bytes(data)
        made.append(LimeConnector.open(str(path), options, parent=None, writable=False))
        return made[-1]

    yield make
    for connector in made:
        connector.close()


def offset_of(image: bytes, address: int, magic: bytes) -> int:
    """Where the header of the block at `address` stands."""
    return image.index(magic + struct.pack("<IQ", 1 if magic == b"EMiL" else 2, address))


@pytest.mark.parametrize("make", [lime_image, avml_image])
def test_every_range_is_read_where_it_lay(opened, make):
    connector = opened(make(BIOS))
    for address, data in BIOS:
        assert connector.memory.read(address, len(data)) == data
    found = [(one.base, one.length) for one in connector.memory_map.ranges]
    assert found == [(start, len(data)) for start, data in BIOS]
    assert len(connector.info.notes) == 1


@pytest.mark.parametrize("make", [lime_image, avml_image])
def test_what_can_be_read_changes_no_oftener_than_the_ranges_do(opened, make):
    assert opened(make([(0x1000, b"x" * 0x2000), (0x10000, b"x" * 0x1000)])).memory.page_size == 4096
    assert opened(make([(0x1000, b"x" * 0x9EC00), (0x100000, b"x" * 0x1000)])).memory.page_size == 1024


@pytest.mark.parametrize("make", [lime_image, avml_image])
def test_it_holds_the_contract_of_connectors(opened, make):
    connector = opened(make(BIOS))
    check_connector(connector, Truth(known=BIOS, holes=[Extent(0, 0x1000), Extent(0x9FC00, 0x60400)]))


@pytest.mark.parametrize("make", [lime_image, avml_image])
def test_it_is_opened_by_its_content_alone(tmp_path, make):
    path = tmp_path / "memory.raw"
    path.write_bytes(make(BIOS))
    with open_target(str(path)) as machine:
        assert machine.instances("connector")[0].connector.kind == "lime"


def test_raw_still_shows_its_bytes(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(lime_image(BIOS))
    with open_target(f"raw:{path}") as machine:
        assert machine.instances("connector")[0].memory.read(0, 4) == b"EMiL"


def test_a_lime_image_that_may_be_written_is(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(lime_image(BIOS))
    connector = LimeConnector.open(str(path), {}, parent=None, writable=True)
    connector.memory.write(0x100000, b"new")
    connector.close()
    assert path.read_bytes()[32 + 0x9EC00 + 32 :].startswith(b"new")


def test_an_avml_image_is_never_written(tmp_path):
    path = tmp_path / "memory"
    path.write_bytes(avml_image(BIOS))
    connector = LimeConnector.open(str(path), {}, parent=None, writable=True)
    assert not connector.info.writable
    connector.close()


# ---- damage ------------------------------------------------------------------------------------------------------


def test_a_lime_image_opens_up_to_a_header_that_is_damaged(opened):
    image = bytearray(lime_image(BIOS))
    at = offset_of(image, 0x100000, b"EMiL")
    image[at] ^= 1
    connector = opened(bytes(image))
    assert connector.memory.read(0x1000, 0x9EC00) == BIOS[0][1]
    assert len(connector.memory_map) == 1
    assert f"at offset {at:#x}" in connector.info.notes[1]


def test_what_follows_the_last_range_is_named_and_left_out(opened):
    image = lime_image(BIOS)
    connector = opened(image + b"rubbish" * 100)
    assert len(connector.memory_map) == 3
    assert f"at offset {len(image):#x}" in connector.info.notes[1]
    assert "last 700 bytes" in connector.info.notes[1]


def test_a_lime_image_that_was_cut_off_opens_up_to_there(opened):
    connector = opened(lime_image(BIOS)[:-1000])
    start, data = BIOS[-1]
    assert connector.memory.read(start, len(data) - 1000) == data[:-1000]
    with pytest.raises(FaultError) as caught:
        connector.memory.read(start, len(data))
    assert caught.value.address == start + len(data) - 1000
    assert "last 1000 bytes are missing" in connector.info.notes[1]


def test_a_range_that_overlaps_another_is_left_out(opened):
    connector = opened(lime_image([(0x1000, b"a" * 0x2000), (0x2000, b"b" * 0x1000), (0x8000, b"c" * 0x1000)]))
    assert connector.memory.read(0x2000, 0x1000) == b"a" * 0x1000
    assert [one.base for one in connector.memory_map.ranges] == [0x1000, 0x8000]
    assert "1 ranges overlap" in connector.info.notes[1]


NOISE = random.Random(7).randbytes(5 * 65536)
AVML_RANGES = [(0x100000, NOISE), (0x400000, b"second" * 40000), (0x800000, b"third" * 999)]


def test_a_damaged_piece_faults_with_its_offset_and_the_rest_is_read(opened):
    image = bytearray(avml_image(AVML_RANGES))
    at = 32 + 10 + 2 * (65536 + 8)  # header, identifier, two pieces that do not shrink
    image[at + 500] ^= 1
    connector = opened(bytes(image))
    data = AVML_RANGES[0][1]
    assert connector.memory.read(0x100000, 2 * 65536) == data[: 2 * 65536]
    assert connector.memory.read(0x100000 + 3 * 65536, 2 * 65536) == data[3 * 65536 :]
    with pytest.raises(SourceFaultError, match=f"offset {at:#x} of the file is damaged") as caught:
        connector.memory.read(0x100000, len(data))
    assert caught.value.address == 0x100000 + 2 * 65536


def test_a_piece_whose_length_is_damaged_spoils_its_block_from_there_on(opened):
    image = bytearray(avml_image(AVML_RANGES))
    at = 32 + 10 + 65536 + 8
    image[at + 1 : at + 4] = b"\xff\xff\xff"
    connector = opened(bytes(image))
    assert connector.memory.read(0x100000, 65536) == AVML_RANGES[0][1][:65536]
    with pytest.raises(SourceFaultError, match=f"offset {at:#x} of the file"):
        connector.memory.read(0x100000 + 65536, 1)
    assert connector.memory.read(0x800000, 5 * 999) == AVML_RANGES[2][1]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_damaged_header_of_avml_costs_its_own_block_alone(opened, number):
    blocks = [bytearray(block) for _, block in avml_blocks(AVML_RANGES)]
    at = sum(len(block) for block in blocks[:number])
    blocks[number][5] ^= 0x40
    if number == 0:  # a file is known by its first header
        blocks.insert(0, bytearray(avml_image([(0x1000, b"before" * 1000)])))
        at = len(blocks[0])
    connector = opened(b"".join(blocks))
    for index, (address, data) in enumerate(AVML_RANGES):
        if index != number:
            assert connector.memory.read(address, len(data)) == data
    with pytest.raises(FaultError):
        connector.memory.read(AVML_RANGES[number][0], 1)
    assert f"bytes {at:#x}-" in connector.info.notes[1]


def test_a_damaged_length_behind_a_block_costs_nothing(opened):
    blocks = [bytearray(block) for _, block in avml_blocks(AVML_RANGES)]
    blocks[1][-8:] = bytes(8)
    connector = opened(b"".join(blocks))
    for address, data in AVML_RANGES:
        assert connector.memory.read(address, len(data)) == data
    assert "length of the block" in connector.info.notes[1]


@pytest.mark.parametrize("cut", [1, 8, 9, 100, 5000])
def test_an_avml_image_that_was_cut_off_opens_up_to_there(opened, cut):
    connector = opened(avml_image([*AVML_RANGES, (0xC00000, random.Random(1).randbytes(65536 * 2))])[:-cut])
    for address, data in AVML_RANGES:
        assert connector.memory.read(address, len(data)) == data
    assert connector.memory.read(0xC00000, 65536) == random.Random(1).randbytes(65536)
    assert len(connector.info.notes) > 1


def test_rubbish_behind_an_avml_image_is_named(opened):
    image = avml_image(AVML_RANGES)
    connector = opened(image + b"rubbish!" * 9)
    assert connector.memory.read(0x800000, 5 * 999) == AVML_RANGES[2][1]
    assert f"{len(image):#x}-{len(image) + 72:#x}" in connector.info.notes[1]


def test_a_block_that_claims_more_than_snappy_can_pack_is_none(opened):
    """A bomb: a header that promises an exabyte, before a handful of bytes."""
    bomb = lime_header(b"AVML", 2, 0, 1 << 60) + b"\xff\x06\x00\x00sNaPpY" + struct.pack("<Q", 10)
    with pytest.raises(NotRecognisedError, match="no range of memory"):
        opened(bomb)
    connector = opened(avml_image(AVML_RANGES) + bomb)
    assert connector.memory.size < 1 << 30


def test_pieces_that_hold_nothing_end_the_search_for_a_block(opened):
    """Skippable pieces of no bytes, a million of them: each record may have a few."""
    header = lime_header(b"AVML", 2, 1 << 40, 4 << 20)
    connector = opened(avml_image(AVML_RANGES) + header + b"\xfe\0\0\0" * (1 << 20))
    assert connector.memory.read(0x800000, 5 * 999) == AVML_RANGES[2][1]
    assert any("too many pieces" in note for note in connector.info.notes)


@pytest.mark.parametrize(
    "data",
    [b"EMiL\x02\0\0\0" + bytes(24), b"AVML\x01\0\0\0" + bytes(24), b"EMiL", bytes(64), lime_header(b"EMiL", 1, 9, -5)],
)
def test_what_is_none_says_so(opened, data):
    with pytest.raises(NotRecognisedError, match="LiME or AVML image"):
        opened(data)


def test_without_the_library_an_avml_image_says_what_to_install(opened, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cramjam", None)
    with pytest.raises(PluginError, match=r"pip install 'cloudfs\[dumps\]'"):
        opened(avml_image(BIOS))
    assert opened(lime_image(BIOS)).memory.read(0x1000, 1) == BIOS[0][1][:1]


# ---- what AVML leaves out ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_blocks_of_zeros_that_avml_leaves_out_read_as_zeros(opened, version):
    blocks = [(0, b"f" * AVML_BLOCK), (AVML_BLOCK, b"s" * AVML_BLOCK), (4 * AVML_BLOCK, b"last")]
    connector = opened(lime_image(blocks) if version == 1 else avml_image(blocks))
    memory = connector.memory
    assert memory.read(2 * AVML_BLOCK - 2, 4) == b"ss\0\0"
    assert memory.read(4 * AVML_BLOCK - 2, 4) == b"\0\0la"
    assert memory.u64(3 * AVML_BLOCK) == 0
    words, faults = memory.words([AVML_BLOCK, 3 * AVML_BLOCK, 5 * AVML_BLOCK], "<u4")
    assert words.tolist() == [0x73737373, 0, 0]
    assert faults.rows.tolist() == [2]
    assert "32 MiB" in connector.info.notes[1]
    assert sum(extent.size for extent in memory.extents()) == 2 * AVML_BLOCK + 4


@pytest.mark.parametrize(
    "blocks",
    [
        [(0, b"f" * AVML_BLOCK), (AVML_BLOCK + 4096, b"last")],
        [(0, b"f" * (AVML_BLOCK - 4096)), (3 * AVML_BLOCK - 4096, b"last")],
    ],
    ids=["no whole blocks", "behind no whole block"],
)
def test_any_other_gap_is_a_hole(opened, blocks):
    memory = opened(avml_image(blocks)).memory
    stop = len(blocks[0][1])
    with pytest.raises(FaultError) as caught:
        memory.read(stop, 1)
    assert caught.value.address == stop


def test_a_gap_between_ranges_of_lime_itself_is_a_hole(opened):
    memory = opened(lime_image([(0, b"f" * AVML_BLOCK), (2 * AVML_BLOCK, b"last")])).memory
    with pytest.raises(FaultError):
        memory.read(AVML_BLOCK, 1)


# ---- hostile files -----------------------------------------------------------------------------------------------

SMALL = {"lime": lime_image([(0x1000, b"x" * 300), (0x8000, bytes(100))]),
         "avml": avml_image([(0x1000, b"x" * 300 + bytes(70000)), (0x80000, b"abc")])}  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(SMALL)),
    st.lists(st.tuples(st.integers(8, 1 << 12), st.integers(0, 255)), max_size=6),
    st.integers(0, 1 << 12),
    st.binary(max_size=40),
)
def test_no_damage_raises_anything_but_the_errors_of_the_engine(tmp_path, name, changes, cut, behind):
    data = bytearray(SMALL[name])
    for at, value in changes:
        data[at % len(data)] = value
    path = tmp_path / "hostile"
    path.write_bytes(bytes(data[: len(data) - cut % len(data)]) + behind)
    try:
        connector = LimeConnector.open(str(path), {}, parent=None, writable=False)
    except EngineError:
        return
    for one in connector.memory_map.ranges:
        with suppress(FaultError):
            connector.memory.read(one.base, min(one.length, MIB))
    assert sum(extent.size for extent in connector.memory.extents()) <= 24 * len(data)
    connector.close()


def test_a_chain_of_a_lime_image_is_its_connector(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(lime_image(BIOS))
    assert str(chain_of(str(path)).links[0][1]) == f"lime:{path}"
