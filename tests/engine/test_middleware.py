"""What wraps memory by option: overlays, caches by kind of page, figures."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from hand_made_tables import DTB, USER, image
from hypothesis import given
from hypothesis import strategies as st

from engine.bytes_memory import BytesMemory
from engine.connectors.dummy import made_bytes
from engine.errors import FaultError, InvalidArgumentError
from engine.machine import Machine
from engine.memory import Addresses, Faults, Memory, Rows
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.middleware import wrap
from engine.overlay import OverlayMemory
from engine.page_cache import CachedPages, PageCache
from engine.testing import Truth, check_memory
from engine.translate.modes import mode
from engine.translate.virtual import VirtualMemory
from engine.types import Extent

BASE, SIZE = 0x10000, 0x5000


def with_holes(data: bytes) -> Memory:
    """`data` at BASE, nothing elsewhere, and a hole of a page behind it before one more page."""
    ranges = [MapRange(BASE, SIZE, 0), MapRange(BASE + SIZE + 4096, 4096, SIZE)]
    return MappedMemory(BytesMemory(data), MemoryMap(ranges))


class Counting(BytesMemory):
    """Memory that can be written to behind one's back, and counts how often it is asked."""

    def __init__(self, data: bytes) -> None:
        self.store = bytearray(data)
        self.asked = 0
        super().__init__(self.store, writable=True)

    def readinto(self, address: int, buffer: memoryview) -> None:
        self.asked += 1
        super().readinto(address, buffer)

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        self.asked += 1
        return super().gather(addresses, out)


# -- overlay=cow ------------------------------------------------------------------------------------------


def test_an_overlay_holds_the_contract_of_memory() -> None:
    data = os.urandom(SIZE + 4096)
    written = bytearray(data)

    def make() -> Memory:
        memory = OverlayMemory(with_holes(data))
        memory.write(BASE + 100, b"x" * 5000)
        memory.write(BASE + SIZE - 3, b"end")
        return memory

    written[100:5100], written[SIZE - 3 : SIZE] = b"x" * 5000, b"end"
    truth = Truth(
        [(BASE, bytes(written[:SIZE])), (BASE + SIZE + 4096, data[SIZE:])],
        [Extent(0, BASE), Extent(BASE + SIZE, 4096)],
    )
    check_memory(make, truth)


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=1, max_size=6000)), max_size=6), st.data())
def test_what_is_read_of_an_overlay_is_what_was_written_last(writes, data) -> None:
    model = bytearray(made_bytes(0, SIZE))
    below = bytes(model)
    memory = OverlayMemory(BytesMemory(below))
    for address, what in writes:
        what = what[: SIZE - address]
        memory.write(address, what)
        model[address : address + len(what)] = what
    assert memory.read(0, SIZE) == model
    addresses = data.draw(st.lists(st.integers(0, SIZE - 8), max_size=40))
    words, faults = memory.words(addresses)
    assert not faults
    assert words.tolist() == [int.from_bytes(model[at : at + 8], "little") for at in addresses]


def test_writes_never_reach_what_lies_below() -> None:
    below = bytearray(SIZE)
    memory = OverlayMemory(BytesMemory(below, writable=True))
    memory.write(0, b"\1" * SIZE)
    assert below == bytes(SIZE)
    assert memory.read(0, SIZE) == b"\1" * SIZE


def test_a_hole_cannot_be_written_to_and_what_lies_before_it_is() -> None:
    memory = OverlayMemory(with_holes(bytes(SIZE + 4096)))
    with pytest.raises(FaultError) as caught:
        memory.write(BASE + SIZE - 2, b"1234")
    assert caught.value.address == BASE + SIZE
    assert memory.read(BASE + SIZE - 2, 2) == b"12"


