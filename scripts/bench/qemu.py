"""Memory of guests that QEMU runs: each way to it against the least that the kernel offers for the same bytes.

    .venv/bin/python scripts/bench/qemu.py [--quick] [--only SECTION] [--json FILE]

The guests are made as for the tests: a QEMU that stands still, its RAM filled, and a guest in a guest (made once, in a
minute). Every ratio is time of the engine by time of the baseline, both measured in turn.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before tests/engine

from guests.kernels import GuestError
from guests.living import Living, qemu
from guests.nested import nested
from harness.daemons import mounted
from harness.machine import CannotMeasureError, cloudfs_program, require_fuse
from harness.program import Outcome, finish, in_sections, options, pinned, rounds_of
from harness.remote import Addresses, RemoteReader
from harness.table import Goal, Table, at_most
from harness.timing import Action, Pair, each, tabled

import engine
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer
from engine.registry import load_connector
from engine.targets import chain_of, open_chain

KIB, MIB = 1 << 10, 1 << 20
PAGE, PAGES = 4 * KIB, 1024
SCALARS = 1000
_UNPACK = struct.Struct("<Q").unpack_from


@dataclass(frozen=True)
class Bench:
    """What all sections need."""

    size: int
    rounds: int

    def table(self, title: str, baseline: str, pairs: Iterator[Pair]) -> Table:
        """The measured pairs."""
        return tabled(title, baseline, pairs, self.rounds)

    @contextlib.contextmanager
    def guest(self, ram: str) -> Iterator[Living]:
        """A QEMU that stands still, every page of its RAM written to."""
        with qemu(ram, size=self.size // MIB, more=["-S"]) as living:
            block = os.urandom(MIB)
            with open(f"/proc/{living.pid}/mem", "r+b", buffering=0) as file:
                for address in range(MIB, self.size, MIB):
                    file.seek(living.host_address(MIB) - MIB + address)
                    file.write(block)
            yield living


@contextlib.contextmanager
def opened(living: Living) -> Iterator[engine.Memory]:
    """The guest's physical memory by the connector."""
    host = NativeLayer.open(Base(live=True), {})
    connector = load_connector("qemu").open(living.name, {}, parent=host, writable=False)
    try:
        yield connector.memory
    finally:
        connector.close()


