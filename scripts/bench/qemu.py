"""Memory of guests that QEMU runs: each way to it against the least that the kernel offers for the same bytes.

    .venv/bin/python scripts/bench/qemu.py [--quick] [--only SECTION] [--peers PYTHON] [--json FILE]

The guests are made as for the tests: a QEMU that stands still, its RAM filled, and a guest in a guest (made once, in a
minute). Every ratio is CPU time of the engine by CPU time of the baseline, both measured in turn: the guests run beside
them. Through the mount it is speed by speed, as in mount.py. PYTHON is one that has leechcorepyc (pip install it into a
venv of its own).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before tests/engine

from guests.kernels import GuestError
from guests.living import Living, qemu
from guests.nested import nested
from harness import figures
from harness.daemons import mounted
from harness.figures import KIB, MIB, Amounts
from harness.machine import HERE, CannotMeasureError, build, cloudfs_program, quietest_cpu, require_fuse
from harness.program import Outcome, finish, in_sections, options, pinned, rounds_of
from harness.remote import Addresses, RemoteReader
from harness.runs import Runner, Side
from harness.table import Goal, Row, Table, at_least, at_most
from harness.timing import Action, Pair, each, measure, tabled

import engine
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer
from engine.registry import load_connector
from engine.targets import chain_of, open_chain
from engine.translate.virtual import VirtualMemory

PAGE, PAGES = 4 * KIB, 1024
SCALARS = 1000
SEED = 3
PEER_TIME = 120
C, CLOUDFS = "C libfuse", "cloudfs"


@dataclass(frozen=True)
class Bench:
    """What all sections need."""

    size: int
    rounds: int
    amounts: Amounts
    cpu: int | None
    peers: str | None

    def table(self, title: str, baseline: str, pairs: Iterator[Pair]) -> Table:
        """The measured pairs."""
        return tabled(title, baseline, pairs, self.rounds, clock=time.thread_time_ns)

    @contextlib.contextmanager
    def guest(self, ram: str) -> Iterator[Living]:
        """A QEMU that stands still, its RAM written to but for the first MiB, which its firmware left full of holes."""
        with qemu(ram, size=self.size // MIB, more=["-S"]) as living:
            block = os.urandom(MIB)
            base = living.host_address(MIB) - MIB
            with open(f"/proc/{living.pid}/mem", "r+b", buffering=0) as file:
                for address in range(MIB, self.size, MIB):
                    file.seek(base + address)
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


# -- guest-physical memory --------------------------------------------------------------------------------


def by_mem_pairs(memory: engine.Memory, living: Living, size: int) -> Iterator[Pair]:
    """Beside /proc/PID/mem of its QEMU, by preadv(2)."""
    base = living.host_address(MIB) - MIB
    with open(f"/proc/{living.pid}/mem", "rb", buffering=0) as file:
        number = file.fileno()
        for width, name in ((PAGE, "4 KiB"), (MIB, "1 MiB")):
            places, buffer = _places(64, size, PAGE).tolist(), memoryview(bytearray(width))
            _same(memory.read(places[0], width), os.pread(number, width, base + places[0]))
            theirs = each(lambda at, b=buffer: os.preadv(number, [b], base + at), places)
            title = f"readinto of {name}, /proc/PID/mem"
            yield Pair(title, "us", theirs, _reads(memory, places, width), 64)
        pages, out = _places(PAGES, size, PAGE), np.empty((PAGES, PAGE), np.uint8)
        rows = list(zip(pages.tolist(), (row.data for row in out), strict=True))

        def loop() -> None:
            for at, row in rows:
                os.preadv(number, [row], base + at)

        title = f"scatter of {PAGES} pages, a loop over /proc/PID/mem"
        yield Pair(title, "us", loop, lambda: memory.gather(pages, out), 1, at_most(1.0))


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
    yield _scatter(memory, size, file.gather, "a raw file", at_most(1.2))
    rows = np.frombuffer(view, np.uint8).reshape(-1, PAGE)

    def take(pages: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> object:
        return rows.take((pages // PAGE).astype(np.intp), axis=0, out=out, mode="clip")

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


def _ram_file(living: Living) -> str:
    """The file that is a guest's RAM, as its QEMU has it open."""
    folder = f"/proc/{living.pid}/fd"
    paths = (f"{folder}/{name}" for name in os.listdir(folder))
    return next(path for path in paths if "memory-backend" in os.readlink(path))


