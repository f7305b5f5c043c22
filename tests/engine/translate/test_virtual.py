"""VirtualMemory: a memory like any other; the tables stand in `hand_made_tables`."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hand_made_tables import DTB, LARGE, LAST, SIZE, USER, image, put, seen

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, FaultKind, InvalidArgumentError, ReadOnlyError
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.testing import Truth, check_memory, check_writes
from engine.translate.virtual import VirtualMemory
from engine.translate.x86 import EPT, X86_64
from engine.types import Extent, PageFlags, Rights

DATA = image()


def virtual(data: bytes | bytearray = DATA, **options) -> VirtualMemory:
    return VirtualMemory(BytesMemory(bytes(data)), [(X86_64, DTB)], **options)


TRUTH = Truth(
    known=[
        (USER, seen(DATA)),
        (USER + 0x9000, bytes(DATA[0x40000:0x41000])),
        (LARGE, bytes(DATA[0x400000:SIZE])),
        (LAST, bytes(DATA[0x41000:0x42000])),
    ],
    holes=[Extent(USER + 0x8000, 0x1000), Extent(USER + 0xA000, 0x1000), Extent(1 << 47, 1 << 20), Extent(0, 4096)],
)


@pytest.mark.parametrize("keep", [False, True])
def test_it_holds_the_contract_of_every_memory(keep):
    check_memory(lambda: virtual(keep=keep), TRUTH)


def test_a_view_made_for_one_operation_holds_it_too():
    check_memory(lambda: virtual().cached(), TRUTH)


def test_over_physical_memory_with_holes_it_holds_it_too():
    ranges = [MapRange(0, 0x38000, 0), MapRange(0x40000, SIZE - 0x40000, 0x40000)]
    physical = MappedMemory(BytesMemory(bytes(DATA)), MemoryMap(ranges))
    check_memory(lambda: VirtualMemory(physical, [(X86_64, DTB)]), TRUTH)


def test_writes_reach_the_page_frames_and_nothing_else():
    data = bytearray(DATA)
    memory = VirtualMemory(BytesMemory(data), [(X86_64, DTB)])
    check_writes(memory, TRUTH)
    assert data == DATA, "check_writes puts back what it changed"
    memory.write(USER + 0xFFC, b"12345678")
    changed = [index for index in range(SIZE) if data[index] != DATA[index]]
    assert set(changed) <= {*range(0x37FFC, 0x38000), *range(0x36000, 0x36004)}
    assert bytes(data[0x37FFC:0x38000]) == b"1234"


def test_read_only_physical_memory_refuses_writes():
    with pytest.raises(ReadOnlyError):
        virtual().write(USER, b"x")


def test_the_last_page_stops_at_two_to_the_64th():
    memory = virtual()
    assert memory.size == 1 << 64
    assert memory.read(LAST, 4096) == bytes(DATA[0x41000:0x42000])
    with pytest.raises(FaultError) as caught:
        memory.read(LAST + 4095, 2)
    assert caught.value.address == 1 << 64
    assert list(memory.extents(LAST)) == [Extent(LAST, 4096)]
    assert [(one.start, one.stop) for one in memory.physical_maps(LAST)] == [(LAST, 1 << 64)]


def test_a_fault_in_a_long_read_is_the_first_bad_address():
    with pytest.raises(FaultError) as caught:
        virtual().read(USER + 5, 40 * 4096)
    assert caught.value.address == USER + 0x8000


def test_a_long_read_across_the_stop_of_physical_memory_faults_there():
    memory = virtual()
    with pytest.raises(FaultError) as caught:
        memory.read(LARGE, 0x100000)
    assert caught.value.address == LARGE + 0x80000
    assert memory.read(LARGE + 0x70000, 0x10000) == bytes(DATA[0x470000:])


@pytest.mark.parametrize("start", [0, 1, 4095, 4097])
def test_many_scattered_pages_read_as_they_lie_in_physical_memory(start):
    frames = np.random.default_rng(start).permutation(100) + 0x50
    data = bytearray(DATA)
    for page, frame in enumerate(frames.tolist()):
        put(data, 0x4000, 100 + page, frame << 12 | 7)
    expected = b"".join(bytes(data[frame << 12 : frame + 1 << 12]) for frame in frames.tolist())
    memory = virtual(data)
    size = len(expected) - start - 17
    assert memory.read(USER + 100 * 4096 + start, size) == expected[start : start + size]


def test_a_table_outside_of_memory_is_said():
    data = bytearray(DATA)
    put(data, 0x3000, (USER >> 21 & 511) + 2, 0x7FFFF000 | 7)
    with pytest.raises(FaultError) as caught:
        virtual(data).u64(USER + 0x400000)
    assert caught.value.kind is FaultKind.TABLE
    assert "page table" in str(caught.value)


def test_virt_to_phys_one_by_one_and_many_agree():
    memory = virtual()
    addresses = [USER + page * 4096 + 7 for page in range(12)] * 3 + [LAST, LARGE + 12345, 1 << 50]
    column, faults = memory.virt_to_phys_many(addresses)
    bad = set(faults.rows.tolist())
    for row, address in enumerate(addresses):
        if row in bad:
            assert column[row] == 0
            with pytest.raises(FaultError):
                memory.virt_to_phys(address)
        else:
            assert memory.virt_to_phys(address) == int(column[row])
    assert len(bad) == 3 * 3 + 1


def test_rights_and_flags_of_a_page():
    memory = virtual()
    found = memory.walk(USER + 0x9000)
    assert found.rights == Rights.READ | Rights.USER
    assert memory.walk(LAST).flags == PageFlags.GLOBAL
    assert memory.walk(LARGE).page_size == 1 << 21


def test_physical_maps_join_what_follows_in_both_address_spaces():
    found = [(one.start, one.size, one.physical, one.page_size) for one in virtual().physical_maps()]
    falling = [(USER + page * 4096, 4096, (0x37 - page) << 12, 4096) for page in range(8)]
    assert found == [
        *falling,
        (USER + 0x9000, 4096, 0x40000, 4096),
        (LARGE, 1 << 21, 0x400000, 1 << 21),
        (LAST, 4096, 0x41000, 4096),
    ]


def test_a_page_map_passes_over_small_gaps():
    memory = virtual()
    assert list(memory.page_map(4096, 0, 1 << 47)) == [Extent(USER, 0xA000), Extent(LARGE, 1 << 21)]
    assert next(memory.page_map(0, 0, 1 << 47)) == Extent(USER, 0x8000)


def test_extents_are_cut_to_what_was_asked():
    assert list(virtual().extents(USER + 5, USER + 0x9005)) == [Extent(USER + 5, 0x8000 - 5), Extent(USER + 0x9000, 5)]


def test_phys_to_virt_finds_every_mapping_inside_runs_too():
    data = bytearray(DATA)
    put(data, 0x4000, 300, 0x35 << 12 | 7)
    memory = virtual(data)
    assert memory.phys_to_virt(0x35123) == [USER + 2 * 4096 + 0x123, USER + 300 * 4096 + 0x123]
    assert memory.phys_to_virt(0x45_6789) == [LARGE + 0x5_6789]
    assert memory.phys_to_virt(0x1000) == []
    rows, addresses = memory.phys_to_virt_many([0x1000, 0x35123, 0x41FFF])
    assert rows.tolist() == [1, 1, 2]
    assert addresses.tolist()[-1] == LAST + 0xFFF


def test_a_guest_in_a_guest_is_a_view_over_a_view():
    """The guest's physical memory begins at 0x100000 of the host's, through EPT; its own tables are as above."""
    host = bytearray(os.urandom(0x10000) + bytes(0xF0000)) + bytearray(DATA)
    for table, index, entry in ((0x1000, 0, 0x2007), (0x2000, 0, 0x3007)):
        host[table : table + 4096] = bytes(4096)
        put(host, table, index, entry)
    host[0x3000:0x4000] = bytes(4096)
    for index in range(3):  # 2M and 4K pages; the last stops with the host's memory
        host[0x4000 + index * 4096 : 0x5000 + index * 4096] = bytes(4096)
        put(host, 0x3000, index, 0x4000 + index * 4096 | 7)
        for page in range(512):
            if index * 0x200000 + page * 4096 < SIZE:
                put(host, 0x4000 + index * 4096, page, 0x100000 + index * 0x200000 + page * 4096 | 0x37)
    guest = VirtualMemory(BytesMemory(bytes(host)), [(EPT, 0x1000)])
    assert guest.read(0x40000, 4096) == bytes(DATA[0x40000:0x41000])
    check_memory(lambda: VirtualMemory(guest, [(X86_64, DTB)]), TRUTH)


def test_an_address_space_wants_a_root_and_no_two_for_the_same_addresses():
    with pytest.raises(InvalidArgumentError):
        VirtualMemory(BytesMemory(b"x"), [])
    with pytest.raises(InvalidArgumentError, match="two page tables"):
        VirtualMemory(BytesMemory(b"x"), [(X86_64, 0), (X86_64, 4096)])
