"""The connector `gdb` on stubs that misbehave, on lines that lose and delay, and when it is killed itself."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bare_qemu import PLACE, BareMachine, bare_machine
from scripted_stub import MEMORY, Script, Scripted, opened, plain, scripted

from engine.connectors.gdb import GdbConnector, guardian
from engine.connectors.gdb.wire import framed
from engine.errors import EngineError, InvalidArgumentError, TargetGoneError, TargetTimeoutError, UnusableTargetError

SIZE = "16K"
READ = (3, 10_000)
LIMIT = 20.0


@pytest.fixture(name="script")
def _script(tmp_path: Path) -> Iterator[Scripted]:
    with scripted(tmp_path) as make:
        yield make


def reads_right(stub: Script, **options: str) -> bool:
    with opened(stub.path, size=SIZE, **options) as connector:
        return connector.memory.read(*READ) == MEMORY[READ[0] : sum(READ)]


# -- what goes on the line -------------------------------------------------------------------------------------


class ByteByByte(Script):
    """Each byte is a packet of the network."""

    def send(self, connection: socket.socket, data: bytes) -> None:
        for at in range(len(data)):
            connection.sendall(data[at : at + 1])


class HalfThenGone(Script):
    """The first answer about memory breaks off in its middle."""

    broken = False

    def send(self, connection: socket.socket, data: bytes) -> None:
        if self.asked[-1].startswith("m") and not self.broken:
            self.broken = True
            connection.sendall(data[: len(data) // 2])
            connection.shutdown(socket.SHUT_RDWR)
        else:
            connection.sendall(data)


class Late(Script):
    """The first answer about memory comes after the time limit."""

    late = False

    def send(self, connection: socket.socket, data: bytes) -> None:
        if self.asked[-1].startswith("m") and not self.late:
            self.late = True
            time.sleep(0.5)
        connection.sendall(data)


class Serial(Script):
    """Whoever connects gets the answers first that were meant for the one before, as on a serial line."""

    def _talk(self, connection: socket.socket) -> None:
        connection.sendall(framed(b"00112233") + b"+" + framed(b"E01") + framed(b"OK"))
        super()._talk(connection)


class Overrun(Script):
    """What comes while it is busy with an answer is lost, as in a UART without flow control."""

    def _talk(self, connection: socket.socket) -> None:
        while data := connection.recv(1 << 16):
            found = re.search(rb"\$(.*?)#..|\x03", data, re.DOTALL)
            if found is not None:
                command = "interrupt" if found[1] is None else found[1].decode("latin-1")
                self.asked.append(command)
                reply = b"T02" if command == "interrupt" else self.answer(command)
                if reply is not None and command != "c":
                    connection.sendall(b"+" + framed(reply))


class Refuses(Script):
    """It asks for everything again, for ever."""

    def send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(b"-" * 100)


class Noisy(Script):
    """Before each answer stands what is none."""

    noise = b""

    def send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(self.noise + data)


class Junk(Noisy):
    """A serial console's output, 8 MiB of it before each answer about memory."""

    def send(self, connection: socket.socket, data: bytes) -> None:
        if self.asked[-1].startswith("m"):
            for _ in range(8):
                connection.sendall(b"[    0.000000] " * (1 << 16))
        connection.sendall(data)


class Prints(Noisy):
    """Its target prints."""

    noise = framed(b"O" + b"hello\n".hex().encode()) * 3


class Stops(Noisy):
    """It says again and again that its target has stopped."""

    noise = framed(b"T05thread:01;") + framed(b"S05")

    def send(self, connection: socket.socket, data: bytes) -> None:
        super().send(connection, framed(b"S05") if self.asked[-1] == "?" else data)


class Notices(Noisy):
    """Notifications of non-stop mode."""

    noise = framed(b"Stop:T05").replace(b"$", b"%")


@pytest.mark.parametrize("kind", [ByteByByte, HalfThenGone, Serial, Junk, Prints, Stops, Notices])
def test_what_stands_there_is_read_all_the_same(script, kind: type[Script]) -> None:
    assert reads_right(script(plain, kind))


class Repeats(Noisy):
    """It answers once more than it was asked."""

    noise = framed(b"00" * 2048)

    def send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall((self.noise if self.asked[-1].startswith("m") else b"") + data)


def test_answers_that_are_not_in_order_are_no_data(script) -> None:
    with opened(script(plain, Repeats).path, size=SIZE) as connector, pytest.raises(EngineError, match="in order"):
        connector.memory.read(*READ)


@pytest.mark.parametrize("kind", [Late, Overrun])
def test_a_slow_line_is_read_in_the_second_attempt(script, kind: type[Script]) -> None:
    assert reads_right(script(plain, kind), timeout="0.3")