def mapped_section(bench: Bench) -> list[Table]:
    """RAM in shared memory."""
    with bench.guest("memfd") as living, opened(living) as memory:
        path = _ram_file(living)
        file = engine.FileMemory(path, fills_holes=True)
        with open(path, "rb") as opened_file:
            view = memoryview(mmap.mmap(opened_file.fileno(), 0, access=mmap.ACCESS_READ))
        title = f"RAM in shared memory (memfd), {bench.size // MIB} MiB"
        pairs = [mapped_pairs(memory, file, view), by_mem_pairs(memory, living, bench.size)]
        return [bench.table(title, "baseline", (pair for each_of in pairs for pair in each_of))]


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
    page = RemoteReader(living.pid, PAGE)

    def one_by_one(pages: Addresses, out: np.ndarray) -> None:
        flat = out.reshape(-1).data
        for row, at in enumerate(pages.tolist()):
            page.block(base + at)
            flat[row * PAGE : (row + 1) * PAGE] = page.buffer

    # It does not ask whether the pages are there: what was never touched would get a page.
    at_once = lambda pages, out: page.rows(pages + np.uint64(base), out)  # noqa: E731
    yield _scatter(memory, size, at_once, "one process_vm_readv", at_most(1 / 0.6))
    yield _scatter(memory, size, one_by_one, "as many process_vm_readv", at_most(1.0))


def private_section(bench: Bench) -> list[Table]:
    """RAM that is QEMU's own."""
    with bench.guest("private") as living, opened(living) as memory:
        title = f"Private RAM, {bench.size // MIB} MiB"
        pairs = [private_pairs(memory, living, bench.size), by_mem_pairs(memory, living, bench.size)]
        return [bench.table(title, "baseline", (pair for each_of in pairs for pair in each_of))]