def _places(count: int, size: int, step: int) -> Addresses:
    numbers = np.random.default_rng(7).integers(MIB // step, (size - MIB) // step, count, np.uint64)
    return numbers * np.uint64(step)


def _reads(memory: engine.Memory, places: Sequence[int], size: int) -> Action:
    buffer = memoryview(bytearray(size))
    return each(lambda address: memory.readinto(address, buffer), places)


def _same(found: bytes, wanted: bytes) -> None:
    if found != wanted:
        raise CannotMeasureError("the engine gives other bytes than the baseline: nothing was measured")


def mapped_pairs(memory: engine.Memory, file: engine.FileMemory, view: memoryview) -> Iterator[Pair]:
    """Beside a plain file: the same file, opened as `raw` opens it; and copies out of a mapping."""
    size = len(view)
    scalars = _places(SCALARS, size, 8).tolist()
    yield Pair("u64, a raw file", "ns", each(file.u64, scalars), each(memory.u64, scalars), SCALARS, at_most(2.5))
    for width, name, bound in ((PAGE, "4 KiB", 1.8), (MIB, "1 MiB", 1.1)):
        places = _places(64, size, PAGE).tolist()
        _same(memory.read(places[0], width), bytes(view[places[0] : places[0] + width]))
        theirs, ours = _reads(file, places, width), _reads(memory, places, width)
        yield Pair(f"readinto of {name}, a raw file", "us", theirs, ours, 64, at_most(bound))
        buffer = memoryview(bytearray(width))
        copies = each(lambda at, b=buffer, n=width: b.__setitem__(slice(None), view[at : at + n]), places)
        yield Pair(f"readinto of {name}, memcpy of the mapping", "us", copies, ours, 64)
    yield _scatter(memory, size, lambda pages, out: file.gather(pages, out), "a raw file", at_most(1.2))
    rows = np.frombuffer(view, np.uint8).reshape(-1, PAGE)
    take = lambda pages, out: rows.take((pages // PAGE).astype(np.intp), axis=0, out=out, mode="clip")  # noqa: E731
    yield _scatter(memory, size, take, "numpy take of the mapping", None)


def _scatter(
    memory: engine.Memory, size: int, baseline: Callable[[Addresses, np.ndarray], object], name: str, goal: Goal | None
) -> Pair:
    pages = _places(PAGES, size, PAGE)
    one, two = (np.empty((PAGES, PAGE), np.uint8) for _ in range(2))
    baseline(pages, one)
    memory.gather(pages, two)
    _same(two.tobytes(), one.tobytes())
    title = f"scatter of {PAGES} pages, {name}"
    return Pair(title, "us", lambda: baseline(pages, one), lambda: memory.gather(pages, two), 1, goal)


def mapped_section(bench: Bench) -> list[Table]:
    """RAM in shared memory."""
    with bench.guest("memfd") as living, opened(living) as memory:
        folder = f"/proc/{living.pid}/fd"
        name = next(n for n in os.listdir(folder) if "memory-backend" in os.readlink(f"{folder}/{n}"))
        file = engine.FileMemory(f"{folder}/{name}", fills_holes=True)
        with open(f"{folder}/{name}", "rb") as opened_file:
            view = memoryview(mmap.mmap(opened_file.fileno(), 0, access=mmap.ACCESS_READ))
        title = f"RAM in shared memory (memfd), {bench.size // MIB} MiB"
        return [bench.table(title, "baseline", mapped_pairs(memory, file, view))]


def private_pairs(memory: engine.Memory, living: Living, size: int) -> Iterator[Pair]:
    """Beside process_vm_readv by ctypes."""
    base = living.host_address(MIB) - MIB
    scalars = _places(SCALARS, size, 8).tolist()
    word = RemoteReader(living.pid, 8)
    by_remote = each(lambda at: word.block(base + at), scalars)
    yield Pair("u64, process_vm_readv", "ns", by_remote, each(memory.u64, scalars), SCALARS, at_most(1 / 0.6))
    for width, name in ((PAGE, "4 KiB"), (128 * KIB, "128 KiB"), (MIB, "1 MiB")):
        places = _places(64, size, PAGE).tolist()
        remote = RemoteReader(living.pid, width)
        remote.block(base + places[0])
        _same(memory.read(places[0], width), bytes(remote.buffer))
        theirs = each(lambda at, r=remote: r.block(base + at), places)
        goal = at_most(1 / 0.6)
        title = f"readinto of {name}, process_vm_readv"
        yield Pair(title, "us", theirs, _reads(memory, places, width), 64, goal)
    pages = _places(PAGES, size, PAGE)
    out = np.empty((PAGES, PAGE), np.uint8)
    page = RemoteReader(living.pid, PAGE)
    theirs = each(lambda at: page.block(base + at), pages.tolist())
    title = f"scatter of {PAGES} pages, as many process_vm_readv"
    yield Pair(title, "us", theirs, lambda: memory.gather(pages, out), 1, at_most(1.0))


def private_section(bench: Bench) -> list[Table]:
    """RAM that is QEMU's own."""
    with bench.guest("private") as living, opened(living) as memory:
        title = f"Private RAM, {bench.size // MIB} MiB"
        return [bench.table(title, "baseline", private_pairs(memory, living, bench.size))]


def level_pairs(below: engine.Memory, above: engine.Memory) -> Iterator[Pair]:
    """The same reads a level lower and a level higher, each at places of its own that hold data."""
    columns = []
    for memory in (below, above):
        pages = np.concatenate([np.arange(part.start, part.stop, PAGE, np.uint64) for part in memory.extents()])
        columns.append(np.random.default_rng(7).choice(pages, PAGES))
    outs = [np.empty((PAGES, PAGE), np.uint8) for _ in range(2)]
    words = [np.empty((PAGES, 8), np.uint8) for _ in range(2)]
    few = [column[:256].tolist() for column in columns]
    yield Pair("u64", "us", each(below.u64, few[0]), each(above.u64, few[1]), 256)
    yield Pair("readinto of 4 KiB", "us", _reads(below, few[0], PAGE), _reads(above, few[1], PAGE), 256)
    for name, out in (("words", words), ("pages", outs)):
        yield Pair(
            f"scatter of {PAGES} {name}", "us",
            lambda out=out: below.gather(columns[0], out[0]), lambda out=out: above.gather(columns[1], out[1]),
        )  # fmt: skip


def nested_section(bench: Bench) -> list[Table]:
    """What a level of nesting adds."""
    links = [("oslayer", "linux"), ("connector", "qemu"), ("oslayer", "linux")]
    tables = []
    for ram in ("memfd", "private"):
        with nested(ram) as (living, _, _), engine.Machine() as machine:
            open_chain(machine, chain_of(None, [("connector", f"qemu:{living.name}"), *links]))
            outer, inner = (instance.memory for instance in machine.instances("connector"))
            title = f"A guest in a guest ({ram}): its physical memory, and that of the guest around it"
            tables.append(bench.table(title, "outer guest", level_pairs(outer, inner)))
    return tables


def mount_pairs(bench: Bench, readers: Sequence[int], goal: Goal | None) -> Iterator[Pair]:
    """Reads of two files in mounts: of an image, of a guest."""
    for width, name in ((PAGE, "4 KiB"), (128 * KIB, "128 KiB"), (MIB, "1 MiB")):
        places = _places(64, bench.size, PAGE).tolist()
        buffer = memoryview(bytearray(width))
        _same(os.pread(readers[1], width, places[0]), os.pread(readers[0], width, places[0]))
        theirs, ours = (each(lambda at, n=number, b=buffer: os.preadv(n, [b], at), places) for number in readers)
        yield Pair(f"pread of {name} at random", "us", theirs, ours, 64, goal)


def mount_section(bench: Bench) -> list[Table]:
    """phys_mem through the mount: of a guest, and of a live file of its size."""
    require_fuse()
    tables = []
    for ram in ("memfd", "private"):
        with bench.guest(ram) as living, contextlib.ExitStack() as stack:
            copy = living.folder / "copy"
            with opened(living) as memory, open(copy, "wb") as file:
                file.writelines(memory.read(address, MIB) for address in range(0, bench.size, MIB))
            readers = []
            for name, word in (("raw", f"raw:{copy}:live=yes"), ("qemu", f"qemu:{living.name}")):
                point = living.folder / f"mount-{name}"
                command = [str(cloudfs_program()), "mount", "-c", word, str(point)]
                daemon = stack.enter_context(mounted(name, command, point, None))
                readers.append(os.open(daemon.path("connector", name, "phys_mem"), os.O_RDONLY))
                stack.callback(os.close, readers[-1])
            pairs = mount_pairs(bench, readers, at_most(1.25) if ram == "memfd" else None)
            tables.append(bench.table(f"phys_mem through the mount ({ram})", "raw file", pairs))
    return tables


SECTIONS: dict[str, Callable[[Bench], list[Table]]] = {
    "mapped": mapped_section,
    "private": private_section,
    "nested": nested_section,
    "mount": mount_section,
}


def main() -> int:
    """The exit code."""
    arguments = options(__doc__, quick="128 MiB", rounds=(9, 3), sections=SECTIONS).parse_args()
    bench = Bench((128 if arguments.quick else 512) * MIB, rounds_of(arguments))

    def work() -> Outcome:
        with pinned(arguments):
            return Outcome(in_sections(arguments, SECTIONS, bench))

    return finish(arguments, work, GuestError)


if __name__ == "__main__":
    sys.exit(main())
