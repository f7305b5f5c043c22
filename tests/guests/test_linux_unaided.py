"""Kernels that were robbed of what they say of themselves are found all the same; false copies of it are not believed.

The images are copies of recorded ones; what is compared with is what the guests said of themselves.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
from commandline import cloudfs
from guests.catalogue import BTF, selected
from guests.damage import PAGE, Damage
from guests.recording import Recording

from cloudfs.render import log_lines, maps_line
from engine.errors import EngineError, InvalidArgumentError
from engine.file_memory import FileMemory
from engine.formats.vmcoreinfo import find_vmcoreinfo
from engine.oslayer import Base, KernelLog, Sockets, Symbols
from engine.oslayers.linux import LinuxLayer

ROBBED_OF = {
    "vmcoreinfo": ("vmcoreinfo",),
    "data symbols": ("data_symbols",),
    "symbols": ("kallsyms",),
    "vmcoreinfo and data symbols": ("vmcoreinfo", "data_symbols"),
    "vmcoreinfo and symbols": ("vmcoreinfo", "kallsyms"),
    "all": ("vmcoreinfo", "kallsyms", "types"),
}
IN_CI = [("amd64-6.1-4level", what) for what in ROBBED_OF] + [("arm64-6.1", "vmcoreinfo and symbols")]
LIMIT = 20.0
"""Seconds of CPU for a search, which takes half of one, or two; of a damaged image up to eight."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "robbed" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-guests")
        cases = [(name, "vmcoreinfo") for name in selected(everything)]
        more = [(name, what) for name in selected(True) for what in ROBBED_OF] if everything else IN_CI
        cases = list(dict.fromkeys([*cases, *more]))
        names = [f"{name}-{what}".replace(" ", "-") for name, what in cases]
        metafunc.parametrize("robbed", cases, indirect=True, scope="module", ids=names)


def open_image(path: Path, **options: str) -> LinuxLayer:
    return LinuxLayer.open(Base(FileMemory(str(path), immutable=True)), {"cache": "no", **options})


class Robbed:
    """A damaged copy that was opened."""

    def __init__(self, recording: Recording, what: str, path: Path) -> None:
        self.recording, self.what, self.path = recording, what, path
        started = time.process_time()
        self.layer = open_image(path)
        self.seconds = time.process_time() - started

    @property
    def typed(self) -> bool:
        return self.recording.guest.architecture in BTF and "types" not in ROBBED_OF[self.what]


@pytest.fixture(scope="module")
def robbed(request, guest, tmp_path_factory):
    name, what = request.param
    recording, folder = guest(name), tmp_path_factory.mktemp("robbed")
    damage = Damage(recording, folder)
    try:
        for part in ROBBED_OF[what]:
            if part != "types" or recording.guest.architecture in BTF:
                getattr(damage, f"without_{part}")()
        yield Robbed(recording, what, damage.path)
    finally:
        shutil.rmtree(folder)


def test_the_robbed_kernel_is_found_in_bounded_time(robbed):
    truth = robbed.recording.truth
    assert robbed.layer.info.version == truth.text("/proc/sys/kernel/osrelease").strip()
    assert robbed.layer.info.page_size == truth.page_size
    assert robbed.seconds < LIMIT


def test_it_translates_the_kernel_s_addresses_as_qemu_does(robbed):
    memory, kernel = robbed.layer.kernel_memory, robbed.layer.kernel.found.candidate
    asked = 0
    for address, place in robbed.recording.translations:
        if address < kernel.kernel_start:
            continue
        asked += 1
        if place is not None:
            assert memory.virt_to_phys(address) == place, hex(address)
    assert asked


def test_its_log_equals_what_the_guest_read_of_it(robbed):
    log = robbed.layer.capability(KernelLog)
    assert log is not None
    expected = robbed.recording.truth.text("dmesg").splitlines()
    assert [line[:-1] for record in log.records() for line in log_lines(record, raw=True)][: len(expected)] == expected


def test_its_processes_are_those_of_the_guest(robbed):
    truth = robbed.recording.truth
    assert set(truth.pids) <= set(robbed.layer.pids())
    process = robbed.layer.process(truth.keeper)
    status = dict(line.split(":\t", 1) for line in truth.text(f"/proc/{truth.keeper}/status").splitlines())
    assert (process.info.name, process.info.ppid, process.info.uid) == (
        status["Name"], int(status["PPid"]), int(status["Uid"].split()[0])
    )  # fmt: skip
    if robbed.typed:
        expected = [line.split() for line in truth.text(f"/proc/{truth.keeper}/maps").splitlines()]
        assert [maps_line(region).split() for region in process.regions()] == expected


