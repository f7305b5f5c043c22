"""A guest that is paused, or killed, while many read it through the mount: what they get, and that nobody waits."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from guests.churn_readers import SIZE, STAMP, stamped
from guests.churning import LASTING, churning
from guests.kernels import MissingError
from guests.living import Living, wait_until
from mounting import Mount, mounted
from support import require

from engine.connectors.qemu import QemuConnector
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer

READERS = 16
GONE = (errno.ENODEV, errno.ESRCH, errno.ENOENT, errno.EIO, errno.ENXIO)
LIMIT = 30.0
"""Seconds within which each call must have returned."""


@pytest.fixture
def guest() -> Iterator[Living]:
    try:
        with churning(rate=20, pids=32768) as (living, _):
            yield living
    except MissingError as error:
        require(False, str(error))


def lasting(processes: Path) -> list[str]:
    """The PIDs of processes that do not end by themselves."""
    found = []
    for name in os.listdir(processes):
        try:
            if name.isdecimal() and (processes / name / "cmdline").read_bytes().startswith(b"lasting\x000\0"):
                found.append(name)
        except OSError:
            continue
    return found


class Reader:
    """Reads stamps, lists and facts of a mount until it is told to end; keeps the longest call and the errors."""

    def __init__(self, mount: Mount, pids: list[str], stop: threading.Event) -> None:
        self.system, self.pids, self.stop = mount.folder / "os/linux", pids, stop
        self.longest, self.reads = 0.0, 0
        self.errors: Counter[int] = Counter()

    def run(self) -> None:
        held = os.open(self.system / "processes" / self.pids[0] / "mem", os.O_RDONLY)
        try:
            while not self.stop.is_set():
                for step in (lambda: os.pread(held, SIZE, STAMP), self._walk):
                    began = time.monotonic()
                    try:
                        step()
                        self.reads += 1
                    except OSError as error:
                        self.errors[error.errno or 0] += 1
                        time.sleep(0.01)
                    self.longest = max(self.longest, time.monotonic() - began)
        finally:
            os.close(held)

    def _walk(self) -> None:
        for pid in self.pids[:4]:
            (self.system / "processes" / pid / "stat").read_bytes()
        os.listdir(self.system / "processes")


def listing_of(folder: Path) -> int:
    """The errno that listing a directory gives; 0 where it can be listed."""
    try:
        os.listdir(folder)
    except OSError as error:
        return error.errno or 0
    return 0


@pytest.mark.slow
def test_a_guest_that_is_killed_under_readers_gives_errors_at_once_and_can_be_removed(guest):
    with mounted("-c", f"qemu:{guest.name}", "-o", "linux", limit=150) as mount:
        pids = lasting(mount.folder / "os/linux/processes")
        assert len(pids) == LASTING
        stop = threading.Event()
        readers = [Reader(mount, pids, stop) for _ in range(READERS)]
        with ThreadPoolExecutor(READERS) as pool:
            running: list[Future[None]] = [pool.submit(reader.run) for reader in readers]
            try:
                wait_until(lambda: all(reader.reads > 4 for reader in readers), 60, "16 readers")
                assert not any(reader.errors for reader in readers)
                guest.kill()
                wait_until(lambda: all(sum(reader.errors.values()) > 4 for reader in readers), LIMIT, "errors")
            finally:
                stop.set()
            for future in running:
                future.result(LIMIT)
        assert {number for reader in readers for number in reader.errors} <= set(GONE)
        longest = max(reader.longest for reader in readers)
        print(f"\nlongest call {longest:.2f} s, {sum(reader.reads for reader in readers)} reads")
        assert longest < LIMIT
        # A list may be a second old.
        wait_until(lambda: listing_of(mount.folder / "os/linux/processes") == errno.ENODEV, LIMIT, "ENODEV")
        os.rmdir(mount.folder / "os/linux")
        os.rmdir(mount.folder / "connector/qemu")
        assert "linux" not in os.listdir(mount.folder / "os")
        assert "qemu" not in os.listdir(mount.folder / "connector")


@pytest.mark.slow
def test_a_guest_that_is_paused_is_read_on_and_goes_on_when_it_is_resumed(guest):
    connector = QemuConnector.open(guest.name, {}, parent=NativeLayer.open(Base(live=True), {}), writable=False)
    try:
        with mounted("-c", f"qemu:{guest.name}", "-o", "linux", limit=150) as mount:
            system = mount.folder / "os/linux"
            pids = lasting(system / "processes")
            stop = threading.Event()
            readers = [Reader(mount, pids, stop) for _ in range(4)]
            with ThreadPoolExecutor(len(readers)) as pool:
                running = [pool.submit(reader.run) for reader in readers]
                try:
                    connector.pause()
                    assert guest.monitor is not None
                    assert guest.monitor.ask("query-status")["running"] is False
                    before = [reader.reads for reader in readers]
                    shown = {name for name in os.listdir(system / "processes") if name.isdecimal()}
                    wait_until(lambda: all(r.reads > n + 3 for r, n in zip(readers, before, strict=True)), 60)
                    for pid in pids:
                        with open(system / "processes" / pid / "mem", "rb", buffering=0) as memory:
                            found = stamped(os.pread(memory.fileno(), SIZE, STAMP))
                            assert found is not None
                            assert found.pid == int(pid)
                    connector.resume()
                    assert guest.monitor.ask("query-status")["running"] is True
                    newest = max(map(int, shown))
                    wait_until(lambda: max(int(n) for n in os.listdir(system / "processes") if n.isdecimal()) > newest)
                finally:
                    stop.set()
                for future in running:
                    future.result(LIMIT)
            assert not any(reader.errors for reader in readers)
    finally:
        connector.close()
