"""The cache of swap, made by hand: pages by their slots, folios, and what is not to be believed."""

from __future__ import annotations

import pytest
from kernel_memory import BASE, Ground, kernel_over

from engine.oslayers.linux.swap_cache import FOLIO_PAGES, SwapCache, swap_cache_of

PAGE = 4096
ARRAY = BASE + 0x20_0000
"""Where the array of page structures stands."""
IN_SWAP = 1 << 2 | 1 << 10
SPACE = 64
"""Bytes of a `struct address_space` here."""
AREA = 3


class Cache:
    """The cache of one area, with room for four times 2^14 slots."""

    def __init__(self) -> None:
        self.ground = Ground()
        self.table, self.spaces = self.ground.room(32 * 8), self.ground.room(4 * SPACE)
        self.ground.put(self.table + 8 * AREA, self.spaces)
        self.entries: dict[int, dict[int, tuple[int, int]]] = {}

    def page(self, slot: int, frame: int, *, says: int | None = None, flags: int = IN_SWAP, index: int | None = None):
        at = ARRAY + 64 * frame
        self.ground.put(at, flags)
        self.ground.put(at + 40, AREA << 58 | (slot if says is None else says))
        self.entries.setdefault(slot >> 14, {})[slot if index is None else index] = at, 0

    def opened(self, symbol: int | None = 0) -> SwapCache | None:
        for part, entries in self.entries.items():
            self.ground.xarray(self.spaces + part * SPACE + 8, entries)
        kernel = kernel_over(self.ground, bytes(PAGE), ARRAY)
        kernel.profile.symbol = lambda *_: self.table if symbol == 0 else symbol
        return swap_cache_of(kernel, kernel.objects())


@pytest.mark.parametrize("index", ["whole", "part"])
@pytest.mark.parametrize("slot", [5, 0x3FFF, 0x4001, 0xFFFF])
def test_a_page_is_found_by_its_slot_in_trees_of_either_kind(slot, index):
    cache = Cache()
    cache.page(slot, 9, index=slot if index == "whole" else slot & 0x3FFF)
    opened = cache.opened()
    assert opened.page(AREA, slot) == 9 * PAGE
    assert opened.page(AREA, slot ^ 1) is None
    assert opened.page(AREA + 1, slot) is None
    assert opened.page(99, slot) is None


def test_a_folio_gives_the_frame_behind_its_first():
    cache = Cache()
    head = ARRAY + 64 * 16
    cache.page(32, 16)
    cache.entries[0].update(dict.fromkeys(range(32, 36), (head, 0)))
    opened = cache.opened()
    assert [opened.page(AREA, slot) for slot in range(32, 36)] == [frame * PAGE for frame in range(16, 20)]


@pytest.mark.parametrize(
    "wrong",
    [{"says": 8}, {"says": 7 - FOLIO_PAGES}, {"flags": 1 << 2}, {"flags": 1 << 10}, {"flags": 0}],
    ids=["of a later slot", "of one far before", "no more in it", "not read yet", "free"],
)
def test_a_page_that_does_not_say_itself_that_it_is_that_slot_s_is_not_believed(wrong):
    cache = Cache()
    wrong = {**wrong, "says": wrong["says"] % (1 << 58)} if "says" in wrong else wrong
    cache.page(7, 9, **wrong)
    assert cache.opened().page(AREA, 7) is None


def test_a_table_that_leads_nowhere_gives_nothing_and_is_counted():
    cache = Cache()
    cache.page(7, 9)
    opened = cache.opened()
    cache.ground.put(cache.table + 8 * AREA, BASE + (1 << 40))
    assert opened.page(AREA, 7) is None


def test_where_the_kernel_does_not_tell_there_is_none():
    assert Cache().opened(symbol=None) is None
