"""Memory: what is derived once, over the plainest memories there are."""

from __future__ import annotations

import os

import numpy as np
import pytest

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError, FaultKind, InvalidArgumentError, PagedOutError, ReadOnlyError
from engine.memory import Faults, Memory, fault
from engine.testing import SlowMemory, Truth, check_memory, check_writes
from engine.types import Extent

DATA = os.urandom(0x6000)


class OnlyReadinto(Memory):
    """The least that a memory can be: pages 1 and 3 of five are holes.

    0        0x1000   0x2000   0x3000   0x4000   0x5000
    |  data  |  hole  |  data  |  hole  |  data  |
    """

    size = 0x5000

    def readinto(self, address: int, buffer: memoryview) -> None:
        for offset in range(len(buffer)):
            at = address + offset
            if not 0 <= at < self.size or at // 4096 in (1, 3):
                raise FaultError(at)
            buffer[offset] = DATA[at % len(DATA)]

    def extents(self, start=0, stop=None):
        stop = self.size if stop is None else min(stop, self.size)
        for page in (0, 2, 4):
            low, high = max(start, page * 4096), min(stop, page * 4096 + 4096)
            if low < high:
                yield Extent(low, high - low)


TRUTH = Truth(
    known=[(0, DATA[:4096]), (0x2000, DATA[0x2000:0x3000]), (0x4100, DATA[0x4100 : 0x4100 + 3000])],
    holes=[Extent(0x1000, 0x1000), Extent(0x3000, 0x1000)],
)


def test_a_memory_with_nothing_but_readinto_holds_the_contract():
    check_memory(OnlyReadinto, TRUTH)


def test_bytes_hold_the_contract():
    check_memory(lambda: BytesMemory(DATA), Truth(known=[(0, DATA), (5, DATA[5:100])]))


def test_writable_bytes_hold_the_contract_of_writing():
    check_writes(BytesMemory(bytearray(DATA)), Truth(known=[(0, DATA)]))


def test_a_window_holds_the_contract():
    truth = Truth(known=[(0x800, DATA[0x800:0x1000]), (0x2000, DATA[0x2000:0x3000])], holes=[Extent(0x1000, 0x1000)])
    moved = Truth([(a - 0x300, d) for a, d in truth.known], [Extent(h.start - 0x300, h.size) for h in truth.holes])
    check_memory(lambda: OnlyReadinto().window(0x300, 0x2D00), moved)


def test_a_window_over_bytes_can_be_written():
    check_writes(BytesMemory(bytearray(DATA)).window(100, 1000), Truth(known=[(0, DATA[100:1100])]))


def test_a_window_never_reaches_outside():
    window = BytesMemory(DATA).window(100, 50)
    with pytest.raises(FaultError) as caught:
        window.read(40, 20)
    assert caught.value.address == 50
    assert window.read_padded(40, 20) == DATA[140:150] + bytes(10)
    assert window.borrow(40, 20) is None


def test_a_window_of_negative_size_is_refused():
    with pytest.raises(InvalidArgumentError):
        BytesMemory(DATA).window(0, -1)


def test_padding_crosses_many_holes_and_counts_the_faults():
    buffer = memoryview(bytearray(0x5000))
    assert OnlyReadinto().readinto_padded(0, buffer) == 2
    expected = b"".join(DATA[p * 4096 : p * 4096 + 4096] if p % 2 == 0 else bytes(4096) for p in range(5))
    assert buffer == expected


def test_padding_over_a_hole_of_a_tebibyte_asks_for_extents_not_for_pages():
    class Far(OnlyReadinto):
        size = 1 << 50
        asked = 0

        def readinto(self, address, buffer):
            self.asked += 1
            have = max(0, min(len(buffer), 0x5000 - address))
            super().readinto(address, buffer[:have])
            if have < len(buffer):
                raise FaultError(address + have)

    memory = Far()
    assert memory.read_padded(0x4FFF, 1 << 20)[:2] == DATA[0x4FFF:0x5000] + b"\0"
    assert memory.asked < 5


def test_a_cstring_in_front_of_a_hole_is_whole():
    class Text(OnlyReadinto):
        def readinto(self, address, buffer):
            try:
                super().readinto(address, buffer)
            finally:
                for offset in range(len(buffer)):
                    buffer[offset] = 0 if address + offset == 0xFFF else 65

    assert Text().cstring(0xFF0) == b"A" * 15


def test_a_cstring_near_the_end_of_what_there_is_is_whole():
    assert BytesMemory(b"text\0rest").cstring(0) == b"text"
    assert BytesMemory(b"text\0").window(0, 5).cstring(1) == b"ext"
    with pytest.raises(FaultError) as caught:
        BytesMemory(b"text").cstring(1)
    assert caught.value.address == 4


