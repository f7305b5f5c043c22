"""A Linux guest that lives: what is shown is what it is now, or an error; never what it was, or another's."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from guests.kernels import MissingError
from guests.living import wait_until
from guests.monitor import Monitor
from guests.obedient import COUNT, SECRET, WORD, Obedient, obedient
from mounting import mounted
from support import applies, require

from engine.errors import NotRecognisedError, TargetGoneError
from engine.machine import Machine
from engine.oslayers.linux import LinuxLayer
from engine.targets import chain_of, open_chain

ENDED = (errno.ENODEV, errno.ESRCH, errno.ENXIO, errno.ENOENT)
LIMIT = 90.0
ALWAYS = ("memfd", "system_reset", "no")
"""Parameters of tests that are run by every run of the tests."""


@pytest.fixture
def in_all(request: pytest.FixtureRequest) -> None:
    """Of tests that are run with --all-guests alone: each takes 5 to 15 s."""
    parameters = getattr(request.node, "callspec", None)
    always = parameters is not None and parameters.id in ALWAYS
    applies(always or request.config.getoption("--all-guests"), "it takes 5 to 15 s: run with --all-guests")


@contextlib.contextmanager
def guest_of(**more: Any) -> Iterator[Obedient]:
    try:
        with obedient(**more) as guest:
            yield guest
    except MissingError as error:
        require(False, str(error))


@contextlib.contextmanager
def shown(guest: Obedient, *options: str) -> Iterator[Path]:
    """The folder of the guest's OS in a mount."""
    with mounted(*options, "-c", f"qemu:{guest.name}", "-o", "linux", limit=240) as mount:
        yield mount.folder / "os/linux"


@contextlib.contextmanager
def layer_of(guest: Obedient, *words: str, writable: bool = False) -> Iterator[LinuxLayer]:
    """The guest's OS, without a mount."""
    with Machine(writable=writable) as machine:
        links = [("connector", ":".join(["qemu", guest.name, *words])), ("oslayer", "linux")]
        layer = open_chain(machine, chain_of(None, links)).layer
        assert isinstance(layer, LinuxLayer)
        yield layer


def told(system: Path) -> dict[str, object]:
    """What `info.json` says."""
    found = json.loads((system / "info.json").read_text())
    assert isinstance(found, dict)
    return found


def notes(record: dict[str, object]) -> str:
    return str(record["notes"])


def count(number: int, guest: Obedient) -> int:
    return int(struct.unpack("<Q", os.pread(number, 8, guest.address + COUNT))[0])


def physical(system: Path, pid: int, address: int) -> int:
    """Where a page of a process lies, as phys_maps tells."""
    for line in (system / "processes" / str(pid) / "phys_maps").read_text().splitlines():
        start, stop, place = (int(word, 16) for word in re.findall(r"[0-9a-f]{8,}", line)[:3])
        if start <= address < stop:
            return place + address - start
    raise AssertionError(f"{address:#x} is not mapped")


def count_as_qemu_has_it(guest: Obedient, place: int) -> int:
    return int.from_bytes(guest.living.saved(place, 8), "little")


def number_of(error: OSError) -> int:
    return error.errno or 0


@contextlib.contextmanager
def memory(system: Path, pid: int | str, flags: int = os.O_RDONLY) -> Iterator[int]:
    number = os.open(system / "processes" / str(pid) / "mem" if pid else system / "mem", flags)
    try:
        yield number
    finally:
        os.close(number)


# -- a guest that runs --------------------------------------------------------------------------------------


def test_a_secret_is_read_fresh_and_what_is_written_is_printed_by_the_guest():
    with guest_of() as guest, shown(guest, "--writable") as system, memory(system, guest.pid, os.O_RDWR) as held:
        assert os.pread(held, len(SECRET), guest.address) == SECRET
        place = physical(system, guest.pid, guest.address) + COUNT
        seen = [count_as_qemu_has_it(guest, place)]
        while len(set(seen)) < 10:
            seen += [count(held, guest), count_as_qemu_has_it(guest, place)]
        assert seen == sorted(seen), "no older than what QEMU read before, no younger than what it reads now"
        os.pwrite(held, struct.pack("<Q", 0xC10DF5), guest.address + WORD)
        assert guest.word() == 0xC10DF5
        assert told(system)["state"] == "running"


