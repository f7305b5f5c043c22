"""Ways in which QEMU is started, told by its command line and mappings alone."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import pytest

from engine.bytes_memory import BytesMemory
from engine.connectors.qemu.asking import daemon_of
from engine.connectors.qemu.command_line import CommandLine, family_of, parse
from engine.connectors.qemu.emulators import VERSION, called, disguised
from engine.connectors.qemu.finding import Guest
from engine.connectors.qemu.layout_sources import by_machine, whole_first_mib
from engine.connectors.qemu.layouts import ram_layout
from engine.connectors.qemu.plugged import plugged_ranges
from engine.connectors.qemu.ram import Block, assignments, candidates, expected, in_order_of_making, runs
from engine.errors import UnusableTargetError
from engine.formats.qemu_monitor import memory_devices, ram_views
from engine.memory import Memory
from engine.memory_map import MapRange
from engine.oslayer import HostOwned, Process
from engine.types import Region, Rights

GIB, MIB = 1 << 30, 1 << 20
X86 = "/usr/bin/qemu-system-x86_64"
READ_WRITE = Rights.READ | Rights.WRITE
LOW, MIDDLE, HIGH = 0x7F00_0000_0000, 0x7F10_0000_0000, 0x7F20_0000_0000


def line(*words: str, program: str = X86, architecture: str | None = None, **files: str) -> CommandLine:
    found = parse(program, [program, *words], architecture, files.get)
    assert found is not None
    return found


def region(start: int, size: int, path: str = "", *, shared: bool = False) -> Region:
    return Region(start, size, READ_WRITE, shared, 0, (0, 1) if path else (0, 0), 7 if path else 0, path)


# -- programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executable", "arguments", "found"),
    [
        ("/usr/bin/qemu-system-x86_64", ["/usr/bin/kvm"], ("qemu-system-x86_64", "x86_64", "")),
        (None, ["/usr/bin/qemu-system-arm64"], ("qemu-system-arm64", "aarch64", "")),
        ("/usr/libexec/qemu-kvm", ["qemu-kvm"], ("qemu-kvm", None, "")),
        ("/usr/bin/qemu-system-x86_64-microvm", ["x"], ("qemu-system-x86_64-microvm", "x86_64", "microvm")),
        ("/opt/b/lib/ld-linux-x86-64.so.2", ["/opt/b/ld.so", "--library-path", "/opt/b", "/opt/b/qemu-system-arm"],
         ("qemu-system-arm", "arm", "")),
        ("/lib/ld-musl-x86_64.so.1", ["ld", "/bin/true", "-x"], None),
        ("/tmp/my-vm", ["my-vm", "-m", "1G"], None),
    ],
)  # fmt: skip
def test_emulators_are_known_by_their_names(executable, arguments, found):
    one = called(executable, arguments)
    assert (one and (one.name, one.architecture, one.flavour)) == found


def test_arguments_begin_behind_a_loader_and_its_options():
    words = ["ld.so", "--library-path", "/opt", "/opt/qemu-system-x86_64", "-m", "1G", "-name", "bundled"]
    found = parse("/opt/lib64/ld-linux-x86-64.so.2", words)
    assert found is not None
    assert (found.name, found.size) == ("bundled", GIB)


def test_a_program_of_another_name_is_known_by_the_words_in_it(tmp_path, started):
    like_qemu = ["-m", "1G", "-machine", "q35", "-display", "none", "-nodefaults"]
    cases = [(True, like_qemu, True), (False, like_qemu, False), (True, ["-m", "1G"], False)]
    for number, (holds, words, is_one) in enumerate(cases):
        program = tmp_path / f"my-vm-{number}"
        program.write_bytes(Path("/bin/sleep").read_bytes() + (b"\n" * MIB + VERSION + b"99" if holds else b""))
        program.chmod(0o755)
        process = started(program, "60")
        assert (disguised(process.pid, ["my-vm", *words]) is not None) is is_one


@pytest.fixture
def started() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(*words: str | Path) -> subprocess.Popen[bytes]:
        running.append(subprocess.Popen(words))  # it returns behind execve(2)
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait(20)


# -- command lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "program", "size"),
    [
        ([], X86, 128 * MIB), (["-m", "2"], X86, 2 * MIB), (["-m", "maxmem=4G,slots=2"], X86, 128 * MIB),
        (["-M", "q35,memory.size=96M"], X86, 96 * MIB), (["-m", "1", "-m", "size=3G,slots=2"], X86, 3 * GIB),
        (["-m", "104857601b"], X86, 104857600 + 8192),
        (["-object", "memory-backend-memfd,id=r,size=96M", "-M", "memory-backend=r"], X86, 96 * MIB),
        (["-object", "{'qom-type':'memory-backend-ram','id':'r','size':67108864}", "-M", "memory-backend=r"], X86,
         64 * MIB),
        (["-perfmap", "-m", "3G"], X86, 3 * GIB), (["-async-teardown", "-m", "3G"], X86, 3 * GIB),
        (["-M", "sbsa-ref"], "qemu-system-aarch64", GIB), (["-M", "virt-7.2"], "qemu-system-aarch64", 128 * MIB),
        ([], "qemu-system-ppc64", 512 * MIB),
    ],
)  # fmt: skip
def test_ram_has_the_size_that_qemu_gives_it(words, program, size):
    assert line(*words, program=program).size == size


@pytest.mark.parametrize(
    ("machine", "family"),
    [
        ("pc-i440fx-9.2", "pc"), ("pc-q35-rhel9.2.0", "q35"), ("pc+pve0", "pc"), ("pc-i440fx-8.1+pve0", "pc"),
        ("q35+pve1", "q35"), ("pc-q35-noble-hpb", "q35"), ("ubuntu", "pc"), ("ubuntu-q35", "q35"), ("virt-9.0", "virt"),
        ("virt-rhel9.4.0", "virt"), ("s390-ccw-virtio-7.2", "s390-ccw-virtio"), ("pseries-7.2", "pseries"),
        ("microvm", "microvm"), ("pc-1.0", "pc"), ("powernv9", "powernv"), ("virt-jammy", "virt"), ("", ""),
    ],
)  # fmt: skip
def test_a_machine_is_known_in_every_version_and_distribution(machine, family):
    assert family_of(machine) == family


def test_an_emulator_whose_name_tells_no_architecture_has_that_of_its_process():
    found = line("-m", "5G", program="/usr/libexec/qemu-kvm", architecture="x86_64")
    assert found.machine == "pc"
    assert ram_layout(found, "x86_64", found.size) == [MapRange(0, 3 * GIB, 0), MapRange(4 * GIB, 2 * GIB, 3 * GIB)]


def test_a_command_line_of_proxmox_is_read():
    words = [
        "-id", "100", "-name", "web,debug-threads=on", "-no-shutdown", "-chardev",
        "socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        "-chardev", "socket,id=qmp-event,path=/var/run/qmeventd.sock,reconnect=5", "-mon",
        "chardev=qmp-event,mode=control", "-daemonize", "-smp", "4,sockets=1", "-nodefaults", "-m", "4096", "-object",
        "memory-backend-ram,id=ram-node0,size=4096M", "-numa", "node,nodeid=0,cpus=0-3,memdev=ram-node0",
        "-readconfig", "/usr/share/qemu-server/pve-q35-4.0.cfg", "-machine", "accel=kvm,type=q35+pve0",
    ]  # fmt: skip
    found = line(*words)
    assert (found.name, found.family, found.size, found.translates) == ("web", "q35", 4 * GIB, False)
    assert [one.name for one in expected(found)] == ["ram-node0"]
    assert [str(one) for one in found.monitors] == ["/var/run/qemu-server/100.qmp", "a descriptor of its manager"]
    assert found.unread.endswith("pve-q35-4.0.cfg")


CONFIGURATION = """# as -writeconfig wrote them
[name]
  guest = "of a file, with a comma"
