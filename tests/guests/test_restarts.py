"""A guest that is restarted under an open chain: what is shown is the new kernel's, or an error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time

import pytest
from guests.booted import booted
from guests.living import wait_until
from guests.opened import Copy
from guests.truth import secret_text
from mounting import mounted
from support import applies

from engine.errors import FaultError, NotRecognisedError, ProcessExitedError, TargetGoneError
from engine.oslayer import KernelLog, Symbols
from engine.oslayers.linux import running
from engine.oslayers.linux.running import BIOS_TICKS
from engine.oslayers.linux.searching import are_off, is_inside
from engine.types import TargetHints

PAGE = 4096
WHILE_RESTARTING = (errno.ENXIO, errno.ENOENT, errno.ESRCH, errno.EIO, errno.ENODEV)


@pytest.mark.slow
@pytest.mark.parametrize("ram", ["private", "memfd"])
def test_after_a_restart_the_mount_shows_the_processes_of_the_new_kernel(ram, request):
    wanted = ram != "memfd" or request.config.getoption("--all-guests")
    applies(wanted, "test_truth.py restarts one that has its RAM there: --all-guests restarts it here too")
    with booted(ram, reboots=True) as guest:
        old = guest.fetch_truth()
        with mounted("-c", f"qemu:{guest.living.name}", "-o", "linux", limit=240) as mount:
            system = mount.folder / "os/linux"
            held = os.open(system / "processes" / str(old.keeper) / "mem", os.O_RDONLY)
            address = old.secrets["data"]
            assert os.pread(held, 48, address) == secret_text("data")
            guest.living.ask("system_reset")
            new = guest.fetch_truth()
            assert old.get("/proc/1/maps") != new.get("/proc/1/maps"), "addresses are drawn anew"

            def back() -> bool:
                try:
                    return (system / f"processes/{new.keeper}/maps").read_text() == new.text(f"/proc/{new.keeper}/maps")
                except OSError as error:
                    if error.errno not in WHILE_RESTARTING:
                        raise
                    return False

            wait_until(back, 90, "the new kernel's processes")
            with pytest.raises(ProcessLookupError):
                os.pread(held, 48, address)
            os.close(held)
            with open(system / f"processes/{new.keeper}/mem", "rb", buffering=0) as memory:
                for name in ("data", "bss", "heap", "stack"):
                    assert os.pread(memory.fileno(), 48, new.secrets[name]) == secret_text(name)
            notes = json.loads((system / "info.json").read_text())["notes"]
            assert any("restarted" in note for note in notes)


# -- without a guest that runs ----------------------------------------------------------------------------


@pytest.fixture
def copy(recording) -> Copy:
    made = Copy(recording)
    profile = made.original.kernel.profile
    known = profile.types is not None and profile.symbol("init_task") is not None
    applies(known, "what tells one boot from another is not known of this kernel: no types, or no init_task")
    return made


def first_process_start(copy: Copy) -> int:
    """Where the start time of the first process stands."""
    layer = copy.original
    return layer.process(1).info.object + layer.tasks.task.get("start_boottime", "real_start_time").offset


def test_a_kernel_of_another_boot_is_another_kernel(copy):
    applies(1 in copy.original.pids(), "this kernel came to no process of ours: it panicked at its start")
    layer = copy.layer(lambda _: None, live=True)
    process = layer.process(1)
    first = next(process.regions(), None)
    assert first is not None
    process.memory.read_padded(first.start, 16)
    copy.set_word(first_process_start(copy), 12345678)
    wait_until(lambda: any("restarted" in note for note in layer.info.notes), 30)
    assert layer.pids() == copy.original.pids()
    with pytest.raises(ProcessExitedError):
        process.check()
    with pytest.raises(ProcessExitedError):
        process.memory.read(first.start, 16)
    assert process.identity != layer.process(1).identity


def test_memory_without_a_kernel_any_more_shows_no_processes(copy):
    layer = copy.layer(lambda _: None, live=True)
    applies(layer.pids(), "this kernel has no processes: it panicked at its start")
    process = layer.process(layer.pids()[-1])
    found = copy.original.kernel.found
    for at in range(found.image.start, found.image.start + found.image.size, PAGE):
        with contextlib.suppress(ValueError, FaultError):
            copy.set_bytes(at, bytes(PAGE))
    with pytest.raises(NotRecognisedError, match="restarted"):
        _asked_for(layer.pids, 10)
    with pytest.raises(NotRecognisedError, match="restarted"):
        layer.pids()
    with pytest.raises(ProcessExitedError):
        process.check()
    assert any("restarted" in note for note in layer.info.notes), layer.info.notes


def _asked_for(ask, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ask()
        time.sleep(0.02)


# -- what the processors tell ------------------------------------------------------------------------------


def test_a_processor_is_known_to_be_in_its_kernel_by_its_registers(copy, recording):
    found = copy.original.kernel.found
    told = {name.lower() for name in recording.registers} & {"cr3", "satp", "ttbr1_el1"}
    assert is_inside(found, [recording.registers]) is (True if told else None)
    if found.machine == "x86_64":
        elsewhere = {**recording.registers, "CR3": 0x1000}
        assert is_inside(found, [elsewhere]) is False
        assert is_inside(found, [{"CR0": 0x10, "CR3": 0}, recording.registers]) is True, "one has not been started"
        assert are_off([{"CR0": 0x10, "CR3": 0}])
        assert not are_off([{"CR0": 0x10, "CR3": 0}, recording.registers])


def test_a_machine_that_stands_still_in_its_kernel_is_paused_and_not_searched(copy, recording, monkeypatch):
    tells = recording.guest.architecture == "amd64" and recording.guest.kernel != "amd64-5.10"
    applies(tells, "of this processor no registers were recorded that tell where it is")
    monkeypatch.setattr(running, "STILL", 0.2)
    layer = copy.layer(lambda _: None, live=True, ask=lambda: TargetHints(registers=(told,), state="paused"))
    told = recording.registers
    monkeypatch.setattr(layer, "_renew", None)  # a search would fail
    wait_until(lambda: layer.info.state == "paused", 10)
    assert any("it is paused" in note for note in layer.info.notes)
    assert layer.pids() == copy.original.pids()


def test_a_machine_with_no_processor_in_its_kernel_is_being_restarted_and_may_come_back(copy, recording, monkeypatch):
    tells = recording.guest.architecture == "amd64" and copy.original.kernel_memory is not None
    applies(tells, "of this processor no registers were recorded that tell where it is")
    monkeypatch.setattr(running, "STILL", 3600.0)
    told = {**recording.registers, "CR3": 0x1000}
    layer = copy.layer(lambda _: None, live=True, ask=lambda: TargetHints(registers=(told,), state="running"))
    memory, base = layer.kernel_memory, layer.info.kernel_base
    assert memory is not None
    assert base is not None
    process, first = layer.process(1), memory.read(base, 16)
    module, keeper = next(layer.modules()).memory, layer.process(copy.keeper)
    file = keeper.cached_file(next(one.name for one in keeper.cached_files() if "-" in one.name))
    assert module is not None
    assert module.read(0, 16)
    assert file.read(0, 4) == b"\x7fELF"
    monkeypatch.setattr(running, "STILL", 0.2)
    wait_until(lambda: layer.info.state == "restarting", 60)
    with pytest.raises(NotRecognisedError, match="no processor is in its old kernel"):
        layer.pids()
    with pytest.raises(ProcessExitedError):
        process.check()
    doors = [
        lambda: memory.read(base, 16), lambda: memory.u64(base), lambda: memory.cached().u64(base),
        lambda: memory.write(base, b"x"), lambda: module.read(0, 16), lambda: file.read(0, 4),
        lambda: list(layer.capability(Symbols).symbols()), lambda: list(layer.capability(KernelLog).records()),
    ]  # fmt: skip
    for door in doors:
        with pytest.raises(TargetGoneError, match="restarted"):
            door()
    told["CR0"] = 0x60000010
    with pytest.raises(NotRecognisedError, match="its firmware runs"):
        layer.pids()
    told.update(recording.registers)  # as where it was in its firmware for a moment alone
    wait_until(lambda: layer.info.state == "running", 60)
    assert memory.read(base, 16) == first
    process.check()


def test_a_pc_whose_bios_counts_again_was_reset(copy):
    applies(copy.original.kernel.found.machine == "x86_64", "only a PC has a BIOS that counts")
    layer = copy.layer(lambda _: None, live=True)
    assert layer.pids()
    place = next(start for start, _, _ in copy._extents) + BIOS_TICKS
    copy.memory.write(place, (copy.memory.u32(place) + 1).to_bytes(4, "little"))
    with pytest.raises(NotRecognisedError, match="its firmware runs"):
        _asked_for(layer.pids, 10)
    with pytest.raises(NotRecognisedError, match="no processor is in its old kernel"):  # it counts no more
        layer.pids()


def test_nobody_waits_while_another_looks_after_a_clock_that_stands(copy, monkeypatch):
    monkeypatch.setattr(running, "STILL", 0.1)
    layer = copy.layer(lambda _: None, live=True)
    applies(layer.system.clock() is not None, "no clock is known of this kernel")
    begun, go_on = threading.Event(), threading.Event()

    def search(gone: bool) -> None:
        begun.set()
        assert not gone
        assert go_on.wait(60)

    monkeypatch.setattr(layer._watch, "_renew", search)
    seeker = threading.Thread(target=lambda: _asked_for_until(layer, begun))
    seeker.start()
    try:
        assert begun.wait(30)
        began = time.monotonic()
        assert layer.pids() == copy.original.pids()
        assert seeker.is_alive(), "it still searches"
        assert time.monotonic() - began < 30
    finally:
        go_on.set()
        seeker.join(60)


def _asked_for_until(layer, event: threading.Event) -> None:
    while not event.is_set():
        layer._watch.look()
        time.sleep(0.02)
