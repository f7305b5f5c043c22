"""Contents of guests that were made for them: swap, a disk half cached, large folios, programs of 32 bits.

The oracles: what the guest wrote where, mincore(2), its pagemap and its /proc/PID/syscall.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from guests import contents
from guests.contents import ContentsRecording, words
from guests.kernels import MissingError
from guests.recorder import sparse_copy
from support import applies, require

from engine.errors import EngineError, FaultError, FaultKind, PagedOutError
from engine.file_memory import FileMemory
from engine.oslayer import Base, CachedFiles, PhysicalMaps, ProcFiles, ThreadRegisters
from engine.oslayers.linux import LinuxLayer
from engine.types import PageFlags

ALL = ("amd64-5.10", "amd64-6.1-4level", "amd64-6.12", "amd64-7", "arm64-6.1", "arm64-6.12-16k", "riscv64-6.12")
IN_CI = ("amd64-6.12", "arm64-6.1")
SWAPPED = 1 << 7
"""Bit 62 of pagemap, among the flags of `Truth.pagemap` (Documentation/admin-guide/mm/pagemap.rst)."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contained" in metafunc.fixturenames:
        names = ALL if metafunc.config.getoption("--all-guests") else IN_CI
        metafunc.parametrize("contained", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def contained(request: pytest.FixtureRequest) -> ContentsRecording:
    try:
        return contents.recorded(request.param)
    except MissingError as error:
        require(False, str(error))
        raise


@pytest.fixture(scope="session")
def layer(contained) -> LinuxLayer:
    return LinuxLayer.open(Base(FileMemory(str(contained.image), immutable=True)), {})


@pytest.fixture
def process(contained, layer):
    return layer.process(contained.holder)


# -- swap -----------------------------------------------------------------------------------------------


def test_pages_in_swap_are_said_to_be_there_and_their_neighbours_are_read(contained, process):
    start, pages, first, gone = (int(word, base) for word, base in
                                 zip(contained.told("anonymous"), (16, 10, 10, 10), strict=True))  # fmt: skip
    size, expected = contained.truth.page_size, words("a", pages, contained.truth.page_size)
    for page in range(pages):
        at = start + page * size
        if first <= page < first + gone:
            with pytest.raises(PagedOutError, match=r"in swap: slot \d+ of ") as caught:
                process.memory.read(at + 8, 8)
            assert caught.value.address == at + 8
        else:
            assert process.memory.read(at, size) == expected[page * size :][:size]
    with pytest.raises(PagedOutError) as caught:
        process.memory.read(start, pages * size)
    assert caught.value.address == start + first * size


def test_a_swapped_page_s_slot_is_that_of_the_guest_s_pagemap(contained, layer, process):
    """pagemap gives type (5 bits) and offset of what is in swap."""
    compared = 0
    for address, _, place, flags in contained.truth.pagemap(contained.holder):
        if flags & SWAPPED:
            with pytest.raises(PagedOutError) as caught:
                process.memory.u64(address)
            assert f"slot {place >> 5} of " in str(caught.value)
            compared += 1
    assert compared == int(contained.told("anonymous")[3])


def test_the_device_of_swap_is_named(contained, layer, process):
    known = layer.kernel.profile.symbol("swap_info") is not None
    applies(known, "this kernel (no KALLSYMS_ALL) does not tell where its table of swap areas is")
    start, _, first, _ = contained.told("anonymous")
    with pytest.raises(PagedOutError, match=r"slot \d+ of /dev/zram0$"):
        process.memory.u64(int(start, 16) + int(first) * contained.truth.page_size)


def test_columns_tell_what_is_in_swap_too(contained, process):
    start, pages, first, gone = (int(word, base) for word, base in
                                 zip(contained.told("anonymous"), (16, 10, 10, 10), strict=True))  # fmt: skip
    _, faults = process.memory.words([start + page * contained.truth.page_size for page in range(pages)], "<u8")
    assert faults.rows.tolist() == list(range(first, first + gone))
    assert set(faults.kinds.tolist()) == {int(FaultKind.PAGED_OUT)}


def test_a_page_in_the_cache_of_swap_is_read(contained, layer):
    """Another process has read it again; the rest is in swap, or was read ahead with it."""
    pid, start, pages, back = (int(word, base) for word, base in
                               zip(contained.told("twin"), (10, 16, 10, 10), strict=True))  # fmt: skip
    known = layer.kernel.profile.symbol("swapper_spaces") is not None
    applies(known, "this kernel does not tell where its cache of swap is (no KALLSYMS_ALL, or kept otherwise: 6.18)")
    size, memory = contained.truth.page_size, layer.process(pid).memory
    expected = words("s", pages, size)
    held = 0
    for page in range(pages):
        try:
            data = memory.read(start + page * size, size)
        except PagedOutError:
            assert page >= back
            continue
        assert data == expected[page * size :][:size], page
        held += 1
    assert back <= held < pages
    assert memory.read(start, back * size) == expected[: back * size]
    values, faults = memory.words([start + page * size for page in range(pages)], "<u8")
    assert len(faults) == pages - held
    assert values.tolist()[:back] == [int.from_bytes(expected[page * size :][:8], "little") for page in range(back)]


def test_a_closed_mapping_is_read_and_flagged(contained, process):
    start, pages = int(contained.told("closed")[0], 16), int(contained.told("closed")[1])
    size = contained.truth.page_size
    assert process.memory.read(start, pages * size) == words("n", pages, size)
    stop = start + pages * size
    runs = [run for run in process.capability(PhysicalMaps).physical_maps() if start <= run.start < stop]
    assert sum(run.size for run in runs) == pages * size
    assert all(PageFlags.INACCESSIBLE in run.flags for run in runs)


# -- files ----------------------------------------------------------------------------------------------


def test_pages_of_a_shared_file_that_went_to_swap_are_said_to_be_there(contained, process):
    number, start, pages, first, gone = (int(word, base) for word, base in
                                         zip(contained.told("small"), (10, 16, 10, 10, 10), strict=True))  # fmt: skip
    size, expected = contained.truth.page_size, words("small"[0], pages, contained.truth.page_size)
    file = process.capability(CachedFiles).cached_file(str(number))
    assert file.size == pages * size + 100
    for memory, base in ((file, 0), (process.memory, start)):
        for page in range(pages):
            if first <= page < first + gone:
                with pytest.raises(PagedOutError, match="slot"):
                    memory.read(base + page * size, size)
            else:
                assert memory.read(base + page * size, size) == expected[page * size :][:size]
    assert file.read(pages * size, 100) == bytes(100)  # never written


def test_a_file_of_large_folios_is_read_back_whole(contained, layer, process):
    number, start, pages, _, _ = contained.told("large")
    size = contained.truth.page_size
    expected = words("l", int(pages), size)
    file = process.capability(CachedFiles).cached_file(number)
    assert file.read(0, len(expected)) == expected
    assert process.memory.read(int(start, 16), len(expected)) == expected
    huge = [run for run in process.capability(PhysicalMaps).physical_maps()
            if int(start, 16) <= run.start < int(start, 16) + len(expected) and run.page_size > size]  # fmt: skip
    assert huge or size > 4096, "the guest gave no large page"


def test_of_a_disk_s_file_all_is_read_that_mincore_found_in_memory_and_nothing_else(contained, process):
    mounted = "disk" in {line[0] for line in contained.lines}
    applies(mounted, "this guest's kernel has no driver for the disk that it was given (MODULES of guests/contents.py)")
    number, start, pages, resident = contained.told("disk")
    size = contained.truth.page_size
    expected = words("d", 257, 4096)[: contents.DISK_BYTES]
    file = process.capability(CachedFiles).cached_file(number)
    assert file.size == len(expected)
    assert "0" in resident
    assert "1" in resident
    held = 0
    for page in range(int(pages)):
        part = expected[page * size :][:size]
        if resident[page] == "1":
            assert file.read(page * size, len(part)) == part
            assert process.memory.read(int(start, 16) + page * size, len(part)) == part
            held += len(part)
        else:
            with pytest.raises(FaultError, match="not in the page cache") as caught:
                file.read(page * size, 1)
            assert not isinstance(caught.value, PagedOutError)
            with pytest.raises(FaultError):
                process.memory.read(int(start, 16) + page * size, 1)
    assert sum(extent.size for extent in file.extents()) == held


def test_a_file_of_hugetlbfs_is_read_back_and_what_was_never_written_is_zeros(contained, process):
    applies("hugetlb" in {line[0] for line in contained.lines}, "this guest's kernel gave no huge pages")
    number, start, huge = (int(word, base) for word, base in zip(contained.told("hugetlb"), (10, 16, 10), strict=True))
    size = contained.truth.page_size
    expected = bytearray(words("t", 3 * huge // size, size))
    expected[huge : 2 * huge] = bytes(huge)
    file = process.capability(CachedFiles).cached_file(str(number))
    assert file.size == 3 * huge
    for page in (*range(0, 3 * huge // size, 37), 3 * huge // size - 1):
        assert file.read(page * size, size) == expected[page * size :][:size], page
    assert file.read(0, 3 * huge) == expected
    assert process.memory.read(start, huge) == expected[:huge]
    assert [(extent.start, extent.size) for extent in file.extents()] == [(0, huge), (2 * huge, huge)]


def test_files_are_listed_with_their_paths_and_sizes(contained, process):
    listed = {info.name: info for info in process.capability(CachedFiles).cached_files()}
    links = dict(line.split(" ", 1) for line in contained.truth.text(f"/proc/{contained.holder}/fd").splitlines())
    for word in ("small", "large"):
        number = contained.told(word)[0]
        assert listed[number].path == links[number]
    mapped = [info for name, info in listed.items() if "-" in name]
    assert [info.path for info in mapped] == ["/init"]


def test_a_vdso_that_was_never_called_is_an_image_all_the_same(contained, layer):
    """All programs of one width have the same, and the guest's maps tell where."""
    seen = set()
    for process in layer.processes():
        pid = process.record.pid
        if f"/proc/{pid}/maps" not in contained.truth:  # of init, who told of the others
            continue
        place = next((start for start, _, _, path in contained.truth.maps(pid) if path == "[vdso]"), None)
        if place is not None:
            (vdso,) = [module for module in process.modules() if module.info.name == "[vdso]"]
            assert vdso.info.base == place
            assert vdso.info.build_id
            seen.add((process.info.architecture, vdso.info.build_id))
    assert len(seen) == (2 if contained.guest.architecture in contents.NARROW else 1)


# -- programs of 32 bits ---------------------------------------------------------------------------------


@pytest.fixture
def narrow(contained, layer):
    applies(contained.guest.architecture in contents.NARROW, "this architecture has no programs of 32 bits")
    return layer.process(int(contained.told("narrow")[0]))


def test_a_program_of_32_bits_is_one_of_the_narrow_architecture(contained, layer, narrow):
    assert narrow.info.architecture == {"amd64": "i386", "arm64": "arm"}[contained.guest.architecture]
    assert layer.process(contained.holder).info.architecture == layer.info.architecture


def test_its_arguments_environment_and_auxiliary_vector_equal_the_guest_s_own(contained, narrow):
    files = narrow.capability(ProcFiles)
    for name in ("cmdline", "environ", "auxv", "comm"):
        assert files.read(name) == contained.truth[f"/proc/{narrow.record.pid}/{name}"], name


def test_its_maps_equal_the_guest_s_own(contained, narrow):
    rows = [(region.start, region.stop, region.permissions, region.path) for region in narrow.regions()]
    assert rows == contained.truth.maps(narrow.record.pid)


def test_its_images_are_of_32_bits(contained, narrow):
    first, *others = narrow.modules()
    assert (first.info.name, first.info.architecture) == ("narrow", narrow.info.architecture)
    places = {path: start for start, _, _, path in reversed(contained.truth.maps(narrow.record.pid))}
    assert first.info.base == places["/bin/narrow"]
    assert {".text", ".data", ".bss"} <= {section.name for section in first.sections()}
    for other in others:
        assert other.info.architecture == narrow.info.architecture
        assert other.info.base == places[other.info.path]


def test_its_text_is_read_back_from_bss_and_heap(contained, narrow):
    for word in contained.told("narrow")[1:]:
        assert narrow.memory.read(int(word, 16), 48) == b"a text of a program of 32 bits".ljust(48, b".")


# -- registers ------------------------------------------------------------------------------------------


def test_registers_equal_what_proc_syscall_says(contained, layer):
    """Number of the call, six arguments, stack pointer, program counter (proc(5))."""
    names = {
        "x86_64": ("orig_rax", "rdi", "rsi", "rdx", "r10", "r8", "r9", "rsp", "rip"),
        "i386": ("orig_eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp", "eip"),
        "aarch64": ("x8", "orig_x0", "x1", "x2", "x3", "x4", "x5", "sp", "pc"),
        "arm": ("r7", None, "r1", "r2", "r3", "r4", "r5", "sp", "pc"),
        "riscv64": ("a7", "orig_a0", "a1", "a2", "a3", "a4", "a5", "sp", "pc"),
    }
    compared = []
    for line in contained.lines:
        if line[0] != "call" or len(line) != 11 or line[2] == "0":
            continue
        process = layer.process(int(line[1]))
        registers = process.capability(ThreadRegisters).registers(int(line[1]))
        for name, word in zip(names[process.info.architecture], line[2:], strict=True):
            if name is not None:
                assert registers[name] == int(word, 0), (line[1], name)
        compared.append(process.info.architecture)
    sleepers = 3  # the holder, the sharer and its twin
    assert len(compared) == sleepers + (contained.guest.architecture in contents.NARROW)


# -- damage ---------------------------------------------------------------------------------------------


def test_a_damaged_image_meets_no_error_but_ours(contained, tmp_path):
    """One page in a hundred is lost, half of them to zeros, half to noise."""
    copy = tmp_path / "damaged"
    sparse_copy(contained.image, copy)
    random, pages = np.random.default_rng(7), np.memmap(copy, np.uint8, "r+").reshape(-1, 4096)
    used = np.flatnonzero(pages[:, ::512].any(axis=1))
    hit = random.choice(used, len(used) // 100, replace=False)
    pages[hit[::2]] = 0
    pages[hit[1::2]] = random.integers(0, 256, (len(hit[1::2]), 4096), np.uint8)
    del pages
    try:
        layer = LinuxLayer.open(Base(FileMemory(str(copy), immutable=True)), {})
        pids = layer.pids()
    except EngineError:
        return
    for pid in pids:
        try:
            process = layer.process(pid)
            for module in process.modules():
                file = module.cached_file
                if file is not None:
                    file.read_padded(0, min(file.size, 1 << 20))
            source = process.capability(CachedFiles)
            for info in source.cached_files() if source is not None else ():
                memory = source.cached_file(info.name)
                memory.read_padded(0, min(memory.size, 1 << 20))
                assert sum(extent.size for extent in memory.extents()) <= memory.size
            for thread in process.threads():
                process.registers(thread.tid)
        except EngineError:
            continue


def test_the_line_of_a_fault_names_the_address(contained, process):
    start, _, first, _ = contained.told("anonymous")
    at = int(start, 16) + int(first) * contained.truth.page_size
    with pytest.raises(PagedOutError) as caught:
        process.memory.u8(at)
    assert re.search(rf"address {at:#x} cannot be accessed: the page is in swap", str(caught.value))
