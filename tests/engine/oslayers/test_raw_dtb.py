"""The OS layer `raw-dtb`: one address space from a DTB that the user knows."""

from __future__ import annotations

import pytest
from hand_made_tables import DTB, LARGE, LAST, USER, image, seen

from engine.bytes_memory import BytesMemory
from engine.errors import InvalidArgumentError, NotRecognisedError, ProcessExitedError
from engine.oslayer import Base, PhysicalMaps
from engine.oslayers.raw_dtb import RawDtbLayer
from engine.types import Rights, TargetHints

DATA = bytes(image())


def layer(**options: str) -> RawDtbLayer:
    return RawDtbLayer.open(Base(BytesMemory(DATA)), {"dtb": hex(DTB), "arch": "x86-64", **options})


def test_its_one_process_reads_through_the_page_tables():
    assert layer().process(1).memory.read(USER, 0x8000) == seen(DATA)


def test_the_kernel_is_the_same_address_space():
    memory = layer().kernel_memory
    assert memory is not None
    assert memory.read(LAST, 16) == DATA[0x41000:0x41010]


def test_a_register_s_pcid_is_dropped():
    assert layer(dtb=hex(DTB | 5)).info.dtb == DTB


def test_regions_are_what_is_mapped_joined_where_rights_are_equal():
    regions = [(one.start, one.stop, one.permissions) for one in layer().process(1).regions()]
    assert regions == [
        (USER, USER + 0x8000, "rwx?"),
        (USER + 0x9000, USER + 0xA000, "r--?"),
        (LARGE, LARGE + (1 << 21), "rwx?"),
        (LAST, 1 << 64, "rwx?"),
    ]


def test_physical_maps_tell_the_frames():
    process = layer().process(1).capability(PhysicalMaps)
    assert process is not None
    first = next(iter(process.physical_maps()))
    assert (first.start, first.size, first.physical) == (USER, 4096, 0x37000)
    assert first.rights & Rights.USER


def test_page_tables_tell_of_no_modules():
    assert not layer().tells_modules
    assert not layer().process(1).tells_modules


def test_there_is_no_other_process():
    assert layer().pids() == [1]
    with pytest.raises(ProcessExitedError):
        layer().process(2)


def test_without_a_dtb_it_recognises_nothing_and_says_what_to_pass():
    with pytest.raises(NotRecognisedError, match="dtb=ADDRESS"):
        RawDtbLayer.open(Base(BytesMemory(DATA)), {})


@pytest.mark.parametrize(
    ("architecture", "cr4", "mode"),
    [("x86_64", 0x750EB0, "x86-64"), ("x86_64", 0x751EB0, "x86-64-la57"), ("i386", 0x350ED0, "x86"),
     ("i386", 0x350EF0, "x86-pae")],
)  # fmt: skip
def test_without_a_dtb_it_says_which_a_dumps_cpu_used(architecture, cr4, mode):
    hints = TargetHints(architecture, 0x3074000, registers=({"cr3": 0x3074001, "cr4": cr4},))
    with pytest.raises(NotRecognisedError, match=f"raw-dtb:dtb=0x3074000,arch={mode} is what a CPU of this dump used"):
        RawDtbLayer.open(Base(BytesMemory(bytes(4096)), hints), {})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtb": "0x7fff0000"}, "no memory at the DTB"),
        ({"dtb": "0x5f000"}, "no address leads to memory by the page table at 0x5f000 as x86-64 reads it"),
        ({"dtb": "0x8000"}, "no address leads to memory by the page table at 0x8000"),
        ({"dtb": "here"}, "no number"),
        ({"arch": "x86-128"}, "x86-64"),
        ({"dtb1": "0x2000"}, "one root, not two"),
        ({"encryption": "much"}, "no number"),
    ],
)
def test_wrong_options_are_refused_with_a_sentence(options, why):
    with pytest.raises(InvalidArgumentError, match=why):
        layer(**options)


def test_bits_of_encryption_are_no_part_of_an_address():
    """AMD's C-bit, here bit 47, in every entry and in CR3."""
    data = bytearray(DATA)
    for table in range(0x1000, 0x8000, 8):
        if any(data[table : table + 8]):
            data[table + 5] |= 0x80
    opened = RawDtbLayer.open(
        Base(BytesMemory(bytes(data))), {"dtb": hex(DTB | 1 << 47), "arch": "x86-64", "encryption": hex(1 << 47)}
    )
    assert opened.process(1).memory.read(USER, 0x8000) == seen(data)