@pytest.mark.parametrize("ram", ["memfd", "private"])
def test_a_write_of_three_bytes_at_an_odd_place_never_touches_its_neighbours(in_all, ram):
    with guest_of(ram=ram) as guest, layer_of(guest, writable=True) as layer:
        pid, place = guest.spin()
        three = layer.process(pid).memory
        for number in range(2000):
            three.write(place, number.to_bytes(3, "little"))
        assert three.read(place, 3) == (1999).to_bytes(3, "little")
        wait_until(lambda: three.u64(place + 15) > 10000, what="the rounds of the process")  # `rounds` of obedient.c
        overwritten, rounds = guest.still()
        assert rounds > 10000
        assert overwritten == 0
        pid, place = guest.spin()  # and the guest does see writes that are too wide
        wide = layer.process(pid).memory

        def widened() -> bool:
            for _ in range(200):
                wide.write(place - 1, wide.read(place - 1, 5))
            return wide.u64(place + 7) > 0  # `overwritten`

        wait_until(widened, what="a write that was noticed")
        assert guest.still()[0] > 0


def test_two_guests_in_one_mount_are_each_themselves(in_all):
    with guest_of() as one, guest_of(ram="private") as two, mounted("-c", f"qemu:{one.name}", "-o", "linux") as mount:
        (mount.folder / "connector/new").write_text(f"second qemu:{two.name}\n")
        (mount.folder / "os/new").write_text("other -c second linux\n")
        systems = [mount.folder / "os/linux", mount.folder / "os/other"]
        with memory(systems[0], one.pid, os.O_RDONLY) as first, memory(systems[1], two.pid) as second:
            one.living.ask("stop")
            before = count(first, one), count(second, two)
            wait_until(lambda: count(second, two) > before[1] + 5, what="the second guest's count")
            assert count(first, one) == before[0]
            two.living.kill()
            with pytest.raises(OSError, match=r".") as ended:
                wait_until(lambda: os.pread(second, 8, two.address) == b"", 10)
            assert number_of(ended.value) in ENDED
            assert os.pread(first, len(SECRET), one.address) == SECRET


# -- a guest that does not run ------------------------------------------------------------------------------


def empty_disk() -> bytes:
    """A disk of 1 MiB in the format qcow2 (QEMU docs/interop/qcow2.txt), which can hold snapshots of a machine."""
    cluster = 1 << 16
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, 1 << 20, 0, 1, 3 * cluster, cluster, 1, 0, 0)
    table, counts = struct.pack(">Q", 2 * cluster), struct.pack(">4H", 1, 1, 1, 1)
    return b"".join(part.ljust(cluster, b"\0") for part in (header, table, counts, b""))


def test_a_guest_that_is_paused_saved_and_set_back_says_so_and_is_read_as_it_is(in_all, tmp_path):
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(empty_disk())
    more = ["-drive", f"if=none,id=disk,file={disk},format=qcow2"]
    with guest_of(more=more) as guest, shown(guest) as system, memory(system, guest.pid) as held:
        guest.living.ask("stop")
        assert guest.living.ask("savevm one") == ""
        saved = count(held, guest)
        wait_until(lambda: told(system)["state"] == "paused", what="the pause")
        assert "it is paused" in notes(told(system))
        guest.living.ask("cont")
        wait_until(lambda: count(held, guest) > saved + 10, what="the count")
        assert told(system)["state"] == "running"
        guest.living.ask("stop")
        guest.living.ask("loadvm one")
        assert count(held, guest) == saved, "the clock went back, and what is read with it"
        guest.living.ask("cont")
        wait_until(lambda: count(held, guest) > saved + 3, what="the count")
        wait_until(lambda: told(system)["state"] == "running", what="that it runs")
        assert "restarted" not in notes(told(system))


