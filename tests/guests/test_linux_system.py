"""What a Linux guest's memory tells of the machine as a whole: clock, names, configuration, files of /proc."""

from __future__ import annotations

import gzip
import re

import pytest
from guests.opened import Copy, opened

from engine.bytes_memory import BytesMemory
from engine.errors import NotFoundError
from engine.oslayer import Containers, KernelConfig, ProcFiles, SystemFiles
from engine.oslayers.linux.clock import Timekeeper
from engine.oslayers.linux.configuration import embedded
from engine.oslayers.linux.modules import kernel_modules


@pytest.fixture
def layer(typed):
    return opened(typed)


@pytest.fixture
def files(layer) -> SystemFiles:
    found = layer.capability(SystemFiles)
    assert found is not None
    return found


def test_the_host_is_called_as_it_calls_itself(recording):
    assert opened(recording).info.hostname == recording.truth.text("/proc/sys/kernel/hostname").strip()


def test_the_kernel_s_command_line_is_told(recording):
    assert opened(recording).info.command_line == recording.truth.text("/proc/cmdline").rstrip("\n")


def test_the_machine_was_started_when_it_says(typed, layer):
    expected = re.search(r"^btime (\d+)$", typed.truth.text("/proc/stat"), re.MULTILINE)
    assert expected is not None
    assert int(layer.info.boot_time) == int(expected[1])


def test_it_was_stopped_a_while_after_it_had_told_its_uptime(typed, layer):
    told = float(typed.truth.text("/proc/uptime").split()[0])
    assert told <= layer.info.uptime <= told + 120
    assert layer.info.time == pytest.approx(layer.info.boot_time + layer.info.uptime)


def test_processes_began_at_a_time_of_the_calendar(typed, layer):
    boot = layer.info.boot_time
    for pid in typed.truth.pids:
        ticks = int(typed.truth.text(f"/proc/{pid}/stat").rsplit(")", 1)[1].split()[19])
        assert layer.process(pid).info.start_time == pytest.approx(boot + ticks / 100, abs=0.02)


def test_the_clock_is_found_by_its_shape_too(layer):
    """As on kernels whose kallsyms has no data."""
    keeper = Timekeeper(layer.kernel)
    there = keeper._by_shape(layer.kernel.objects())
    found, keeper.address = keeper.read(), there
    again = keeper.read()
    assert found is not None
    assert again is not None
    assert again.boot == found.boot


def test_without_types_the_clock_is_not_known(recording):
    if opened(recording).kernel.profile.types is None:
        assert opened(recording).info.boot_time is None


@pytest.mark.parametrize(
    "name",
    ["version", "cmdline", "modules", "filesystems", "sys/kernel/hostname", "sys/kernel/osrelease",
     "sys/kernel/version", "sys/kernel/random/boot_id"],
)  # fmt: skip
def test_a_file_of_the_system_equals_the_guest_s_own(typed, files, name):
    if name in files.names() and f"/proc/{name}" in typed.truth:
        assert files.read(name) == typed.truth[f"/proc/{name}"]


def test_every_kernel_tells_the_files_that_tools_need(files):
    needed = {"version", "cmdline", "stat", "uptime", "meminfo", "loadavg", "mounts", "modules", "cpuinfo",
              "sys/kernel/hostname", "sys/kernel/osrelease"}  # fmt: skip
    assert needed <= set(files.names())
    for name in files.names():
        assert files.read(name).endswith(b"\n"), name


def test_a_file_that_is_not_known_is_refused_in_a_sentence(files):
    with pytest.raises(NotFoundError, match="/proc/kcore is not known"):
        files.read("kcore")


def test_memory_is_counted_as_the_guest_counts_it(typed, files):
    """The guest went on for a while: what may have grown is near, what cannot is equal."""

    def counts(text: str) -> dict[str, int]:
        return {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines()}

    expected = counts(typed.truth.text("/proc/meminfo"))
    found = counts(files.read("meminfo").decode())
    assert found.keys() <= expected.keys()
    assert found["MemTotal"] == expected["MemTotal"]
    for name in found.keys() & {"Buffers", "Cached", "Shmem", "SwapCached", "Mapped", "Unevictable"}:
        assert found[name] == pytest.approx(expected[name], abs=256), name
    for name in found.keys() - {"MemTotal"}:
        assert found[name] == pytest.approx(expected[name], abs=32 << 10), name


