"""The connector elfcore: files as kernels, QEMU and makedumpfile write them, and files that are wrong."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hand_made_dumps import Load, elf_core, note
from hypothesis import given, settings
from hypothesis import strategies as st
from support import applies

from engine.connectors.elfcore import ElfCoreConnector, KcoreConnector
from engine.errors import (
    AccessDeniedError,
    EngineError,
    FaultError,
    NotFoundError,
    NotRecognisedError,
    UnsupportedError,
    UnusableTargetError,
)
from engine.targets import image_link
from engine.testing import Truth, check_memory
from engine.types import Extent

DATA = os.urandom(0x6000)
TEXT = b"OSRELEASE=6.1.0\nPAGESIZE=4096\n"
INFO = note(b"VMCOREINFO", 0, TEXT)


def opened(path: Path, content: bytes) -> ElfCoreConnector:
    path.write_bytes(content)
    return ElfCoreConnector.open(str(path), {}, parent=None, writable=False)


@pytest.fixture
def made(tmp_path):
    return lambda content: opened(tmp_path / "core", content)


#   0x1000        0x3000     0x8000       0xa000
#   |  0..0x2000  |   hole   | 0x2000..0x4000 |
TWO = [Load(0x1000, DATA[:0x2000]), Load(0x8000, DATA[0x2000:0x4000])]
TRUTH = Truth([(0x1000, DATA[:0x2000]), (0x8000, DATA[0x2000:0x4000])], [Extent(0, 0x1000), Extent(0x3000, 0x5000)])


@pytest.mark.parametrize("gap", [0, 1, 1176], ids=["header only", "odd", "as QEMU"])
@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("bits", [64, 32])
def test_segments_are_read_at_their_physical_addresses(made, bits, order, gap):
    connector = made(elf_core(TWO, bits=bits, order=order, gap=gap))
    check_memory(lambda: connector.memory, TRUTH)
    assert connector.memory.page_size == 4096


def test_the_number_of_segments_may_stand_in_section_zero(made):
    many = [Load(0x1000 * i, bytes([i % 251]) * 64) for i in range(70_000)]
    connector = made(elf_core(many, many=True))
    assert len(connector.memory_map) == 70_000
    assert connector.memory.read(0x1000 * 69_999, 2) == bytes([69_999 % 251]) * 2


def test_where_vmcoreinfo_says_so_what_is_not_in_the_file_is_zeros(made):
    connector = made(elf_core([Load(0x1000, DATA[:0x1000], more=0x2000), Load(0x5000, DATA[:0x1000])], INFO))
    truth = [(0x1000, DATA[:0x1000] + bytes(0x2000)), (0x5000, DATA[:0x1000])]
    check_memory(lambda: connector.memory, Truth(truth, [Extent(0x4000, 0x1000)]))
    assert any("8192 bytes were left out" in note for note in connector.info.notes)


def test_without_vmcoreinfo_what_is_not_in_the_file_is_a_hole(made):
    connector = made(elf_core([Load(0x1000, DATA[:0x1000], more=0x2000)]))
    check_memory(lambda: connector.memory, Truth([(0x1000, DATA[:0x1000])], [Extent(0x2000, 0x2000)]))


def test_bytes_win_over_the_zeros_of_another_segment(made):
    connector = made(elf_core([Load(0x1000, DATA[:0x1000], more=0x4000), Load(0x3000, DATA[:0x1000])], INFO))
    whole = DATA[:0x1000] + bytes(0x1000) + DATA[:0x1000] + bytes(0x2000)
    assert connector.memory.read(0x1000, 0x5000) == whole


def test_overlapping_segments_are_one_memory(made):
    ram, text = Load(0x1000, DATA[:0x4000]), Load(0x2000, DATA[0x1000:0x2000], virtual=0xFFFFFFFF81000000)
    across = Load(0x4000, DATA[0x3000:0x6000])
    connector = made(elf_core([text, ram, across]))
    check_memory(lambda: connector.memory, Truth([(0x1000, DATA)], [Extent(0, 0x1000)]))


def test_segments_without_a_physical_address_are_left_out(made):
    vmalloc = Load(2**64 - 1, DATA[:0x1000], virtual=0xFFFFC90000000000)
    connector = made(elf_core([vmalloc, *TWO]))
    assert connector.info.real_size == 0x4000


def test_a_file_that_is_cut_opens_as_far_as_it_goes(tmp_path):
    connector = opened(tmp_path / "core", elf_core(TWO)[:-0x1001])
    check_memory(lambda: connector.memory, Truth(TRUTH.known[:1], [Extent(0x8000, 0x2000)]))
    assert any("the file is cut: 4097 bytes" in note for note in connector.info.notes)


def test_a_file_that_is_cut_in_its_table_of_segments_gives_what_is_left(made):
    content = elf_core([Load(0x1000, b"")] * 4)
    rows = bytearray(content[: 64 + 56 * 3])
    struct.pack_into("<IIQQQQQQ", rows, 64 + 56 * 2, 1, 7, 0, 0, 0x7000, 64, 64, 0)
    connector = made(bytes(rows))
    assert connector.memory.read(0x7000, 4) == b"\x7fELF"
    assert any("2 of 5 are missing" in note for note in connector.info.notes)


def test_an_executable_is_no_core(tmp_path):
    with pytest.raises(NotRecognisedError, match="is an ELF file but no core of a machine"):
        ElfCoreConnector.open(sys.executable, {}, parent=None, writable=False)


@pytest.mark.parametrize("notes", [b"", note(b"CORE", 6, bytes(16)), note(b"CORE", 0x46494C45, bytes(16))])
def test_the_core_of_a_process_is_told_from_that_of_a_machine(made, notes):
    loads = [Load(0, DATA[:0x1000], virtual=0x400000), Load(0, DATA[:0x1000], virtual=0x600000)]
    with pytest.raises(NotRecognisedError, match="core of a process"):
        made(elf_core(loads, notes))


def test_a_file_without_memory_says_so(made):
    with pytest.raises(UnusableTargetError, match="holds no memory"):
        made(elf_core([]))


def test_what_is_no_elf_file_is_not_recognised(made):
    with pytest.raises(NotRecognisedError, match="not an ELF image"):
        made(b"EMiL" + bytes(100))


def test_a_file_that_does_not_exist_is_said_so(tmp_path):
    with pytest.raises(NotFoundError):
        ElfCoreConnector.open(str(tmp_path / "none"), {}, parent=None, writable=False)


def test_vmcoreinfo_is_handed_to_the_os_layer(made):
    hints = made(elf_core(TWO, note(b"CORE", 1, bytes(336)) + INFO)).hints()
    assert hints.vmcoreinfo == TEXT
    assert hints.architecture == "x86_64"


def test_the_registers_of_a_status_note_are_hints(made):
    status = bytes(112) + struct.pack("<27Q", *range(100, 127)) + bytes(8)
    (registers,) = made(elf_core(TWO, note(b"CORE", 1, status))).hints().registers
    assert (registers["r15"], registers["rip"], registers["rsp"], registers["gs"]) == (100, 116, 119, 126)


def test_qemus_note_tells_the_page_tables(made):
    state = struct.pack("<II", 1, 440) + struct.pack("<18Q", *range(18)) + bytes(240)
    state += struct.pack("<6Q", 0x80050033, 0, 0x1234, 0x3074001, 0x750EB0, 0xFFFF888000000000)
    hints = made(elf_core(TWO, note(b"QEMU", 0, state))).hints()
    assert hints.dtb == 0x3074000
    assert hints.registers[0]["kernel_gs_base"] == 0xFFFF888000000000


def test_a_core_is_recognised_by_its_content(tmp_path):
    path = tmp_path / "vmcore"
    path.write_bytes(elf_core(TWO))
    assert str(image_link(str(path))[1]).startswith("elfcore")


def test_a_kernel_without_kcore_is_said_to_have_none():
    applies(not os.path.exists("/proc/kcore"), "this kernel has a /proc/kcore: the next test opens it")
    with pytest.raises(UnsupportedError, match="CONFIG_PROC_KCORE"):
        KcoreConnector.open("", {}, parent=None, writable=False)


def test_this_machines_kcore_opens_for_root_alone():
    applies(os.path.exists("/proc/kcore"), "this kernel has no /proc/kcore (CONFIG_PROC_KCORE)")
    if os.geteuid():
        with pytest.raises(AccessDeniedError, match="root"):
            KcoreConnector.open("", {}, parent=None, writable=False)
    else:
        connector = KcoreConnector.open("", {}, parent=None, writable=False)
        assert connector.info.live
        connector.close()


GOOD = elf_core(TWO, INFO + note(b"CORE", 1, bytes(336)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), max_size=4), st.integers(0, 900))
def test_a_damaged_header_gives_engine_errors_only(tmp_path_factory, patches, cut):
    content = bytearray(GOOD)
    for at, data in patches:
        content[at : at + len(data)] = data
    path = tmp_path_factory.getbasetemp() / "damaged-core"
    try:
        connector = opened(path, bytes(content[: len(content) - cut * 20]))
        memory = connector.memory
        memory.read_padded(0, 0xA000)
        memory.words(np.arange(0, 0xA000, 512, dtype=np.uint64))
        connector.hints()
    except EngineError:
        pass


def test_a_fault_behind_the_cut_is_exact(tmp_path):
    connector = opened(tmp_path / "core", elf_core(TWO)[:-0x1000])
    with pytest.raises(FaultError) as caught:
        connector.memory.read(0x8FF0, 0x20)
    assert caught.value.address == 0x9000
