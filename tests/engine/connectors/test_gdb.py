"""The connector `gdb`: on QEMU's stub, and on a scripted one that misbehaves."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from bare_qemu import PLACE, RAM, BareMachine, bare_machine
from scripted_stub import MEMORY, Scripted, opened, plain, scripted

from engine.connectors.gdb import GdbConnector
from engine.connectors.gdb.documents import parsed
from engine.connectors.gdb.wire import Wire, framed, unpacked
from engine.errors import (
    EngineError,
    FaultError,
    InvalidArgumentError,
    NotFoundError,
    ReadOnlyError,
    TargetGoneError,
    TargetTimeoutError,
    UnsupportedError,
    UnusableTargetError,
)

SHADOWED = 256 << 10
"""From 0xc0000 to 1 MiB a PC has ROM until its firmware has made RAM of it."""

# -- QEMU ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def machine() -> Iterator[BareMachine]:
    with bare_machine() as found:
        yield found


def test_reads_the_machines_memory(machine: BareMachine) -> None:
    with opened(machine.stub) as connector:
        assert connector.memory.read(PLACE, len(machine.known)) == machine.known


def test_the_memory_map_is_what_qemu_tells(machine: BareMachine) -> None:
    with opened(machine.stub) as connector:
        assert RAM - SHADOWED <= connector.memory_map.real_size <= RAM
        assert connector.memory.size == RAM


def test_a_column_of_words_is_what_stands_there(machine: BareMachine) -> None:
    offsets = np.random.default_rng(1).integers(0, len(machine.known) - 8, 1000)
    with opened(machine.stub) as connector:
        words, faults = connector.memory.words(PLACE + offsets)
    assert not faults
    assert words.tolist() == [int.from_bytes(machine.known[at : at + 8], "little") for at in offsets.tolist()]


def test_outside_of_the_map_nothing_is_asked_for(machine: BareMachine) -> None:
    with opened(machine.stub) as connector:
        with pytest.raises(FaultError) as caught:
            connector.memory.read(RAM - 4, 8)
        assert caught.value.address == RAM
        _, faults = connector.memory.words([0xFEE0_0000, PLACE])  # a device
        assert faults.rows.tolist() == [0]


def test_it_runs_on_when_nothing_is_asked_for(machine: BareMachine) -> None:
    with opened(machine.stub) as connector:
        connector.memory.u64(PLACE)
        machine.wait_until("running")
        connector.memory.u64(PLACE)
        machine.wait_until("running")


def test_hold_keeps_it_stopped_until_it_is_closed(machine: BareMachine) -> None:
    with opened(machine.stub, stop="hold") as connector:
        connector.memory.u64(PLACE)
        time.sleep(0.1)
        assert machine.status() == "paused"
    machine.wait_until("running")


def test_pause_keeps_it_stopped_until_resume(machine: BareMachine) -> None:
    with opened(machine.stub) as connector:
        connector.pause()
        time.sleep(0.1)
        assert machine.status() == "paused"
        connector.resume()
        machine.wait_until("running")


def test_a_machine_that_was_never_started_stays_so() -> None:
    with bare_machine("-S") as machine:
        with opened(machine.stub) as connector:
            assert connector.memory.read(0, 16)
            assert any("stood still" in note for note in connector.info.notes)
        assert machine.status() == "paused (prelaunch)"


def test_what_is_written_stands_in_the_machine(machine: BareMachine) -> None:
    data = os.urandom(10_000)
    with opened(machine.stub, writable=True) as connector:
        connector.memory.write(0x30_0001, data)
        assert connector.memory.read(0x30_0001, len(data)) == data
        told = machine.monitor("xp /8xb 0x300001")
    assert [int(byte, 16) for byte in re.findall(r"0x([0-9a-f]{2})\b", told)] == list(data[:8])


def test_a_write_of_three_bytes_at_an_odd_place_is_one_of_three_bytes(
    machine: BareMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    ask = Wire.ask
    monkeypatch.setattr(Wire, "ask", lambda wire, packet, *more: sent.append(packet) or ask(wire, packet, *more))
    with opened(machine.stub, writable=True) as connector:
        connector.memory.write(0x30_0001, b"abc")
    assert [packet for packet in sent if packet[:1] in b"MX"] == [b"M300001,3:616263"]


def test_nothing_is_written_unless_it_was_allowed(machine: BareMachine) -> None:
    with opened(machine.stub) as connector, pytest.raises(ReadOnlyError):
        connector.memory.write(PLACE, b"x")


def test_what_was_kept_while_it_stood_still_is_gone_when_it_runs(machine: BareMachine) -> None:
    with opened(machine.stub) as one:
        before = one.memory.read(0x38_0000, 8)
        machine.wait_until("running")
        one.close()
        with opened(machine.stub, writable=True) as other:
            other.memory.write(0x38_0000, bytes(byte ^ 0xFF for byte in before))
        with opened(machine.stub) as again:
            assert again.memory.read(0x38_0000, 8) != before


def test_the_registers_are_those_that_the_monitor_prints(machine: BareMachine) -> None:
    with opened(machine.stub, stop="hold") as connector:
        hints = connector.hints()
        told = machine.monitor("info registers")
    assert hints.architecture == "x86-64"
    cs, cr0 = re.search(r"^CS =([0-9a-f]+)", told, re.MULTILINE), re.search(r"CR0=([0-9a-f]+)", told)
    assert cs is not None
    assert cr0 is not None
    assert (hints.registers[0]["cs"], hints.registers[0]["cr0"]) == (int(cs[1], 16), int(cr0[1], 16))


def test_the_stub_gives_virtual_addresses_again_afterwards(machine: BareMachine) -> None:
    with opened(machine.stub):
        pass
    with opened(machine.stub, physical="no", size="1M") as connector:
        assert any("what the processor sees" in note for note in connector.info.notes)
        assert connector._session.use(lambda wire: wire.ask(b"qqemu.PhyMemMode")) == b"0"


def test_a_killed_machine_is_gone_and_nobody_hangs() -> None:
    with bare_machine() as machine, opened(machine.stub, timeout="2") as connector:
        connector.memory.u64(PLACE)
        machine.process.kill()
        machine.process.wait(10)
        time.sleep(0.02)  # for so long what is kept may be given
        with pytest.raises((TargetGoneError, NotFoundError)):
            connector.memory.u64(PLACE)


def test_a_second_debugger_gets_a_sentence_in_time(machine: BareMachine) -> None:
    with opened(machine.stub), pytest.raises(TargetTimeoutError, match="another debugger"):
        GdbConnector.open(machine.stub, {"timeout": "0.3"}, parent=None, writable=False)


# -- a scripted stub -------------------------------------------------------------------------------------------


@pytest.fixture(name="script")
def _script(tmp_path: Path) -> Iterator[Scripted]:
    with scripted(tmp_path) as make:
        yield make


def test_a_stub_that_knows_little_is_read_within_the_size_that_was_said(script) -> None:
    with opened(script(plain).path, size="16K") as connector:
        assert connector.memory.read(3, 10_000) == MEMORY[3:10_003]
        assert any("what the processor sees" in note for note in connector.info.notes)


def test_without_a_map_and_a_size_it_is_refused(script) -> None:
    with pytest.raises(UnusableTargetError, match="size="):
        GdbConnector.open(script(plain).path, {}, parent=None, writable=False)


def test_physical_addresses_are_refused_where_there_are_none(script) -> None:
    with pytest.raises(UnsupportedError, match="physical=no"):
        GdbConnector.open(script(plain).path, {"size": "1M", "physical": "yes"}, parent=None, writable=False)


def test_it_detaches_when_it_is_closed(script) -> None:
    stub = script(plain)
    with opened(stub.path, size="16K"):
        pass
    assert stub.asked[-1] == "D"


@pytest.mark.parametrize("readable", [1, 4095, 4096, 5000, 8191])
def test_what_a_stub_refuses_as_a_whole_is_read_up_to_its_first_bad_byte(script, readable: int) -> None:
    with opened(script(lambda command: plain(command, readable)).path, size="16K") as connector:
        with pytest.raises(FaultError) as caught:
            connector.memory.read(0, 12_000)
        assert caught.value.address == readable
        assert connector.memory.read(0, readable) == MEMORY[:readable]


def test_a_map_that_the_stub_tells_is_taken(script) -> None:
    def answer(command: str) -> bytes:
        if command.startswith("qSupported"):
            return b"PacketSize=800;qXfer:memory-map:read+"
        if command.startswith("qXfer:memory-map:read"):
            return b'l<memory-map><memory type="ram" start="0x1000" length="0x2000"/></memory-map>'
        return plain(command)

    with opened(script(answer).path) as connector:
        assert [(entry.base, entry.length) for entry in connector.memory_map.ranges] == [(0x1000, 0x2000)]
        assert connector.memory.read(0x1000, 0x2000) == MEMORY[0x1000:0x3000]


def test_a_lost_connection_is_made_again(script) -> None:
    lost = []

    def answer(command: str) -> bytes:
        if command.startswith("m") and not lost:
            lost.append(1)
            return b"hang up"
        return plain(command)

    with opened(script(answer).path, size="16K") as connector:
        assert connector.memory.read(0, 100) == MEMORY[:100]


def test_silence_ends_in_time(script) -> None:
    stub = script(lambda command: None if command.startswith("m") else plain(command))
    with opened(stub.path, size="16K", timeout="0.2") as connector, pytest.raises(TargetTimeoutError):
        connector.memory.read(0, 100)


@pytest.mark.parametrize(
    "nonsense",
    [b"$zz#00", b"$00#zz", b"$" + b"0" * (3 << 20), b"$0*" + b"~*" * 100 + b"#00", b"xyz", framed(b"T05") * 2000],
    ids=["checksum", "no checksum", "endless", "runs", "not hexadecimal", "stops"],
)
def test_nonsense_is_an_error_of_the_engine(script, nonsense: bytes) -> None:
    stub = script(lambda command: nonsense if command.startswith("m") else plain(command))
    with opened(stub.path, size="16K", timeout="0.5") as connector, pytest.raises(EngineError):
        connector.memory.read(0, 100)


def test_nobody_at_the_address_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no stub listens"):
        GdbConnector.open(f"{tmp_path}/nothing", {}, parent=None, writable=False)


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("", {}), ("host", {}), ("host:0", {}), ("host:99999", {}), ("1", {"stop": "often"}), ("1", {"timeout": "x"}),
        ("1", {"base": "0"}), ("1", {"size": "0"}), ("1", {"size": "2", "base": "0xffffffffffffffff"}),
        ("1", {"map": "x", "size": "1"}),
    ],
)  # fmt: skip
def test_wrong_words_are_refused_before_anything_is_connected(target: str, options: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError):
        GdbConnector.open(target, options, parent=None, writable=False)


def test_a_description_that_defines_entities_is_none() -> None:
    assert parsed(b'<!DOCTYPE target [<!ENTITY a "b">]><target>&a;</target>') is None
    assert parsed(b"<target><reg/></target>") is not None


@pytest.mark.parametrize("text", [b"", b"#$}*", bytes(range(256))])
def test_what_is_escaped_reads_back(text: bytes) -> None:
    assert unpacked(framed(text)[1:-3]) == text


def test_runs_are_spelt_out() -> None:
    assert unpacked(b"0* 1") == b"00001"  # GDB's own example: «0* » means 0000
