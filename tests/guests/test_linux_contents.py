"""What a guest's memory holds of files: images of processes, the page cache, pages that are not mapped yet."""

from __future__ import annotations

from itertools import pairwise

import pytest
from guests.catalogue import BTF, selected
from guests.opened import opened
from guests.program import compiled
from guests.truth import secret_text
from readelf import Readelf, by_place

from engine.errors import FaultError
from engine.oslayer import ProcFiles
from engine.oslayers.linux import LinuxLayer
from engine.oslayers.linux.cached_files import CachedFile, PageCache
from engine.oslayers.linux.files import Descriptors
from engine.oslayers.linux.page_frames import found_by_mapped_pages, page_frames


@pytest.fixture
def layer(typed):
    return opened(typed)


@pytest.fixture
def program(typed) -> bytes:
    """The program that the guest runs, as it was compiled here."""
    return compiled(typed.guest.architecture).read_bytes()


def cached(layer: LinuxLayer, pid: int, number: int) -> CachedFile:
    """What is cached of an open descriptor's file."""
    process = layer.process(pid)
    reader = Descriptors(layer.kernel, layer.tasks)
    file = dict(reader.files(process.record.address))[number]
    return CachedFile(PageCache(layer.kernel, reader.objects).pages(file))


def descriptor(truth, pid: int, path: str) -> int:
    lines = (line.split(" ", 1) for line in truth.text(f"/proc/{pid}/fd").splitlines())
    return next(int(number) for number, target in lines if target == path)


# -- images ---------------------------------------------------------------------------------------------


def test_the_images_of_a_process_are_what_its_maps_say_and_readelf_knows_of_the_program(typed, layer):
    truth, elf = typed.truth, Readelf(str(compiled(typed.guest.architecture)))
    first, *others = layer.process(truth.keeper).modules()
    info = first.info
    assert (info.name, info.path) == ("keeper", "/bin/keeper")
    assert info.base == min(start for start, _, _, path in truth.maps(truth.keeper) if path == "/bin/keeper")
    assert info.size == elf.load_size
    assert info.build_id == elf.build_id()
    (vdso,) = others
    place = next((start, stop) for start, stop, _, path in truth.maps(truth.keeper) if path == "[vdso]")
    assert vdso.info.path == "[vdso]"
    assert vdso.info.base == place[0]
    assert vdso.info.base + vdso.info.size <= place[1]


def test_sections_come_from_the_file_in_the_page_cache(typed, layer):
    elf = Readelf(str(compiled(typed.guest.architecture)))
    module = next(iter(layer.process(typed.truth.keeper).modules()))
    found = {section.name: (section.base, section.size) for section in module.sections()}
    assert found == {name: (address, size) for name, address, size in elf.sections() if name}


def test_a_module_s_file_is_the_program_byte_for_byte(typed, layer, program):
    module = next(iter(layer.process(typed.truth.keeper).modules()))
    file = module.cached_file
    assert file.size == len(program)
    assert file.read(0, file.size) == program


def test_the_vdso_exports_what_readelf_finds_in_it(typed, layer, tmp_path):
    vdso = next(m for m in layer.process(typed.truth.keeper).modules() if m.info.name == "[vdso]")
    path = tmp_path / "vdso"
    path.write_bytes(vdso.memory.read_padded(0, vdso.memory.size))
    assert sorted(vdso.exports(), key=by_place) == Readelf(str(path)).exports()


def test_the_auxiliary_vector_equals_the_guest_s_own(typed, layer):
    for pid in typed.truth.pids:
        if f"/proc/{pid}/auxv" in typed.truth:
            files = layer.process(pid).capability(ProcFiles)
            assert files.read("auxv") == typed.truth[f"/proc/{pid}/auxv"], pid


def test_every_program_here_is_one_of_the_kernel_s_own_architecture(typed, layer):
    for pid in typed.truth.pids:
        assert layer.process(pid).info.architecture == layer.info.architecture


# -- the page cache -------------------------------------------------------------------------------------


def test_the_array_of_page_structures_found_by_mapped_pages_is_where_the_kernel_says(typed, layer):
    """Two ways that know nothing of one another."""
    frames = page_frames(layer.kernel)
    assert found_by_mapped_pages(layer.kernel, frames.size) == frames.base