def test_processors_counted_no_less_than_they_told(typed, files):
    expected = typed.truth.text("/proc/stat").splitlines()
    found = dict(line.split(None, 1) for line in files.read("stat").decode().splitlines())
    for line in expected:
        key, rest = line.split(None, 1)
        if key.startswith("cpu"):
            before, after = map(int, rest.split()), map(int, found[key].split())
            assert all(one <= two <= one + 6000 for one, two in zip(before, after, strict=True)), key
    for key in ("btime", "processes"):
        if key in found:
            assert f"{key} {found[key]}" in expected


def test_x86_features_and_model_equal_cpuinfo(typed, files):
    if typed.guest.architecture != "amd64":
        assert files.read("cpuinfo") == b"processor\t: 0\n\n"
        return
    expected = typed.truth.text("/proc/cpuinfo").splitlines()
    assert set(files.read("cpuinfo").decode().splitlines()) <= set(expected)


def test_averages_of_the_load_are_near(typed, files):
    expected, found = typed.truth.text("/proc/loadavg").split(), files.read("loadavg").decode().split()
    for one, two in zip(expected[:3], found[:3], strict=True):
        assert float(two) == pytest.approx(float(one), abs=1.0)
    assert found[4] == expected[4]


def test_no_process_of_the_guests_is_in_a_container(layer):
    found = layer.capability(Containers)
    assert found is not None
    assert found.containers() == {}


# -- the kernel's configuration ------------------------------------------------------------------------

CONFIG = b"CONFIG_64BIT=y\n" + b"# CONFIG_EXPERT is not set\n" * 2000
PACKED = b"IKCFG_ST" + gzip.compress(CONFIG) + b"IKCFG_ED"


def test_debian_s_kernels_carry_no_configuration(recording):
    assert opened(recording).capability(KernelConfig) is None


@pytest.mark.parametrize("at", [0, 5, (1 << 20) - 4, (1 << 20) - 8 - 3])
def test_a_configuration_is_found_wherever_it_stands(at):
    image = bytearray(2 << 20)
    image[at : at + len(PACKED)] = PACKED
    assert embedded(BytesMemory(bytes(image))) == CONFIG


def test_only_what_unpacks_to_its_end_counts():
    damaged = bytearray(PACKED)
    damaged[-12] ^= 0xFF
    torn, plain = PACKED[: len(PACKED) // 2], b"IKCFG_ST, says a program that looks for IKCFG_ED"
    for data in (bytes(damaged), torn, plain, b""):
        assert embedded(BytesMemory(data)) is None
    assert embedded(BytesMemory(plain + torn + bytes(damaged) + PACKED)) == CONFIG


def test_every_file_that_is_listed_can_be_read_on_every_kernel(recording):
    """Those without types too, of which less is known."""
    layer = opened(recording)
    files = layer.capability(SystemFiles)
    assert files is not None
    for name in files.names():
        assert files.read(name).endswith(b"\n"), name
    own = layer.process(recording.truth.keeper).capability(ProcFiles)
    for name in own.names():
        assert own.read(name), name
    assert {"cmdline", "comm", "environ", "stat", "status"} <= set(own.names())
    for name in ("sys/kernel/hostname", "sys/kernel/osrelease", "cmdline", "version"):
        assert files.read(name) == recording.truth[f"/proc/{name}"]


def test_a_configuration_is_read_out_of_the_module_that_carries_it(typed):
    """One of the guest's own modules, renamed, and its data written over."""
    changed = Copy(typed)

    def plant(copy: Copy) -> None:
        module = max(kernel_modules(copy.original.kernel), key=lambda one: one.size)
        part = max(module.parts, key=lambda one: one.size)
        copy.set_bytes(part.base + 64, PACKED[: 4096 - 64])
        name = copy.original.kernel.types.require("module")["name"]
        copy.set_bytes(module.address + name.offset, b"configs\0")

    assert len(PACKED) < 4096 - 64
    found = changed.layer(plant).capability(KernelConfig)
    assert found is not None
    assert found.config() == CONFIG
