"""`struct module`, by the list in which all modules hang.

A module begins with its state, its place in the list and its name. Of the places in the kernel's image that could head
a list, the one counts whose every member has, before it, a state, and behind it a name with nothing but zeros up to its
field's end. Where a module's memory is described proves itself too: `base` is a page, the module's own record lies
within `size` bytes from there, and the nodes by which these ranges are looked up point back to the module. Before 6.4
there is one range for all (`core_layout`), and one that is freed after the start; from then on there are seven
(`mem`), of which the second, data, holds the record.

Sources: Linux include/linux/module.h (struct module, module_layout, module_memory, mod_tree_node), include/linux/
rbtree_latch.h, kernel/module/tree_lookup.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from engine.layout import Field
from engine.memory import Memory
from engine.oslayers.linux.modules import MEMORY_KINDS, MODULE_LIMIT, SIZE_LIMIT, STATES, list_heads
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.profile import Profile
from engine.oslayers.linux.shape.sample import Sample
from engine.oslayers.linux.shape.types import (
    Members,
    Shapes,
    array,
    characters,
    list_head,
    number,
    pointer,
    structure,
)
from engine.oslayers.linux.walks import ring
from engine.types import Extent

MODULE_BYTES = 2048
NAME_SIZE = 64
"""MODULE_NAME_LEN and the word before it that makes the two even: `name` has 64 bytes less a word."""
_NAME = re.compile(rb"[A-Za-z0-9_.-]{1,63}\0+")
_NODE_WORDS = 7
"""mod_tree_node: the module, and two rb_nodes of three words."""
_COUNTS = 16
"""Bytes of module_layout's four sizes."""
NEAR = 8 << 20
"""Bytes around `init_task` in which the list's head is looked for: both are initialised data, some MiB in all."""


def find_modules(profile: Profile, shapes: Shapes) -> dict[str, Members]:
    """`module`, and with `mem` `module_memory`; empty where no list proves itself."""
    found = profile.found
    objects = Objects(found.memory.cached(), shapes, found.candidate.kernel_start)
    word = shapes.pointer_size
    known = profile.symbol("modules")
    heads = list(list_heads(objects, _data(profile))) if known is None else [known]
    for head, modules in _lists(objects, _plausible(objects, heads)):
        sample = Sample.read(objects.memory, modules, MODULE_BYTES, objects.kernel_start)
        if len(sample) == len(modules):
            profile.learn("modules", head)
            members: Members = {
                "state": (0, number(4)),
                "list": (word, list_head(word)),
                "name": (3 * word, characters(NAME_SIZE - word)),
            }
            ranges, others = _ranges(sample)
            return {"module": {**members, **ranges}, **others}
    return {}


def _data(profile: Profile) -> Extent:
    """The part of the kernel's image around `init_task`."""
    image, middle = profile.found.image, profile.require("init_task")
    start, stop = max(image.start, middle - NEAR & ~0xFFF), min(image.stop, middle + NEAR)
    return Extent(start, max(0, stop - start))


def _plausible(objects: Objects, heads: list[int]) -> list[int]:
    """The heads whose first member may be a module: most heads are dropped here, all at once."""
    word = objects.word
    firsts, faults = objects.memory.words(heads, objects.word_type)
    data = np.zeros((len(heads), 2 * word + NAME_SIZE), np.uint8)
    more = objects.memory.gather(firsts.astype(np.uint64) - np.uint64(word), data)
    good = (data[:, 0] < len(STATES)) & (data[:, 1:word] == 0).all(axis=1) & (data[:, -1] == 0)
    good &= data[:, 3 * word] > 0x20
    good[np.union1d(faults.rows, more.rows).astype(np.intp)] = False
    return [heads[row] for row in np.flatnonzero(good).tolist()]


def _lists(objects: Objects, heads: list[int]) -> Iterator[tuple[int, list[int]]]:
    """(head, modules) of the lists whose every member is a module."""
    word, silent = objects.word, objects.silent()
    link = Field("list", word, 2 * word, list_head(word))
    for head in heads:
        modules: list[int] = []
        for address in ring(silent, head, link, MODULE_LIMIT):
            if not _is_module(objects.memory, address, word):
                modules = []
                break
            modules.append(address)
        if modules and not silent.skipped:
            yield head, modules
        silent.skipped.clear()


def _is_module(memory: Memory, address: int, word: int) -> bool:
    data = memory.read_padded(address, 2 * word + NAME_SIZE)
    return int.from_bytes(data[:word], "little") in STATES and _NAME.fullmatch(data[3 * word :]) is not None


def _ranges(sample: Sample) -> tuple[Members, dict[str, Members]]:
    """`core_layout` and `init_layout`, or `mem` with `module_memory`; nothing where neither is proved."""
    word = sample.word
    words = sample.words().astype(np.uint64)
    before = sample.pointers(words) & (words <= sample.addresses[:, None])
    pages = sample.agreed(before & (words & np.uint64(4095) == 0))
    back = set((sample.agreed(words == sample.addresses[:, None]) * word).tolist())
    found: list[tuple[Members, dict[str, Members]]] = []
    for base in (pages * word).tolist():
        own = sample.addresses - sample.column(base)
        for distance in dict.fromkeys((word, word + 4, 2 * word, 2 * word + 4)):
            if base + distance + 4 > sample.size:
                continue
            size = sample.column(base + distance, 4)
            if sample.holds((size > own) & (size <= np.uint64(SIZE_LIMIT))):
                found += _as_layout(sample, back, base, distance)
                found += _as_memory(sample, base, distance)
    return found[0] if len(found) == 1 else ({}, {})


def _as_layout(sample: Sample, back: set[int], base: int, distance: int) -> list[tuple[Members, dict[str, Members]]]:
    """Two `struct module_layout`, the first of which has its `base` there."""
    word = sample.word
    node = base + word + _COUNTS
    other = node + _NODE_WORDS * word
    if distance != word or node not in back or other + word + _COUNTS not in back:
        return []
    kind = structure("module_layout", {"base": (0, pointer(word)), "size": (word, number(4))})
    return [({"core_layout": (base, kind), "init_layout": (other, kind)}, {})]


def _as_memory(sample: Sample, base: int, distance: int) -> list[tuple[Members, dict[str, Members]]]:
    """Seven `struct module_memory`, the second of which has its `base` there."""
    word = sample.word
    node = distance + 4 + -(distance + 4) % word
    stride = node + _NODE_WORDS * word
    first = base - stride
    if first < 3 * word + NAME_SIZE or first + len(MEMORY_KINDS) * stride > sample.size:
        return []
    for place in range(first, first + len(MEMORY_KINDS) * stride, stride):
        start, size, owner = sample.column(place), sample.column(place + distance, 4), sample.column(place + node)
        used = size > 0
        if not sample.holds(~used | ((owner == sample.addresses) & (start & np.uint64(4095) == 0) & (start > 0))):
            return []
    lookup = array(pointer(word), _NODE_WORDS)
    parts: Members = {"base": (0, pointer(word)), "size": (distance, number(4)), "mtn": (node, lookup)}
    return [({"mem": (first, array(structure("module_memory", parts), len(MEMORY_KINDS)))}, {"module_memory": parts})]