def test_threads_that_write_to_one_page_lose_nothing() -> None:
    memory = OverlayMemory(BytesMemory(bytes(4096)))

    def write(part: int) -> None:
        for offset in range(part, 4096, 8):
            memory.write(offset, bytes([part + 1]))

    threads = [threading.Thread(target=write, args=(part,)) for part in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.read(0, 4096) == bytes(range(1, 9)) * 512


def test_with_an_overlay_a_file_is_written_to_without_permission_and_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(bytes(8192))
    file.chmod(0o400)
    with Machine() as machine:
        instance = machine.run("connector", f"c raw:{file}:overlay=cow")
        assert instance.writable
        assert instance.live
        instance.memory.write(10, b"hello")
        assert instance.memory.read(8, 8) == b"\0\0hello\0"
    assert file.read_bytes() == bytes(8192)


def test_page_tables_that_were_changed_in_an_overlay_translate_as_changed() -> None:
    tables = bytes(image())
    memory = OverlayMemory(BytesMemory(tables))
    space = VirtualMemory(memory, [(mode("x86-64"), DTB)])
    address = USER
    table, entry = [(where, value) for _, where, value, _ in space.path(address)][-1]
    before = space.virt_to_phys(address)
    memory.write(table, (entry ^ 0x1000).to_bytes(8, "little"))
    assert space.virt_to_phys(address) == before ^ 0x1000


# -- cache= -------------------------------------------------------------------------------------------------


def test_cached_pages_hold_the_contract_of_memory() -> None:
    data = os.urandom(SIZE + 4096)
    truth = Truth(
        [(BASE, data[:SIZE]), (BASE + SIZE + 4096, data[SIZE:])], [Extent(0, BASE), Extent(BASE + SIZE, 4096)]
    )
    check_memory(lambda: CachedPages(PageCache(with_holes(data), 60)), truth)


def test_a_page_is_asked_for_once_within_its_lifetime() -> None:
    source = Counting(bytes(range(256)) * 64)
    memory = wrap(source, {"cache": "all", "lifetime": "60"})
    for _ in range(3):
        assert memory.read(100, 50) == bytes(range(100, 150))
        assert memory.words([8, 16, 4096])[0].tolist()[0] == int.from_bytes(bytes(range(8, 16)), "little")
    assert source.asked == 2


def test_after_its_lifetime_a_page_is_read_anew() -> None:
    source = Counting(bytes(8192))
    memory = wrap(source, {"cache": "all", "lifetime": "1e-9"})
    assert memory.u64(0) == 0
    source.store[0] = 1
    assert memory.u64(0) == 1


def test_what_is_written_is_read_back_at_once() -> None:
    memory = wrap(Counting(bytes(8192)), {"cache": "all", "lifetime": "60"})
    assert memory.u64(4092) == 0
    memory.write(4092, b"12345678")
    assert memory.read(4092, 8) == b"12345678"


@pytest.fixture
def walked() -> tuple[Counting, int]:
    return Counting(bytes(image())), USER


def test_with_cache_tables_a_walk_is_kept_and_bytes_are_fresh(walked: tuple[Counting, int]) -> None:
    source, address = walked
    space = VirtualMemory(wrap(source, {"cache": "tables", "lifetime": "60"}), [(mode("x86-64"), DTB)])
    physical = space.virt_to_phys(address)
    before = source.asked
    assert space.virt_to_phys(address) == physical
    assert source.asked == before
    source.store[physical] ^= 0xFF
    assert space.u8(address) == source.store[physical]


@pytest.mark.parametrize(("kept", "stale"), [("tables", False), ("read-only", True), ("all", True)])
def test_what_may_only_be_read_is_kept_where_that_was_asked_for(kept: str, stale: bool) -> None:
    source = Counting(bytes(image()))
    space = VirtualMemory(wrap(source, {"cache": kept, "lifetime": "60"}), [(mode("x86-64"), DTB)])
    address = USER + 0x9000
    first = space.read(address, 1)
    source.store[space.virt_to_phys(address)] ^= 0xFF
    assert (space.read(address, 1) == first) is stale


@pytest.mark.parametrize(
    "options",
    [{"cache": "some"}, {"lifetime": "1"}, {"cache": "all", "lifetime": "0"}, {"cache": "all", "lifetime": "x"},
     {"cache": "all", "lifetime": "nan"}, {"overlay": "yes"}, {"metrics": "perhaps"}],
)  # fmt: skip
def test_wrong_words_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError):
        wrap(BytesMemory(b""), options)


# -- metrics= -----------------------------------------------------------------------------------------------


def test_percentiles_of_calls_ascend_and_stand_below_the_sum() -> None:
    memory = wrap(BytesMemory(bytes(1 << 20)), {"metrics": "yes"})
    assert memory.figures()["p50_us"] is None
    for size in range(1, 1000):
        memory.read(0, size)
    figures = memory.figures()
    assert 0 < figures["p50_us"] <= figures["p90_us"] <= figures["p99_us"] <= 1.2e6 * figures["seconds"] + 0.2