def test_its_modules_are_those_of_the_guest_where_it_has_types(robbed):
    if robbed.typed:
        expected = [line.split()[0] for line in robbed.recording.truth.text("/proc/modules").splitlines()]
        assert [module.name for module in robbed.layer.modules()] == expected


def test_its_netlink_sockets_are_those_of_the_guest_where_it_has_types(robbed):
    if robbed.typed:
        lines = [line.split() for line in robbed.recording.truth.text("/proc/net/netlink").splitlines()[1:]]
        found = robbed.layer.capability(Sockets).sockets()
        assert {one.inode for one in found if one.family == "netlink"} == {int(line[9]) for line in lines}


def test_what_is_gone_is_said(robbed):
    notes, parts = " ".join(robbed.layer.info.notes), ROBBED_OF[robbed.what]
    assert ("found without VMCOREINFO" in notes) == ("vmcoreinfo" in parts)
    assert ("no symbols:" in notes) == ("kallsyms" in parts)
    assert (robbed.layer.capability(Symbols) is None) == ("kallsyms" in parts)
    if robbed.recording.guest.architecture in BTF:
        assert ("no types:" in notes) == ("types" in parts)


# -- copies that are not believed ------------------------------------------------------------------------------

NAME = "amd64-6.1-4level"


@pytest.fixture(scope="module")
def sound(guest):
    return guest(NAME)


@pytest.fixture
def damage(sound, tmp_path):
    return Damage(sound, tmp_path)


def same_kernel(path: Path, recording: Recording) -> bool:
    layer, sound = open_image(path), open_image(recording.image)
    assert layer.kernel.found.root == sound.kernel.found.root
    assert layer.kernel.found.image == sound.kernel.found.image
    return layer.pids() == sound.pids()


def of_another_boot(text: bytes) -> bytes:
    """A VMCOREINFO as the same kernel writes it when KASLR has moved it elsewhere."""
    moved = 0x0140_0000
    lines = []
    for line in text.decode().splitlines():
        key, _, value = line.partition("=")
        if key.startswith("SYMBOL(") and int(value, 16) >= 0xFFFF_FFFF_8000_0000:
            value = f"{int(value, 16) - moved:x}"
        lines.append(f"{key}={value}")
    return "\n".join(lines).encode()


def test_a_vmcoreinfo_of_the_boot_before_is_passed_over_though_it_comes_first(damage, sound):
    text = find_vmcoreinfo(FileMemory(str(sound.image), immutable=True))[0].raw
    old = of_another_boot(text)
    assert old != text
    first, second, third = damage.free_pages(3)
    assert first < min(find_vmcoreinfo(FileMemory(str(sound.image), immutable=True))[0].pages)
    for place in (first, second, third):
        damage.write(place, old)
    assert same_kernel(damage.path, sound)


def test_a_vmcoreinfo_of_the_boot_before_alone_leads_to_the_kernel_that_runs(damage, sound):
    old = of_another_boot(find_vmcoreinfo(FileMemory(str(sound.image), immutable=True))[0].raw)
    damage.without_vmcoreinfo().write(damage.free_pages(1)[0], old)
    assert same_kernel(damage.path, sound)


def test_banners_and_names_of_other_places_prove_nothing(damage, sound):
    """Those of this very kernel, copied to where it is not, as a log or the page cache has them."""
    from engine.oslayers.linux.claims import claims

    damage.without_vmcoreinfo()
    memory = FileMemory(str(sound.image), immutable=True)
    places = damage.free_pages(8)
    for claim, place in zip(claims(memory), places, strict=False):
        damage.write(place + 64, memory.read(claim.address, 512))
    for number, claim in enumerate(claims(memory)):
        damage.write(places[4] + 1024 * number, memory.read(claim.address, 512).replace(b"6.1.0", b"9.9.9"))
    assert same_kernel(damage.path, sound)


def test_types_and_symbols_of_another_kernel_are_not_taken(damage, sound, guest):
    """A whole other kernel's image, as kexec leaves it, lies in front of the one that runs."""
    other = open_image(guest("amd64-6.12").image).kernel.found
    size = 1 << 20
    places = [place for place in damage.free_pages(64 * 256) if place % size == 0]
    for number, place in enumerate(places[:48]):
        damage.write(place, other.memory.read_padded(other.image.start + number * size, size))
    assert len(places) >= 48
    assert same_kernel(damage.path, sound)
    damage.without_vmcoreinfo()
    assert same_kernel(damage.path, sound)


