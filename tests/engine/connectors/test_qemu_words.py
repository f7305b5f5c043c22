"""What the connector `qemu` reads: command lines, the monitor's output, mappings; also of those who mean it no good."""

from __future__ import annotations

import json
import os
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.connectors.qemu.command_line import Address, CommandLine, parse
from engine.connectors.qemu.layouts import ram_layout
from engine.connectors.qemu.monitor import Monitor, MonitorError
from engine.connectors.qemu.ram import Block, assignments, candidates, expected, runs
from engine.connectors.qemu.words import pairs, size_of
from engine.errors import TargetBusyError
from engine.formats.qemu_monitor import View, host_address, ram_views, registers
from engine.types import Region, Rights

GIB, MIB = 1 << 30, 1 << 20
X86 = "/usr/bin/qemu-system-x86_64"
READ_WRITE = Rights.READ | Rights.WRITE

# As libvirt 9.0 writes it (shortened): RAM as an object in JSON, the monitor on a descriptor.
LIBVIRT = [
    X86, "-name", "guest=web,debug-threads=on", "-S", "-machine", "pc-q35-7.2,usb=off,dump-guest-core=off,"
    "memory-backend=pc.ram", "-accel", "kvm", "-m", "size=2097152k,slots=16,maxmem=16777216k", "-object",
    '{"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"x-use-canonical-path-for-ramblock-id":false,'
    '"size":2147483648}', "-uuid", "c7a5fdbd-edaf-9455-926a-d65c16db1809", "-display", "none", "-no-user-config",
    "-chardev", "socket,id=charmonitor,fd=30,server=on,wait=off", "-mon", "chardev=charmonitor,id=monitor,mode=control",
]  # fmt: skip


def line(*words: str) -> CommandLine:
    found = parse(X86, [X86, *words])
    assert found is not None
    return found


def test_a_command_line_of_libvirt_tells_all_that_is_needed():
    found = parse(X86, LIBVIRT)
    assert found is not None
    assert (found.name, found.family, found.size, found.accelerators) == ("web", "q35", 2 * GIB, ("kvm",))
    assert [(one.name, one.kind, one.size) for one in found.backends] == [("pc.ram", "memfd", 2 * GIB)]
    assert found.monitors == (Address("elsewhere"),)
    assert found.uuid == "c7a5fdbd-edaf-9455-926a-d65c16db1809"
    assert not found.translates


@pytest.mark.parametrize(
    ("told", "size"),
    [
        ("2G", 2 * GIB), ("2048", 2 * GIB), ("size=2097152k,slots=4,maxmem=8G", 2 * GIB), ("1.5G", 3 * GIB // 2),
        ("0.5T", 512 * GIB), ("2g", 2 * GIB), ("size=512", 512 * MIB), ("nonsense", 128 * MIB), ("0", 128 * MIB),
    ],
)  # fmt: skip
def test_sizes_are_read_as_qemu_reads_them(told, size):
    assert line("-m", told).size == size


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["-name", "plain"], "plain"), (["-name", "guest=with,debug-threads=on"], "with"),
        (["-name", "debug-threads=on,guest=x,,y"], "x,y"), (["-name", "first", "-name", "second"], "second"),
        (["--name", "dashes"], "dashes"), ([], None), (["-append", "-name", "-S"], None), (["-S", "-name", "n"], "n"),
    ],
)  # fmt: skip
def test_names_are_read_in_every_spelling(words, name):
    assert line(*words).name == name


@pytest.mark.parametrize(
    ("words", "address"),
    [
        (["-qmp", "unix:/run/q,server=on,wait=off"], Address("unix", "/run/q")),
        (["-qmp", "unix:/run/q,server,nowait"], Address("unix", "/run/q")),
        (["-qmp-pretty", "unix:q,server=on"], Address("unix", "q")),
        (["-qmp", "tcp:127.0.0.1:4444,server=on"], Address("tcp", host="127.0.0.1", port=4444)),
        (["-qmp", "tcp:[::1]:4444,server"], Address("tcp", host="::1", port=4444)),
        (["-qmp", "tcp::99999999,server"], Address("elsewhere")),
        (["-qmp", "stdio"], Address("elsewhere")),
        (["-qmp", "unix:/run/q"], Address("elsewhere")),
        (["-chardev", "socket,id=a,path=/p,server=on", "-mon", "a,mode=control"], Address("unix", "/p")),
        (["-chardev", "socket,id=a,path=/p,,q,server", "-qmp", "chardev:a"], Address("unix", "/p,q")),
        (["-chardev", "socket,id=a,path=n,abstract=on,server=on", "-mon", "chardev=a,mode=control"],
         Address("unix", "n", abstract=True)),
    ],
)  # fmt: skip
def test_monitors_are_found_where_they_listen(words, address):
    assert line(*words).monitors == (address,)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["-object", "sev-guest,id=s,cbitpos=47", "-machine", "q35,memory-encryption=s"], "SEV"),
        (["-object", '{"qom-type":"sev-snp-guest","id":"s"}', "-M", "confidential-guest-support=s"], "SEV-SNP"),
        (["-object", "tdx-guest,id=t", "-machine", "q35,confidential-guest-support=t"], "TDX"),
        (["-machine", "q35"], None),
    ],
)
def test_encryption_is_seen(words, what):
    assert line(*words).encryption == what


