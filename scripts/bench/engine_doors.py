"""The engine's doors against what Python, numpy and the kernel offer for the same bytes.

    .venv/bin/python scripts/bench/engine_doors.py [--quick] [--only SECTION] [--json FILE]

Every ratio is time of the engine by time of the baseline; both are measured in turn and give the same bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
from harness.daemons import Holder, holding
from harness.machine import CannotMeasureError, Tools, build, scratch_directory
from harness.program import Outcome, finish, in_sections, options, pinned, rounds_of
from harness.remote import Addresses, RemoteReader, Words
from harness.table import Goal, Table, at_most
from harness.timing import Action, Pair, each, tabled

import engine

KIB, MIB = 1 << 10, 1 << 20
SEED = 5
FEW, MANY = 4096, 262_144
SCALARS = 2000
ROW, ROWS = 4 * KIB, 256
BYSTANDERS = 200

_UNPACK = struct.Struct("<Q").unpack_from


@dataclass(frozen=True)
class Bench:
    """What all sections need."""

    tools: Tools
    directory: Path
    size: int
    rounds: int

    def table(self, title: str, pairs: Iterator[Pair]) -> Table:
        """The measured pairs."""
        return tabled(title, "baseline", pairs, self.rounds)


def _addresses(count: int, start: int, size: int, step: int = 8) -> Addresses:
    numbers = np.random.default_rng(SEED).integers(0, size // step - 1, count, np.uint64)
    return numbers * np.uint64(step) + np.uint64(start)


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise CannotMeasureError(f"{what} gives other bytes than the baseline: nothing was measured")


def _words_pair(
    title: str, memory: engine.Memory, baseline: Callable[[Addresses], Words], addresses: Addresses, goal: Goal
) -> Pair:
    values, faults = memory.words(addresses, "<u8")
    _same("words", (bool(faults), values.tolist()), (False, baseline(addresses).tolist()))
    return Pair(
        f"words of {len(addresses)} random addresses, {title}",
        "ns",
        lambda: baseline(addresses),
        lambda: memory.words(addresses, "<u8"),
        len(addresses),
        goal,
    )


# -- bytes and files -------------------------------------------------------------------------------


def bytes_pairs(memory: engine.Memory, view: memoryview) -> Iterator[Pair]:
    """Bytes of this program."""
    scalars = _addresses(SCALARS, 0, len(view)).tolist()
    _same("u64", [memory.u64(a) for a in scalars], [_UNPACK(view, a)[0] for a in scalars])
    baseline = each(lambda address: _UNPACK(view, address)[0], scalars)
    yield Pair("u64, struct.unpack_from", "ns", baseline, each(memory.u64, scalars), SCALARS, at_most(3.0))
    yield from _column_pairs(memory, view)
    buffer = memoryview(bytearray(MIB))
    places = _addresses(64, 0, len(view) - MIB, ROW).tolist()
    copy = each(lambda address: buffer.__setitem__(slice(None), view[address : address + MIB]), places)
    ours = each(lambda address: memory.readinto(address, buffer), places)
    yield Pair("readinto of 1 MiB, slice copy", "us", copy, ours, len(places), at_most(1.1))
    yield from _borrow_pair(memory, view, places)


def file_pairs(memory: engine.Memory, view: memoryview, descriptor: int) -> Iterator[Pair]:
    """A file; `view` is a mapping of it."""
    scalars = _addresses(SCALARS, 0, len(view)).tolist()
    _same("u64", [memory.u64(a) for a in scalars], [_UNPACK(view, a)[0] for a in scalars])
    ours = each(memory.u64, scalars)
    by_view = each(lambda address: _UNPACK(view, address)[0], scalars)
    by_pread = each(lambda address: _UNPACK(os.pread(descriptor, 8, address))[0], scalars)
    yield Pair("u64, struct.unpack_from of a mapping (SIGBUS if cut)", "ns", by_view, ours, SCALARS)
    yield Pair("u64, os.pread", "ns", by_pread, ours, SCALARS, at_most(2.0))
    yield from _column_pairs(memory, view)
    places = _addresses(64, 0, len(view) - MIB, ROW).tolist()
    for size, name, goal in ((ROW, "4 KiB", 1.5), (MIB, "1 MiB", 1.1)):
        yield _preadv_pair(memory, places, descriptor, memoryview(bytearray(size)), name, at_most(goal))
    yield from _borrow_pair(memory, view, places)


def _column_pairs(memory: engine.Memory, view: memoryview) -> Iterator[Pair]:
    words = np.frombuffer(view, "<u8")

    def index(addresses: Addresses) -> Words:
        found: Words = words[addresses >> np.uint64(3)]
        return found

    for count, goal in ((FEW, at_most(2.0)), (MANY, at_most(1.5))):
        yield _words_pair("numpy index", memory, index, _addresses(count, 0, len(view)), goal)
    rows = _addresses(ROWS, 0, len(view), ROW)
    listed: list[int] = rows.tolist()
    out: npt.NDArray[np.uint8] = np.empty((ROWS, ROW), np.uint8)
    faults = memory.gather(rows, out)
    _same("gather", (bool(faults), out.tobytes()), (False, b"".join([view[a : a + ROW] for a in listed])))

    def join() -> bytes:
        return b"".join([view[address : address + ROW] for address in listed])

    title = f"gather of {ROWS} rows of 4 KiB, join of slices"
    yield Pair(title, "ns", join, lambda: memory.gather(rows, out), ROWS, at_most(1.25))


def _preadv_pair(
    memory: engine.Memory, places: Sequence[int], descriptor: int, buffer: memoryview, name: str, goal: Goal
) -> Pair:
    memory.readinto(places[0], buffer)
    _same("readinto", bytes(buffer), os.pread(descriptor, len(buffer), places[0]))
    return Pair(
        f"readinto of {name}, os.preadv",
        "us",
        each(lambda address: os.preadv(descriptor, [buffer], address), places),
        each(lambda address: memory.readinto(address, buffer), places),
        len(places),
        goal,
    )


def _borrow_pair(memory: engine.Memory, view: memoryview, places: Sequence[int]) -> Iterator[Pair]:
    if memory.borrow(0, MIB) is None:
        return
    slices = each(lambda address: view[address : address + MIB], places)
    lent = each(lambda address: memory.borrow(address, MIB), places)
    yield Pair("borrow of 1 MiB, slice of a view", "ns", slices, lent, len(places), at_most(10.0))


def bytes_section(bench: Bench) -> list[Table]:
    """BytesMemory."""
    data = os.urandom(min(bench.size, 64 * MIB))
    pairs = bytes_pairs(engine.BytesMemory(data), memoryview(data))
    return [bench.table(f"BytesMemory, {len(data) >> 20} MiB", pairs)]


def file_section(bench: Bench) -> list[Table]:
    """FileMemory."""
    path = bench.directory / "file"
    words = [str(bench.tools.client), "fill", str(path), str(bench.size), str(SEED), "0"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=120)
    memory = engine.FileMemory(str(path))
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            pairs = file_pairs(memory, view, file.fileno())
            return [bench.table(f"FileMemory, a file of {bench.size >> 20} MiB on tmpfs", pairs)]
    finally:
        memory.close()


# -- processes -------------------------------------------------------------------------------------


def process_pairs(memory: engine.Memory, holder: Holder, descriptor: int) -> Iterator[Pair]:
    """The memory of another process."""
    scalars = _addresses(SCALARS, holder.address, holder.size).tolist()
    _same("u64", [memory.u64(a) for a in scalars], [_UNPACK(os.pread(descriptor, 8, a))[0] for a in scalars])
    by_pread = each(lambda address: _UNPACK(os.pread(descriptor, 8, address))[0], scalars)
    # Two system calls where the baseline has one: pagemap is asked first, so that no page is touched.
    yield Pair("u64, os.pread", "ns", by_pread, each(memory.u64, scalars), SCALARS, at_most(2.5))
    for size, name, goal in ((ROW, "4 KiB", 2.5), (128 * KIB, "128 KiB", 1.5), (MIB, "1 MiB", 1.15)):
        places = _addresses(64, holder.address, holder.size - size, ROW).tolist()
        buffer, remote = memoryview(bytearray(size)), RemoteReader(holder.pid, size)
        yield _preadv_pair(memory, places, descriptor, buffer, name, at_most(goal))
        remote.block(places[0])
        _same("process_vm_readv", bytes(remote.buffer), os.pread(descriptor, size, places[0]))
        by_remote, ours = each(remote.block, places), _reads(memory, places, buffer)
        title = f"readinto of {name}, process_vm_readv by ctypes"
        yield Pair(title, "us", by_remote, ours, len(places), at_most(goal))
    yield _copy_pair(memory, holder)
    remote = RemoteReader(holder.pid, 8)
    for count, bound in ((FEW, 2.5), (MANY, 1.5)):
        addresses = _addresses(count, holder.address, holder.size)
        yield _words_pair("process_vm_readv by ctypes", memory, remote.words, addresses, at_most(bound))

    def loop(addresses: Addresses) -> Words:
        return np.array([_UNPACK(os.pread(descriptor, 8, a))[0] for a in addresses.tolist()], np.uint64)

    addresses = _addresses(FEW, holder.address, holder.size)
    yield _words_pair("loop of os.pread", memory, loop, addresses, at_most(0.75))


def _copy_pair(memory: engine.Memory, holder: Holder) -> Pair:
    """The least that 1 MiB costs: a copy inside of this program, from as large a place."""
    places = _addresses(64, holder.address, holder.size - MIB, ROW).tolist()
    buffer, own = memoryview(bytearray(MIB)), memoryview(bytearray(os.urandom(MIB)) * (holder.size // MIB))
    copy = each(lambda at: buffer.__setitem__(slice(None), own[at : at + MIB]), [a - holder.address for a in places])
    return Pair("readinto of 1 MiB, copy", "us", copy, _reads(memory, places, buffer), len(places))


def _reads(memory: engine.Memory, places: Sequence[int], buffer: memoryview) -> Action:
    return each(lambda address: memory.readinto(address, buffer), places)


def process_section(bench: Bench) -> list[Table]:
    """The memory of a native process."""
    with contextlib.ExitStack() as stack:
        holder = stack.enter_context(holding(bench.tools, bench.size, SEED))
        machine = stack.enter_context(engine.open_target("native"))
        assert machine.default_os is not None
        process = machine.default_os.layer.process(holder.pid)
        stack.callback(process.close)
        file = stack.enter_context(open(f"/proc/{holder.pid}/mem", "rb", buffering=0))
        pairs = process_pairs(process.memory, holder, file.fileno())
        return [bench.table(f"Memory of a native process, {holder.size >> 20} MiB", pairs)]


ATTRIBUTES = ("pid", "ppid", "name", "status", "uids", "gids", "num_threads", "create_time", "cmdline")


def listing_pairs(layer: engine.OsLayer) -> Iterator[Pair]:
    """PIDs alone, and whole records."""

    def records() -> int:
        count = 0
        for process in layer.processes():
            with contextlib.suppress(engine.ProcessExitedError):
                count += process.info.pid > 0
            process.close()
        return count

    def by_psutil() -> int:
        psutil.process_iter.cache_clear()  # a first listing has no processes kept from the last one
        return sum(1 for _ in psutil.process_iter(ATTRIBUTES))

    total = len(layer.pids())
    yield Pair("PIDs, psutil.pids", "us", psutil.pids, layer.pids, total, at_most(1.5))
    yield Pair("records, psutil.process_iter", "us", by_psutil, records, total, at_most(1.0))
    yield Pair("records, reading stat status cmdline", "us", _walk_proc, records, total)


def _walk_proc() -> int:
    """The least that a lister does: three files of every process, unread by anyone."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                for file in ("stat", "status", "cmdline"):
                    with open(f"/proc/{name}/{file}", "rb", buffering=0) as opened:
                        opened.read()
                count += 1
    return count


def list_section(bench: Bench) -> list[Table]:
    """Listing processes, of which there are some more than usual."""
    with contextlib.ExitStack() as stack:
        for _ in range(BYSTANDERS):
            stack.enter_context(holding(bench.tools, ROW, SEED))
        machine = stack.enter_context(engine.open_target("native"))
        assert machine.default_os is not None
        layer = machine.default_os.layer
        return [bench.table(f"Listing {len(layer.pids())} processes, per process", listing_pairs(layer))]


SECTIONS: dict[str, Callable[[Bench], list[Table]]] = {
    "bytes": bytes_section,
    "file": file_section,
    "process": process_section,
    "list": list_section,
}


def main() -> int:
    """The exit code."""
    arguments = options(__doc__, quick="64 MiB", rounds=(9, 3), sections=SECTIONS).parse_args()
    size = (64 if arguments.quick else 256) * MIB

    def work() -> Outcome:
        with scratch_directory(size) as directory:
            bench = Bench(build(directory, fuse=False), directory, size, rounds_of(arguments))
            with pinned(arguments):
                return Outcome(in_sections(arguments, SECTIONS, bench))

    return finish(arguments, work)


if __name__ == "__main__":
    sys.exit(main())
