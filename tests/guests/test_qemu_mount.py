"""Guests of QEMU through the mount, from their start to the end of QEMU."""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from guests.booted import booted
from guests.kernels import MissingError
from guests.living import wait_until
from guests.nested import SECRET, nested
from guests.truth import secret_text
from mounting import mounted
from support import require

COUNT = 64


@pytest.mark.parametrize("ram", ["private", "memfd"])
def test_a_running_guest_shows_its_processes_and_their_memory_until_it_is_killed(ram):
    with booted(ram) as guest, mounted("-c", f"qemu:{guest.living.name}", "-o", "auto") as mount:
        truth = guest.fetch_truth()
        processes = mount.folder / "os/linux/processes"
        shown = {int(name) for name in os.listdir(processes) if name.isdecimal()}
        # The collector of the truth has ended since; threads of the kernel come and go.
        ours = [pid for pid in truth.pids if truth.get(f"/proc/{pid}/cmdline")]
        told = {pid for pid in ours if b"init" not in truth[f"/proc/{pid}/comm"]}
        assert truth.keeper in told
        assert told <= shown
        keeper = processes / str(truth.keeper)
        assert (keeper / "comm").read_text() == truth.text(f"/proc/{truth.keeper}/comm")
        assert (keeper / "maps").read_text() == truth.text(f"/proc/{truth.keeper}/maps")
        with open(keeper / "mem", "rb", buffering=0) as memory:
            for name, address in truth.secrets.items():
                if name in ("data", "bss", "heap", "stack"):
                    assert os.pread(memory.fileno(), 48, address) == secret_text(name)
            physical = os.open(mount.folder / "connector/qemu/phys_mem", os.O_RDONLY)
            assert os.pread(physical, 4096, 0x100000)
            guest.living.kill()
            wait_until(lambda: _errno(lambda: os.pread(physical, 4096, 0x100000)) == errno.ENODEV, 10)
            os.close(physical)
            assert _errno(lambda: os.pread(memory.fileno(), 48, address)) in (errno.ENODEV, errno.ESRCH)
        # Lists of processes are kept for a second.
        wait_until(lambda: _errno(lambda: os.listdir(processes)) == errno.ENODEV, 10, "ENODEV")


def _errno(act: Callable[[], object]) -> int | None:
    try:
        act()
    except OSError as error:
        return error.errno
    return None


@pytest.mark.parametrize("ram", ["private", "memfd"])
def test_a_secret_in_a_guest_in_a_guest_is_fresh_through_a_held_descriptor(ram):
    try:
        with nested(ram) as (living, pid, address), mounted(
            "-c", f"qemu:{living.name}", "-o", "linux", "-c", "qemu", "-o", "auto"
        ) as mount:  # fmt: skip
            layers = [name for name in os.listdir(mount.folder / "os") if name.startswith("linux")]
            inner = max(layers)
            place = Path(mount.folder / "os" / inner / "processes" / str(pid) / "mem")
            number = os.open(place, os.O_RDONLY)
            try:
                assert os.pread(number, len(SECRET), address) == SECRET
                seen: set[int] = set()
                wait_until(lambda: len(seen.add(_count(number, address)) or seen) >= 5, 60, "five counts")
            finally:
                os.close(number)
    except MissingError as error:
        require(False, str(error))


def _count(number: int, address: int) -> int:
    one, two = struct.unpack("<2Q", os.pread(number, 16, address + COUNT))
    assert 0 <= one - two <= 1, "the second word follows the first"
    return int(one)


def _second(number: int, address: int) -> int:
    """What the program wrote after it had counted on from the first word."""
    return int.from_bytes(os.pread(number, 8, address + COUNT + 8), "little")


def test_a_write_through_the_mount_is_seen_by_a_program_in_the_guest():
    try:
        with nested("memfd") as (living, pid, address), mounted(
            "--writable", "-c", f"qemu:{living.name}", "-o", "linux", "-c", "qemu", "-o", "auto"
        ) as mount:  # fmt: skip
            inner = max(name for name in os.listdir(mount.folder / "os") if re.fullmatch(r"linux(-\d)?", name))
            number = os.open(mount.folder / "os" / inner / "processes" / str(pid) / "mem", os.O_RDWR)
            try:
                os.pwrite(number, struct.pack("<Q", 1 << 40), address + COUNT)
                wait_until(lambda: 1 << 40 < _second(number, address) < (1 << 40) + 10000, 60, "the program's count")
            finally:
                os.close(number)
    except MissingError as error:
        require(False, str(error))
