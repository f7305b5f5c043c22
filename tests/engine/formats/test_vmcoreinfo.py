"""VMCOREINFO: its lines, its two forms, and finding it in memory."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.errors import NotRecognisedError
from engine.formats.vmcoreinfo import TEXT_LIMIT, Vmcoreinfo, find_vmcoreinfo
from engine.memory_map import MappedMemory, MapRange, MemoryMap

TEXT = b"""OSRELEASE=6.1.0-50-cloud-amd64
BUILD-ID=0123456789abcdef0123456789abcdef01234567
PAGESIZE=4096
SYMBOL(init_uts_ns)=ffffffffb0e19000
OFFSET(uts_namespace.name)=4
SYMBOL(_stext)=ffffffffaf400000
SYMBOL(vmemmap)=ffffea0000000000
SIZE(printk_info)=88
LENGTH(free_area.free_list)=5
NUMBER(phys_base)=-46137344
NUMBER(pgtable_l5_enabled)=0
NUMBER(TCR_EL1_T1SZ)=0x10
NUMBER(kimage_voffset)=0xffffa5d62f600000
KERNELOFFSET=2e400000
CONFIG_X86_PAE=y
CRASHTIME=1700000000
"""


def note(text: bytes, order: str = "<", name: bytes = b"VMCOREINFO\0\0") -> bytes:
    return struct.pack(order + "3I", 11, len(text), 0) + name + text


INFO = Vmcoreinfo.parse(TEXT)


def test_a_number_is_signed_decimal_or_hexadecimal():
    assert INFO.number("phys_base") == -46137344
    assert INFO.number("TCR_EL1_T1SZ") == 16
    assert INFO.number("kimage_voffset") == 0xFFFFA5D62F600000
    assert INFO.number("PAGESIZE") == 4096
    assert INFO.number("absent") is None


def test_a_symbol_is_hexadecimal_without_a_mark():
    assert INFO.symbol("_stext") == 0xFFFFFFFFAF400000
    assert INFO.symbols == {
        "init_uts_ns": 0xFFFFFFFFB0E19000, "_stext": 0xFFFFFFFFAF400000, "vmemmap": 0xFFFFEA0000000000,
    }  # fmt: skip
    assert INFO.symbol("absent") is None


def test_sizes_offsets_and_lengths_are_decimal():
    assert (INFO.size("printk_info"), INFO.offset("uts_namespace.name")) == (88, 4)
    assert INFO.length("free_area.free_list") == 5
    assert INFO.size("absent") is None


def test_other_lines_are_texts():
    assert INFO.release == "6.1.0-50-cloud-amd64"
    assert INFO.release_number() == (6, 1)
    assert INFO.build_id == "0123456789abcdef0123456789abcdef01234567"
    assert INFO.text("CONFIG_X86_PAE") == "y"
    assert INFO.text("CONFIG_ARM_LPAE") is None
    assert (INFO.page_size, INFO.kernel_offset) == (4096, 0x2E400000)


@pytest.mark.parametrize("value", ["", "-", "0x", "1.5", "0x1ffffffffffffffff", "9" * 40, "１２", "ten", "--1", "0x-1"])
def test_a_bad_number_is_none(value):
    text = f"OSRELEASE=1\nNUMBER(bad)={value}\nSYMBOL(bad)={value}z\nSIZE(bad)={value}\nPAGESIZE={value}\n"
    info = Vmcoreinfo.parse(text.encode())
    assert (info.number("bad"), info.symbol("bad"), info.page_size) == (None, None, 4096)
    assert info.size("bad") is None


def test_of_a_key_that_comes_twice_the_first_counts():
    assert Vmcoreinfo.parse(b"OSRELEASE=a\nPAGESIZE=4096\nOSRELEASE=b\nPAGESIZE=16384\n").values == {
        "OSRELEASE": "a", "PAGESIZE": "4096",
    }  # fmt: skip


def test_lines_with_control_characters_are_left_out():
    lines = [b"OSRELEASE=a\x1b[2J", b"BUILD-ID=\xff\xfe", b"no line", b"=x", b"PAGESIZE=4096", b"k" * 500 + b"=1"]
    info = Vmcoreinfo.parse(b"\n".join(lines))
    assert info.values == {"BUILD-ID": "\ufffd\ufffd", "PAGESIZE": "4096"}
    assert info.release == ""
    assert info.build_id is None


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_note_of_either_byte_order_is_parsed(order):
    assert Vmcoreinfo.parse_note(note(TEXT, order) + b"rest").raw == TEXT


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 64, note(TEXT)[:100], note(TEXT, name=b"VMCOREINFx\0\0"), note(b"NOTHING=" + bytes(64)), TEXT],
    ids=["empty", "zeros", "cut", "other name", "other text", "no note"],
)
def test_what_is_no_note_is_not_recognised(data):
    with pytest.raises(NotRecognisedError):
        Vmcoreinfo.parse_note(data)


# -- finding -------------------------------------------------------------------------------------------------------


def memory_with(*placed: tuple[int, bytes], size: int = 64 * 4096) -> BytesMemory:
    data = bytearray(size)
    for address, content in placed:
        data[address : address + len(content)] = content
    return BytesMemory(bytes(data))


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_text_and_its_note_are_found_as_one(order):
    (found,) = find_vmcoreinfo(memory_with((5 * 4096, TEXT), (9 * 4096, note(TEXT, order))))
    assert (found.raw, found.pages, found.notes) == (TEXT, (5 * 4096,), (9 * 4096,))


def test_a_text_that_begins_at_no_page_is_passed_over():
    assert find_vmcoreinfo(memory_with((5 * 4096 + 8, TEXT))) == []


def test_the_one_with_a_note_comes_before_planted_and_older_ones():
    older = TEXT.replace(b"6.1.0-50", b"5.10.0-1")
    longer = TEXT + b"NUMBER(planted)=1\n"
    found = find_vmcoreinfo(memory_with((0, older), (4096, longer), (2 * 4096, TEXT), (7 * 4096, note(TEXT))))
    assert [each.raw for each in found] == [TEXT, longer, older]


def test_a_damaged_copy_is_one_of_its_own():
    damaged = bytearray(TEXT)
    damaged[200:300] = bytes(100)
    found = find_vmcoreinfo(memory_with((4096, bytes(damaged)), (2 * 4096, TEXT), (3 * 4096, note(TEXT))))
    assert [each.raw for each in found] == [TEXT, TEXT[:200]]


def test_a_text_at_the_very_end_of_memory_is_found():
    assert len(find_vmcoreinfo(memory_with((4096, TEXT), size=4096 + len(TEXT)))) == 1
    assert find_vmcoreinfo(memory_with((4096, TEXT[:7]), size=4096 + 7)) == []


def test_a_text_longer_than_a_page_is_read_to_its_end():
    long = TEXT + b"".join(b"NUMBER(n%d)=%d\n" % (n, n) for n in range(400))
    (found,) = find_vmcoreinfo(memory_with((4096, long), (16 * 4096, note(long))))
    assert found.number("n399") == 399
    assert found.pages
    assert found.notes


def test_a_text_without_end_is_cut():
    endless = b"OSRELEASE=x\nPAGESIZE=4096\n" + b"y" * (1 << 20)
    (found,) = find_vmcoreinfo(memory_with((0, endless), size=1 << 20))
    assert len(found.raw) == TEXT_LIMIT


def test_only_the_part_asked_for_is_searched_and_holes_are_crossed():
    flat = memory_with((4096, TEXT), (3 * 4096, TEXT.replace(b"6.1", b"6.2")))
    memory = MappedMemory(flat, MemoryMap([MapRange(0, 8192, 0), MapRange(1 << 40, 8192, 8192)]))
    assert [each.pages for each in find_vmcoreinfo(memory)] == [(4096,), ((1 << 40) + 4096,)]
    assert [each.pages for each in find_vmcoreinfo(memory, 8192)] == [((1 << 40) + 4096,)]


@given(st.binary(max_size=600), st.integers(0, 40))
def test_any_bytes_give_values_that_are_text(junk, gap):
    memory = memory_with((4096, TEXT[:gap] + junk), (8192, note(junk)), (12288, b"OSRELEASE=" + junk))
    for found in find_vmcoreinfo(memory):
        assert all(key and value.isprintable() for key, value in found.values.items())
        assert all(0 <= value < 1 << 64 for value in found.symbols.values())
