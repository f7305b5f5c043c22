"""The connector `qemu` on QEMUs with every kind of RAM and monitor: QEMU's own monitor is the oracle."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from guests.kernels import MissingError
from guests.living import RAM, Living, qemu
from support import require

from engine.connectors.qemu import QemuConnector
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer

MIB = 1 << 20
Open = Callable[..., QemuConnector]


@pytest.fixture
def start() -> Iterator[Callable[..., Living]]:
    """Starts QEMUs as `qemu` does; they end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(*words: str, **more: object) -> Living:
            try:
                return stack.enter_context(qemu(*words, **more))  # type: ignore[arg-type]
            except MissingError as error:
                require(False, str(error))
                raise

        yield begin


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens guests of this host: `opened(living, qmp="no", writable=True)`."""
    with contextlib.ExitStack() as stack:

        def open_one(target: Living | str, *, writable: bool = False, **options: str) -> QemuConnector:
            host = NativeLayer.open(Base(live=True, writable=writable), {})
            name = target.name if isinstance(target, Living) else target
            found = QemuConnector.open(name, options, parent=host, writable=writable)
            stack.callback(found.close)
            return found

        yield open_one


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