def test_a_file_that_only_memory_has_is_read_back_with_its_secret_and_zeros_elsewhere(typed, layer):
    truth = typed.truth
    for path, place, name in (
        ("/tmp/shared", 5 * truth.page_size, "shared-file"),
        ("/tmp/deleted (deleted)", 3 * truth.page_size + 7, "deleted-file"),
        ("/memfd:nameless (deleted)", 0, "memfd"),
    ):
        file = cached(layer, truth.keeper, descriptor(truth, truth.keeper, path))
        expected = bytearray(1 << 20)
        expected[place : place + 48] = secret_text(name)
        assert file.read(0, file.size) == expected, path
        assert sum(extent.size for extent in file.extents()) == truth.page_size


def test_a_file_ends_where_its_size_says(typed, layer):
    truth = typed.truth
    file = cached(layer, truth.keeper, descriptor(truth, truth.keeper, "/tmp/private"))
    assert file.size == truth.page_size + 48
    assert file.read(truth.page_size, 48) == secret_text("private-file")
    with pytest.raises(FaultError) as caught:
        file.read(truth.page_size, 49)
    assert caught.value.address == file.size


def test_etc_passwd_is_read_through_a_descriptor_of_each_process_that_has_it_open(typed, layer):
    expected = b"root:x:0:0::/:/bin/sh\nada:x:1000:1000::/home/ada:\nbob:x:1001:1001::/home/bob:\n"
    number = 0
    for pid in typed.truth.pids:
        text = typed.truth.text(f"/proc/{pid}/fd") if f"/proc/{pid}/fd" in typed.truth else ""
        if " /etc/passwd" in text:
            file = cached(layer, pid, descriptor(typed.truth, pid, "/etc/passwd"))
            assert file.read(0, file.size) == expected
            number += 1
    assert number >= 2


# -- pages that are not mapped yet ----------------------------------------------------------------------


def test_memory_that_was_never_touched_is_zeros(typed, layer):
    line = next(line for line in typed.truth.text("/tmp/secrets").splitlines() if line.startswith("untouched"))
    address, size = int(line.split()[1], 16), int(line.split()[2])
    memory = layer.process(typed.truth.keeper).memory
    assert memory.read(address, size) == bytes(size)
    addresses = [address + offset for offset in range(0, size, 256)]
    values, faults = memory.words(addresses, "<u8")
    assert not faults
    assert not values.any()


def test_a_mapped_program_is_read_whole_though_parts_of_it_were_never_run(typed, layer, program):
    truth = typed.truth
    memory = layer.process(truth.keeper).memory
    lines = (line.split() for line in truth.text(f"/proc/{truth.keeper}/maps").splitlines())
    compared = 0
    for row in lines:
        if len(row) > 5 and row[5] == "/bin/keeper" and (row[1] == "r-xp" or row[2] == "00000000"):
            start, stop = (int(part, 16) for part in row[0].split("-"))
            expected = program[int(row[2], 16) :][: stop - start]
            assert memory.read(start, len(expected)) == expected
            compared += len(expected)
    assert compared > 100_000


def test_what_lies_in_no_mapping_is_absent(typed, layer):
    truth = typed.truth
    memory = layer.process(truth.keeper).memory
    maps = truth.maps(truth.keeper)
    for (_, stop, _, _), (start, _, _, _) in pairwise(maps):
        if stop < start < 1 << 47:
            with pytest.raises(FaultError):
                memory.read(stop, 1)


def test_a_mapped_file_s_unmapped_pages_count_as_data(typed, layer):
    truth = typed.truth
    memory = layer.process(truth.keeper).memory
    start, stop = next((a, b) for a, b, rights, path in truth.maps(truth.keeper)
                       if path == "/bin/keeper" and rights.startswith("r-x"))  # fmt: skip
    (extent,) = memory.extents(start, stop)
    assert (extent.start, extent.stop) == (start, stop)


def test_there_are_guests_with_types():
    assert any(name.split("-")[0] in BTF for name in selected(False))
