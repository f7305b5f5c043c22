"""Writing through a debug stub: the machine does what was written, or never sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_qemu import LIMIT, PLACE, BareMachine, bare_machine
from scripted_stub import MEMORY, Scripted, plain, scripted

from engine.errors import ReadOnlyError
from engine.machine import Machine
from engine.memory import Memory

CODE = bytes.fromhex("b041 e6e9 66b900001000 67e2fd ebf1")
"""mov al, 'A'; out 0xe9, al; mov ecx, 1 << 20; loop; jmp to the start (Intel SDM volume 2)."""
START = 0x7C00
"""Where a PC puts the first sector of a floppy disk, and jumps to."""


def opened(machine: Machine, target: str) -> Memory:
    return machine.run("connector", f"stub {target}").memory


class Printing:
    """What a machine prints at the port of QEMU's debug console."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def wait_for(self, letter: bytes) -> None:
        """Until it prints that letter last."""
        deadline = time.monotonic() + LIMIT
        while not self.place.exists() or not self.place.read_bytes().endswith(letter):
            assert time.monotonic() < deadline, f"it never printed {letter!r}"
            time.sleep(0.02)


@pytest.fixture
def printing(tmp_path: Path) -> Iterator[tuple[BareMachine, Printing]]:
    """A machine that prints A for ever."""
    disk, said = tmp_path / "disk", tmp_path / "said"
    disk.write_bytes(CODE.ljust(510, b"\0") + b"\x55\xaa" + bytes((1440 << 10) - 512))
    words = ["-drive", f"if=floppy,format=raw,file={disk}", "-boot", "a", "-debugcon", f"file:{said}"]
    with bare_machine(*words) as machine:
        yield machine, Printing(said)


def test_a_machine_does_what_its_code_is_patched_to_do(printing) -> None:
    machine, printed = printing
    printed.wait_for(b"A")
    with Machine(writable=True) as instances:
        memory = opened(instances, f"gdb:{machine.stub}")
        assert memory.read(START, len(CODE)) == CODE
        memory.write(START + 1, b"B")
        printed.wait_for(b"B")
        memory.write(START + 1, b"C")
        printed.wait_for(b"C")
    assert b"A" not in printed.place.read_bytes().partition(b"B")[2]


def test_what_is_written_into_an_overlay_the_machine_never_sees() -> None:
    with bare_machine() as machine, Machine(writable=True) as instances:
        memory = opened(instances, f"gdb:{machine.stub}:overlay=cow")
        memory.write(PLACE, os.urandom(10_000))
        assert memory.read(PLACE, 10_000) != machine.known[:10_000]
        told = machine.monitor(f"xp /16xb {PLACE:#x}")
        words = [int(word, 16) for line in told.splitlines() for word in line.partition(":")[2].split()]
        assert bytes(words) == machine.known[:16]


@pytest.fixture(name="script")
def _script(tmp_path: Path) -> Iterator[Scripted]:
    with scripted(tmp_path) as make:
        yield make


def test_an_overlay_sends_no_write(script) -> None:
    stub = script(plain)
    with Machine(writable=True) as instances:
        memory = opened(instances, f"gdb:{stub.path}:size=16K,overlay=cow")
        memory.write(100, b"changed")
        assert memory.read(98, 11) == MEMORY[98:100] + b"changed" + MEMORY[107:109]
    assert not [command for command in stub.asked if command[0] in "MXPGcZ" and command != "c"]


def test_nothing_is_sent_that_was_not_allowed_to_be_written(script) -> None:
    stub = script(plain)
    with Machine() as instances, pytest.raises(ReadOnlyError):
        opened(instances, f"gdb:{stub.path}:size=16K").write(100, b"changed")
    assert not [command for command in stub.asked if command[0] in "MX"]


def test_a_write_is_exactly_as_wide_as_it_was_asked_for(script) -> None:
    stub = script(lambda command: b"OK" if command[0] == "M" else plain(command))
    with Machine(writable=True) as instances:
        opened(instances, f"gdb:{stub.path}:size=16K").write(4093, b"\1\2\3\4\5")
    assert [command for command in stub.asked if command[0] in "MX"] == ["Mffd,5:0102030405"]
