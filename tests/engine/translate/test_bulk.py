"""The vectorised walk against the scalar one, over page tables of every mode that lead everywhere and nowhere."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_trees import addresses_of, memory_of, random_memory, walked
from support import require

from engine import accelerator
from engine.bytes_memory import BytesMemory
from engine.errors import FaultKind, InvalidArgumentError, UnsupportedError
from engine.file_memory import FileMemory
from engine.memory import Memory
from engine.translate import modes
from engine.translate.bulk import WalkReport, blocks, translate
from engine.translate.mmu import EntryKind, Level, MmuSpec, Translation
from engine.types import ADDRESS_SPACE, PageFlags, Rights

SWAP = EntryKind("swap", 0xFFFF_0000_0000_0001, 0x1234_0000_0000_0000, fault=FaultKind.PAGED_OUT)
ODD = MmuSpec(
    "odd",
    "made up: leaves wider than their entry, inverted and shifted parts, tags, unequal halves",
    8,
    (
        Level(30, 8, (EntryKind("table", 3, 1, address=((0xFFFF_F800, 0),)),
                      EntryKind("1G", 3, 2, 30, ((0xFF << 20, 10),)))),
        Level(21, 9, (EntryKind("table", 3, 1, address=((0xFFFF_F000 >> 2, 2),), rights=((Rights.WRITE, 4, 0),)),
                      EntryKind("4M", 0x83, 0x82, 22, ((0xFFC0_0000, 0),), ((Rights.READ, 0, 0),)),
                      EntryKind("moving", 0x83, 0x03, fault=FaultKind.MIGRATING))),
        Level(12, 9, (EntryKind("4K", 3, 1, 12, ((0xFF000, 0), (0xFF00_0000_0000, -24)), ((Rights.READ, 8, 8),),
                                ((PageFlags.DIRTY, 4, 4), (PageFlags.ACCESSED, 1 << 62, 1 << 62))),
                      EntryKind("64K", 3, 2, 16, ((0xFFFF_0000, 0),), invert=0xFFFF_0000),
                      EntryKind("bad", 3, 3, fault=FaultKind.MALFORMED))),
    ),
    low_bits=38, high_bits=35, ignored_bits=0xFF << 56,
)  # fmt: skip
ZEROS = MmuSpec(
    "zeros",
    "made up: an entry is a leaf where a bit is clear, but for zero, which is absent",
    4,
    (Level(22, 10, (EntryKind("table", 1, 0, address=((0xFFFF_F000, 0),)),
                    EntryKind("4M", 1, 1, 22, ((0xFFC0_0000, 0),)))),
     Level(12, 10, (EntryKind("4K", 1, 0, 12, ((0xFFFF_F000, 0),)),))),
    low_bits=32, address_bits=32,
)  # fmt: skip
EXTRA = ("aarch64-16k-47-high", "aarch64-64k-52-tbi", "aarch64-4k-52-lpa2", "arm-short-1", "arm-lpae-1-2-high")
KNOWN = [modes.mode(name) for name in (*modes.names(), *EXTRA)]
NARROW = [mode for mode in (*KNOWN, ODD, ZEROS) if mode.entry_size <= 8 and mode.address_bits <= 64]
every_mode = pytest.mark.parametrize("mode", NARROW, ids=lambda mode: mode.name)
FEW = ("x86", "x86-64", "ept", "aarch64-64k-52-tbi", "arm-short-1", "riscv-sv39", "odd", "zeros")
few_modes = pytest.mark.parametrize("mode", [mode for mode in NARROW if mode.name in FEW], ids=lambda mode: mode.name)


@pytest.fixture(autouse=True, params=["accelerator", "numpy"])
def way(request):
    """Both walks hold the same contract."""
    if request.param == "accelerator":
        require(accelerator.library() is not None, f"there is no accelerator: {accelerator.why_not()}")
        yield
    else:
        with accelerator.without():
            yield


class Remote(BytesMemory):
    """A memory of which whole tables are read."""

    words_are_cheap = False

    def pieces(self):
        return None


def hook(address: int, entry: int, level: int) -> Translation | FaultKind:
    """An OS layer that finds some pages and reasons in entries that no row matches."""
    if entry % 3 == 0:
        physical = entry >> 12 << 12 & 0xFFF_F000 | address & 0xFFF
        return Translation(address, physical, 12, Rights.READ, PageFlags.TRANSITION, entry, 0, level)
    return FaultKind.PAGED_OUT if entry % 3 == 1 else FaultKind.ABSENT


def assert_as_walked(memory: Memory, roots, addresses, absent=None, source: Memory | None = None):
    found = translate(source or memory, roots, addresses, absent=absent, details=True)
    assert found.rights is not None
    assert found.flags is not None
    columns = (found.physical, found.page_bits, found.kinds, found.rights, found.flags)
    wanted = [walked(memory, roots, address, absent) for address in addresses.tolist()]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    for address, row, want in zip(addresses.tolist(), rows, wanted, strict=True):
        assert row == want, f"{address:#x}"
    plain = translate(source or memory, roots, addresses, absent=absent)
    for one, two in zip(columns[:3], (plain.physical, plain.page_bits, plain.kinds), strict=True):
        assert one.tolist() == two.tolist()


@every_mode
def test_many_addresses_are_translated_as_each_of_them(mode):
    memory = memory_of(mode, 1)
    assert_as_walked(memory, [(mode, 0x1000)], addresses_of(mode, 1, 120))


@few_modes
def test_whole_tables_give_the_same_answers(mode):
    data = random_memory(mode, 7)
    assert_as_walked(BytesMemory(data), [(mode, 0x2000)], addresses_of(mode, 1, 120), source=Remote(data))
    close = np.arange(1000, dtype=np.uint64) * np.uint64(4096) + np.uint64(mode.extents()[0].start)
    assert_as_walked(BytesMemory(data), [(mode, 0x2000)], close, source=Remote(data))


@few_modes
def test_the_hook_is_asked_for_entries_that_no_row_matches(mode):
    memory = memory_of(mode, 3)
    assert_as_walked(memory, [(mode, 0x1000)], addresses_of(mode, 5, 120), absent=hook)


@few_modes
def test_addresses_that_share_last_tables_are_translated_as_each_of_them(mode):
    memory = memory_of(mode, 11)
    chance = np.random.default_rng(2)
    for extent in mode.extents():
        start = extent.start + int(chance.integers(0, extent.size)) // 4096 * 4096
        size = min(1 << 25, extent.stop - start)
        addresses = chance.integers(0, size, 300, np.uint64) + np.uint64(start)
        assert_as_walked(memory, [(mode, 0x3000)], addresses)
        assert_as_walked(memory, [(mode, 0x3000)], np.sort(addresses))




def test_modes_of_more_than_64_bits_are_walked_one_address_at_a_time():
    wide = replace(modes.mode("x86-64"), name="wide", entry_size=16)
    data = bytearray(1 << 16)
    for at, entry in ((0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x5003), (0x4010, 0x6003)):
        data[at : at + 8] = entry.to_bytes(8, "little")
    addresses = np.array([5, 4096 + 7, 8192, 1 << 50], np.uint64)
    assert_as_walked(BytesMemory(bytes(data)), [(wide, 0x1000)], addresses)
    with pytest.raises(UnsupportedError, match="64 bits"):
        next(blocks(BytesMemory(bytes(data)), (wide, 0x1000)))


def test_of_two_roots_each_translates_its_half():
    memory = memory_of(modes.mode("aarch64-4k-48"), 4)
    roots = [(modes.mode("aarch64-4k-48"), 0x1000), (modes.mode("aarch64-4k-48-high"), 0x5000)]
    addresses = np.concatenate([addresses_of(spec, 8, 120) for spec, _ in roots])
    assert_as_walked(memory, roots, addresses)
    assert_as_walked(memory, list(reversed(roots)), addresses, absent=hook)


def test_an_empty_batch_and_one_address_are_batches():
    memory = memory_of(modes.mode("x86-64"), 4)
    roots = [(modes.mode("x86-64"), 0x1000)]
    assert len(translate(memory, roots, np.empty(0, np.uint64)).physical) == 0
    assert_as_walked(memory, roots, np.array([0x1234], np.uint64))


# -- whole trees -------------------------------------------------------------------------------------------------


def listing(memory: Memory, root, start: int = 0, stop: int | None = None, **options) -> list[tuple[int, ...]]:
    """Every row of every block, in order."""
    found = []
    for chunk in blocks(memory, root, start, stop, **options):
        assert len(chunk)
        columns = (chunk.starts, chunk.sizes, chunk.physical, chunk.page_bits, chunk.rights, chunk.flags, chunk.kinds)
        found += zip(*(column.tolist() for column in columns), strict=True)
    return found


def assert_covers(rows, start: int, stop: int) -> None:
    at = start
    for row in rows:
        assert row[0] == at
        assert row[1] > 0
        at += row[1]
    assert at == stop


@every_mode
def test_a_listing_covers_the_range_and_says_what_the_walk_of_each_address_says(mode):
    memory = memory_of(mode, 2, size=1 << 17, absent=0.994)
    root = mode, 0x1000
    rows = listing(memory, root, gaps=True)
    assert_covers(rows, 0, min(ADDRESS_SPACE, max(extent.stop for extent in mode.extents())))
    assert rows == listing(memory, root, gaps=True, buffer=1 << 14), "whatever the buffer"
    chance = np.random.default_rng(2)
    for row in chance.choice(len(rows), min(40, len(rows)), replace=False).tolist():
        start, size, physical, bits, rights, flags, kind = rows[row]
        if kind == FaultKind.NOT_WALKED:
            continue
        for address in {start, start + size - 1, start + int(chance.integers(0, min(size, 1 << 62)))}:
            if not any(address in extent for extent in mode.extents()):
                continue  # beside what is listed only tagged addresses are translated, to what is
            found = walked(memory, [root], address)
            moved = physical + address - start if not kind else 0
            assert found == (moved, bits, kind, rights, flags), f"{address:#x}"


@few_modes
def test_a_part_of_a_listing_is_the_listing_cut_to_it(mode):
    memory = memory_of(mode, 9, size=1 << 17, absent=0.994)
    root = mode, 0x1000
    whole = [row for row in listing(memory, root) if row[6] != FaultKind.NOT_WALKED]
    chance = np.random.default_rng(3)
    for low, high in chance.integers(0, len(whole), (3, 2)).tolist():
        low, high = sorted((low, high))
        start, stop = whole[low][0] + whole[low][1] // 3, whole[high][0] + (whole[high][1] + 1) // 2
        if start >= stop:
            continue
        part = listing(memory, root, start, stop, gaps=True)
        assert_covers(part, start, stop)
        for row in part:
            if row[6] not in (FaultKind.ABSENT, FaultKind.NOT_WALKED):
                address = row[0] + row[1] // 2
                moved = row[2] + row[1] // 2 if not row[6] else 0
                assert walked(memory, [root], address) == (moved, row[3], row[6], row[4], row[5])


@few_modes
def test_the_hook_says_what_stands_in_a_listing(mode):
    memory = memory_of(mode, 21, size=1 << 17, absent=0.994)
    rows = listing(memory, (mode, 0x1000), gaps=True, absent=hook)
    assert_covers(rows, 0, min(ADDRESS_SPACE, max(extent.stop for extent in mode.extents())))
    for start, size, physical, bits, rights, flags, kind in rows[:: max(1, len(rows) // 40)]:
        if kind == FaultKind.NOT_WALKED:
            continue
        for address in (start, start + size - 1):
            inside = any(address in extent for extent in mode.extents())
            if inside and (kind or not flags & PageFlags.TRANSITION.value):
                moved = physical + address - start if not kind else 0
                assert walked(memory, [(mode, 0x1000)], address, hook) == (moved, bits, kind, rights, flags)


def test_an_empty_address_space_of_64_bits_is_two_gaps():
    mode = MmuSpec("all", "made up", 8, (Level(55, 9, (EntryKind("t", 1, 1, address=((0xFF000, 0),)),)),
                                         Level(46, 9, (EntryKind("p", 1, 1, 46, ((1 << 50, 0),)),))), 64)  # fmt: skip
    memory = BytesMemory(bytes(1 << 16))
    assert [row[:2] for row in listing(memory, (mode, 0), gaps=True)] == [(0, 1 << 63), (1 << 63, 1 << 63)]
    assert listing(memory, (mode, 0)) == []


def test_the_last_page_of_all_is_listed_without_a_stop():
    data = bytearray(1 << 15)
    for at, entry in ((0x1FF8, 0x2003), (0x2FF8, 0x3003), (0x3FF8, 0x4003), (0x4FF8, 0x5003)):
        data[at : at + 8] = entry.to_bytes(8, "little")
    rows = listing(BytesMemory(bytes(data)), (modes.mode("x86-64"), 0x1000), gaps=True)
    assert rows[-1][:4] == (ADDRESS_SPACE - 4096, 4096, 0x5000, 12)
    assert_covers(rows, 0, ADDRESS_SPACE)


def test_a_range_that_is_none_is_an_error():
    with pytest.raises(InvalidArgumentError):
        next(blocks(BytesMemory(b""), (modes.mode("x86-64"), 0), 0, ADDRESS_SPACE + 1))
    assert listing(BytesMemory(b""), (modes.mode("x86-64"), 0), 8192, 4096) == []


# -- hostile trees -------------------------------------------------------------------------------------------------


def test_a_table_that_leads_to_itself_is_walked_a_few_times():
    memory = BytesMemory((0x0067).to_bytes(8, "little") * 512)
    report = WalkReport()
    rows = listing(memory, (modes.mode("x86-64"), 0), report=report)
    assert report.tables <= 4 * 64
    assert report.repeated > 400
    assert {row[6] for row in rows} == {0, FaultKind.NOT_WALKED}
    assert not report.limited


def test_tables_outside_of_memory_are_reported_and_listed():
    data = bytearray(8192)
    data[:16] = (0x7000_0003).to_bytes(8, "little") + (0x1003).to_bytes(8, "little")
    report = WalkReport()
    rows = listing(BytesMemory(bytes(data)), (modes.mode("x86-64"), 0), report=report)
    assert rows == [(0, 1 << 39, 0, 0, 0, 0, FaultKind.TABLE)]
    assert report.unreadable == [0x7000_0000]
    assert report.tables == 3


def test_a_table_at_the_edge_of_memory_is_walked_as_far_as_it_goes():
    data = bytearray(0x4000 + 0x800)
    for at, entry in ((0x1000, 0x2003), (0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x5003), (0x47F8, 0x6003)):
        data[at : at + 8] = entry.to_bytes(8, "little")
    rows = listing(BytesMemory(bytes(data)), (modes.mode("x86-64"), 0x1000))
    assert [row[:3] for row in rows] == [(0, 4096, 0x5000), (255 << 12, 4096, 0x6000), (256 << 12, 256 << 12, 0)]
    assert rows[-1][6] == FaultKind.TABLE


def test_a_tree_of_more_tables_than_memory_has_room_for_ends_at_the_limit():
    memory = memory_of(modes.mode("riscv-sv57"), 5, size=1 << 18, absent=0.0)
    report = WalkReport()
    for _ in blocks(memory, (modes.mode("riscv-sv57"), 0), report=report):
        pass
    assert report.limited
    assert report.tables <= (1 << 12) + 5 * 64 + 1


def test_the_trees_of_these_tests_have_pages_and_all_kinds_of_holes():
    seen: set[int] = set()
    for mode in NARROW:
        found = translate(memory_of(mode, 1), [(mode, 0x1000)], addresses_of(mode, 1, 300))
        assert (found.kinds == 0).sum() >= 10, mode.name
        seen |= set(found.kinds.tolist())
    assert {0, FaultKind.ABSENT, FaultKind.TABLE, FaultKind.MIGRATING, FaultKind.MALFORMED} <= seen


def test_a_listing_takes_no_more_memory_than_its_buffer_allows():
    mode = modes.mode("x86-64")
    tables = 513
    words = np.zeros(512 * (tables + 3), np.uint64)
    words[512], words[1024] = 0x2003, 0x3003
    words[1536:2048] = (np.arange(512, dtype=np.uint64) + np.uint64(4)) << np.uint64(12) | np.uint64(3)
    words[2048:] = 0x7003
    memory = BytesMemory(words.tobytes())
    rows = 0
    next(blocks(memory, (mode, 0x1000)))
    tracemalloc.start()
    for chunk in blocks(memory, (mode, 0x1000), buffer=1 << 20):
        rows += len(chunk)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 512 * 512
    assert peak < 2 << 20


def test_page_tables_in_a_file_that_others_cut_are_faults_and_no_signal(tmp_path):
    mode = modes.mode("x86-64")
    path = tmp_path / "image"
    data = random_memory(mode, 3, size=1 << 18)
    path.write_bytes(data)
    memory = FileMemory(str(path))
    addresses = addresses_of(mode, 3, 100)
    truth = translate(BytesMemory(data), [(mode, 0x1000)], addresses)
    program = "import os, sys\nwhile True: [os.truncate(sys.argv[1], n) for n in (5000, 1 << 18)]"
    cutter = subprocess.Popen([sys.executable, "-c", program, str(path)])
    try:
        for number in range(100):
            found = translate(memory, [(mode, 0x1000)], addresses)
            for row in np.flatnonzero(found.kinds == 0).tolist():
                assert truth.kinds[row] == 0
                assert found.physical[row] == truth.physical[row]
            if number % 20 == 0:
                for chunk in blocks(memory, (mode, 0x1000), 0, 1 << 30):
                    assert len(chunk)
    finally:
        cutter.kill()
        cutter.wait()


def test_a_few_seconds_of_the_fuzzer_find_nothing():
    program = Path(__file__).parents[3] / "scripts" / "fuzz" / "page_tables.py"
    command = [sys.executable, str(program), "2", "--seed", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert "cases" in done.stdout