@pytest.mark.parametrize(
    ("executable", "arguments", "is_one"),
    [
        (X86, ["x"], True), ("/usr/libexec/qemu-kvm", ["x"], True), (None, ["kvm", "-m", "1G"], True),
        ("/nix/store/x/bin/.qemu-system-x86_64-wrapped", ["qemu-system-x86_64"], True),
        ("/usr/bin/bash", ["bash", "-c", "qemu-system-x86_64 -m 1G"], False), (None, [], False),
        ("/usr/bin/grep", ["grep", "qemu-system-x86_64"], False), ("/usr/bin/qemu-img", ["qemu-img"], False),
        ("/usr/bin/qemu-x86_64", ["qemu-x86_64", "./program"], False),
    ],
)  # fmt: skip
def test_only_emulators_of_machines_are_taken_for_guests(executable, arguments, is_one):
    assert (parse(executable, arguments) is not None) is is_one


def test_nodes_are_put_together_by_their_numbers():
    found = line("-object", "memory-backend-ram,id=a,size=1G", "-object", "memory-backend-ram,id=b,size=2G",
                 "-numa", "node,nodeid=1,memdev=a", "-numa", "node,nodeid=0,memdev=b", "-m", "3G")  # fmt: skip
    assert [one.name for one in expected(found)] == ["b", "a"]


@given(st.lists(st.text(max_size=40), max_size=30))
def test_no_command_line_makes_it_fail(words):
    found = parse(X86, [X86, *words])
    assert found is not None
    ram_layout(found, found.architecture, found.size)


@given(st.text(max_size=200))
def test_no_value_makes_it_fail(text):
    pairs(text, "first")
    size = size_of(text)
    assert size is None or 0 <= size < 1 << 63


# -- mappings -----------------------------------------------------------------------------------------------


def region(start: int, size: int, rights: Rights = READ_WRITE, path: str = "", *, shared: bool = False) -> Region:
    return Region(start, size, rights, shared, 0, (0, 1) if path else (0, 0), 7 if path else 0, path)


def test_neither_the_translators_buffer_nor_a_larger_bar_is_taken_for_ram():
    mapped = [
        region(0x7F00_0000_0000, GIB, READ_WRITE | Rights.EXECUTE),
        region(0x7F10_0000_0000, 16 * GIB, path="anon_inode:[vfio-device]", shared=True),
        region(0x7F20_0000_0000, 16 * GIB, path="/dev/vfio/12", shared=True),
        region(0x7F30_0000_0000, GIB, path="/usr/share/image.img", shared=True),
        region(0x7F40_0000_0000, GIB),
    ]
    found = list(assignments(expected(line("-m", "1G")), runs(mapped)))
    assert found == [(Block(0x7F40_0000_0000, GIB),)]


def test_ram_that_is_joined_with_what_lies_below_is_found_by_its_end():
    mapped = [region(0x7F40_0000_0000 - 8 * MIB, GIB + 8 * MIB), region(0x7F40_0000_0000 + GIB, 4096, Rights.NONE)]
    assert candidates(expected(line("-m", "1G"))[0], runs(mapped)) == [Block(0x7F40_0000_0000, GIB)]


def test_ram_whose_mapping_was_cut_in_parts_is_one_piece():
    mapped = [region(0x7F40_0000_0000, 3 * MIB), region(0x7F40_0030_0000, GIB - 3 * MIB)]
    assert candidates(expected(line("-m", "1G"))[0], runs(mapped)) == [Block(0x7F40_0000_0000, GIB)]