def peers_section(bench: Bench) -> list[Table]:
    """LeechCore's device for QEMU, which needs RAM in a file of /dev/shm."""
    if bench.peers is None:
        return []
    with bench.guest("file") as living, opened(living) as memory, contextlib.ExitStack() as stack:
        link = Path(f"/dev/shm/{living.name}-ram")  # it looks in that folder alone, and follows no symbolic link
        link.hardlink_to(living.folder / "ram")
        stack.callback(link.unlink)
        rounds = ["--rounds", str(bench.rounds)]
        words = [bench.peers, str(HERE / "leechcore_peer.py"), link.name, str(bench.size), *rounds]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=PEER_TIME, check=True)
            theirs = json.loads(done.stdout.strip().splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            theirs = {"missing": str(error)}
        if "missing" in theirs:
            why = theirs["missing"]
            print(f"LeechCore is not there ({why}): pip install leechcorepyc for --peers", file=sys.stderr)
            return []
        at, found = theirs["first"]
        _same(memory.read(at, PAGE), bytes.fromhex(found))
        places, pages = _places(64, bench.size, PAGE).tolist(), _places(PAGES, bench.size, PAGE)
        out = np.empty((PAGES, PAGE), np.uint8)
        works: dict[str, tuple[str, Action, int]] = {
            "4 KiB": ("readinto of 4 KiB", _reads(memory, places, PAGE), 64),
            "1 MiB": ("readinto of 1 MiB", _reads(memory, places, MIB), 64),
            "pages": (f"scatter of {PAGES} pages", lambda: memory.gather(pages, out), 1),
        }
        rows = []
        for key, (title, action, count) in works.items():
            ours = measure(Pair(title, "us", action, action, count), bench.rounds, time.thread_time_ns).subject
            # A file that is cut while LeechCore copies out of its mapping ends the program: we ask the kernel to copy.
            goal = at_most(1.0) if key != "4 KiB" else None
            rows.append(Row(title, "us", theirs[key], ours, goal))
        return [Table(f"RAM in a file of /dev/shm, {bench.size // MIB} MiB", "LeechCore", "engine", rows)]


# -- guests in guests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """Memory, and the part of it that stays as it is: of a QEMU its guest's RAM."""

    title: str
    memory: engine.Memory
    start: int = 0
    stop: int | None = None


def _of_qemu(title: str, process: engine.Process) -> Level:
    """Its largest mapping, but for the translated code."""
    wanted, code = engine.Rights.READ | engine.Rights.WRITE, engine.Rights.EXECUTE
    regions = (region for region in process.regions() if region.rights & (wanted | code) == wanted)
    largest = max(regions, key=lambda region: region.size)
    return Level(title, process.memory, largest.start, largest.stop)


def _data_pages(level: Level, count: int) -> Addresses:
    """Pages that hold data, at random; of a process those that its page tables name."""
    found: list[Addresses] = []
    memory = level.memory
    extents = VirtualMemory.extents if isinstance(memory, VirtualMemory) else type(memory).extents
    for part in extents(memory, level.start, level.stop):
        found.append(np.arange(part.start, part.stop, PAGE, np.uint64))
        if sum(map(len, found)) > 1 << 18:
            break
    pages = np.concatenate(found)
    chance = np.random.default_rng(7)
    good: list[int] = []
    while len(good) < count:
        column = chance.choice(pages, count)
        faults = memory.gather(column, np.empty((count, 8), np.uint8))
        good += np.delete(column, faults.rows).tolist()
    return np.array(good[:count], np.uint64)


def level_pairs(lower: Level, higher: Level) -> Iterator[Pair]:
    """The same reads a level lower and a level higher, each at places of its own that hold data."""
    below, above = lower.memory, higher.memory
    columns = [_data_pages(level, PAGES) for level in (lower, higher)]
    outs = [np.empty((PAGES, PAGE), np.uint8) for _ in range(2)]
    words = [np.empty((PAGES, 8), np.uint8) for _ in range(2)]
    few = [column[:256].tolist() for column in columns]
    yield Pair("u64", "us", each(below.u64, few[0]), each(above.u64, few[1]), 256)
    yield Pair("readinto of 4 KiB", "us", _reads(below, few[0], PAGE), _reads(above, few[1], PAGE), 256)
    for name, out in (("words", words), ("pages", outs)):
        yield Pair(
            f"scatter of {PAGES} {name}", "us",
            partial(below.gather, columns[0], out[0]), partial(above.gather, columns[1], out[1]),
        )  # fmt: skip


def _listed(layer: engine.OsLayer) -> int:
    count = 0
    for process in layer.processes():
        with contextlib.suppress(engine.ProcessExitedError):
            count += process.info.pid > 0
    return count


def listing_pairs(outer: engine.OsLayer, inner: engine.OsLayer) -> Iterator[Pair]:
    """Lists of processes; both guests have a few dozen."""
    yield Pair("PIDs, all", "ms", outer.pids, inner.pids)
    yield Pair("records of all processes", "ms", lambda: _listed(outer), lambda: _listed(inner))


def nested_section(bench: Bench) -> list[Table]:
    """What each level adds: host process, guest's physical memory, process in it, and the same once more."""
    links = [("oslayer", "linux"), ("connector", "qemu"), ("oslayer", "linux")]
    tables = []
    for ram in ("memfd", "private"):
        with nested(ram) as (living, pid, _), engine.Machine() as machine:
            open_chain(machine, chain_of(None, [("connector", f"qemu:{living.name}"), *links]))
            outer, inner = (instance.memory for instance in machine.instances("connector"))
            guest, within = (i.layer for i in machine.instances("oslayer") if i.layer.kind == "linux")
            host = NativeLayer.open(Base(live=True), {}).process(living.pid)
            vmm = next(process for process in guest.processes() if process.name.startswith("qemu-system"))
            levels = [
                _of_qemu("the QEMU's process", host),
                Level("its guest's physical memory", outer),
                _of_qemu("a process of the guest: a QEMU", vmm),
                Level("physical memory of the guest in the guest", inner),
                Level("a process in that", within.process(pid).memory),
            ]
            for below, above in pairwise(levels):
                title = f"{above.title[0].upper()}{above.title[1:]} ({ram})"
                tables.append(bench.table(title, below.title, level_pairs(below, above)))
            title = f"Lists of the guest in the guest ({ram})"
            tables.append(bench.table(title, "outer guest", listing_pairs(guest, within)))
    return tables


# -- the mount --------------------------------------------------------------------------------------------


def _mount_side(bench: Bench, stack: contextlib.ExitStack, name: str, command: Sequence[object], path: str,
                start: int, folder: Path) -> Side:  # fmt: skip
    point = folder / f"mount-{name.replace(' ', '-')}"
    words = [str(word) for word in (*command, point)]
    daemon = stack.enter_context(mounted(name, words, point, bench.cpu))
    return Side(name, {"memory": daemon.path(path)}, daemon, start)


def mount_section(bench: Bench) -> list[Table]:
    """phys_mem through the mount against C over the same RAM: the ratios of mount.py."""
    require_fuse()
    tables = []
    with tempfile.TemporaryDirectory(prefix="cloudfs-bench-") as name:
        tools = build(Path(name))
        for ram in ("memfd", "private"):
            with bench.guest(ram) as living, contextlib.ExitStack() as stack:
                runner = Runner(tools, bench.cpu, bench.rounds, lambda text: print(f"  {text}", file=sys.stderr))
                base = living.host_address(MIB) - MIB
                if ram == "memfd":
                    command, path, start = [tools.baseline_fs, "--file", _ram_file(living)], "direct", MIB
                else:
                    command, path, start = [tools.baseline_fs, "--remote", living.pid], "remote", base + MIB
                sides = [
                    _mount_side(bench, stack, C, command, path, start, living.folder),
                    _mount_side(
                        bench, stack, CLOUDFS, [cloudfs_program(), "mount", "-c", f"qemu:{living.name}"],
                        "connector/qemu/phys_mem", MIB, living.folder,
                    ),
                ]  # fmt: skip
                for at in _places(16, bench.size, PAGE).tolist():
                    _same(*(_from(side, at - MIB, 128 * KIB) for side in sides))
                for work in figures.reading_works("memory", bench.size - 2 * MIB, bench.amounts):
                    runner.measure(work, sides)
                goals = (at_least(0.80), at_least(0.65), at_least(0.60), at_most(1.35))
                lines = figures.reading_lines("memory", goals)
                tables.append(runner.table(f"phys_mem through the mount ({ram})", C, CLOUDFS, lines))
    return tables


def _from(side: Side, offset: int, size: int) -> bytes:
    number = os.open(side.paths["memory"], os.O_RDONLY)
    try:
        return os.pread(number, size, side.start + offset)
    finally:
        os.close(number)


SECTIONS: dict[str, Callable[[Bench], list[Table]]] = {
    "mapped": mapped_section,
    "private": private_section,
    "peers": peers_section,
    "nested": nested_section,
    "mount": mount_section,
}


def main() -> int:
    """The exit code."""
    parser = options(__doc__, quick="128 MiB", rounds=(9, 3), sections=SECTIONS)
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has leechcorepyc")
    arguments = parser.parse_args()

    def work() -> Outcome:
        cpu = None if arguments.unpinned else quietest_cpu()
        size, shrink = (128 * MIB, 4) if arguments.quick else (512 * MIB, 1)
        bench = Bench(size, rounds_of(arguments), Amounts(shrink), cpu, arguments.peers)
        with pinned(arguments):
            return Outcome(in_sections(arguments, SECTIONS, bench))

    return finish(arguments, work, GuestError)


if __name__ == "__main__":
    sys.exit(main())