def test_a_guest_that_was_migrated_away_is_said_to_be_and_goes_on_elsewhere(in_all, tmp_path):
    socket = tmp_path / "stream"
    with guest_of() as here, guest_of(incoming=f"unix:{socket}") as there, shown(here) as system:
        with memory(system, here.pid) as held:
            here.living.migrate(f"unix:{socket}")
            left = count(held, here)
            wait_until(lambda: told(system)["state"] == "postmigrate", what="the migration")
            assert "migrated away" in notes(told(system))
            assert count(held, here) == left
        there.living.go_on()
        with layer_of(there) as layer:
            process = layer.process(there.pid)
            before = process.memory.u64(there.address + COUNT)
            assert before >= left
            wait_until(lambda: process.memory.u64(there.address + COUNT) > before, what="the count at its new place")


def test_a_guest_whose_qemu_was_stopped_by_a_signal_hangs_nobody(in_all):
    with guest_of() as guest, shown(guest) as system, memory(system, guest.pid) as held:
        os.kill(guest.living.pid, signal.SIGSTOP)
        try:
            longest = 0.0

            def stopped() -> bool:
                nonlocal longest
                began = time.monotonic()
                record = told(system)
                assert os.pread(held, len(SECRET), guest.address) == SECRET
                assert str(guest.pid) in os.listdir(system / "processes")
                longest = max(longest, time.monotonic() - began)
                return record["state"] == "stopped"

            wait_until(stopped, what="that it was stopped")
            assert longest < 15
        finally:
            os.kill(guest.living.pid, signal.SIGCONT)
        wait_until(lambda: told(system)["state"] == "running", what="that it runs")


def test_a_guest_that_stands_still_and_whose_monitors_are_busy_is_said_to_stand(in_all):
    with guest_of() as guest, contextlib.closing(Monitor(guest.living.folder / "qmp")), shown(guest) as system:
        guest.living.ask("stop")
        longest = 0.0

        def stands() -> bool:
            nonlocal longest
            began = time.monotonic()
            record = told(system)
            longest = max(longest, time.monotonic() - began)
            return record["state"] is None and "it is paused, or being restarted" in notes(record)

        wait_until(stands, 60, "that its clock stands")
        assert longest < 20
        guest.living.ask("cont")
        wait_until(lambda: told(system)["state"] == "running", what="that it runs")


@pytest.mark.parametrize("way", ["quit", "off", "ABRT"])
def test_a_guest_that_ends_is_gone_and_its_info_says_so(in_all, way):
    with guest_of() as guest, shown(guest) as system, memory(system, guest.pid) as held, memory(system, "") as kernel:
        if way == "quit":
            guest.living.process.poll()
            with contextlib.suppress(Exception):
                guest.living.ask("quit")
        elif way == "off":
            guest.tell("off")
        else:
            os.kill(guest.living.pid, signal.SIGABRT)
        guest.living.process.wait(60)
        for number in held, kernel:
            with pytest.raises(OSError, match=r".") as ended:
                os.pread(number, 8, guest.address)
            assert number_of(ended.value) in ENDED
        wait_until(lambda: told(system)["state"] == "ended", 10, "that it has ended")
        assert "has ended" in notes(told(system))


def test_a_kernel_that_panicked_is_shown_as_it_was(in_all):
    with guest_of() as guest, shown(guest) as system:
        guest.tell("pvpanic")
        wait_until(lambda: told(system)["state"] == "guest-panicked", what="the panic that QEMU is told of")
        assert "its kernel has panicked" in notes(told(system))
        guest.living.ask("cont")
        guest.tell("panic 0")
        wait_until(lambda: "Kernel panic" in (system / "log").read_text(), what="the panic in the log")
        time.sleep(2)  # longer than a clock may stand before it is a reason to doubt
        assert {str(guest.pid), "2"} <= set(os.listdir(system / "processes"))
        with memory(system, guest.pid) as held:
            assert os.pread(held, len(SECRET), guest.address) == SECRET


# -- another kernel -----------------------------------------------------------------------------------------


class Holder(threading.Thread):
    """Reads the same places again and again: whatever is given must be what was there first."""

    def __init__(self, reads: dict[str, Callable[[], bytes]]) -> None:
        super().__init__()
        self.first = {name: read() for name, read in reads.items()}
        self.reads = reads
        self.wrong: list[str] = []
        self.errors: dict[str, int] = {}
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            for name, read in self.reads.items():
                try:
                    found = read()
                except OSError as error:
                    self.errors[name] = number_of(error)
                    continue
                if found != self.first[name]:
                    self.wrong.append(name)
            time.sleep(0.005)


