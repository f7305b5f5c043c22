"""native → qemu → linux → qemu → linux: a process in a guest in a guest of this host."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from guests.kernels import MissingError
from guests.living import Living, wait_until
from guests.monitor import Serial
from guests.nested import INNER_SIZE, OUTER_SIZE, SECRET, nested
from support import require

from engine.errors import TargetGoneError
from engine.file_memory import FileMemory
from engine.machine import Machine
from engine.memory import Addresses, Data, Faults, Memory, Rows
from engine.middleware import MeteredMemory
from engine.oslayers.native.memory import NativeMemory
from engine.targets import chain_of, open_chain

COUNT = 64
"""Where the counter stands in the secret: see the program in nested.py."""


@dataclass
class Chain:
    """An open chain into the inner guest."""

    living: Living
    machine: Machine
    pid: int
    address: int

    def memory(self) -> Memory:
        """The memory of the inner program."""
        return self.machine.instances("oslayer")[-1].layer.process(self.pid).memory


def opened(links: list[tuple[str, str]], *, writable: bool = False) -> Machine:
    machine = Machine(writable=writable)
    try:
        open_chain(machine, chain_of(None, links))
    except BaseException:
        machine.close()
        raise
    return machine


def links(living: Living) -> list[tuple[str, str]]:
    return [("connector", f"qemu:{living.name}"), ("oslayer", "linux"), ("connector", "qemu"), ("oslayer", "linux")]


@pytest.fixture(scope="module", params=["memfd", "private"])
def chain(request: pytest.FixtureRequest) -> Iterator[Chain]:
    try:
        with nested(request.param) as (living, pid, address), opened(links(living), writable=True) as machine:
            yield Chain(living, machine, pid, address)
    except MissingError as error:
        require(False, str(error))


def test_the_inner_guest_is_found_and_laid_out(chain):
    inner = chain.machine.instances("connector")[1].connector
    assert inner.info.target.startswith("inner (pid ")
    assert inner.info.size == INNER_SIZE << 20
    assert chain.machine.instances("connector")[0].connector.info.size == OUTER_SIZE << 20


def test_the_secret_of_the_inner_program_is_read_at_its_address(chain):
    assert chain.memory().read(chain.address, len(SECRET)) == SECRET


def test_a_secret_that_changes_is_read_fresh_through_both_guests(chain):
    memory = chain.memory()
    before = memory.u64(chain.address + COUNT)
    wait_until(lambda: memory.u64(chain.address + COUNT) >= before + 5, 60, "the inner guest's count")
    one, two = np.frombuffer(memory.read(chain.address + COUNT, 16), "<u8").tolist()
    assert 0 <= one - two <= 1, "the second word follows the first"


def test_what_is_written_is_seen_by_the_inner_program(chain):
    memory = chain.memory()
    memory.write(chain.address + COUNT, (1 << 40).to_bytes(8, "little"))
    wait_until(lambda: (1 << 40) < memory.u64(chain.address + COUNT + 8) < (1 << 40) + 10000, 60, "the count")


def test_a_write_of_three_bytes_at_an_odd_place_reaches_the_outer_qemu_as_these_three(chain, monkeypatch):
    stored: list[bytes] = []
    for kind in (FileMemory, NativeMemory):
        write = kind.write

        def spied(self: Memory, address: int, data: Data, write: Callable[..., None] = write) -> None:
            stored.append(bytes(data))
            write(self, address, data)

        monkeypatch.setattr(kind, "write", spied)
    memory, place = chain.memory(), chain.address + COUNT - 3  # the count behind it changes all the time
    memory.write(place, b"abc")
    assert stored == [b"abc"]
    assert memory.read(place, 3) == b"abc"
    memory.write(place, bytes(3))


class Counted(MeteredMemory):
    """Counts calls, not rows."""

    calls = 0

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        Counted.calls += 1
        return super().gather(addresses, out)

    def readinto(self, address: int, buffer: memoryview) -> None:
        Counted.calls += 1
        super().readinto(address, buffer)


def test_a_column_goes_down_in_one_pass_for_each_level(chain, monkeypatch):
    inner = chain.machine.instances("connector")[1].memory
    addresses = np.concatenate([np.arange(part.start, part.stop, 4096, np.uint64) for part in inner.extents()])[:1024]
    process = chain.machine.get("oslayer", "linux").layer.process(
        int(chain.machine.instances("connector")[1].connector.info.target.rpartition(" ")[2].rstrip(")"))
    )
    space = process.memory
    counted = Counted(space.physical)
    monkeypatch.setattr(space, "physical", counted)
    Counted.calls = 0
    base = next(part.real_base for part in chain.machine.instances("connector")[1].connector.memory_map.ranges)
    out = np.empty((len(addresses), 8), np.uint8)
    space.gather(addresses + np.uint64(base), out)
    assert len(addresses) == 1024
    assert Counted.calls <= 4 + 1, "one for each level of page tables, one for the words"


def test_untouched_ram_of_the_inner_guest_is_zeros(chain):
    inner = chain.machine.instances("connector")[1].memory
    hole = next((one.stop for one, two in pairwise(inner.extents()) if two.start > one.stop), None)
    assert hole is not None, "some of its RAM was never touched"
    assert inner.read(hole, 4096) == bytes(4096)


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "cloudfs", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_line_goes_into_the_inner_guest(chain):
    outer = f"qemu:{chain.living.name}"
    assert "inner" in run("targets", "-c", outer, "-o", "linux", "qemu")
    listed = run("ps", "-c", outer, "-o", "linux", "-c", "qemu", "-o", "auto")
    assert any(line.split()[0] == "1" and "init" in line for line in listed.splitlines())


def test_two_lines_in_new_open_a_guest_in_a_guest(chain):
    with opened([("connector", f"qemu:{chain.living.name}"), ("oslayer", "linux")]) as machine:
        machine.run("connector", "deeper -c linux qemu:inner")
        layer = machine.run("oslayer", "within -c deeper linux").layer
        assert layer.process(chain.pid).memory.read(chain.address, len(SECRET)) == SECRET


def test_a_guest_in_a_dumped_host_is_opened(chain, tmp_path):
    dump = tmp_path / "dump"
    chain.living.monitor.ask("stop")
    try:
        dump.write_bytes(chain.living.saved(0, OUTER_SIZE << 20))
    finally:
        chain.living.monitor.ask("cont")
    words = [("connector", f"raw:{dump}:immutable=yes"), ("oslayer", "linux"), ("connector", "qemu")]
    with opened([*words, ("oslayer", "linux")]) as machine:
        assert machine.instances("connector")[1].connector.info.live is False
        memory = machine.instances("oslayer")[1].layer.process(chain.pid).memory
        assert memory.read(chain.address, len(SECRET)) == SECRET
    os.unlink(dump)


def read_on(memory: Memory, address: int) -> None:
    """Read the secret until that fails."""
    while True:
        assert memory.read(address, len(SECRET)) == SECRET


@pytest.mark.parametrize("writable", [False, True])
def test_an_inner_qemu_that_ends_is_gone_and_nothing_else_is_read(writable):
    try:
        with nested("memfd") as (living, pid, address), opened(links(living), writable=writable) as machine:
            memory = machine.instances("connector")[1].memory
            view, program = memory.cached(), machine.instances("oslayer")[-1].layer.process(pid).memory
            assert program.read(address, len(SECRET)) == SECRET
            with contextlib.closing(Serial(living.folder / "serial")) as serial:
                serial.tell("end")
                with pytest.raises(TargetGoneError, match="inner"):
                    read_on(program, address)
                serial.said("ended", 120)
            for door in (lambda: memory.read(address, 64), lambda: memory.u64(0x1000), lambda: view.u64(0x1000),
                         lambda: program.read(address, 64), lambda: list(memory.extents())):  # fmt: skip
                with pytest.raises(TargetGoneError):
                    door()
            with pytest.raises(TargetGoneError):
                memory.write(0x1000, b"into another's page")
    except MissingError as error:
        require(False, str(error))
