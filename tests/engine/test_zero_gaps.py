"""Memory with gaps that are known to be zeros."""

from __future__ import annotations

import os

import numpy as np

from engine.bytes_memory import BytesMemory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.testing import Truth, check_memory
from engine.types import Extent
from engine.zero_gaps import ZeroGaps

DATA = os.urandom(0x3000)
#   0x1000      0x2000     0x4000     0x6000    0x7000    0x8000
#   |  data 0   |  zeros   | data 1,2 |  hole   |  zeros  |
HELD = MemoryMap([MapRange(0x1000, 0x1000, 0), MapRange(0x4000, 0x2000, 0x1000)])
GAPS = [Extent(0x2000, 0x2000), Extent(0x7000, 0x1000)]


def made() -> ZeroGaps:
    return ZeroGaps(MappedMemory(BytesMemory(DATA), HELD), GAPS)


def test_it_holds_the_contract():
    whole = DATA[:0x1000] + bytes(0x2000) + DATA[0x1000:]
    holes = [Extent(0, 0x1000), Extent(0x6000, 0x1000)]
    check_memory(made, Truth([(0x1000, whole), (0x7000, bytes(0x1000))], holes))


def test_columns_over_gaps_borders_and_holes_are_what_reads_give():
    memory = made()
    addresses = np.arange(0xF00, 0x8100, 24, dtype=np.uint64)
    out = np.full((len(addresses), 100), 7, np.uint8)
    faults = memory.gather(addresses, out)
    for row, address in enumerate(addresses.tolist()):
        parts = ((0x1000, 0x6000), (0x7000, 0x8000))
        room = next((stop - address for start, stop in parts if start <= address < stop), 0)
        have = min(room, 100)
        assert out[row].tobytes() == memory.read(address, have) + bytes(100 - have)
        assert (row in faults.rows) == (have < 100)
    ends = (faults.addresses == 0x6000) | (faults.addresses == 0x8000) | (faults.addresses == addresses[faults.rows])
    assert ends.all()
