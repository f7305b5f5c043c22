"""Memory in blocks that must be decoded: here by zlib, and with a block that is damaged."""

from __future__ import annotations

import os
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.block_memory import BlockMemory
from engine.errors import BadDataError, FaultError, InvalidArgumentError, SourceFaultError
from engine.testing import Truth, check_memory
from engine.types import Extent

DATA = os.urandom(0x9000)
#   0x1000   0x2000   0x2800     0x4000   0x6000        0x9000
#   |   0   |   1    |   hole   |   2    |  3 damaged  |
STARTS, LENGTHS = [0x1000, 0x2000, 0x4000, 0x6000], [0x1000, 0x800, 0x2000, 0x3000]
PACKED = [zlib.compress(DATA[start:][:length]) for start, length in zip(STARTS, LENGTHS, strict=True)]


class Counted:
    """A decoder that counts, and knows block 3 to be damaged."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, index: int) -> bytes:
        self.calls.append(index)
        if index == 3:
            raise BadDataError(0x777, detail="its checksum is wrong")
        return zlib.decompress(PACKED[index])


def test_block_memory_holds_the_contract():
    known = [(0x1000, DATA[0x1000:0x2800]), (0x4000, DATA[0x4000:0x6000])]
    holes = [Extent(0, 0x1000), Extent(0x2800, 0x1800)]
    check_memory(lambda: BlockMemory(STARTS, LENGTHS, Counted()), Truth(known, holes))


def test_a_batch_decodes_each_block_once_whatever_its_order_and_the_limit():
    decode = Counted()
    memory = BlockMemory(STARTS, LENGTHS, decode, limit=1)
    places = np.random.default_rng(1).permutation(np.r_[0x1000:0x27F8, 0x4000:0x5FF8]).astype(np.uint64)
    inside = places[(places <= 0x1FF8) | (places >= 0x2000)]
    values, faults = memory.words(inside)
    assert not faults
    assert values.tolist() == [int.from_bytes(DATA[at : at + 8], "little") for at in inside.tolist()]
    assert sorted(decode.calls) == [0, 1, 2]


def test_a_damaged_block_names_its_offset_in_the_file():
    memory = BlockMemory(STARTS, LENGTHS, Counted())
    with pytest.raises(SourceFaultError, match="block at offset 0x777 of the file is damaged: its checksum") as caught:
        memory.read(0x5FF0, 0x20)
    assert caught.value.address == 0x6000


def test_a_damaged_block_leaves_the_others_readable():
    memory = BlockMemory(STARTS, LENGTHS, Counted())
    values, faults = memory.words(np.array([0x6000, 0x1000, 0x8FF8, 0x4000], np.uint64))
    assert faults.rows.tolist() == [0, 2]
    assert faults.addresses.tolist() == [0x6000, 0x8FF8]
    assert values.tolist()[1] == int.from_bytes(DATA[0x1000:0x1008], "little")
    assert memory.read_padded(0x5000, 0x2000) == DATA[0x5000:0x6000] + bytes(0x1000)


def test_a_damaged_block_is_decoded_once():
    decode = Counted()
    memory = BlockMemory(STARTS, LENGTHS, decode)
    memory.read_padded(0x6000, 0x3000)
    assert decode.calls == [3]


def test_a_block_shorter_than_it_should_be_faults_behind_its_bytes():
    memory = BlockMemory([0], [0x1000], lambda index: b"x" * 100)
    with pytest.raises(SourceFaultError) as caught:
        memory.read(90, 20)
    assert caught.value.address == 100
    out = np.full((1, 20), 7, np.uint8)
    faults = memory.gather(np.array([90], np.uint64), out)
    assert faults.addresses.tolist() == [100]
    assert out.tobytes() == b"x" * 10 + bytes(10)


def test_what_passes_through_does_not_stay():
    decode = Counted()
    memory = BlockMemory(STARTS, LENGTHS, decode)
    memory.read(0x1000, 0x1800)
    memory.read(0x1000, 0x1800)
    assert decode.calls == [0, 1, 0, 1]


def test_a_block_that_is_read_in_parts_stays():
    decode = Counted()
    memory = BlockMemory(STARTS, LENGTHS, decode)
    for address in range(0x1000, 0x2000, 64):
        memory.read(address, 8)
    assert decode.calls == [0]


def test_no_more_than_the_limit_is_kept():
    decode = Counted()
    memory = BlockMemory(STARTS, LENGTHS, decode, limit=0x1800)
    for address in (0x1000, 0x2000, 0x1000, 0x4000, 0x4000, 0x1000):
        memory.u64(address)
    assert decode.calls == [0, 1, 2, 0]


def test_only_what_is_decoded_is_read_without_waiting():
    memory = BlockMemory(STARTS, LENGTHS, Counted())
    buffer = memoryview(bytearray(16))
    assert not memory.readinto_nowait(0x1010, buffer)
    memory.u64(0x1000)
    assert memory.readinto_nowait(0x1010, buffer)
    assert buffer == DATA[0x1010:0x1020]


@pytest.mark.parametrize(
    ("starts", "lengths"),
    [([0, 8], [16, 8]), ([8, 0], [4, 4]), ([0], [0]), ([2**64 - 8], [16]), ([0, 8], [8])],
    ids=["overlap", "descend", "empty", "leave", "one length too few"],
)
def test_blocks_that_cannot_be_are_refused(starts, lengths):
    with pytest.raises(InvalidArgumentError):
        BlockMemory(starts, lengths, lambda index: b"")


def test_memory_without_blocks_is_empty():
    memory = BlockMemory([], [], lambda index: b"")
    assert memory.size == 0
    assert list(memory.extents()) == []
    with pytest.raises(FaultError):
        memory.u64(0)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), max_size=12), st.data())
def test_any_blocks_read_as_the_bytes_they_hold(spans, data):
    starts, lengths, at = [], [], 0
    for gap, length in spans:
        starts.append(at + gap)
        lengths.append(length)
        at += gap + length
    truth = {start + i: (start + i) % 251 for start, length in zip(starts, lengths, strict=True) for i in range(length)}
    memory = BlockMemory(starts, lengths, lambda index: bytes(truth[starts[index] + i] for i in range(lengths[index])))
    address, width = data.draw(st.integers(0, at + 8)), data.draw(st.integers(1, 60))
    have = next((i for i in range(width) if address + i not in truth), width)
    out = np.full((20, width), 9, np.uint8)
    faults = memory.gather(np.full(20, address, np.uint64), out)
    expected = bytes(truth[address + i] for i in range(have)) + bytes(width - have)
    assert all(row.tobytes() == expected for row in out)
    assert faults.addresses.tolist() == ([address + have] * 20 if have < width else [])
    assert sum(extent.size for extent in memory.extents()) == len(truth)


def test_threads_share_the_store():
    memory = BlockMemory(STARTS, LENGTHS, Counted(), limit=0x1800)
    wrong: list[int] = []

    def read(seed: int) -> None:
        places = np.random.default_rng(seed).integers(0x4000, 0x5FF8, 300).tolist()
        wrong.extend(at for at in places if memory.u64(at) != int.from_bytes(DATA[at : at + 8], "little"))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