def test_addresses_may_be_any_whole_numbers_and_nothing_else():
    memory = BytesMemory(bytes(range(64)))
    for addresses in ([0, 8], (0, 8), np.array([0, 8]), np.array([0, 8], np.uint64)):
        assert memory.words(addresses)[0].tolist() == [0x0706050403020100, 0x0F0E0D0C0B0A0908]
    for addresses in ([-8], np.array([0, -8]), [1 << 64], ["x"], np.array([0.5])):
        with pytest.raises(InvalidArgumentError):
            memory.words(addresses)


def test_read_many_gives_a_fault_for_what_is_no_address_however_many_there_are():
    memory = BytesMemory(DATA)
    for count in (3, 40):
        for address in (-1, 1 << 64):
            results = memory.read_many([(address, 1)] * count + [(0, 1)] * count)
            assert all(isinstance(result, FaultError) for result in results[:count])
            assert results[count:] == [DATA[:1]] * count


def test_a_window_cannot_leave_the_address_space():
    with pytest.raises(InvalidArgumentError):
        OnlyReadinto().window((1 << 64) - 4096, 8192)


def test_a_negative_size_is_refused():
    for act in (BytesMemory(DATA).read, BytesMemory(DATA).read_padded):
        with pytest.raises(InvalidArgumentError):
            act(0, -1)


def test_a_cstring_that_runs_into_a_hole_faults_there():
    class Text(OnlyReadinto):
        def readinto(self, address, buffer):
            super().readinto(address, buffer)
            buffer[:] = b"A" * len(buffer)

    with pytest.raises(FaultError) as caught:
        Text().cstring(0xFF0)
    assert caught.value.address == 0x1000


def test_faults_are_false_when_there_are_none_and_raise_the_first_otherwise():
    assert not Faults.of([])
    Faults.of([]).raise_first()
    faults = Faults.of([(3, 0x1000, FaultKind.PAGED_OUT), (5, 0x9000, FaultKind.ABSENT)])
    assert len(faults) == 2
    with pytest.raises(PagedOutError) as caught:
        faults.raise_first()
    assert caught.value.address == 0x1000


def test_gather_tells_the_kind_of_each_fault():
    class Swapped(OnlyReadinto):
        def readinto(self, address, buffer):
            raise fault(address, FaultKind.PAGED_OUT)

    faults = Swapped().gather(np.array([8], np.uint64), np.zeros((1, 8), np.uint8))
    assert faults.kinds.tolist() == [FaultKind.PAGED_OUT]


def test_words_take_any_type():
    memory = BytesMemory(np.arange(64, dtype=">u2").tobytes())
    values, faults = memory.words(np.array([0, 2, 126], np.uint64), ">u2")
    assert values.tolist() == [0, 1, 63]
    assert not faults


def test_read_only_bytes_refuse_a_write():
    with pytest.raises(ReadOnlyError):
        BytesMemory(b"abc").write(0, b"x")


def test_a_memory_that_may_block_is_not_read_without_waiting():
    slow = SlowMemory(BytesMemory(DATA))
    assert slow.readinto_nowait(0, memoryview(bytearray(8))) is False


def test_gather_of_wide_rows_takes_slices():
    data = os.urandom(1 << 16)
    out = np.zeros((5, 5000), np.uint8)
    addresses = np.array([0, 1, 60_536, 7, 30_000], np.uint64)
    assert not BytesMemory(data).gather(addresses, out)
    assert [row.tobytes() for row in out] == [data[a : a + 5000] for a in addresses.tolist()]


def test_gather_near_the_end_of_the_address_space_does_not_wrap():
    out = np.zeros((1, 8), np.uint8)
    faults = BytesMemory(DATA).gather(np.array([(1 << 64) - 4], np.uint64), out)
    assert faults.addresses.tolist() == [(1 << 64) - 4]


@pytest.mark.parametrize("width", [1, 2, 8, 16, 4096])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 13])
def test_gather_of_many_rows_gives_their_bytes_aligned_or_not(width, aligned, size):
    data = os.urandom(size)
    generator = np.random.default_rng(width)
    addresses = generator.integers(0, size - width + 1, 500).astype(np.uint64)
    if aligned:
        addresses -= addresses % np.uint64(width)
        addresses[-1] = (size - width) // width * width
    else:
        addresses[-1] = size - width
    out = np.full((500, width), 0xAA, np.uint8)
    assert not BytesMemory(data).gather(addresses, out)
    assert [row.tobytes() for row in out] == [data[a : a + width] for a in addresses.tolist()]
