"""A running guest through QEMU's debug stub, with no knowledge of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guests.catalogue import GUESTS
from guests.kernels import MissingError
from guests.machine import started
from guests.truth import Truth
from support import require

from engine.connectors.gdb import GdbConnector
from engine.oslayer import Base
from engine.oslayers.linux import LinuxLayer

Live = tuple[str, Truth]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """The stub of a guest that runs, and its truth."""
    try:
        with started(GUESTS["amd64-6.1-4level"]) as guest:
            guest.start()
            truth = guest.fetch_truth()
            guest.finish()
            yield str(guest.folder / "gdb"), truth
    except MissingError as error:
        require(False, str(error))


def test_the_processes_of_a_running_guest_are_its_own(live: Live) -> None:
    stub, truth = live
    connector = GdbConnector.open(stub, {}, parent=None, writable=False)
    try:
        layer = LinuxLayer.open(Base(connector.memory, connector.hints(), live=True, ask_hints=connector.hints), {})
        found = {process.info.pid: process.info.name for process in layer.processes()}
    finally:
        connector.close()
    assert set(truth.pids) <= found.keys()
    told = {pid: truth.text(f"/proc/{pid}/comm").strip() for pid in truth.pids}
    users = {pid: name[:15] for pid, name in told.items() if not name.startswith("kworker")}  # those change names
    assert {pid: found[pid][:15] for pid in users} == users


def test_the_registers_name_a_table_that_translates_the_kernel(live: Live) -> None:
    stub, _ = live
    connector = GdbConnector.open(stub, {"stop": "hold"}, parent=None, writable=False)
    try:
        hints = connector.hints()
        assert hints.dtb is not None
        layer = LinuxLayer.open(Base(connector.memory, hints, live=True), {})
        assert layer.info.kernel_base is not None
    finally:
        connector.close()