def test_a_line_that_has_lost_something_is_asked_one_by_one_from_then_on(script) -> None:
    stub = script(plain, Overrun)
    with opened(stub.path, size=SIZE, timeout="0.3", stop="hold") as connector:
        connector.memory.read(0, 4096)
        begun = time.monotonic()
        connector.memory.read(8192, 4096)
        assert time.monotonic() - begun < 0.3


def test_a_stub_that_never_acknowledges_is_read(script) -> None:
    assert reads_right(script(lambda command: framed(plain(command))))


def test_a_stub_that_promises_and_refuses_to_do_without_acknowledgements_is_read(script) -> None:
    def answer(command: str) -> bytes:
        if command.startswith("qSupported"):
            return b"PacketSize=100;QStartNoAckMode+"
        return b"E01" if command == "QStartNoAckMode" else plain(command)

    assert reads_right(script(answer))


@pytest.mark.parametrize("size", ["0", "1", "-5", "ffffffffffffffff", "zz", ""])
def test_a_packet_size_that_cannot_be_is_none(script, size: str) -> None:
    def answer(command: str) -> bytes:
        return f"PacketSize={size}".encode() if command.startswith("qSupported") else plain(command)

    assert reads_right(script(answer))


def test_a_stub_that_asks_for_everything_again_for_ever_ends_in_time(script) -> None:
    begun = time.monotonic()
    with pytest.raises(TargetTimeoutError):
        GdbConnector.open(script(plain, Refuses).path, {"size": SIZE, "timeout": "0.3"}, parent=None, writable=False)
    assert time.monotonic() - begun < 5


def test_a_target_that_has_ended_is_said(script) -> None:
    def answer(command: str) -> bytes:
        return b"W00" if command.startswith("m") else plain(command)

    with opened(script(answer).path, size=SIZE) as connector, pytest.raises(TargetGoneError, match="ended"):
        connector.memory.read(0, 100)


def test_a_target_that_has_ended_before_is_said(script) -> None:
    with pytest.raises(TargetGoneError, match="ended"):
        GdbConnector.open(
            script(lambda command: b"W00" if command == "?" else plain(command)).path, {"size": SIZE},
            parent=None, writable=False,
        )  # fmt: skip


class CannotStop(Script):
    """A target that was let go runs."""

    def send(self, connection: socket.socket, data: bytes) -> None:
        if self.asked[-1] != "interrupt":
            connection.sendall(data)


def test_a_target_that_cannot_be_stopped_again_is_said_once_it_was_let_go(script) -> None:
    stub = script(plain, CannotStop)
    with opened(stub.path, size=SIZE, timeout="0.3") as connector:
        deadline = time.monotonic() + LIMIT
        while "c" not in stub.asked:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for _ in range(2):
            with pytest.raises(TargetTimeoutError, match="stop=hold"):
                connector.memory.read(0, 100)


def test_where_a_stub_refuses_to_detach_its_target_is_told_to_go_on(script) -> None:
    stub = script(lambda command: b"E01" if command.startswith("D") else plain(command))
    with opened(stub.path, size=SIZE, stop="hold"):
        pass
    deadline = time.monotonic() + LIMIT
    while stub.asked[-1] != "c":
        assert time.monotonic() < deadline, stub.asked
        time.sleep(0.01)


# -- what else than a machine is behind a stub -------------------------------------------------------------------


def kgdb(command: str) -> bytes:
    """What kgdb of Linux 6.1 answers; its kernel maps physical memory from 0xffff888000000000 on."""
    if found := re.fullmatch("m([0-9a-f]+),([0-9a-f]+)", command):
        start = int(found[1], 16) - 0xFFFF_8880_0000_0000
        return plain(f"m{start:x},{found[2]}") if start >= 0 else b"E14"
    if command.startswith("qThreadExtraInfo"):
        return b"shadowCPU0".hex().encode()
    return {"qfThreadInfo": b"mfffffffffffffffe,01", "qsThreadInfo": b"l", "?": b"S05", "D": b"OK"}.get(command, b"")


def test_kgdb_is_read_through_its_kernels_map_of_physical_memory(script) -> None:
    with opened(script(kgdb).path, direct="0xffff888000000000", size=SIZE) as connector:
        assert connector.memory.read(*READ) == MEMORY[READ[0] : sum(READ)]
        assert [(one.base, one.length) for one in connector.memory_map.ranges] == [(0, 16 << 10)]


def test_a_kernel_that_waits_in_kgdb_is_neither_let_go_nor_detached_from(script) -> None:
    stub = script(kgdb)
    with opened(stub.path, direct="0xffff888000000000", size=SIZE) as connector:
        connector.memory.read(0, 16)
        time.sleep(0.1)
        connector.memory.read(0, 16)
    assert not {"c", "D", "interrupt"} & set(stub.asked)


