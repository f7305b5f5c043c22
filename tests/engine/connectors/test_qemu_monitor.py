"""Conversations with monitors of QEMU that are slow, silent, talk nonsense, or go away in between."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from engine.connectors.qemu import monitor as monitors
from engine.connectors.qemu.command_line import parse
from engine.connectors.qemu.monitor import Conversation, HumanMonitor, Monitor, MonitorError
from engine.errors import TargetBusyError, TargetTimeoutError
from engine.formats.qemu_monitor import status

GREETING = json.dumps({"QMP": {"version": {}, "capabilities": []}}).encode() + b"\r\n"
OK = b'{"return": {}}\r\n'
BANNER = b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "
Play = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitors, "GREETING", 0.3)


@contextlib.contextmanager
def played(play: Play) -> Iterator[socket.socket]:
    """Our end of a connection whose other end does that."""
    ours, theirs = socket.socketpair()

    def act() -> None:
        with contextlib.suppress(OSError), theirs:
            theirs.settimeout(10)
            play(theirs)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(20)


def opened(ours: socket.socket, kind: type[Monitor | HumanMonitor] = Monitor, limit: float = 1.0) -> Conversation:
    return kind(ours, "the monitor", time.monotonic() + limit)


def until_closed(theirs: socket.socket) -> None:
    while theirs.recv(4096):
        pass


def silent(theirs: socket.socket) -> None:
    until_closed(theirs)


@pytest.mark.parametrize("kind", [Monitor, HumanMonitor])
def test_who_says_nothing_is_busy_with_somebody_else(kind):
    with played(silent) as ours, pytest.raises(TargetBusyError, match="another one is there"):
        opened(ours, kind)


@pytest.mark.parametrize("kind", [Monitor, HumanMonitor])
@pytest.mark.parametrize("said", [b"220 mail.example\r\n(qemu) ", b"[]\n\n(qemu) ", b"\xff\x00" * 3000])
def test_who_talks_nonsense_is_no_monitor(kind, said):
    def play(theirs: socket.socket) -> None:
        theirs.sendall(said)
        until_closed(theirs)

    with played(play) as ours, pytest.raises((MonitorError, TargetBusyError)):
        opened(ours, kind)


def endless(theirs: socket.socket) -> None:
    while True:
        theirs.sendall(b"x" * 65536)


@pytest.mark.parametrize("kind", [Monitor, HumanMonitor])
def test_a_greeting_without_end_is_read_to_a_limit(kind, monkeypatch):
    monkeypatch.setattr(monitors, "ANSWER_LIMIT", 1 << 20)
    monkeypatch.setattr(monitors, "GREETING", 20.0)
    with played(endless) as ours, pytest.raises(MonitorError):
        opened(ours, kind, limit=30)


@pytest.mark.parametrize("kind", [Monitor, HumanMonitor])
def test_who_goes_away_in_between_is_told(kind):
    with played(lambda theirs: None) as ours, pytest.raises(MonitorError, match="closed"):
        opened(ours, kind)


def test_who_speaks_a_byte_at_a_time_is_waited_for_no_longer_than_the_whole_may_take():
    def drip(theirs: socket.socket) -> None:
        theirs.sendall(GREETING + OK)
        for _ in range(1000):
            time.sleep(0.02)
            theirs.sendall(b" ")

    began = time.monotonic()
    with played(drip) as ours:
        talk = opened(ours, limit=0.5)
        with pytest.raises(TargetTimeoutError):
            talk.ask("query-status")
    assert time.monotonic() - began < 8


def test_the_echo_and_the_sequences_for_terminals_are_left_out_of_what_people_are_told():
    def play(theirs: socket.socket) -> None:
        theirs.sendall(b"\xff\xfb\x01\xff\xfb\x03" + BANNER)
        typed = theirs.recv(4096).rstrip()
        theirs.sendall(b"\x1b[K".join(bytes([letter]) + b"\x1b[D" for letter in typed))
        theirs.sendall(b"\r\nVM status: paused\r\nmore\r\n(qemu) ")
        until_closed(theirs)

    with played(play) as ours:
        assert opened(ours, HumanMonitor).human("info status") == "VM status: paused\nmore\n"


def test_a_command_that_the_monitor_for_people_does_not_know_is_refused():
    def play(theirs: socket.socket) -> None:
        theirs.sendall(BANNER)
        theirs.recv(4096)
        theirs.sendall(b"frob\r\nunknown command: 'frob'\r\n(qemu) ")
        until_closed(theirs)

    with played(play) as ours, pytest.raises(MonitorError, match="refused frob: unknown command"):
        opened(ours, HumanMonitor).human("frob")


# -- what the command line says of them ---------------------------------------------------------------------


def addresses(*words: str) -> list[tuple[str, str, bool, bool]]:
    line = parse("/usr/bin/qemu-system-x86_64", ["qemu-system-x86_64", *words])
    assert line is not None
    return [(one.kind, str(one), one.human, one.waits) for one in line.monitors]


def test_monitors_for_people_stand_behind_qmp():
    words = ["-monitor", "unix:/run/human,server=on,wait=off", "-qmp", "unix:/run/qmp,server=on,wait=off"]
    assert addresses(*words) == [("unix", "/run/qmp", False, False), ("unix", "/run/human", True, False)]


def test_a_monitor_for_people_is_named_by_mon_too():
    words = ["-chardev", "socket,id=h,host=127.0.0.1,port=4444,server=on,wait=off", "-mon", "chardev=h,mode=readline"]
    assert addresses(*words) == [("tcp", "127.0.0.1:4444", True, False)]
    assert addresses(*words[:2], "-mon", "chardev=h") == [("tcp", "127.0.0.1:4444", True, False)]
    assert addresses("-monitor", "telnet:127.0.0.1:4445,server=on,wait=off")[0][:3] == ("tcp", "127.0.0.1:4445", True)


@pytest.mark.parametrize("place", ["stdio", "pty", "vc", "null", "none"])
def test_monitors_on_terminals_cannot_be_connected_to(place):
    assert addresses("-monitor", place) == []
    assert addresses("-qmp", place)[0][0] == "elsewhere"


def test_a_server_waits_where_it_is_not_told_otherwise():
    assert addresses("-qmp", "unix:/run/qmp,server=on")[0][3]
    assert addresses("-qmp", "unix:/run/qmp,server")[0][3]
    assert not addresses("-qmp", "unix:/run/qmp,server,nowait")[0][3]


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("VM status: running\n", "running"), ("VM status: paused\n", "paused"),
        ("VM status: paused (postmigrate)\n", "postmigrate"),
        ("VM status: paused (guest-panicked)\n", "guest-panicked"),
        ("VM status: running (single step mode)\n", "running"), ("nonsense", None),
    ],
)  # fmt: skip
def test_the_state_of_the_machine_is_read(text, state):
    assert status(text) == state
