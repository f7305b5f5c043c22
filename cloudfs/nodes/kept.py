"""What was read for names and attributes, kept for as long as the kernel may believe them, or less.

Lists of regions and modules, owners, renderings: plain facts, by instance and key. Over a live target they
live a second at the most, and no longer than 20 times what they took to make: what is cheap is fresh. Of what
cannot change they live until the space is needed. Never bytes of memory.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from engine.machine import LIST_LIFETIME, LIST_SHARE, Instance

T = TypeVar("T")
BUDGET = 32 << 20
"""Bytes, about, that are kept for one instance."""
ENTRY_WEIGHT = 300
"""Bytes, about, that an entry takes beside its value."""


_Item = tuple[float, float, int, Any]
"""When it was stored, when it expires, weight, value."""


class _Shelf:
    """What is kept for one instance, the least recently stored first."""

    __slots__ = ("items", "weight")

    def __init__(self) -> None:
        self.items: OrderedDict[Hashable, _Item] = OrderedDict()
        self.weight = 0


class Kept:
    """A bounded store; safe for threads. What is made twice at one time is kept once: the first."""

    def __init__(self, budget: int = BUDGET, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget = budget
        self._clock = clock
        self._shelves: dict[Instance | None, _Shelf] = {}
        self._lock = threading.Lock()

    def find(self, instance: Instance | None, key: Hashable) -> tuple[float, Any] | None:
        """(age in seconds, value) of what was stored under `key`, however old, or None."""
        found = self._item(instance, key)
        return None if found is None else (self._clock() - found[0], found[3])

    def _item(self, instance: Instance | None, key: Hashable) -> _Item | None:
        shelf = self._shelves.get(instance)
        return None if shelf is None or (instance is not None and instance.closed) else shelf.items.get(key)

    def store(
        self,
        instance: Instance | None,
        key: Hashable,
        value: T,
        weight: int = 0,
        *,
        lifetime: float = 0.0,
        expires: float = 0.0,
    ) -> T:
        """Keep `value` and give it, or give the one that is there and not older than `lifetime`.

        `weight` is its size in bytes, about; what exceeds an eighth of the budget is not kept.
        """
        now = self._clock()
        weight += ENTRY_WEIGHT
        with self._lock:
            if instance not in self._shelves:
                self._purge()
            shelf = self._shelves.setdefault(instance, _Shelf())
            found = shelf.items.get(key)
            if found is not None and now - found[0] < lifetime:
                there: T = found[3]
                return there
            if found is not None:
                shelf.weight -= shelf.items.pop(key)[2]
            if weight <= self.budget // 8 and not (instance is not None and instance.closed):
                shelf.items[key] = (now, expires, weight, value)
                shelf.weight += weight
            while shelf.weight > self.budget or self._stale(instance, shelf, now):
                shelf.weight -= shelf.items.popitem(last=False)[1][2]
        return value

    @staticmethod
    def _stale(instance: Instance | None, shelf: _Shelf, now: float) -> bool:
        """Whether the first item is too old to be of use: it may hold a module, and that a process's descriptors."""
        if instance is None or not instance.live or len(shelf.items) < 2:
            return False
        return now - next(iter(shelf.items.values()))[0] > 2 * LIST_LIFETIME

    def get(
        self, instance: Instance, key: Hashable, make: Callable[[], T], weigh: Callable[[T], int] | None = None
    ) -> T:
        """What `make` gives, or gave a short while ago (ever, where the target is not live)."""
        found = self._item(instance, key)
        if found is not None and (not instance.live or self._clock() < found[1]):
            value: T = found[3]
            return value
        began = self._clock()
        value = make()
        now = self._clock()
        lifetime = min(LIST_LIFETIME, LIST_SHARE * (now - began))
        return self.store(instance, key, value, 0 if weigh is None else weigh(value), expires=now + lifetime)

    def forget(self, instance: Instance) -> None:
        """Drop all that is kept for an instance, so that nothing holds what it held."""
        with self._lock:
            self._shelves.pop(instance, None)

    def _purge(self) -> None:
        for instance in [known for known in self._shelves if known is not None and known.closed]:
            del self._shelves[instance]


KEPT = Kept()
"""The one of this program."""
