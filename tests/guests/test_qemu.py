"""The connector `qemu` on QEMUs with every kind of RAM and monitor: QEMU's own monitor is the oracle."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from guests.living import RAM, wait_until
from guests.monitor import Monitor

from engine.connectors.qemu import QemuConnector
from engine.errors import (
    FaultError,
    InvalidArgumentError,
    NotFoundError,
    ReadOnlyError,
    TargetGoneError,
    UnsupportedError,
    UnusableTargetError,
)
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer

MIB = 1 << 20
Open = Callable[..., QemuConnector]


@pytest.mark.parametrize("qmp", ["yes", "no"])
@pytest.mark.parametrize("ram", [name for name in RAM if name != "equal-nodes"])
def test_ram_of_every_kind_is_read_as_qemu_reads_it(start, opened, ram, qmp):
    living = start(ram, more=["-S"])
    places = {0x7000: os.urandom(8192), 0x100000: os.urandom(4096), 33 * MIB: os.urandom(4096)}
    for place, data in places.items():
        living.put(place, data)
    connector = opened(living, qmp=qmp)
    assert connector.memory.size == connector.info.real_size == 64 * MIB
    assert {place: connector.memory.read(place, len(data)) for place, data in places.items()} == places
    assert connector.memory.read(0, 0xA0000) == living.saved(0, 0xA0000)
    assert connector.memory.read(32 * MIB - 4096, MIB) == living.saved(32 * MIB - 4096, MIB)


# -- layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("binary", "machine", "size"),
    [
        ("qemu-system-x86_64", "pc", 3583),
        ("qemu-system-x86_64", "pc", 3584),
        ("qemu-system-x86_64", "pc-i440fx-2.4", 5120),
        ("qemu-system-x86_64", "pc,max-ram-below-4g=1G", 2048),
        ("qemu-system-x86_64", "q35", 2815),
        ("qemu-system-x86_64", "q35", 2816),
        ("qemu-system-x86_64", "q35,max-ram-below-4g=1G", 2048),
        ("qemu-system-x86_64", "microvm", 4096),
        ("qemu-system-i386", "isapc", 64),
        ("qemu-system-aarch64", "virt", 5120),
        ("qemu-system-aarch64", "sbsa-ref", 1024),
        ("qemu-system-arm", "virt", 1024),
        ("qemu-system-riscv64", "virt", 5120),
    ],
)
def test_a_machines_type_and_size_tell_the_layout_that_qemu_tells(start, opened, binary, machine, size):
    more = ["-S", "-cpu", "cortex-a57"] if binary.endswith("aarch64") else ["-S"]
    living = start("private", size=size, machine=machine, binary=binary, more=more)
    told, concluded = opened(living), opened(living, qmp="no")
    assert "told by its monitor" in told.info.notes[0]
    assert "concluded from its machine" in concluded.info.notes[0]
    assert told.memory_map.coalesced() == concluded.memory_map.coalesced()


def test_a_machine_that_is_not_known_wants_a_map_and_takes_it(start, opened, tmp_path):
    living = start("private", size=128, machine="xilinx-zynq-a9", binary="qemu-system-arm", more=["-S"])
    with pytest.raises(UnusableTargetError, match=r"xilinx-zynq-a9 \(arm\).*map=FILE"):
        opened(living, qmp="no")
    (tmp_path / "map").write_text("[[range]]\nbase = 0x100000\nlength = 0x7f00000\nreal_base = 0x100000\n")
    connector = opened(living, map=str(tmp_path / "map"))
    living.put(0x123000, b"there")
    assert connector.memory.read(0x123000, 5) == b"there"


def test_nodes_of_one_size_are_told_apart_by_the_bios_that_one_of_them_holds(start, opened):
    living = start("equal-nodes")
    ram = living.host_address(0x1000) - 0x1000  # the BIOS runs from ROM first, and copies itself there
    wait_until(lambda: b"SeaBIOS" in living.at(ram + 0xF0000, 0x10000), what="the BIOS")
    connector = opened(living, qmp="no")
    assert "confirmed by its" in connector.info.notes[0]
    assert connector.memory_map.coalesced() == opened(living).memory_map.coalesced()


def test_mappings_that_cannot_be_told_apart_are_named_with_what_to_say(start, opened):
    living = start("equal-nodes", more=["-S"])
    places = [living.host_address(0x1000) - 0x1000, living.host_address(33 * MIB) - MIB]
    with pytest.raises(UnusableTargetError, match=r"say which: base=") as error:
        opened(living, qmp="no")
    assert all(f"{place:#x} (32 MiB)" in str(error.value) for place in places)
    living.put(0x1000, b"low node")
    assert opened(living, base=hex(places[0]), size="32M").memory.read(0x1000, 8) == b"low node"


# -- monitors -----------------------------------------------------------------------------------------------


def within(seconds: float, act: Callable[[], QemuConnector]) -> QemuConnector:
    began = time.monotonic()
    found = act()
    assert time.monotonic() - began < seconds
    return found


def test_a_monitor_with_a_client_is_left_to_it(start, opened):
    living = start("private", more=["-S"])
    with contextlib.closing(Monitor(living.folder / "qmp")) as other:
        connector = within(20, lambda: opened(living))
        assert "concluded" in connector.info.notes[0]
        assert any("another one is there" in note for note in connector.info.notes)
        assert other.ask("query-status")["running"] is False


def test_after_opening_the_monitor_is_free_for_others(start, opened):
    living = start("private", more=["-S"])
    opened(living).hints()
    with contextlib.closing(Monitor(living.folder / "qmp")) as other:
        assert other.ask("query-status")["running"] is False


def test_a_qemu_without_a_monitor_is_opened(start, opened):
    living = start("memfd", more=["-S"], monitor="none", own_monitor=False)
    wait_until(lambda: b"memory-backend" in Path(f"/proc/{living.pid}/maps").read_bytes())
    connector = opened(living)
    assert connector.memory.size == 64 * MIB
    with pytest.raises(UnsupportedError, match="no monitor"):
        connector.pause()


def test_a_qemu_that_stands_still_is_opened_though_its_monitor_is_silent(start, opened):
    living = start("private", more=["-S"])
    living.put(0x5000, b"stopped")
    os.kill(living.pid, signal.SIGSTOP)
    try:
        connector = within(20, lambda: opened(living))
        assert connector.memory.read(0x5000, 7) == b"stopped"
        assert connector.hints().architecture == "x86_64"
    finally:
        os.kill(living.pid, signal.SIGCONT)


def test_nobody_else_is_taken_for_the_monitor_of_a_qemu(start, opened):
    living = start("private", more=["-S"])
    place = living.folder / "qmp"
    place.unlink()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as ours:
        ours.bind(str(place))
        ours.listen()
        connector = within(20, lambda: opened(living))
    assert any(f"process {os.getpid()} listens there" in note for note in connector.info.notes)


def test_a_monitor_on_a_port_is_asked(start, opened):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    living = start("private", monitor="none", more=["-S", "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"])
    assert f"its monitor at 127.0.0.1:{port}" in opened(living).info.notes[0]


def test_a_guest_started_as_libvirt_starts_it_is_opened(start, opened):
    ours, theirs = socket.socketpair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        words = [
            "-S", "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
            "-chardev", f"socket,id=charmonitor,fd={theirs.fileno()}", "-uuid", "c7a5fdbd-edaf-9455-926a-d65c16db1809",
            "-mon", "chardev=charmonitor,id=monitor,mode=control",
        ]  # fmt: skip
        script = 'mount -t tmpfs private "$0" && exec "$@"'
        before = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "{folder}"]
        living = start("file", more=words, before=before, own_monitor=False, monitor="none", keep=[theirs.fileno()])
        theirs.close()
        ours.settimeout(20)
        assert b"QMP" in ours.recv(4096)
        assert not (living.folder / "ram").exists()
        connector = opened(living)
        number = next(name for name in os.listdir(f"/proc/{living.pid}/fd")
                      if os.readlink(f"/proc/{living.pid}/fd/{name}").endswith("/ram"))  # fmt: skip
        with open(f"/proc/{living.pid}/fd/{number}", "r+b", buffering=0) as file:
            file.seek(0x6000)
            file.write(b"private")
        assert connector.memory.read(0x6000, 7) == b"private"
        assert any("virsh" in note for note in connector.info.notes)
        assert not any("through the process" in note for note in connector.info.notes), "its mount is seen by it alone"


def test_a_guest_is_paused_and_resumed_by_its_monitor(start, opened):
    living = start("private")
    connector = opened(living)
    connector.pause()
    assert living.monitor.ask("query-status")["status"] == "paused"
    connector.resume()
    assert living.monitor.ask("query-status")["status"] == "running"


def test_hints_carry_the_registers_that_qemu_prints(start, opened):
    living = start("private", more=["-S"])
    registers = opened(living).hints().registers
    assert len(registers) == 1
    assert registers[0]["CR0"] == 0x60000010, "after a reset, Intel SDM vol. 3A table 10-1"


# -- names --------------------------------------------------------------------------------------------------


def test_targets_tell_name_pid_machine_and_ram(start):
    living = start("private", more=["-S"], machine="q35")
    host = NativeLayer.open(Base(live=True), {})
    found = {target.name: target.description for target in QemuConnector.targets(host)}
    assert found[living.name] == f"pid {living.pid}, x86_64, q35, 64 MiB"


def test_a_guest_is_opened_by_pid(start, opened):
    living = start("private", more=["-S"])
    assert opened(str(living.pid)).info.target == f"{living.name} (pid {living.pid})"


def test_who_names_no_guest_where_there_are_two_is_told_both(start, opened):
    one, two = start("private", more=["-S"]), start("private", more=["-S"])
    with pytest.raises(InvalidArgumentError) as error:
        opened("")
    assert one.name in str(error.value)
    assert two.name in str(error.value)
    with pytest.raises(NotFoundError, match="no guest is called 'nonsense'; there are: .*" + two.name):
        opened("nonsense")


def test_two_guests_are_read_each_for_itself(start, opened):
    living = [start("private", more=["-S"]), start("memfd", more=["-S"])]
    for number, one in enumerate(living):
        one.put(0x9000, b"guest %d" % number)
    found = [opened(one) for one in living]
    assert [connector.memory.read(0x9000, 7) for connector in found] == [b"guest 0", b"guest 1"]


def test_other_programs_memory_is_opened_by_pid_and_place(opened, tmp_path):
    code = "import mmap,sys; m=mmap.mmap(-1,1<<22); m[4096:4100]=b'here'; print('on',flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            (tmp_path / "map").write_text("[[range]]\nbase = 0x40000000\nlength = 0x400000\nreal_base = 0\n")
            host = NativeLayer.open(Base(live=True), {})
            process = host.process(other.pid)
            large = [one.start for one in process.regions() if one.permissions == "rw-s" and one.size == 1 << 22]
            place = next(start for start in large if process.memory.read(start + 4096, 4) == b"here")
            found = opened(str(other.pid), base=hex(place), map=str(tmp_path / "map"))
            assert found.memory.read(0x40001000, 4) == b"here"
        finally:
            other.kill()


# -- writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ram", [name for name in RAM if name != "equal-nodes"])
def test_what_is_written_is_there_for_the_guest_at_once(start, opened, ram):
    living = start(ram, more=["-S"])
    connector = opened(living, writable=True)
    data = os.urandom(10000)
    connector.memory.write(32 * MIB - 5000, data)
    assert living.saved(32 * MIB - 5000, len(data)) == data
    assert any("TCG" in note for note in connector.info.notes)


def test_nothing_is_written_without_leave(start, opened):
    connector = opened(start("private", more=["-S"]))
    with pytest.raises(ReadOnlyError):
        connector.memory.write(0x1000, b"x")


# -- ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ram", ["private", "memfd"])
def test_a_guest_whose_qemu_was_killed_is_gone_for_every_door(start, opened, ram):
    living = start(ram, more=["-S"])
    memory = opened(living).memory
    view = memory.cached()
    out = np.empty((64, 8), np.uint8)
    living.kill()
    doors = [
        lambda: memory.read(0x1000, 8), lambda: memory.read(0, MIB), lambda: memory.u64(0x2000),
        lambda: memory.gather(np.arange(64, dtype=np.uint64) * 4096, out), lambda: list(memory.extents()),
        lambda: memory.readinto_nowait(0x1000, memoryview(bytearray(8))), lambda: memory.cached().u64(0x1000),
        memory.shortcut, lambda: memory.borrow(0x1000, 16), memory.pieces, lambda: view.read(0x1000, 8),
    ]  # fmt: skip
    time.sleep(0.01)  # a view looks at the process after some milliseconds at the latest
    for door in doors:
        with pytest.raises(TargetGoneError, match=f"pid {living.pid}"):
            door()


def test_a_qemu_that_was_killed_is_gone_before_anybody_waits_for_it(start, opened):
    living = start("memfd", more=["-S"])
    memory = opened(living).memory
    os.kill(living.pid, signal.SIGKILL)
    os.waitid(os.P_PID, living.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(TargetGoneError):
        memory.read(0x1000, 8)


@pytest.mark.parametrize("ram", ["private", "memfd"])
def test_readers_of_a_guest_that_is_killed_end_and_see_nothing_else(start, opened, ram):
    living = start(ram, more=["-S"])
    pattern = os.urandom(4096)
    for page in range(16, 32):
        living.put(page * 4096, pattern)
    memory = opened(living).memory
    begun = threading.Barrier(17)

    def read(number: int) -> str:
        begun.wait(20)
        while True:
            try:
                if memory.read((16 + number) * 4096, 4096) != pattern:
                    return "other bytes"
            except TargetGoneError:
                return "gone"
            except FaultError:
                return "fault"

    with ThreadPoolExecutor(16) as pool:
        results = [pool.submit(read, number) for number in range(16)]
        begun.wait(20)
        living.kill()
        assert {result.result(30) for result in results} == {"gone"}


def test_a_guest_whose_memory_is_encrypted_is_refused_in_one_sentence(opened):
    code = "import sys; print('on', flush=True); sys.stdin.read()"
    words = ["-name", "secretive", "-object", "sev-snp-guest,id=s", "-machine", "q35,confidential-guest-support=s"]
    with subprocess.Popen(
        ["qemu-system-x86_64", "-c", code, *words], executable=sys.executable, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as pretender:  # fmt: skip
        try:
            pretender.stdout.readline()
            with pytest.raises(UnsupportedError, match=r"secretive \(pid \d+\) is encrypted \(SEV-SNP\)"):
                opened("secretive")
        finally:
            pretender.kill()


def test_a_reset_of_the_guest_leaves_its_memory_open(start, opened):
    living = start("memfd")
    memory = opened(living).memory
    living.ask("system_reset")
    wait_until(lambda: b"SeaBIOS" in memory.read(0xF0000, 0x10000), what="the BIOS")