def test_a_file_is_known_by_its_name_whatever_its_folder_is_called_here():
    backend = "memory-backend-file,id=r,size=1G,mem-path=/private/ram,share=on"
    words = ("-object", backend, "-machine", "memory-backend=r")
    ram = region(0x2000_0000_0000, GIB, path="/elsewhere/ram (deleted)", shared=True)
    mapped = [region(0x1000_0000_0000, GIB), ram]
    assert candidates(expected(line(*words))[0], runs(mapped)) == [Block(0x2000_0000_0000, GIB)]


# -- the monitor's output -----------------------------------------------------------------------------------

# QEMU 7.2 and 9.0, q35 with 5 GiB in two nodes, a card with memory of its own (shortened).
MTREE = """FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "vga", root: bus master container
 AS "cpu-memory-0", root: system
 AS "memory", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): node0 KVM
  00000000000a0000-00000000000bffff (prio 1, ram): vga.vram KVM
  00000000000c0000-00000000000c8fff (prio 0, rom): node0 @00000000000c0000 KVM
  0000000000100000-000000007fffffff (prio 0, ram): node0 @0000000000100000 KVM
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000fd000000-00000000fdffffff (prio 1, ram): vga.vram KVM
  00000000fffc0000-00000000ffffffff (prio 0, romd): system.flash0
  0000000100000000-000000011fffffff (prio 0, ram): node0 @0000000080000000 KVM
  0000000120000000-00000001bfffffff (prio 0, ram): my node 1 KVM
  0000008000000000-00000083ffffffff (prio 1, ramd): 0000:01:00.0 BAR 1 mmaps[0]
"""


def test_ram_is_what_the_view_of_the_system_shows_of_memory_backends():
    views = ram_views(MTREE, {"node0", "my node 1"})
    assert views == [
        View(0, 0xA0000, "node0", 0),
        View(0xC0000, 0x9000, "node0", 0xC0000),
        View(0x100000, 0x7FF00000, "node0", 0x100000),
        View(0x1_0000_0000, 0x2000_0000, "node0", 0x8000_0000),
        View(0x1_2000_0000, 0xA000_0000, "my node 1", 0),
    ]


def test_without_a_name_that_is_known_the_largest_block_is_ram():
    assert {view.block for view in ram_views(MTREE, set())} == {"my node 1"}


def test_a_host_address_is_read_from_what_gpa2hva_prints():
    assert host_address("Host virtual address for 0x1000 (pc.ram) is 0x7f6d37e01000\r\n") == 0x7F6D37E01000
    assert host_address("No memory is mapped at address 0xfffff000000\r\n") is None


def test_registers_of_riscv_are_read_too():
    told = "\r\nCPU#0\n pc       ffffffff80003a1c\n satp     a000000000081234\n"
    assert registers(told)[0]["SATP"] == 0xA000000000081234


@given(st.text(max_size=300))
def test_no_output_makes_it_fail(text):
    ram_views("FlatView #1\n AS \"memory\", root: system\n" + text, set())
    registers("CPU#0" + text)
    host_address(text)


# -- what listens where a monitor should ----------------------------------------------------------------------


def talk(*answers: bytes) -> Monitor:
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            for answer in answers:
                theirs.sendall(answer)
            while theirs.recv(4096):
                pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        return Monitor(ours, "it")
    except BaseException:
        ours.close()
        raise


GREETING = json.dumps({"QMP": {"version": {}}}).encode() + b"\n"


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", MonitorError), (b"{}\n", MonitorError), (b"[1]\n", MonitorError),
        (b"[" * 100000 + b"\n", MonitorError), (b"", TargetBusyError), (os.urandom(100) + b"\n", MonitorError),
    ],
)  # fmt: skip
def test_what_does_not_greet_as_qemu_is_left_alone(said, error):
    with pytest.raises(error):
        talk(said)


def test_events_between_answers_are_passed_over():
    event = b'{"event":"STOP","timestamp":{}}\n'
    with talk(GREETING, b'{"return":{}}\n', event, b'{"return":"yes\\r\\n"}\n') as monitor:
        assert monitor.human("x") == "yes\n"


def test_a_refusal_says_what_qemu_says():
    refusal = b'{"error":{"class":"GenericError","desc":"not now"}}\n'
    with talk(GREETING, b'{"return":{}}\n', refusal) as monitor, pytest.raises(MonitorError, match="not now"):
        monitor.human("x")
