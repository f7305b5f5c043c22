"""Entries of pages that Linux took away: the kind of fault says where the page is."""

from __future__ import annotations

import pytest
from hand_made_tables import DTB, USER, image, put

from engine.errors import FaultError, FaultKind, PagedOutError
from engine.memory import BytesMemory
from engine.oslayers.linux.swap import absent_hook
from engine.translate.virtual import VirtualMemory
from engine.translate.x86 import X86_64

TABLE = 0x4000
"""Of USER's pages; its entries from 10 on are free."""
OFFSET = 0x1234 << 9


def memory(entry: int, machine: str = "x86_64") -> VirtualMemory:
    data = image()
    put(data, TABLE, 10, entry)
    return VirtualMemory(BytesMemory(bytes(data)), [(X86_64, DTB)], absent_hook(machine))


@pytest.mark.parametrize("kind", [0, 1, 22])
def test_a_page_in_swap_is_said_to_be_paged_out(kind):
    with pytest.raises(PagedOutError) as caught:
        memory(kind << 59 | OFFSET).read(USER + 10 * 4096, 8)
    assert caught.value.address == USER + 10 * 4096


@pytest.mark.parametrize(
    ("kind", "fault"), [(25, FaultKind.MIGRATING), (26, FaultKind.MIGRATING), (31, FaultKind.ABSENT)]
)
def test_a_page_on_the_move_and_a_mark_are_told_apart(kind, fault):
    with pytest.raises(FaultError) as caught:
        memory(kind << 59 | OFFSET).u64(USER + 10 * 4096)
    assert caught.value.kind is fault


def test_columns_say_the_same():
    found = memory(3 << 59 | OFFSET)
    _, faults = found.words([USER + page * 4096 for page in range(12)] * 2, "<u8")
    kinds = {(row % 12, FaultKind(kind)) for row, kind in zip(faults.rows.tolist(), faults.kinds.tolist(), strict=True)}
    assert kinds == {(8, FaultKind.ABSENT), (10, FaultKind.PAGED_OUT), (11, FaultKind.ABSENT)}


def test_a_page_that_was_never_there_is_absent():
    with pytest.raises(FaultError) as caught:
        memory(0).u64(USER + 10 * 4096)
    assert caught.value.kind is FaultKind.ABSENT


def test_other_architectures_entries_count_as_paged_out():
    with pytest.raises(PagedOutError):
        memory(31 << 59 | OFFSET, "aarch64").u64(USER + 10 * 4096)