[machine]
  type = "q35"
  memory-backend = "ram0"
[memory]
  size = "256"
[object "ram0"]
  qom-type = "memory-backend-memfd"
  size = "256M"
[chardev "mon0"]
  backend = "socket"
  path = "/run/q,1"
  server = "on"
[mon "m"]
  chardev = "mon0"
  mode = "control"
nonsense
"""


def test_a_configuration_file_is_taken_in():
    found = line("-readconfig", "file", "-nodefaults", file=CONFIGURATION)
    assert (found.name, found.family, found.size) == ("of a file, with a comma", "q35", 256 * MIB)
    assert [(one.name, one.kind, one.size) for one in found.backends] == [("ram0", "memfd", 256 * MIB)]
    assert [str(one) for one in found.monitors] == ["/run/q,1"]
    assert not found.unread


def test_what_stands_last_wins_over_a_configuration_file():
    assert line("-readconfig", "file", "-m", "1G", "-M", "pc", file=CONFIGURATION).family == "pc"
    assert line("-m", "1G", "-readconfig", "file", file=CONFIGURATION).size == 256 * MIB


def test_what_is_set_later_belongs_to_what_has_that_id():
    words = ["-set", "chardev.a.path=/x,y", "-chardev", "socket,id=a,server=on,path=/p", "-mon", "a,mode=control",
             "-set", "chardev.b.path=/z", "-set", "nonsense", "-set", "..="]  # fmt: skip
    assert [str(one) for one in line(*words).monitors] == ["/x,y"]


# -- mappings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memfd", "ram,share=on"])
def test_the_translators_buffer_in_a_memfd_is_not_taken_for_ram(kind):
    words = ("-object", f"memory-backend-{kind},id=r,size=1G", "-machine", "memory-backend=r", "-m", "1G")
    mapped = [
        region(LOW, GIB, "/memfd:tcg-jit (deleted)", shared=True),
        region(HIGH, GIB, "/memfd:memory-backend-memfd (deleted)", shared=True),
    ]
    assert list(assignments(expected(line(*words)), runs(mapped))) == [(Block(HIGH, GIB),)]


def test_pieces_of_one_size_lie_one_below_the_other_as_they_are_made():
    words = [word for name in "abc" for word in ("-object", f"memory-backend-ram,id={name},size=1G")]
    nodes = [word for number, name in enumerate("cab") for word in ("-numa", f"node,nodeid={number},memdev={name}")]
    found = line(*words, *nodes, "-m", "3G")
    mapped = runs([region(LOW, GIB), region(MIDDLE, GIB), region(HIGH, GIB)])
    ways = [blocks for blocks in assignments(expected(found), mapped) if in_order_of_making(expected(found), blocks)]
    assert ways == [(Block(LOW, GIB), Block(HIGH, GIB), Block(MIDDLE, GIB))]


def plugged(*words: str, mapped: list[Region], machine: str = "q35") -> list[MapRange] | None:
    found = line("-machine", machine, *words)
    ram = [Block(HIGH, found.size)]
    layout = ram_layout(found, "x86_64", found.size)
    assert layout is not None
    return plugged_ranges(found, "x86_64", runs(mapped), layout, ram)


def test_memory_devices_begin_at_the_first_gib_behind_ram():
    dimm = ("-object", "memory-backend-ram,id=d,size=512M", "-device", "pc-dimm,memdev=d")
    mapped = [region(LOW, 512 * MIB), region(HIGH, 5 * GIB)]
    assert plugged("-m", "512M", *dimm, mapped=mapped) == [MapRange(4 * GIB, 512 * MIB, LOW)]
    assert plugged("-m", "5121M", *dimm, mapped=mapped) == [MapRange(8 * GIB, 512 * MIB, LOW)]


def test_memory_devices_stand_behind_those_with_an_address():
    words = [
        "-m", "1G", "-object", "memory-backend-ram,id=d,size=512M", "-device", "pc-dimm,memdev=d,addr=0x100000000",
        "-object", "memory-backend-memfd,id=e,size=256M", "-device", '{"driver":"virtio-mem-pci","memdev":"e"}',
    ]  # fmt: skip
    mapped = [region(LOW, 512 * MIB), region(MIDDLE, 256 * MIB, "/memfd:memory-backend-memfd (deleted)", shared=True)]
    assert plugged(*words, mapped=mapped) == [
        MapRange(4 * GIB, 512 * MIB, LOW), MapRange(4 * GIB + 512 * MIB, 256 * MIB, MIDDLE)
    ]  # fmt: skip


def test_memory_devices_that_cannot_be_told_apart_are_left_out():
    words = [word for name in "de" for word in ("-object", f"memory-backend-ram,id={name},size=512M",
                                                "-device", f"pc-dimm,memdev={name}")]  # fmt: skip
    assert plugged("-m", "1G", *words, mapped=[region(LOW, 512 * MIB), region(MIDDLE, 512 * MIB)]) is None
    assert plugged("-m", "1G", *words[:4], mapped=[region(LOW, 512 * MIB)], machine="microvm") is None


def test_memory_that_is_shared_with_other_programs_is_no_ram():
    found = line("-object", "memory-backend-file,id=h,size=1G,mem-path=/x", "-device", "ivshmem-plain,memdev=h")
    assert found.others == {"h"}
    assert not found.plugged


@pytest.mark.parametrize("size", [GIB, 5 * GIB])
def test_ram_that_continues_what_is_mapped_above_it_is_found(size):
    mapped = [region(LOW, size), region(LOW + size, 3 * MIB)]
    assert candidates(expected(line("-m", f"{size >> 20}"))[0], runs(mapped)) == [Block(LOW, size)]


# -- what memory itself tells -------------------------------------------------------------------------------

TWO_NODES = (
    "-object", "memory-backend-ram,id=a,size=16M", "-object", "memory-backend-ram,id=b,size=16M",
    "-numa", "node,memdev=a", "-numa", "node,memdev=b", "-m", "32",
)  # fmt: skip


def concluded(contents: dict[int, tuple[int, bytes]], *words: str) -> tuple[list[int], str]:
    """Where RAM is said to lie that may be in any mapping of 16 MiB: each has some bytes at an offset."""
    found = line(*words)
    mapped = [region(start, 16 * MIB) for start in contents]

    def view(ranges: Sequence[MapRange]) -> Memory:
        data = bytearray(sum(one.length for one in ranges))
        for one in ranges:
            offset, text = contents[one.real_base]
            data[one.base + offset : one.base + offset + len(text)] = text
        return BytesMemory(bytes(data))

    guest = Guest(cast("Process", None), 1, found, "x86_64")
    placed = by_machine(guest, runs(mapped), None, view)
    return [one.real_base for one in placed.ranges], placed.notes[0]


KERNEL = (8 * MIB, b"OSRELEASE=6.1.0\nPAGESIZE=4096\n" + bytes(100))
BIOS = (0xF1000, b"SeaBIOS")


def test_a_mapping_that_holds_a_kernel_is_ram_where_a_graphics_card_has_one_of_that_size():
    for places in ({LOW: KERNEL, HIGH: (0, b"")}, {LOW: (0, b""), HIGH: KERNEL}):
        found, note = concluded(places, "-m", "16")
        assert [places[one] for one in found] == [KERNEL]
        assert "confirmed by a Linux kernel in it" in note


def test_a_kernel_does_not_tell_which_node_is_the_first():
    with pytest.raises(UnusableTargetError, match="several mappings may be the RAM"):
        concluded({LOW: KERNEL, HIGH: (0, b"")}, *TWO_NODES)


def test_a_bios_tells_which_node_is_the_first():
    assert concluded({LOW: BIOS, HIGH: KERNEL}, *TWO_NODES)[0] == [LOW, HIGH]
    assert concluded({LOW: KERNEL, HIGH: BIOS}, *TWO_NODES)[0] == [HIGH, LOW]


@pytest.mark.parametrize("second", [BIOS, (0, b"")])
def test_mappings_that_are_equally_likely_are_named(second):
    with pytest.raises(UnusableTargetError) as error:
        concluded({LOW: second, HIGH: second}, "-m", "16")
    assert f"{LOW:#x} (16 MiB); {HIGH:#x} (16 MiB); say which: base=ADDRESS" in str(error.value)


class Owned(HostOwned):
    """A process of a user of this host."""

    def __init__(self, uid: int) -> None:
        self.uid = uid

    def owner(self) -> tuple[int, int]:
        return self.uid, self.uid

    def capability(self, kind: type) -> object:
        return self if kind is HostOwned else None


@pytest.mark.parametrize(
    ("uid", "ours", "daemon"), [(1000, 1000, "session"), (0, 0, "system"), (1000, 0, "system"), (64055, 1000, "system")]
)
def test_a_users_own_guest_is_asked_of_the_users_own_libvirt(monkeypatch, uid, ours, daemon):
    monkeypatch.setattr(os, "geteuid", lambda: ours)
    assert daemon_of(Guest(cast("Process", Owned(uid)), 1, line(), "x86_64")) == f"qemu:///{daemon}"


# -- the monitor's output -----------------------------------------------------------------------------------


def test_backends_of_old_machines_stand_with_their_paths():
    told = (
        'FlatView #0\n AS "memory", root: system\n Root memory region: system\n'
        "  0000000000000000-0000000001ffffff (prio 0, ram): /objects/m0\n"
        "  0000000002000000-0000000003ffffff (prio 0, ram): /objects/m1\n"
        "  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram\n"
    )
    assert [view.block for view in ram_views(told, {"m0", "m1"})] == ["/objects/m0", "/objects/m1"]


# QEMU 7.2.
DEVICES = """Memory device [dimm]: "dimm1"
  addr: 0x100000000
  slot: 0
  node: 0
  size: 1073741824
  memdev: /objects/mem1
  hotplugged: true
  hotpluggable: true
