"""Real page tables of Windows 10: two captures of physical pages, and translations recorded by others' tools.

Wanted in the folder that CLOUDFS_TEST_DATA names: windows/rewind-a and windows/rewind-c (quarkslab/rewind): pages.lime,
context.json with the CPU's registers, and of the first v2p.json, 891 pairs of virtual and physical addresses.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import applies, require

from engine.bytes_memory import BytesMemory
from engine.errors import FaultError
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.translate.bulk import WalkReport, blocks, translate
from engine.translate.mmu import Root, Walker
from engine.translate.modes import roots_of
from engine.types import PageFlags, Rights

KERNEL, IMAGE_BASE = 0xFFFF_8000_0000_0000, 0xFFFFF8051A09F000
SHARED_DATA = 0xFFFFF78000000000
SELF_REFERENCES = {"rewind-a": 0x1E8, "rewind-c": 0x1F8}


def lime(path: Path) -> MappedMemory:
    """LiME's format: ranges of a header of 32 bytes (magic, version, first and last address, 8 zeros) and bytes."""
    data, ranges, at = path.read_bytes(), [], 0
    while at < len(data):
        magic, version, first, last = struct.unpack_from("<IIQQ", data, at)
        assert (magic, version) == (0x4C694D45, 1)
        ranges.append(MapRange(first, last - first + 1, at + 32))
        at += 32 + last - first + 1
    return MappedMemory(BytesMemory(data), MemoryMap(ranges))


class Capture:
    def __init__(self, folder: Path) -> None:
        self.memory = lime(folder / "pages.lime")
        self.registers: dict[str, Any] = json.loads((folder / "context.json").read_text())
        names = ("cr0", "cr3", "cr4", "efer")
        self.root: Root = roots_of("x86-64", {name: self.registers[name] for name in names})[0]
        self.walker = Walker(self.memory, *self.root, keep=True)

    @property
    def index(self) -> int:
        return next(i for i in range(256, 512) if self.top(i) & 0xF_FFFF_FFFF_F001 == self.root[1] | 1)

    def top(self, index: int) -> int:
        return self.memory.u64(self.root[1] + 8 * index)

    def self_map(self) -> range:
        """The addresses at which the tables map themselves."""
        start = 0xFFFF << 48 | self.index << 39
        return range(start, start + (1 << 39))


def capture(name: str) -> Capture:
    # They are nobody's to pass on, so that no machine can be asked to have them.
    wanted = f"captures of Windows: set CLOUDFS_TEST_DATA to a folder that has windows/{name}/pages.lime"
    applies("CLOUDFS_TEST_DATA" in os.environ, wanted)
    folder = Path(os.environ["CLOUDFS_TEST_DATA"]) / "windows" / name
    require((folder / "pages.lime").is_file(), f"the Windows capture {name} is not in CLOUDFS_TEST_DATA")
    return Capture(folder)


@pytest.fixture(scope="module")
def one() -> Capture:
    return capture("rewind-a")


@pytest.fixture(scope="module")
def pairs() -> dict[int, int]:
    capture("rewind-a")
    path = Path(os.environ["CLOUDFS_TEST_DATA"]) / "windows/rewind-a/v2p.json"
    return {int(va, 16): int(pa, 16) for va, pa in json.loads(path.read_text()).items()}


@pytest.fixture(scope="module", params=list(SELF_REFERENCES))
def each(request: pytest.FixtureRequest) -> tuple[str, Capture]:
    return request.param, capture(request.param)


def test_the_registers_name_four_levels_and_drop_the_pcid(each):
    _, found = each
    spec, dtb = found.root
    assert spec.name == "x86-64"
    assert found.registers["cr3"] & 0xFFF == 2
    assert dtb == found.registers["cr3"] & ~0xFFF


def test_every_recorded_translation_is_found(one, pairs):
    assert len(pairs) == 891
    assert {va: one.walker.walk(va).physical for va in pairs} == pairs
    assert {va: one.walker.find(va + 0xFFF)[0] - 0xFFF for va in pairs} == pairs


def test_every_recorded_translation_is_found_in_one_batch(one, pairs):
    addresses = np.array(list(pairs), np.uint64)
    found = translate(one.memory, [one.root], addresses)
    assert not found.kinds.any()
    assert found.physical.tolist() == list(pairs.values())


def test_as_many_lie_in_large_pages_as_was_counted(one, pairs):
    sizes = [one.walker.walk(va).page_bits for va in pairs]
    assert (sizes.count(21), sizes.count(12)) == (766, 125)


def test_the_tables_map_themselves_at_the_index_that_is_known(each):
    name, found = each
    assert found.index == SELF_REFERENCES[name]
    index = found.index
    address = 0xFFFF << 48 | index << 39 | index << 30 | index << 21 | index << 12
    assert found.walker.walk(address).physical == found.root[1]


@pytest.mark.parametrize(
    ("name", "small", "large"), [("rewind-a", 10_903, 244), ("rewind-c", 5_394, 5)], ids="rewind-a rewind-c".split()
)
def test_a_listing_finds_the_pages_that_were_counted(name, small, large):
    """Pages of 4 KiB and 2 MiB outside of the self-map; tables that were not captured are told, not guessed."""
    found, report = capture(name), WalkReport()
    sizes: list[int] = []
    self_map = found.self_map()
    for chunk in blocks(found.memory, found.root, report=report):
        outside = (chunk.starts < np.uint64(self_map.start)) | (chunk.starts > np.uint64(self_map[-1]))
        sizes += chunk.page_bits[(chunk.kinds == 0) & outside].tolist()
    assert (sizes.count(12), sizes.count(21)) == (small, large)
    assert len(sizes) == small + large
    assert report.unreadable


def test_what_is_listed_is_what_a_walk_finds(each):
    _, found = each
    for chunk in blocks(found.memory, found.root):
        for row in range(0, len(chunk), 7):
            start = int(chunk.starts[row])
            if chunk.kinds[row]:
                with pytest.raises(FaultError):
                    found.walker.walk(start)
                continue
            walk = found.walker.walk(start)
            assert (walk.physical, walk.page_bits) == (chunk.physical[row], chunk.page_bits[row])
            assert (walk.rights.value, walk.flags.value) == (chunk.rights[row], chunk.flags[row])


def test_the_kernels_image_begins_where_it_is_known_to(one):
    found = one.walker.walk(IMAGE_BASE)
    assert (found.physical, found.page_bits, found.entry) == (0x229F000, 21, 0x22008E3)
    assert one.memory.read(found.physical, 2) == b"MZ"
    assert Rights.USER not in found.rights
    assert PageFlags.DIRTY in found.flags


def test_the_shared_page_tells_the_build(one):
    found = one.walker.walk(SHARED_DATA)
    assert found.physical == 0x3A31000
    assert one.memory.u32(found.physical + 0x260) == 17763
    assert one.memory.u32(found.physical + 0x26C) == 10
    with pytest.raises(FaultError):
        one.walker.walk(0x7FFE0000)


def test_no_page_of_the_kernel_is_for_users(each):
    _, found = each
    self_map = found.self_map()
    for chunk in blocks(found.memory, found.root, KERNEL):
        outside = (chunk.starts < np.uint64(self_map.start)) | (chunk.starts > np.uint64(self_map[-1]))
        mapped = chunk.rights[(chunk.kinds == 0) & outside]
        assert not np.any(mapped & Rights.USER.value)