def test_kgdb_without_a_word_on_addresses_is_one_sentence(script) -> None:
    with pytest.raises(UnusableTargetError, match=r"is kgdb.*direct="):
        GdbConnector.open(script(kgdb).path, {}, parent=None, writable=False)


@pytest.mark.parametrize("options", [{"direct": "0x1000"}, {"direct": "0x1000", "size": "1M", "physical": "yes"}])
def test_where_a_kernel_maps_memory_wants_to_be_said_whole(options: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError, match="direct="):
        GdbConnector.open("1", options, parent=None, writable=False)


def gdbserver(command: str) -> bytes:
    """A stub of a process that reads files for its clients."""
    maps = b"1000-3000 r--p 0 00:00 0 /bin/x\n3000-4000 ---p 0 00:00 0\nffffffffff600000-ffffffffff601000 --xp 0 0 0"
    if command.startswith("qSupported"):
        return b"PacketSize=1000;qXfer:auxv:read+;qXfer:exec-file:read+"
    if command.startswith("vFile:pread"):
        start = int(command.rsplit(",", 1)[1], 16)
        return b"F%x;%b" % (len(maps[start:]), maps[start:]) if maps[start:] else b"F0;"
    known = {"qC": b"QC2a", "qXfer:exec-file:read::0,f00": b"l/bin/x", "vFile:close:5": b"F0"}
    return b"F5" if command.startswith("vFile:open") else known.get(command) or plain(command)


def test_a_process_behind_a_stub_is_said_to_be_one(script) -> None:
    with pytest.raises(UnusableTargetError, match=r"debugs a process \(PID 42, /bin/x\), not a machine"):
        GdbConnector.open(script(gdbserver).path, {}, parent=None, writable=False)


def test_of_a_process_is_read_what_it_has_mapped_and_may_read(script) -> None:
    with opened(script(gdbserver).path, physical="no") as connector:
        assert [(one.base, one.length) for one in connector.memory_map.ranges] == [(0x1000, 0x2000)]
        assert connector.memory.read(0x1000, 100) == MEMORY[0x1000:0x1064]


# -- killed --------------------------------------------------------------------------------------------------

CLIENT = f"""
import sys
from engine.connectors.gdb import GdbConnector, guardian
connector = GdbConnector.open(sys.argv[1], {{"stop": sys.argv[2]}}, parent=None, writable=False)
connector.memory.read({PLACE:#x}, 16)
print("read", flush=True)
while True:
    connector.memory.read({PLACE:#x}, 1 << 20)
"""


@pytest.fixture(scope="module")
def machine() -> Iterator[BareMachine]:
    with bare_machine() as found:
        yield found


@pytest.mark.parametrize("stop", ["hold", "brief"])
def test_a_machine_runs_on_when_its_reader_is_killed(machine: BareMachine, stop: str) -> None:
    client = subprocess.Popen([sys.executable, "-c", CLIENT, machine.stub, stop], stdout=subprocess.PIPE)
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == b"read\n"
        assert machine.status() == "paused"
    finally:
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=LIMIT)
    machine.wait_until("running")
    with opened(machine.stub, physical="no", size="1M") as connector:
        assert connector._session.use(lambda wire: wire.ask(b"qqemu.PhyMemMode")) == b"0"


def test_a_machine_that_stood_still_does_so_after_its_reader_was_killed() -> None:
    with bare_machine("-S") as machine:
        client = subprocess.Popen([sys.executable, "-c", CLIENT, machine.stub, "brief"], stdout=subprocess.PIPE)
        try:
            assert client.stdout is not None
            assert client.stdout.readline() == b"read\n"
        finally:
            client.send_signal(signal.SIGKILL)
            client.communicate(timeout=LIMIT)
        time.sleep(0.2)
        assert machine.status() == "paused (prelaunch)"


def test_an_error_while_it_opens_leaves_the_machine_running(machine: BareMachine) -> None:
    with pytest.raises(EngineError):
        GdbConnector.open(machine.stub, {"physical": "no"}, parent=None, writable=False)
    machine.wait_until("running")


def test_no_guardian_is_left_behind(script, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*words: object, **options: object) -> subprocess.Popen[bytes]:
        made.append(real(*words, **options))
        return made[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    for limit in (1.0, 0.0):
        monkeypatch.setattr(guardian, "EXIT_LIMIT", limit)
        with opened(script(plain).path, size=SIZE) as connector:
            connector.memory.read(0, 100)
    assert len(made) == 2
    assert all(process.returncode is not None for process in made)