Memory device [virtio-mem]: "vm0"
  memaddr: 0x140000000
  node: 0
  requested-size: 67108864
  size: 67108864
  max-size: 268435456
  block-size: 2097152
  memdev: /objects/vmem0
"""


def test_memory_devices_are_read_from_what_the_monitor_prints():
    assert memory_devices(DEVICES) == {"mem1", "vmem0"}
    assert memory_devices("") == frozenset()


@pytest.mark.parametrize(
    "told",
    [
        [MapRange(0, 0xA0000, 0), MapRange(0xC0000, 0x40000, 0xC0000), MapRange(MIB, 63 * MIB, MIB)],
        [MapRange(0, 0xD8000, 0), MapRange(0xF0000, 64 * MIB - 0xF0000, 0xF0000)],
        [MapRange(0, 64 * MIB, 0)],
    ],
    ids=["graphics", "BIOS written", "whole"],
)
def test_a_pc_has_ram_under_what_its_first_mib_shows(told):
    moved = [MapRange(one.base, one.length, HIGH + one.real_base) for one in told]
    assert whole_first_mib(moved) == [MapRange(0, MIB, HIGH), MapRange(MIB, 63 * MIB, HIGH + MIB)]


def test_a_board_and_a_pc_of_two_nodes_in_the_first_mib_stay_as_they_are():
    nodes = [MapRange(0, 65536, LOW), MapRange(MIB, MIB, 0)]
    for told in ([MapRange(GIB, GIB, LOW)], [MapRange(0, 0xA0000, LOW)], nodes):
        assert whole_first_mib(told) == told
