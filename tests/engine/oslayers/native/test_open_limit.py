"""However many processes are looked at, the descriptors held for them are bounded."""

from __future__ import annotations

import os

import pytest
from support import require

from engine.oslayer import Base
from engine.oslayers.native import NativeLayer, memory


@pytest.fixture(autouse=True)
def none_opened(monkeypatch):
    monkeypatch.setattr(memory, "_opened", memory._Opened())
    require(os.access("/proc/self/mem", os.R_OK), "/proc/self/mem cannot be read")


def test_the_memories_opened_first_let_go_of_their_descriptors_and_open_them_again_on_use(monkeypatch):
    monkeypatch.setattr(memory, "OPEN_LIMIT", 4)
    layer = NativeLayer.open(Base(live=True), {})
    held = [layer.process(os.getpid()) for _ in range(20)]
    address = next(region.start for region in held[0].regions() if region.permissions.startswith("r"))
    before = len(os.listdir("/proc/self/fd"))
    expected = held[0].memory.read(address, 16)
    for process in held:
        assert process.memory.read(address, 16) == expected
    assert len(os.listdir("/proc/self/fd")) - before <= 4 * 4
    assert held[0].memory.read(address, 16) == expected


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dropped"])
def test_memories_that_hold_no_descriptors_push_none_out(monkeypatch, layer, closed):
    monkeypatch.setattr(memory, "OPEN_LIMIT", 4)
    first = layer.process(os.getpid())
    address = next(region.start for region in first.regions() if region.permissions.startswith("r"))
    first.memory.read(address, 1)
    number = first.memory._files.mem
    kept = []
    for _ in range(8):
        process = layer.process(os.getpid())
        process.memory.read(address, 1)
        if closed:
            process.close()
            kept.append(process)
        del process
    assert os.readlink(f"/proc/self/fd/{number}") == f"/proc/{os.getpid()}/mem"
    assert first.memory._files is not None


def test_a_memory_opened_anew_counts_once(monkeypatch, layer):
    monkeypatch.setattr(memory, "OPEN_LIMIT", 2)
    first, second = layer.process(os.getpid()), layer.process(os.getpid())
    address = next(region.start for region in first.regions() if region.permissions.startswith("r"))
    first.memory.read(address, 1)
    for _ in range(5):
        second.close()
        second.memory.read(address, 1)
    assert first.memory._files is not None
