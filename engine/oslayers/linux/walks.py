"""Walks over a kernel's containers: list_head, hlist, xarray, maple tree, red-black tree. All are bounded.

A list that leaves what can be read, runs in a circle that misses its head, or grows beyond its limit ends there and
is counted in `Objects.skipped`: what came before it stands. Over live memory that is a list which changed meanwhile.

Sources: Linux include/linux/{list,xarray,maple_tree,rbtree}.h, lib/{xarray,maple_tree}.c, releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.errors import FaultError
from engine.layout import Field
from engine.oslayers.linux.objects import Objects
from engine.records import dataclass

LIST_LIMIT = 1 << 20
TREE_LIMIT = 1 << 20
"""Entries of a container; more is nothing that a kernel has."""
DEPTH_LIMIT = 32
EVERYWHERE = (0, (1 << 64) - 1)

XA_NODE = 2
"""Low bits of an internal entry of an xarray or maple tree (xa_is_internal)."""
XA_SMALLEST = 4096
"""Internal entries up to here are no nodes but marks: retry, zero, siblings (xa_is_node)."""


def ring(objects: Objects, head: int, link: Field, limit: int = LIST_LIMIT, *, kind: str = "list") -> Iterator[int]:
    """The structures in the ring of `struct list_head` whose head lies at `head`, each linked by its member `link`."""
    seen: set[int] = set()
    try:
        at = objects.pointer(head)
        while at != head:
            if not objects.is_pointer(at) or at in seen or len(seen) >= limit:
                objects.skipped[f"broken {kind}"] += 1
                return
            seen.add(at)
            yield at - link.offset
            at = objects.pointer(at)
    except FaultError:
        objects.skipped[f"broken {kind}"] += 1


WALKS = 3
"""How often a list is walked that was found broken: over live memory it may have changed meanwhile."""


def settled_ring(
    objects: Objects, head: int, link: Field, limit: int = LIST_LIMIT, *, kind: str = "list"
) -> tuple[list[int], bool]:
    """The structures in a ring of `struct list_head`, and whether it closed.

    A ring that does not close is walked from its other end too, and up to three times in all with page tables read
    anew; then what was met on any walk counts as its members, and the list is counted as broken once.
    """
    met: dict[int, None] = {}
    for walk in range(WALKS):
        if walk:
            objects.retried[kind] += 1
        silent = objects.silent() if not walk else objects.fresh().silent()
        found, closed = _walk(silent, head, 0, link, limit)
        if closed:
            return found, True
        met.update(dict.fromkeys(found))
        backwards, closed = _walk(silent, head, objects.word, link, limit)
        if closed:
            return backwards[::-1], True
        met.update(dict.fromkeys(reversed(backwards)))
    objects.skipped[f"broken {kind}"] += 1
    return list(met), False


def _walk(objects: Objects, head: int, direction: int, link: Field, limit: int) -> tuple[list[int], bool]:
    """The members up to where the ring breaks; `direction` is the offset of `next` or of `prev`."""
    seen: dict[int, None] = {}
    try:
        at = objects.pointer(head + direction)
        while at != head:
            if not objects.is_pointer(at) or at in seen or len(seen) >= limit:
                break
            following = objects.pointer(at + direction)  # what cannot be read is no member
            seen[at] = None
            at = following
    except FaultError:
        at = 0
    return [node - link.offset for node in seen], at == head


def chain(objects: Objects, first: int, link: Field, limit: int = LIST_LIMIT, *, kind: str = "chain") -> Iterator[int]:
    """Structures chained by a plain pointer in `link`, from the one at `first` on, up to a null pointer.

    Of an hlist the links point to the members: take the member's offset off, as `hlist` does.
    """
    seen: set[int] = set()
    at = first
    try:
        while at:
            if not objects.is_pointer(at) or at in seen or len(seen) >= limit:
                objects.skipped[f"broken {kind}"] += 1
                return
            seen.add(at)
            yield at
            at = objects.pointer(at + link.offset)
    except FaultError:
        objects.skipped[f"broken {kind}"] += 1


def hlist(objects: Objects, head: int, link: Field, limit: int = LIST_LIMIT, *, kind: str = "hlist") -> Iterator[int]:
    """The structures in the `struct hlist_head` at `head`; of an hlist_nulls odd pointers end it too."""
    seen: set[int] = set()
    try:
        at = objects.pointer(head)
        while at and not at & 1:
            if not objects.is_pointer(at) or at in seen or len(seen) >= limit:
                objects.skipped[f"broken {kind}"] += 1
                return
            seen.add(at)
            yield at - link.offset
            at = objects.pointer(at)
    except FaultError:
        objects.skipped[f"broken {kind}"] += 1


def xarray(
    objects: Objects, head: int, limit: int = TREE_LIMIT, *, first: int = 0, last: int = (1 << 64) - 1
) -> Iterator[tuple[int, int, int]]:
    """(index, entry, count) of the `struct xarray` at `head`, ascending: `count` indices share the entry.

    Entries with bit 0 set are values (`entry >> 1`), all others pointers. Older trees of that shape (radix_tree_root,
    idr) are the same by the kernel's own design. Of entries that share nothing with the indices from `first` to
    `last` none is given, and their nodes are not read.
    """
    node = objects.struct("xa_node")
    slots, shift = node["slots"], node["shift"]
    slot_count = slots.size // objects.word
    try:
        top = objects.pointer(head + objects.struct("xarray", "radix_tree_root").first("xa_head", "rnode").offset)
    except FaultError:
        objects.skipped["broken xarray"] += 1
        return
    if not _is_node(objects, top):
        if top and top & 3 != XA_NODE and not first:
            yield 0, top, 1
        return
    walk = _Xarray(objects, slots, shift, slot_count, first, last, limit)
    yield from walk.node(top - XA_NODE, 0, 64)


def xarray_entry(objects: Objects, head: int, index: int) -> int:
    """The entry at one index of the `struct xarray` at `head`; 0 where there is none. Raises FaultError."""
    node = objects.struct("xa_node")
    slots, shift = node["slots"], node["shift"]
    count = slots.size // objects.word
    entry = objects.pointer(head + objects.struct("xarray", "radix_tree_root").first("xa_head", "rnode").offset)
    if not _is_node(objects, entry):
        return entry if not index and entry & 3 != XA_NODE else 0
    for _ in range(DEPTH_LIMIT):
        at = entry - XA_NODE
        bits = objects.value(at, shift)
        slot = index >> bits
        if bits > 60 or slot >= count:
            return 0
        entry, index = objects.pointer(at + slots.offset + slot * objects.word), index - (slot << bits)
        if not bits or not _is_node(objects, entry):
            return entry if entry & 3 != XA_NODE else 0
    return 0


def _is_node(objects: Objects, entry: int) -> bool:
    return entry & 3 == XA_NODE and entry > XA_SMALLEST and objects.is_pointer(entry)


@dataclass(slots=True)
class _Xarray:
    """One walk of an xarray."""

    objects: Objects
    slots: Field
    shift: Field
    count: int
    first: int
    last: int
    budget: int

    def node(self, at: int, base: int, above: int) -> Iterator[tuple[int, int, int]]:
        """What the node at `at` holds, whose first slot has the index `base`; its shift is less than `above`."""
        objects = self.objects
        try:
            bits = objects.value(at, self.shift)
            data = objects.memory.read(at + self.slots.offset, self.slots.size)
        except FaultError:
            objects.skipped["broken xarray"] += 1
            return
        if not 0 <= bits < above:  # of a child less than of its parent: no circle
            objects.skipped["broken xarray"] += 1
            return
        entries = np.frombuffer(data, objects.word_type).tolist()
        for slot, entry in enumerate(entries):
            if not entry:
                continue
            index = base + (slot << bits)
            if index > self.last:
                return
            self.budget -= 1
            if self.budget < 0:
                objects.skipped["broken xarray"] += 1
                return
            if bits and _is_node(objects, entry):
                if index + (1 << bits) > self.first:
                    yield from self.node(entry - XA_NODE, index, bits)
            elif entry & 3 != XA_NODE:
                siblings = 1  # of a large folio: entries that only name the slot of the first
                while slot + siblings < len(entries) and entries[slot + siblings] == (slot << 2 | XA_NODE):
                    siblings += 1
                if index + (siblings << bits) > self.first:
                    yield index, entry, siblings << bits


def maple_tree(
    objects: Objects, tree: int, limit: int = TREE_LIMIT, within: tuple[int, int] = EVERYWHERE
) -> Iterator[int]:
    """The entries of the `struct maple_tree` at `tree` (of an mm: its VMAs), ascending.

    Nodes that have nothing to do with the indices from `within[0]` up to `within[1]` are not looked at.
    """
    try:
        root = objects.pointer(tree + objects.struct("maple_tree")["ma_root"].offset)
    except FaultError:
        objects.skipped["broken maple tree"] += 1
        return
    if not _is_node(objects, root):
        if objects.is_pointer(root) and not root & 3:
            yield root
        return
    yield from _maple_node(objects, root, 0, [limit], set(), within)


def _maple_shapes(objects: Objects) -> dict[int, tuple[Field, Field]]:
    """Node type → (pivots, slots): 1 leaf_64, 2 range_64, 3 arange_64 (enum maple_type)."""
    wide, alloc = objects.struct("maple_range_64"), objects.struct("maple_arange_64")
    of_range = wide["pivot"], wide["slot"]
    return {1: of_range, 2: of_range, 3: (alloc["pivot"], alloc["slot"])}


def _maple_node(
    objects: Objects, entry: int, depth: int, budget: list[int], seen: set[int], within: tuple[int, int]
) -> Iterator[int]:
    """Type in bits 6:3 of an entry that leads to a node, the node at its multiple of 256 (lib/maple_tree.c)."""
    kind, at = entry >> 3 & 15, entry & ~0xFF
    shape = _maple_shapes(objects).get(kind)
    if shape is None or depth > DEPTH_LIMIT or at in seen:
        objects.skipped["broken maple tree"] += 1
        return
    seen.add(at)
    pivots, slots = shape
    try:
        data = objects.memory.read(at, max(pivots.stop, slots.stop))
    except FaultError:
        objects.skipped["broken maple tree"] += 1
        return
    word = objects.word
    limits = np.frombuffer(data, objects.word_type, pivots.size // word, pivots.offset).tolist()
    found = np.frombuffer(data, objects.word_type, slots.size // word, slots.offset).tolist()
    for index, slot in enumerate(found):
        budget[0] -= 1
        if budget[0] < 0:
            objects.skipped["broken maple tree"] += 1
            return
        highest = limits[index] if index < len(limits) else 0
        if highest and highest < within[0]:
            continue
        if slot and kind == 1:
            # The last slot of a leaf that is not full may hold the node's own data (ma_meta): small numbers.
            if objects.is_pointer(slot) and not slot & 3:
                yield slot
        elif slot and kind != 1 and objects.is_pointer(slot & ~0xFF):
            yield from _maple_node(objects, slot, depth + 1, budget, seen, within)
        if highest >= within[1]:
            return
        if index < len(limits) and not highest:
            return  # pivot 0 behind the first slot: the node's entries stop here


def red_black_tree(objects: Objects, root: int, link: Field, limit: int = TREE_LIMIT) -> Iterator[int]:
    """The structures in the `struct rb_root` at `root`, in order, each linked by its `struct rb_node` in `link`."""
    node = objects.struct("rb_node")
    left, right = node["rb_left"], node["rb_right"]
    seen: set[int] = set()
    stack: list[int] = []
    try:
        at = objects.pointer(root)
        while at or stack:
            while at:
                if not objects.is_pointer(at) or at in seen or len(seen) >= limit:
                    objects.skipped["broken tree"] += 1
                    return
                seen.add(at)
                stack.append(at)
                at = objects.pointer(at + left.offset)
            here = stack.pop()
            yield here - link.offset
            at = objects.pointer(here + right.offset)
    except FaultError:
        objects.skipped["broken tree"] += 1