def symbol(system: Path, name: str) -> int:
    found = re.search(rf"(?m)^([0-9a-f]{{16}}) \w {name}$", (system / "symbols").read_text())
    assert found is not None
    return int(found[1], 16)


@pytest.mark.parametrize("way", ["system_reset", "reboot", "panic 1", "kexec"])
def test_what_was_opened_of_a_kernel_ends_with_it_and_the_next_one_is_shown(in_all, way):
    more = [] if way != "system_reset" else ["-boot", "menu=on,splash-time=2500"]
    with guest_of(more=more) as guest, shown(guest) as system:
        before = told(system)
        text = symbol(system, "_text") & ~(1 << 63)
        assert str(before["version"]).startswith("6.1.")
        with memory(system, "") as kernel, memory(system, guest.pid) as held, open(system / "log", "rb") as log:
            length = len(log.read())
            holder = Holder({
                "kernel": lambda: os.pread(kernel, 4096, text),
                "process": lambda: os.pread(held, len(SECRET), guest.address),
                "log": lambda: os.pread(log.fileno(), 1 << 16, length + (1 << 20)),
            })  # fmt: skip
            holder.start()
            try:
                if way == "system_reset":
                    guest.living.ask(way)
                else:
                    guest.tell(way)
                with ThreadPoolExecutor(1) as pool:
                    boot = pool.submit(guest.await_boot)  # it stands still where nobody reads what it prints
                    wait_until(lambda: _is_away(system), 60, "the restart")
                    boot.result()
                began = time.monotonic()
                wait_until(lambda: _is_back(system, guest), LIMIT, "the next kernel")
                print(f"\nafter {way} the next kernel is shown {time.monotonic() - began:.2f} s after its first word")
                wait_until(lambda: len(holder.errors) == 3, 10, "the end of what is held")
            finally:
                holder.stop.set()
                holder.join(30)
            assert holder.wrong == []
            assert set(holder.errors.values()) <= set(ENDED)
        after = told(system)
        assert (after["version"], after["boot_time"]) != (before["version"], before["boot_time"])
        assert str(after["version"]).startswith("6.12." if way == "kexec" else "6.1.")
        assert "restarted since it was opened, once" in notes(after)
        assert symbol(system, "_text") == int(str(after["kernel_base"]), 16)
        assert len((system / "log").read_bytes()) > 0


def _is_away(system: Path) -> bool:
    """Whether it is said that the old kernel runs no more."""
    record = told(system)
    return record["state"] == "restarting" or "restarted since" in notes(record)


def _is_back(system: Path, guest: Obedient) -> bool:
    try:
        with memory(system, guest.pid) as held:
            return os.pread(held, len(SECRET), guest.address) == SECRET
    except OSError as error:
        if number_of(error) not in (*ENDED, errno.EIO):
            raise
        return False


@pytest.mark.parametrize("qmp", ["no", "yes"])
def test_while_firmware_runs_no_old_process_is_shown(in_all, qmp):
    with guest_of(more=["-boot", "menu=on,splash-time=4000"]) as guest, layer_of(guest, f"qmp={qmp}") as layer:
        kernel = layer.kernel_memory
        base = layer.info.kernel_base
        assert kernel is not None
        assert base is not None
        assert guest.pid in layer.pids()
        wait_until(lambda: layer.info.state == "running", what="that it runs")
        guest.living.ask("system_reset")
        began = time.monotonic()
        with pytest.raises(NotRecognisedError, match="restarted"):
            wait_until(lambda: not layer.pids(), 3)
        took = time.monotonic() - began
        assert layer.info.state == "restarting"
        with pytest.raises(TargetGoneError, match="restarted"):
            kernel.read(base, 16)
        assert took < 3, "the firmware still waits for somebody to choose"


def test_a_guest_that_was_reset_while_it_is_paused_is_not_shown_as_if_it_were_paused(in_all):
    with guest_of() as guest, layer_of(guest) as layer:
        wait_until(lambda: layer.info.state == "running", what="that it runs")
        guest.living.ask("stop")
        guest.living.ask("system_reset")
        wait_until(lambda: layer.info.state == "restarting", what="the reset")


