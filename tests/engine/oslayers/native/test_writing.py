"""Writing into a process."""

from __future__ import annotations

import numpy as np
import pytest
from native_program import PAGE, PATTERN

from engine.errors import FaultError, FaultKind, ProcessExitedError, ReadOnlyError
from engine.testing import Truth, check_writes
from engine.types import Extent


@pytest.fixture
def target(start):
    return start()


@pytest.fixture
def memory(writable_layer, target):
    return writable_layer.process(target.pid).memory


def test_a_process_holds_the_contract_of_writing_on_every_kernel(memory, target, kernel):
    known = [(target.pattern, PATTERN[:100000]), (target.pattern + 5, PATTERN[5:70]), (target.island, PATTERN[:PAGE])]
    check_writes(memory, Truth(known, [Extent(target.island + 2 * PAGE, PAGE), Extent(0, PAGE), Extent(1 << 63, PAGE)]))


def test_the_program_sees_what_was_written(memory, target):
    memory.write(target.counter, (42).to_bytes(8, "little"))
    target.tell("counter\n")
    assert target.said() == ("counter", 42)


def test_the_program_sees_what_was_scattered(memory, target):
    assert not memory.scatter(np.array([target.counter], np.uint64), np.array([[43, 0, 0, 0, 0, 0, 0, 0]], np.uint8))
    target.tell("counter\n")
    assert target.said() == ("counter", 43)


def test_without_writable_a_write_is_refused_and_nothing_changes(layer, target):
    memory = layer.process(target.pid).memory
    with pytest.raises(ReadOnlyError):
        memory.write(target.counter, bytes(8))
    with pytest.raises(ReadOnlyError):
        memory.scatter(np.array([target.counter], np.uint64), np.zeros((1, 8), np.uint8))
    target.tell("counter\n")
    assert target.said() == ("counter", 1234567890123456789)


def test_pages_that_are_read_only_to_the_program_are_written(memory, target, kernel):
    memory.write(target.read_only + 10, b"written")
    assert memory.read(target.read_only + 10, 7) == b"written"
    rows = np.frombuffer(b"scattered", np.uint8).reshape(1, 9)
    assert not memory.scatter(np.array([target.in_rodata], np.uint64), rows)
    assert memory.read(target.in_rodata, 9) == b"scattered"


def test_pages_that_were_never_touched_are_written(memory, target, kernel):
    memory.write(target.sparse + 3 * PAGE - 2, b"new page")
    assert memory.read(target.sparse + 3 * PAGE - 2, 8) == b"new page"


def test_a_write_into_a_hole_says_where_and_has_written_all_before_it(memory, target, kernel):
    with pytest.raises(FaultError) as caught:
        memory.write(target.island + 2 * PAGE - 3, b"123456")
    assert caught.value.address == target.island + 2 * PAGE
    assert caught.value.kind == FaultKind.ABSENT
    assert memory.read(target.island + 2 * PAGE - 3, 3) == b"123"


def test_what_no_debugger_may_write_is_a_read_only_fault(memory, writable_layer, target):
    vdso = next(r for r in writable_layer.process(target.pid).regions() if r.path.startswith("[vvar"))
    with pytest.raises(FaultError) as caught:
        memory.write(vdso.start, b"x")
    assert caught.value.kind == FaultKind.READ_ONLY


def test_below_the_stack_nothing_is_written_and_the_stack_does_not_grow(memory, writable_layer, target):
    def stack():
        return next(r for r in writable_layer.process(target.pid).regions() if r.path == "[stack]")

    before = stack()
    for address in (before.start - 8, before.start - 10 * PAGE):
        with pytest.raises(FaultError) as caught:
            memory.write(address, b"x" * 8)
        assert caught.value.address == address
    assert stack() == before


def test_of_rows_that_overlap_the_last_one_stays_also_over_pages_of_all_kinds(memory, target, kernel):
    """Rows over a page that is there, one that was never touched, a hole and a read-only page, in turn."""
    generator = np.random.default_rng(5)
    places = np.array([target.pattern + 4000, target.sparse + PAGE - 4, target.island + 2 * PAGE - 4, target.read_only])
    truth = {int(place): bytearray(memory.read_padded(int(place), 24)) for place in places}
    picked = generator.integers(0, 4, 3000)
    offsets = generator.integers(0, 17, 3000)
    rows = generator.integers(0, 256, (3000, 8)).astype(np.uint8)
    addresses = (places[picked] + offsets).astype(np.uint64)
    faults = memory.scatter(addresses, rows)
    expected_faults = {}
    for row, (place, offset) in enumerate(zip(places[picked].tolist(), offsets.tolist(), strict=True)):
        room = 24
        if place == target.island + 2 * PAGE - 4:
            room = 4
            if offset + 8 > room:
                expected_faults[row] = max(place + offset, place + room)
        have = max(0, min(8, room - offset))
        truth[place][offset : offset + have] = rows[row].tobytes()[:have]
    assert dict(zip(faults.rows.tolist(), faults.addresses.tolist(), strict=True)) == expected_faults
    for place, data in truth.items():
        assert memory.read_padded(place, 24) == data


def test_writing_ends_with_the_process(memory, target):
    memory.write(target.counter, bytes(8))
    target.end()
    with pytest.raises(ProcessExitedError):
        memory.write(target.counter, bytes(8))
    with pytest.raises(ProcessExitedError):
        memory.scatter(np.array([target.counter], np.uint64), np.zeros((1, 8), np.uint8))
