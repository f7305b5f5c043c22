"""However many processes are looked at, the descriptors held for them are bounded."""

from __future__ import annotations

import os

from support import require

from engine.oslayer import Base
from engine.oslayers.native import NativeLayer, memory


def test_the_memories_opened_first_let_go_of_their_descriptors_and_open_them_again_on_use(monkeypatch):
    monkeypatch.setattr(memory, "OPEN_LIMIT", 4)
    layer = NativeLayer.open(Base(live=True), {})
    require(os.access("/proc/self/mem", os.R_OK), "/proc/self/mem cannot be read")
    held = [layer.process(os.getpid()) for _ in range(20)]
    address = next(region.start for region in held[0].regions() if region.permissions.startswith("r"))
    before = len(os.listdir("/proc/self/fd"))
    expected = held[0].memory.read(address, 16)
    for process in held:
        assert process.memory.read(address, 16) == expected
    assert len(os.listdir("/proc/self/fd")) - before <= 4 * 4
    assert held[0].memory.read(address, 16) == expected
