"""Kernels without types: what their tasks prove of themselves equals what the guests said, and nothing is made up.

32-bit kernels of Debian carry no BTF; of 64-bit guests it is zeroed in a copy.
"""

from __future__ import annotations

import os
import random
import shutil

import pytest
from guests.catalogue import BTF, GUESTS, selected
from guests.recording import Recording
from guests.truth import secret_text

from cloudfs.render import region_record
from engine.errors import EngineError, NotFoundError
from engine.file_memory import FileMemory
from engine.formats.btf import load_btf
from engine.oslayer import Base, OpenFiles, PhysicalMaps, ProcFiles, Sockets
from engine.oslayers.linux import LinuxLayer
from engine.oslayers.linux.shape.finding import find_shapes
from engine.types import Rights

ZEROED = "amd64-6.1-4level"
"""The guest whose BTF is zeroed in every run; with --all-guests that of every typed one is."""
PAGE = 4096
TOO_LATE = 2
"""Processes that began after the guest had listed its own."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-guests")
    typed = [name for name in selected(everything) if GUESTS[name].architecture in BTF]
    if "shaped" in metafunc.fixturenames:
        bare = [name for name in selected(everything) if name not in typed]
        metafunc.parametrize("shaped", [*bare, *(typed if everything else [ZEROED])], indirect=True, scope="module")
    if "with_btf" in metafunc.fixturenames:
        metafunc.parametrize("with_btf", typed, indirect=True, scope="module")


def open_image(path: object) -> LinuxLayer:
    return LinuxLayer.open(Base(FileMemory(str(path), immutable=True)), {"cache": "no"})


def without_btf(recording: Recording, folder: object) -> object:
    """A sparse copy whose .BTF is zeros."""
    layer = open_image(recording.image)
    found, blob = layer.kernel.found, recording.truth["btf"]
    window = found.memory.window(found.image.start, found.image.size)
    size = len(blob)
    start = layer.kernel.profile.symbol("__start_BTF")
    if start is None:  # no KALLSYMS_ALL: where the blob is found
        start = found.image.start + load_btf(window)[1].address
    copy = folder / "ram"
    shutil.copyfile(recording.image, copy)
    ranges = [(physical, offset, length) for physical, length, offset in recording.extents]
    with open(copy, "r+b") as file:
        for address in range(start & -PAGE, start + size, PAGE):
            physical = found.memory.virt_to_phys(address)
            low, high = max(start, address), min(start + size, address + PAGE)
            for base, offset, length in ranges:
                if base <= physical < base + length:
                    file.seek(offset + physical - base + low - address)
                    file.write(bytes(high - low))
    return copy


@pytest.fixture(scope="module")
def with_btf(request, guest):
    return guest(request.param)


@pytest.fixture(scope="module")
def shaped(request, guest, tmp_path_factory):
    """(recording, layer) of each guest whose kernel has no types, or lost them."""
    recording = guest(request.param)
    if recording.guest.architecture not in BTF:
        yield recording, open_image(recording.image)
        return
    folder = tmp_path_factory.mktemp("zeroed")
    yield recording, open_image(without_btf(recording, folder))
    shutil.rmtree(folder)


def test_processes_are_read_by_shape_and_info_says_so(shaped):
    _, layer = shaped
    assert layer.pids()
    notes = [note for note in layer.info.notes if "by the shape" in note]
    assert notes == ["read by the shape of its structures, mappings from page tables; "
                     "not known are open files, sockets, namespaces"]  # fmt: skip


def test_pids_are_those_that_the_guest_listed(shaped):
    recording, layer = shaped
    listed, told = set(layer.pids()), set(recording.truth.pids)
    assert told <= listed
    assert len(listed - told) <= TOO_LATE


def test_parents_names_users_threads_states_and_times_equal_the_guest_s_own(shaped):
    recording, layer = shaped
    truth = recording.truth
    for pid in truth.pids:
        info = layer.process(pid).info
        status = dict(line.split(":\t", 1) for line in truth.text(f"/proc/{pid}/status").splitlines())
        stat = truth.text(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()
        assert info.kernel_thread == bool(int(stat[6]) & 0x0020_0000), pid
        assert info.name == status["Name"] or info.kernel_thread, pid
        assert info.ppid == int(status["PPid"]), pid
        assert [info.uid, info.gid] == [int(status[key].split()[0]) for key in ("Uid", "Gid")], pid
        assert info.threads == int(status["Threads"]), pid
        assert abs(int(stat[19]) - info.start_ticks) <= 1, pid
        assert info.state is not None, pid
        if status["State"][0] in "ZT":  # all others may have woken up since, or fallen asleep
            assert info.state == status["State"][0], pid


def test_process_groups_and_sessions_equal_the_guest_s_own(shaped):
    recording, layer = shaped
    for pid in recording.truth.pids:
        told = recording.truth[f"/proc/{pid}/stat"].rsplit(b")", 1)[1].split()
        found = layer.process(pid).capability(ProcFiles).read("stat").rsplit(b")", 1)[1].split()
        assert found[2:4] == told[2:4], pid


def test_names_of_threads_equal_the_guest_s_own(shaped):
    recording, layer = shaped
    pid = recording.truth.keeper
    tasks = {int(name.split("/")[4]) for name in recording.truth if name.startswith(f"/proc/{pid}/task/")}
    found = {thread.tid for thread in layer.process(pid).threads()}
    assert len(found) == layer.process(pid).info.threads > 1
    assert not tasks or tasks == found


def test_capabilities_equal_the_guest_s_own(shaped):
    recording, layer = shaped
    for pid in recording.truth.pids:
        told = recording.truth.text(f"/proc/{pid}/status").splitlines()
        found = layer.process(pid).capability(ProcFiles).read("status").decode("utf-8", "surrogateescape").splitlines()
        for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "Uid", "Gid", "NSpid", "NSsid"):
            assert [line for line in found if line.startswith(key)] == [line for line in told if line.startswith(key)]


def test_command_line_environment_and_auxiliary_vector_equal_the_guest_s_own(shaped):
    recording, layer = shaped
    for pid in recording.truth.pids:
        files = layer.process(pid).capability(ProcFiles)
        for name in ("cmdline", "environ", "auxv"):
            if f"/proc/{pid}/{name}" in recording.truth:
                assert files.read(name) == recording.truth[f"/proc/{pid}/{name}"], (pid, name)


def test_secrets_are_read_back_from_every_kind_of_mapping(shaped):
    recording, layer = shaped
    memory = layer.process(recording.truth.keeper).memory
    for name, address in recording.truth.secrets.items():
        assert memory.read(address, 48) == secret_text(name), name


def test_regions_lie_within_the_guest_s_maps(shaped):
    """With no more rights than these grant: what may be written need not be yet. i386 has no word against executing."""
    recording, layer = shaped
    for pid in recording.truth.pids:
        if not recording.truth.text(f"/proc/{pid}/maps"):
            continue
        maps = recording.truth.maps(pid)
        for region in layer.process(pid).regions():
            at = region.start
            for start, stop, rights, path in maps:
                if start <= at < min(stop, region.stop):
                    assert not region.path or region.path == path, (pid, hex(at))
                    shown = region.permissions.replace("x", "-" if recording.guest.architecture == "i386" else "x")
                    assert all(one in ("-", "?", other) for one, other in zip(shown, rights, strict=True)), hex(at)
                    at = stop
            assert at >= region.stop, (pid, hex(region.start))


def test_regions_hold_every_resident_page(shaped):
    recording, layer = shaped
    truth = recording.truth
    for pid in (truth.keeper, truth.twin[0]):
        stop = layer.kernel.found.candidate.kernel_start
        regions = [(region.start, region.stop) for region in layer.process(pid).regions()]
        for start, count, _, flags in truth.pagemap(pid):
            if flags & truth.PRESENT and start < min(stop, 1 << 63):
                for page in range(start, start + count * truth.page_size, truth.page_size):
                    assert any(low <= page < high for low, high in regions), hex(page)


def test_regions_say_where_they_are_from_and_nothing_else(shaped):
    recording, layer = shaped
    for region in layer.process(recording.truth.keeper).regions():
        record = region_record(region)
        assert record["source"] == "page tables"
        assert [record[key] for key in ("offset", "device", "inode")] == [None] * 3
        assert record["path"] in (None, "[heap]", "[stack]")


def test_the_heap_and_the_stack_are_known_by_their_names(shaped):
    recording, layer = shaped
    paths = {region.path for region in layer.process(recording.truth.keeper).regions()}
    assert {"[heap]", "[stack]"} <= paths


def test_no_page_of_the_kernel_is_told_as_a_process_s(shaped):
    recording, layer = shaped
    process = layer.process(recording.truth.keeper)
    stop = layer.kernel.found.candidate.kernel_start
    assert all(run.start < stop for run in process.capability(PhysicalMaps).physical_maps())
    assert process.memory.size <= stop
    assert all(region.rights & ~(Rights.READ | Rights.WRITE | Rights.EXECUTE) == Rights.NONE
               for region in process.regions())  # fmt: skip


def test_what_is_not_known_is_refused_and_never_empty(shaped):
    recording, layer = shaped
    process = layer.process(recording.truth.keeper)
    assert layer.capability(Sockets) is None
    assert process.capability(OpenFiles) is None
    info = process.info
    assert info.executable is None
    assert info.extra["namespaces"] is None
    assert not process.tells_modules
    files = process.capability(ProcFiles)
    assert files.links() == ()
    for name in ("exe", "cwd", "root", "fd/0"):
        with pytest.raises(NotFoundError):
            files.link(name)
    with pytest.raises(NotFoundError):
        files.descriptors()


def test_status_has_no_line_that_is_not_so(shaped):
    """All that it says the guest said too, but for what goes on changing."""
    recording, layer = shaped
    for pid in recording.truth.pids:
        told = recording.truth.text(f"/proc/{pid}/status").splitlines()
        for line in layer.process(pid).capability(ProcFiles).read("status").decode(errors="replace").splitlines():
            assert line in told or line.startswith(("Name:", "State:")), (pid, line)


def test_shapes_are_where_btf_says(with_btf):
    """Every member that is proved stands where the kernel's own types have it."""
    layer = open_image(with_btf.image)
    profile = layer.kernel.profile
    shapes = find_shapes(layer.kernel.found, profile.require("init_task"))
    assert shapes is not None
    for name, members in shapes.names().items():
        layout = profile.types.require(name)
        for member in members:
            names = ("__state", "state") if member == "__state" else (member,)
            assert shapes.require(name)[member].offset == layout.first(*names).offset, (name, member)
    known = shapes.names()
    assert {"flags", "__state", "mm", "real_parent", "signal", "real_cred"} <= set(known["task_struct"])


