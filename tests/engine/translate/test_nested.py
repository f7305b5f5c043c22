"""A guest's memory is a view through its host's tables, and a process in it is a view over that view.

    address of the process ─ guest's tables ─> guest-physical ─ EPT or NPT ─> host-physical
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, FaultKind
from engine.file_memory import FileMemory
from engine.memory import Memory
from engine.testing import PageTableBuilder
from engine.translate.bulk import translate
from engine.translate.modes import mode
from engine.translate.virtual import VirtualMemory

PAGE = 4096
GUEST_RAM, HOST_RAM = 1 << 20, 0x80_0000
CODE, DATA, LOST = 0x40_0000, 0x7FFF_0000, 0x50_0000
"""Addresses in the guest's process; the frame of the last is none that the host has given."""
PAIRS = [("ept", "x86-64"), ("ept-5", "x86-64-la57"), ("npt", "x86-64"), ("npt-5", "x86-pae"), ("ept", "x86")]
CONTENT = bytes(range(256)) * 16


@pytest.fixture(params=["bytes", "file in memory"])
def ground(request: pytest.FixtureRequest) -> Iterator[Callable[[bytes], Memory]]:
    """What host-physical memory is; of a file the reads go down in one call of C."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:

        def made(data: bytes) -> Memory:
            if request.param == "bytes":
                return BytesMemory(data)
            Path(file.name).write_bytes(data)
            return FileMemory(file.name)

        yield made


@pytest.fixture(params=PAIRS, ids="/".join)
def views(request: pytest.FixtureRequest, ground) -> tuple[VirtualMemory, VirtualMemory]:
    """(guest-physical memory, the process's memory)"""
    outer, inner = request.param
    guest = PageTableBuilder(mode(inner), base=0x8000, seed=1)
    for address, frame in ((CODE, 0x4_0000), (DATA, 0x5_0000), (LOST, 0xF000_0000)):
        guest.map(address, frame)
    ram = bytearray(GUEST_RAM)
    ram[guest.base : guest.base + len(guest.data)] = guest.data
    ram[0x4_0000 : 0x4_0000 + PAGE] = CONTENT
    host = PageTableBuilder(mode(outer), base=0x10_0000, seed=2)
    frames = np.random.default_rng(3).permutation(GUEST_RAM // PAGE).tolist()
    physical = bytearray(HOST_RAM + GUEST_RAM)
    for number, frame in enumerate(frames):
        at, size = number * PAGE, slice(HOST_RAM + frame * PAGE, HOST_RAM + (frame + 1) * PAGE)
        host.map(at, size.start, "4K execute-only" if at == 0x4_0000 and "ept" in outer else "4K")
        physical[size] = ram[at : at + PAGE]
    physical[host.base : host.base + len(host.data)] = host.data
    below = VirtualMemory(ground(bytes(physical)), [(host.spec, host.dtb)])
    return below, VirtualMemory(below, [(guest.spec, guest.spec.dtb(guest.register))])


def test_a_process_of_a_guest_is_read_through_both(views):
    _, process = views
    assert process.read(CODE, PAGE) == CONTENT
    assert process.read(DATA, PAGE) == bytes(PAGE)


def test_what_may_only_be_executed_is_read(views):
    below, _ = views
    assert below.read(0x4_0000, PAGE) == CONTENT


def test_a_batch_goes_through_both(views):
    below, process = views
    addresses = np.array([CODE + 5, DATA, DATA + PAGE, LOST], np.uint64)
    found = translate(below, process.roots, addresses)
    assert found.physical.tolist()[:2] == [0x4_0005, 0x5_0000]
    assert found.kinds.tolist() == [0, 0, FaultKind.ABSENT, 0]


def test_a_frame_that_the_host_has_not_given_is_a_fault_at_the_address_of_the_process(views):
    _, process = views
    with pytest.raises(FaultError) as caught:
        process.read(LOST, 8)
    assert caught.value.address == LOST
