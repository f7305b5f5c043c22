"""Monitors of QEMU where they listen: for people, by a relative path, in another mount namespace, waited for."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guests.kernels import MissingError
from guests.living import Living, qemu, wait_until
from guests.monitor import Monitor
from support import require

from engine.connectors.qemu import QemuConnector
from engine.errors import UnusableTargetError
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer

Open = Callable[..., QemuConnector]
HUMAN = ["-S", "-monitor", "unix:{folder}/human,server=on,wait=off"]


@contextlib.contextmanager
def started(*words: str, **more: Any) -> Iterator[Living]:
    try:
        with qemu(*words, **more) as living:
            yield living
    except MissingError as error:
        require(False, str(error))


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens guests of this host: `opened(living, qmp="no")`."""
    with contextlib.ExitStack() as stack:

        def open_one(living: Living, **options: str) -> QemuConnector:
            host = NativeLayer.open(Base(live=True), {})
            found = QemuConnector.open(str(living.pid), options, parent=host, writable=False)
            stack.callback(found.close)
            return found

        yield open_one


def test_where_there_is_no_qmp_the_monitor_for_people_is_asked(opened):
    with started(more=HUMAN, monitor="none", own_monitor=False) as living:
        wait_until((living.folder / "human").exists)
        connector = opened(living)
        assert connector.info.notes[0] == f"the layout of its RAM is told by its monitor at {living.folder}/human"
        assert connector.memory_map.coalesced() == opened(living, qmp="no").memory_map.coalesced()
        hints = connector.hints()
        assert (hints.state, hints.registers[0]["CR0"]) == ("prelaunch", 0x60000010)
        connector.resume()
        assert connector.hints().state == "running"
        connector.pause()
        assert connector.hints().state == "paused"


def test_the_monitor_for_people_is_asked_where_qmp_has_a_client(opened):
    with (
        started(more=HUMAN, own_monitor=False) as living,
        contextlib.closing(Monitor(living.folder / "qmp")) as other,
    ):
        assert "/human" in opened(living).info.notes[0]
        assert other.ask("query-status")["status"] == "prelaunch"


@pytest.mark.parametrize("way", ["tcp", "telnet", "abstract"])
def test_monitors_on_ports_and_abstract_sockets_are_asked(opened, way):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    name = f"cloudfs-test-{os.getpid()}-{port}"
    words = ["-monitor", f"{way}:127.0.0.1:{port},server=on,wait=off"]
    if way == "abstract":
        words = ["-chardev", f"socket,id=q,path={name},abstract=on,server=on,wait=off", "-mon", "q,mode=control"]
    with started(more=["-S", *words], monitor="none") as living:
        place = f"@{name}" if way == "abstract" else f"127.0.0.1:{port}"
        connector = opened(living)
        assert connector.info.notes[0] == f"the layout of its RAM is told by its monitor at {place}"
        assert connector.memory_map.coalesced() == opened(living, qmp="no").memory_map.coalesced()


def test_a_monitor_with_a_relative_path_is_found_from_where_qemu_runs(opened):
    words = ["-S", "-qmp", "unix:here,server=on,wait=off"]
    with started(more=words, monitor="none", before=["env", "-C", "{folder}"]) as living:
        assert opened(living).info.notes[0] == "the layout of its RAM is told by its monitor at here"


def test_a_monitor_in_another_mount_namespace_is_asked(opened):
    before = ["unshare", "--mount", "--propagation", "private", "sh", "-c",
              'mount -t tmpfs private "$0" && exec "$@"', "{folder}"]  # fmt: skip
    with started(more=["-S"], before=before, own_monitor=False) as living:
        wait_until(lambda: Path(f"/proc/{living.pid}/root{living.folder}/qmp").exists())
        assert not (living.folder / "qmp").exists()
        assert opened(living).info.notes[0] == f"the layout of its RAM is told by its monitor at {living.folder}/qmp"


def test_a_qemu_that_waits_for_somebody_to_connect_is_not_started_by_us(opened):
    with started(more=["-S", "-qmp", "unix:{folder}/waits,server=on"], monitor="none", own_monitor=False) as living:
        wait_until((living.folder / "waits").exists)
        with pytest.raises(UnusableTargetError, match=r"waits with its start until somebody connects to .*/waits"):
            opened(living)
        assert len(os.listdir(f"/proc/{living.pid}/task")) == 2, "no processor was made"
        with contextlib.closing(Monitor(living.folder / "waits")) as manager:
            assert manager.ask("query-status")["status"] == "prelaunch"
        assert "told by its monitor" in opened(living).info.notes[0]


def test_a_qemu_that_was_stopped_by_a_signal_is_said_to_be(opened):
    with started(more=["-S"]) as living:
        connector = opened(living)
        os.kill(living.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: Path(f"/proc/{living.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            began = time.monotonic()
            told = connector.ask()
            assert told is not None
            assert told.state == connector.info.state == "stopped"
            assert any("stopped by a signal" in note for note in opened(living).info.notes)
            assert time.monotonic() - began < 20
        finally:
            os.kill(living.pid, signal.SIGCONT)


def test_without_leave_no_monitor_is_asked_for_hints_either(opened):
    with started(more=["-S"]) as living, contextlib.closing(socket.socket(socket.AF_UNIX)) as other:
        other.connect(str(living.folder / "qmp"))  # whoever connects now would have to wait
        began = time.monotonic()
        assert opened(living, qmp="no").hints().registers == ()
        assert time.monotonic() - began < 0.9


def test_what_is_opened_says_that_its_qemu_has_ended():
    with started(more=["-S"]) as living:
        host = NativeLayer.open(Base(live=True), {})
        connector = QemuConnector.open(str(living.pid), {}, parent=host, writable=False)
        living.kill()
        assert connector.info.state == "ended"
        connector.close()