@pytest.mark.parametrize("fill", ["zeros", "noise"])
def test_damaged_pages_raise_nothing_but_engine_errors(shaped, tmp_path, fill):
    """One page in a hundred of those that hold anything."""
    recording, _ = shaped
    chance = random.Random(fill)
    copy = tmp_path / "ram"
    shutil.copyfile(recording.image, copy)
    with open(copy, "r+b") as file:
        at, end = 0, os.fstat(file.fileno()).st_size
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            stop = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            for page in range(at, stop, PAGE):
                if chance.random() < 0.01:
                    os.pwrite(file.fileno(), bytes(PAGE) if fill == "zeros" else chance.randbytes(PAGE), page)
            at = stop
    try:
        layer = open_image(copy)
        for process in layer.processes():
            read_all(process)
    except EngineError:
        pass  # the kernel's own page may be among those damaged: that is said


def read_all(process) -> None:
    try:
        assert process.info
        list(process.regions())
        list(process.threads())
        files = process.capability(ProcFiles)
        for name in files.names():
            files.read(name)
    except EngineError:
        pass


def test_modules_equal_proc_modules(shaped):
    recording, layer = shaped
    told = [line.split() for line in recording.truth.text("/proc/modules").splitlines()]
    found = [(module.name, module.info.base, module.size) for module in layer.modules()]
    assert found == [(row[0], int(row[5], 16), int(row[1])) for row in told]
