"""The connector kdump: files written by hand, of every version and kind, and files that are wrong."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hand_made_dumps import Kdump, deflated, flattened, kdump, note, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from support import require

from engine.connectors.kdump import KdumpConnector
from engine.errors import (
    EngineError,
    FaultError,
    FaultKind,
    InvalidArgumentError,
    NotRecognisedError,
    PluginError,
    SourceFaultError,
    UnusableTargetError,
)
from engine.targets import image_link
from engine.testing import Truth, check_memory
from engine.types import Extent

PAGE = 4096
TEXT = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"


def page(number: int) -> bytes:
    return struct.pack("<I", number) + os.urandom(60) * 68 + bytes(12)


#   pages   1 2 3 | 4 5 zeros | 6 7 left out | 8 … 19 no RAM | 20 … 39
PAGES = {pfn: page(pfn) for pfn in (1, 2, 3, *range(20, 40))} | {4: bytes(PAGE), 5: bytes(PAGE)}
LEFT_OUT = (6, 7)
TRUTH = Truth(
    [
        (1 * PAGE, b"".join(PAGES[pfn] for pfn in range(1, 6))),
        (20 * PAGE, b"".join(PAGES[pfn] for pfn in range(20, 40))),
    ],
    [Extent(0, PAGE), Extent(6 * PAGE, 14 * PAGE)],
)


@pytest.fixture
def made(tmp_path):
    def make(content: bytes, name: str = "dump", **options: str) -> KdumpConnector:
        path = tmp_path / name
        path.write_bytes(content)
        return KdumpConnector.open(str(path), options, parent=None, writable=False)

    return make


@pytest.mark.parametrize("pack", [plain, deflated])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize(("bits", "padded"), [(64, False), (32, False), (32, True)], ids=["64", "32", "32 padded"])
def test_every_width_and_byte_order_holds_the_contract(made, bits, padded, order, pack):
    how = Kdump(bits=bits, order=order, padded=padded, pack=pack, level=31, text=TEXT)
    connector = made(kdump(PAGES, how, LEFT_OUT))
    check_memory(lambda: connector.memory, TRUTH)
    assert connector.hints().vmcoreinfo == TEXT


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("version", range(7))
def test_every_version_is_read(made, version, padded):
    how = Kdump(bits=32 if padded else 64, version=version, padded=padded, level=9, text=TEXT if version >= 3 else b"")
    connector = made(kdump(PAGES, how, LEFT_OUT))
    assert connector.memory.read(PAGE, PAGE) == PAGES[1]
    assert connector.hints().vmcoreinfo == (TEXT if version >= 3 else None)
    expected = "left out by dump level 9: user pages" if version else "left out of the dump"
    with pytest.raises(FaultError, match=expected):
        connector.memory.u64(6 * PAGE)


def test_a_diskdump_has_one_bitmap(made):
    connector = made(kdump(PAGES, Kdump(signature=b"DISKDUMP", one_bitmap=True)))
    assert connector.memory.read(39 * PAGE, PAGE) == PAGES[39]
    with pytest.raises(FaultError) as caught:
        connector.memory.u64(6 * PAGE)
    assert caught.value.kind == FaultKind.ABSENT


@pytest.mark.parametrize("size", [4096, 16384, 65536])
def test_pages_are_as_large_as_the_header_says(made, size):
    pages = {pfn: os.urandom(size) for pfn in (0, 3)}
    connector = made(kdump(pages, Kdump(page=size)))
    assert connector.memory.page_size == size
    assert connector.memory.read(3 * size, size) == pages[3]


def _snappy(data: bytes) -> tuple[bytes, int]:
    import cramjam

    return bytes(cramjam.snappy.compress_raw(data)), 4


def _zstd(data: bytes) -> tuple[bytes, int]:
    import cramjam

    return bytes(cramjam.zstd.compress(data)), 32


@pytest.mark.parametrize("pack", [_snappy, _zstd], ids=["snappy", "zstd"])
def test_pages_packed_by_a_library_are_read(made, pack):
    try:
        status = pack(b"x")[1]
    except ImportError:
        require(False, "the library cramjam is not installed")
        raise
    connector = made(kdump(PAGES, Kdump(pack=pack, status=status), LEFT_OUT))
    check_memory(lambda: connector.memory, TRUTH)


def test_a_missing_library_is_named_when_the_dump_is_opened(made, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cramjam", None)
    with pytest.raises(PluginError, match=r"snappy.*cloudfs\[dumps\]"):
        made(kdump(PAGES, Kdump(status=4)))


def test_lzo_pages_are_read(made):
    def pack(data: bytes) -> tuple[bytes, int]:
        zeros, rest = divmod(len(data) - 18 - 1, 255)  # one long run of literals
        return bytes(1 + zeros) + bytes([rest + 1]) + data + b"\x11\0\0", 2

    connector = made(kdump(PAGES, Kdump(pack=pack), LEFT_OUT))
    check_memory(lambda: connector.memory, TRUTH)


def test_a_search_of_all_pages_sees_what_a_read_sees(made):
    pages = {pfn: page(pfn) for pfn in range(1000)}
    memory = made(kdump(pages, Kdump(pack=deflated))).memory
    values, faults = memory.words(np.arange(1000, dtype=np.uint64) * np.uint64(PAGE), "<u4")
    assert not faults
    assert values.tolist() == list(range(1000))


def test_pages_of_zeros_hold_no_data(made):
    memory = made(kdump(PAGES, Kdump(), LEFT_OUT)).memory
    assert list(memory.extents()) == [Extent(PAGE, 3 * PAGE), Extent(20 * PAGE, 20 * PAGE)]
    assert memory.read(4 * PAGE, 2 * PAGE) == bytes(2 * PAGE)


def test_columns_tell_what_was_left_out_from_what_is_not_there(made):
    memory = made(kdump(PAGES, Kdump(level=31), LEFT_OUT)).memory
    _, faults = memory.words(np.array([PAGE, 6 * PAGE + 8, 10 * PAGE, 4 * PAGE, 2**63], np.uint64))
    assert faults.rows.tolist() == [1, 2, 4]
    assert faults.addresses.tolist() == [6 * PAGE + 8, 10 * PAGE, 2**63]
    assert faults.kinds.tolist() == [FaultKind.LEFT_OUT, FaultKind.ABSENT, FaultKind.ABSENT]


def test_the_notes_say_how_much_was_left_out(made):
    notes = made(kdump(PAGES, Kdump(level=31), LEFT_OUT)).info.notes
    assert notes == ("2 pages were left out by dump level 31: cache, user or free pages",)


def test_the_memory_map_is_the_machines_ram(made):
    memory_map = made(kdump(PAGES, Kdump(), LEFT_OUT)).memory_map
    assert [(entry.base, entry.length) for entry in memory_map.ranges] == [(PAGE, 7 * PAGE), (20 * PAGE, 20 * PAGE)]


def test_registers_of_the_notes_are_hints(made):
    status = bytes(112) + struct.pack("<27Q", *range(100, 127)) + bytes(8)
    hints = made(kdump(PAGES, Kdump(notes=note(b"CORE", 1, status)))).hints()
    assert (hints.architecture, hints.registers[0]["rip"]) == ("x86_64", 116)


@pytest.mark.parametrize("machine", [b"", b"Unknown"])
def test_a_header_that_does_not_name_the_machine_leaves_that_to_the_notes(made, machine):
    status = bytes(112) + struct.pack("<34Q", *range(34)) + bytes(8)
    hints = made(kdump(PAGES, Kdump(notes=note(b"CORE", 1, status), machine=machine))).hints()
    assert (hints.architecture, hints.registers[0]["pc"]) == ("aarch64", 32)


def test_a_flattened_dump_is_read_in_place(made):
    content = kdump(PAGES, Kdump(pack=deflated, text=TEXT), LEFT_OUT)
    pieces = [(at, content[at : at + 700]) for at in range(0, len(content), 700)]
    wrong_first = [(0, bytes(512)), *reversed(pieces)]
    connector = made(flattened(wrong_first))
    check_memory(lambda: connector.memory, TRUTH)


def _split(tmp_path: Path) -> list[str]:
    names = []
    for number, part in enumerate([(0, 3), (3, 25), (25, 25), (25, 40), (0, 0)]):
        names.append(str(tmp_path / f"part{number}"))
        Path(names[-1]).write_bytes(kdump(PAGES, Kdump(split=part, pack=deflated), LEFT_OUT))
    return names


def test_the_parts_of_a_split_dump_are_one_memory(tmp_path):
    names = _split(tmp_path)
    connector = KdumpConnector.open(names[1], {"parts": str(tmp_path / "part*")}, parent=None, writable=False)
    check_memory(lambda: connector.memory, TRUTH)


def test_a_file_that_was_cut_into_pieces_is_joined(tmp_path):
    content = kdump(PAGES, Kdump(pack=deflated), LEFT_OUT)
    for number, at in enumerate(range(0, len(content), 10_000), 1):
        (tmp_path / f"dump.{number:03}").write_bytes(content[at : at + 10_000])
    link = image_link(str(tmp_path / "dump.001"))[1]
    connector = KdumpConnector.open(link.target, link.options, parent=None, writable=False)
    check_memory(lambda: connector.memory, TRUTH)


def test_the_lease_of_a_split_dump_ends_with_that_of_any_part(tmp_path):
    names = _split(tmp_path)
    connector = KdumpConnector.open(names[1], {"parts": str(tmp_path / "part*")}, parent=None, writable=False)
    require(connector.lease is not None and connector.lease.held, "there are no read leases here")
    assert not connector.info.live
    with open(names[3], "r+b"):
        assert connector.info.live


def test_one_part_of_a_split_dump_says_that_there_are_others(tmp_path):
    connector = KdumpConnector.open(_split(tmp_path)[1], {}, parent=None, writable=False)
    assert any("parts=PATTERN" in note for note in connector.info.notes)
    assert connector.memory.read(20 * PAGE, PAGE) == PAGES[20]
    for address in (PAGE, 30 * PAGE):
        with pytest.raises(FaultError, match="another part of a split dump"):
            connector.memory.read(address, PAGE)
        with pytest.raises(FaultError, match="another part of a split dump"):
            connector.memory.read(address, 2 * PAGE)


def test_parts_of_different_dumps_are_refused(tmp_path):
    names = _split(tmp_path)
    Path(names[3]).write_bytes(kdump(PAGES, Kdump(split=(25, 41), count=41)))
    with pytest.raises(InvalidArgumentError, match="is no part of the dump"):
        KdumpConnector.open(names[0], {"parts": str(tmp_path / "part*")}, parent=None, writable=False)


def test_a_part_given_twice_is_refused(tmp_path):
    names = _split(tmp_path)
    Path(tmp_path / "part9").write_bytes(Path(names[1]).read_bytes())
    with pytest.raises(InvalidArgumentError, match="same part"):
        KdumpConnector.open(names[0], {"parts": str(tmp_path / "part*")}, parent=None, writable=False)


def test_a_damaged_page_names_its_place_and_leaves_the_others(made):
    content = kdump(PAGES, Kdump(pack=deflated))
    packed = deflated(PAGES[3])[0]
    at = content.index(packed)
    memory = made(content[: at + 5] + b"\xff" * 20 + content[at + 25 :]).memory
    with pytest.raises(SourceFaultError, match=f"block at offset {at:#x} of the file is damaged") as caught:
        memory.read(2 * PAGE, 2 * PAGE)
    assert caught.value.address == 3 * PAGE
    assert memory.read_padded(2 * PAGE, 3 * PAGE) == PAGES[2] + bytes(2 * PAGE)


@pytest.mark.parametrize("pack", [plain, deflated])
def test_a_dump_that_is_cut_opens_as_far_as_it_goes(made, pack):
    content = kdump(PAGES, Kdump(pack=pack))
    at = content.index(pack(PAGES[30])[0])
    memory = made(content[: at + 40]).memory
    assert memory.read(20 * PAGE, 10 * PAGE) == b"".join(PAGES[pfn] for pfn in range(20, 30))
    with pytest.raises(SourceFaultError):
        memory.read(31 * PAGE, 8)
    assert memory.read_padded(29 * PAGE, 11 * PAGE)[:PAGE] == PAGES[29]


def test_a_dump_that_is_cut_in_its_bitmaps_says_so(made):
    content = kdump(PAGES, Kdump())
    connector = made(content[: 3 * PAGE + 2])
    assert any("within its bitmaps" in note for note in connector.info.notes)


def test_a_page_that_there_was_no_room_for_says_so(made):
    content = bytearray(kdump(PAGES, Kdump(status=8)))
    at = 4 * PAGE + 24 * 2  # header, sub header, two bitmaps; the third descriptor
    content[at : at + 24] = bytes(24)
    connector = made(bytes(content))
    with pytest.raises(SourceFaultError, match="there was no room for the page"):
        connector.memory.u64(3 * PAGE)
    assert any("no room for all pages" in note for note in connector.info.notes)


def test_other_files_are_not_recognised(made):
    for content in (b"KDUMP", b"\x7fELF" + bytes(1000)):
        with pytest.raises(NotRecognisedError, match="is no kdump file"):
            made(content)


@pytest.mark.parametrize("count", [0, 2**40, 2**63], ids=str)
def test_an_absurd_number_of_pages_is_refused(made, count):
    with pytest.raises(UnusableTargetError, match="pages"):
        made(kdump(PAGES, Kdump(count=count)))


def test_bitmaps_larger_than_the_file_cost_nothing(made):
    content = bytearray(kdump(PAGES, Kdump(version=5)))
    struct.pack_into("<II", content, 436, 0xFFFFFFFF, 0xFFFFFFFF)
    with pytest.raises(UnusableTargetError, match="pages"):
        made(bytes(content))


def test_bits_that_a_file_does_not_have_take_no_memory(made):
    tracemalloc.start()
    try:
        made(kdump(PAGES, Kdump(count=2**31 - 1)).replace(struct.pack("<I", 2), struct.pack("<I", 1 << 18), 1))
    except UnusableTargetError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize("content", [kdump(PAGES, Kdump()), kdump(PAGES, Kdump(signature=b"DISKDUMP")), flattened([])])
def test_a_dump_is_recognised_by_its_content(tmp_path, content):
    path = tmp_path / "vmcore"
    path.write_bytes(content)
    assert str(image_link(str(path))[1]).startswith("kdump")


GOOD = kdump(PAGES, Kdump(pack=deflated, text=TEXT, notes=note(b"CORE", 1, bytes(336)), level=31), LEFT_OUT)
FLAT = flattened([(at, GOOD[at : at + 5000]) for at in range(0, len(GOOD), 5000)])
_PLACES = st.one_of(st.integers(0, 470), st.integers(4096, 4210), st.integers(8192, 8200), st.integers(16384, 17200))


@pytest.mark.parametrize("good", [GOOD, FLAT], ids=["in order", "flattened"])
@settings(max_examples=150, deadline=None)
@given(patches=st.lists(st.tuples(_PLACES, st.binary(min_size=1, max_size=8)), max_size=4), cut=st.integers(0, 400))
def test_a_damaged_header_gives_engine_errors_only(tmp_path_factory, good, patches, cut):
    content = bytearray(good)
    for at, data in patches:
        content[at : at + len(data)] = data
    path = tmp_path_factory.getbasetemp() / "damaged-dump"
    path.write_bytes(content[: len(content) - 50 * cut])
    try:
        memory = KdumpConnector.open(str(path), {}, parent=None, writable=False).memory
        memory.read_padded(0, 50 * PAGE)
        memory.words(np.arange(0, 50 * PAGE, 512, dtype=np.uint64))
        for extent in list(memory.extents(0, 50 * PAGE)):
            memory.read_padded(extent.start, extent.size)
    except EngineError:
        pass