# -- what a person may give --------------------------------------------------------------------------------------


def test_a_given_page_table_and_slide_are_used(sound):
    found = open_image(sound.image).kernel.found
    slide = int(sound.truth.vmcoreinfo["KERNELOFFSET"], 16)
    layer = open_image(sound.image, dtb=hex(found.candidate.dtb), kaslr=hex(slide))
    assert layer.kernel.found.root == found.root


def test_the_processor_s_own_register_is_a_page_table_too(sound, damage):
    """CR3 while a process runs: its table leads to the kernel, whatever else it has."""
    cr3 = sound.registers["CR3"]
    for path in (sound.image, damage.without_vmcoreinfo().path):
        layer = open_image(path, dtb=hex(cr3))
        assert layer.kernel.found.candidate.dtb == cr3 & ~0xFFF
        assert set(sound.truth.pids) <= set(layer.pids())


@pytest.mark.parametrize("without", [(), ("vmcoreinfo",)], ids=["with vmcoreinfo", "without"])
@pytest.mark.parametrize("option", [{"dtb": "0x1000"}, {"dtb": "0x123456789000"}, {"kaslr": "0x200000"}], ids=str)
def test_a_wrong_value_is_refused_in_one_sentence(damage, without, option):
    for part in without:
        getattr(damage, f"without_{part}")()
    with pytest.raises(InvalidArgumentError) as caught:
        open_image(damage.path, **option)
    key, value = next(iter(option.items()))
    assert str(caught.value).startswith(f"{key}={value} ")
    assert len(str(caught.value).splitlines()) == 1


def test_the_slide_fits_without_vmcoreinfo_too(damage, sound):
    slide = int(sound.truth.vmcoreinfo["KERNELOFFSET"], 16)
    assert open_image(damage.without_vmcoreinfo().path, kaslr=hex(slide)).info.version


# -- and damaged at random ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "share", "rest"), [(1, 0.01, 1.0), (2, 0.05, 1.0), (3, 0.01, 0.6), (4, 0.001, 0.65)], ids=str
)
def test_a_damaged_or_cut_off_image_says_what_it_still_tells_in_bounded_time(damage, seed, share, rest):
    chance = random.Random(seed)
    damage.without_vmcoreinfo()
    for extent in FileMemory(str(damage.recording.image), immutable=True).extents():
        for place in range(extent.start, extent.stop, PAGE):
            if chance.random() < share:
                damage.write(place, chance.randbytes(PAGE) if seed % 2 else bytes(PAGE))
    os.truncate(damage.path, int(damage.path.stat().st_size * rest))
    said, started = "", time.process_time()
    try:
        layer = open_image(damage.path)
        assert layer.info.version == damage.recording.truth.text("/proc/sys/kernel/osrelease").strip()
        log = layer.capability(KernelLog)
        assert log is None or list(log.records())
        assert layer.pids() or layer.info.skipped
    except EngineError as error:
        said = str(error)
    assert "\n" not in said
    assert time.process_time() - started < LIMIT


# -- as a person meets it ----------------------------------------------------------------------------------------


def test_ps_lists_the_processes_of_an_image_without_vmcoreinfo(damage, sound):
    done = cloudfs("ps", "--json", str(damage.without_vmcoreinfo().path))
    assert done.returncode == 0, done.stderr
    assert set(sound.truth.pids) <= {record["pid"] for record in json.loads(done.stdout)}


def test_where_the_page_tables_are_gone_too_one_sentence_says_what_was_found(damage, sound):
    found = open_image(sound.image).kernel.found
    damage.without_vmcoreinfo().write(found.candidate.dtb, bytes(PAGE))
    with open(damage.path, "r+b") as file:  # and every process's: whatever leads to the same table of the level below
        data = file.read()
        top = found.physical.u64(found.candidate.dtb + 8 * 511).to_bytes(8, "little")
        at = data.find(top)
        while at >= 0:
            file.seek(at)
            file.write(bytes(8))
            at = data.find(top, at + 8)
    done = cloudfs("ps", str(damage.path))
    assert done.returncode == 1
    said = done.stderr.decode()
    assert len(said.splitlines()) == 1
    assert "no page tables that lead to that kernel" in said
    assert f"Linux {sound.truth.text('/proc/sys/kernel/osrelease').strip()}" in said
    assert "raw-dtb" in said


