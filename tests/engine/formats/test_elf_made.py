"""ELF of every class and byte order, made by hand; readelf, which reads all machines, is the oracle."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from elf_samples import MadeSymbol, load, make_elf
from readelf import Readelf, by_place

from engine.bytes_memory import BytesMemory
from engine.errors import BadDataError
from engine.formats.elf import ElfFile, ElfImage, build_id_of, parse_notes
from engine.types import ExportInfo

SYMBOLS = [
    MadeSymbol(b"libmade.so", section=0, kind=0, binding=0),
    MadeSymbol(b"wanted", section=0),
    MadeSymbol(b"code", 0x100, 16),
    MadeSymbol(b"data", 0x200, 8, kind=1),
    MadeSymbol(b"of_thread", 0x10, 4, kind=6),
    MadeSymbol(b"chosen", 0x300, 4, kind=10),
    MadeSymbol(b"only_one", 0x400, 4, kind=1, binding=10),
    MadeSymbol(b"weak", 0x500, 4, binding=2),
    MadeSymbol(b"local", 0x600, 4, binding=0),
    MadeSymbol(b"hidden", 0x600, 4, other=2),
    MadeSymbol(b"guarded", 0x600, 4, other=3),
    MadeSymbol(b"absolute", 0x600, 4, section=0xFFF1),
    MadeSymbol(b"", 0x600, 4),
]
# machine, class, big-endian → name of the architecture
MACHINES = {
    (62, 64, False): "x86_64", (62, 32, False): "x32", (3, 32, False): "i386", (183, 64, False): "aarch64",
    (183, 64, True): "aarch64_be", (40, 32, False): "arm", (40, 32, True): "armeb", (243, 64, False): "riscv64",
    (243, 32, False): "riscv32", (21, 64, False): "ppc64le", (21, 64, True): "ppc64", (20, 32, True): "ppc",
    (22, 64, True): "s390x", (22, 32, True): "s390", (8, 32, True): "mips", (8, 64, False): "mips64el",
    (43, 64, True): "sparc64", (258, 64, False): "loongarch64", (0x9026, 64, False): "alpha", (15, 32, True): "parisc",
    (4, 32, True): "m68k", (247, 64, False): "bpf", (61234, 64, False): "em_61234",
}  # fmt: skip


@pytest.fixture(params=MACHINES, ids=lambda key: MACHINES[key])
def data(request) -> bytes:
    machine, bits, big_endian = request.param
    wide = machine in (22, 0x9026) and bits == 64
    return make_elf(
        SYMBOLS, bits=bits, big_endian=big_endian, machine=machine, build_id=b"\xab" * 20, wide_hash=wide
    )


@pytest.fixture
def path(data, tmp_path) -> str:
    file = tmp_path / "made.so"
    file.write_bytes(data)
    return str(file)


@pytest.mark.parametrize("key", MACHINES, ids=lambda key: MACHINES[key])
def test_the_architecture_has_its_usual_name(key):
    machine, bits, big_endian = key
    made = make_elf([], bits=bits, big_endian=big_endian, machine=machine)
    assert ElfFile(BytesMemory(made)).header.architecture == MACHINES[key]


def test_exports_of_every_machine_are_those_of_readelf(data, path):
    exports = sorted(ElfFile(BytesMemory(data)).exports(), key=by_place)
    assert exports == Readelf(path).exports()
    assert len(exports) == 7


def test_imports_of_every_machine_are_those_of_readelf(data, path):
    assert list(ElfFile(BytesMemory(data)).imports()) == Readelf(path).imports() != []


def test_name_and_build_id_of_every_machine_are_those_of_readelf(data, path):
    elf = ElfFile(BytesMemory(data))
    assert (elf.soname(), elf.build_id()) == (Readelf(path).soname(), Readelf(path).build_id())
    assert elf.build_id() == "ab" * 20


@pytest.mark.parametrize("base", [None, 0x7F0000000000, 0x10000000])
def test_a_loaded_image_of_every_machine_says_what_its_file_says(data, base):
    file = ElfFile(BytesMemory(data))
    if base is not None and base >= file.header.address_stop:
        base = 0x70000000
    image = ElfImage(BytesMemory(load(file, base)), base or 0x123456000)
    assert list(image.exports()) == list(file.exports())
    assert list(image.imports()) == list(file.imports())


def test_the_offset_of_a_symbol_of_a_thread_is_that_in_its_block():
    exports = list(ElfFile(BytesMemory(make_elf(SYMBOLS))).exports())
    assert ExportInfo("of_thread", 0x10, 4, "tls") in exports


def test_a_symbol_behind_the_image_is_skipped_and_counted():
    elf = ElfFile(BytesMemory(make_elf([MadeSymbol(b"far", 1 << 40), MadeSymbol(b"near", 16)])))
    assert [export.name for export in elf.exports()] == ["near"]
    assert elf.skipped == 1


# -- notes: 12 bytes of sizes and kind, owner, data, each padded -------------------------------------------


def note(owner: bytes, kind: int, data: bytes, alignment: int) -> bytes:
    padded = owner + bytes(-(12 + len(owner)) % alignment)
    return struct.pack("<III", len(owner), len(data), kind) + padded + data + bytes(-len(data) % alignment)


PROPERTY = note(b"GNU\0", 5, bytes(16), 8)
BUILD_ID = note(b"GNU\0", 3, bytes(range(20)), 4)


def test_the_build_id_is_found_among_other_notes():
    data = note(b"stapsdt\0", 3, bytes(7), 4) + note(b"GNU\0", 1, bytes(16), 4) + BUILD_ID
    assert build_id_of(data) == bytes(range(20)).hex()


def test_a_build_id_that_was_merged_with_notes_of_wider_padding_is_found():
    assert build_id_of(PROPERTY + BUILD_ID, alignment=8) == bytes(range(20)).hex()
    assert build_id_of(note(b"GNU\0", 5, bytes(13), 4) + BUILD_ID, alignment=8) == bytes(range(20)).hex()


def test_notes_padded_to_eight_bytes_are_read():
    notes = list(parse_notes(PROPERTY + note(b"Linux\0", 0x100, b"12345", 8), alignment=8))
    assert [(found.owner, found.kind, len(found.data)) for found in notes] == [(b"GNU", 5, 16), (b"Linux", 0x100, 5)]


def test_a_note_that_is_cut_ends_the_notes():
    assert len(list(parse_notes(PROPERTY + BUILD_ID[:-8]))) == 1
    assert list(parse_notes(struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 3))) == []


# -- tables that lie ---------------------------------------------------------------------------------------


def poked(tag: int, value: int) -> ElfFile:
    """A made image with one value of its dynamic section replaced."""
    data = bytearray(make_elf(SYMBOLS))
    place = next(at for at in range(0x200, 0x300, 16) if struct.unpack_from("<Q", data, at)[0] == tag)
    struct.pack_into("<Q", data, place + 8, value)
    return ElfFile(BytesMemory(data))


@pytest.mark.parametrize("tag", [4, 5, 6], ids=["hash", "strings", "symbols"])
@pytest.mark.parametrize("value", [1 << 63, 0x900000, (1 << 64) - 1])
def test_a_table_outside_of_the_image_is_bad_data(tag, value):
    with pytest.raises(BadDataError):
        list(poked(tag, value).exports())


def test_a_string_table_of_an_impossible_size_is_bad_data():
    with pytest.raises(BadDataError):
        list(poked(10, 1 << 40).exports())


def test_symbols_of_a_foreign_size_are_bad_data():
    with pytest.raises(BadDataError, match="symbols of 25 bytes"):
        list(poked(11, 25).exports())


def test_a_symbol_count_beyond_the_image_is_bad_data():
    data = bytearray(make_elf(SYMBOLS))
    place = ElfFile(BytesMemory(data)).dynamic.linked(4)
    struct.pack_into("<I", data, place + 4, 0x7FFFFFFF)
    with pytest.raises(BadDataError, match="2147483647 dynamic symbols"):
        list(ElfFile(BytesMemory(data)).exports())


def test_thousands_of_symbols_that_share_one_long_name_do_not_fill_the_memory():
    name = b"x" * 60000
    data = make_elf([MadeSymbol(name, 16)] + [MadeSymbol(b"", 16)] * 6000)
    elf = ElfFile(BytesMemory(data))
    table = elf.dynamic.linked(6)
    rows = bytearray(data)
    for number in range(6001):
        struct.pack_into("<I", rows, table + 24 + 24 * number, 1)
    with pytest.raises(BadDataError, match="overlap"):
        list(ElfFile(BytesMemory(rows)).exports())


def test_names_that_overlap_may_not_be_larger_together_than_some_times_their_table():
    name = b"\xff" * 60000
    data = bytearray(make_elf([MadeSymbol(name, 16)] + [MadeSymbol(b"", 16)] * 40))
    table = ElfFile(BytesMemory(bytes(data))).dynamic.linked(6)
    for number in range(41):
        struct.pack_into("<I", data, table + 24 + 24 * number, 1 + number)
    tracemalloc.start()
    try:
        with pytest.raises(BadDataError, match="overlap"):
            list(ElfFile(BytesMemory(data)).exports())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_names_that_end_alike_may_share_their_bytes():
    data = bytearray(make_elf([MadeSymbol(b"x" * 1000, 16)] + [MadeSymbol(b"", 16)] * 900))
    table = ElfFile(BytesMemory(bytes(data))).dynamic.linked(6)
    for number in range(901):
        struct.pack_into("<I", data, table + 24 + 24 * number, 1 + number)
    assert len(list(ElfFile(BytesMemory(data)).exports())) == 901


def test_segments_that_pass_the_end_of_the_address_space_are_bad_data():
    data = bytearray(make_elf(SYMBOLS))
    struct.pack_into("<Q", data, 64 + 40, (1 << 63) + 1)  # p_memsz
    struct.pack_into("<Q", data, 64 + 16, 1 << 63)  # p_vaddr
    with pytest.raises(BadDataError):
        _ = ElfFile(BytesMemory(data)).load_size


def test_a_loaded_image_with_more_segments_than_its_header_can_say_is_bad_data():
    data = bytearray(make_elf(SYMBOLS))
    struct.pack_into("<Q", data, 40, 0x1000)  # e_shoff
    struct.pack_into("<H", data, 56, 0xFFFF)  # e_phnum
    with pytest.raises(BadDataError, match="65535 or more"):
        _ = ElfImage(BytesMemory(data), 4096).loads


def test_a_file_with_more_segments_than_its_header_can_say_counts_them_in_section_zero():
    data = bytearray(make_elf(SYMBOLS))
    struct.pack_into("<Q", data, 40, len(data))  # e_shoff
    struct.pack_into("<H", data, 56, 0xFFFF)  # e_phnum
    data += struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 3, 0, 0)
    elf = ElfFile(BytesMemory(data))
    assert len(elf.segments) == 3
    assert next(elf.exports()).name == "code"
