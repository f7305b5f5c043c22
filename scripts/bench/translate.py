"""Virtual address translation against walks in C, memflow-py and Volatility 3.

    .venv/bin/python scripts/bench/translate.py [--quick] [--only SECTION] [--peers PYTHON] [--json FILE]

Times are CPU time of the one thread that works: what else runs counts only by what it takes of the caches.

One address space of 262,144 shuffled 4 KiB pages, x86-64 with four levels, the same image for all (memflow-py makes up
its own). Ratios are time of the engine by time of the other side; both are measured in turn and give the same answers.
PYTHON is one that has memflow and volatility3 (pip install memflow volatility3 into a venv of its own).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from harness.machine import HERE, CannotMeasureError, scratch_directory
from harness.program import Outcome, finish, in_sections, options, pinned, rounds_of
from harness.table import Goal, Row, Table, at_most
from harness.timing import Action, Pair, measure, tabled

from engine import accelerator
from engine.bytes_memory import BytesMemory
from engine.file_memory import FileMemory
from engine.memory import Memory
from engine.translate.bulk import blocks, translate
from engine.translate.mmu import MmuSpec, Walker
from engine.translate.virtual import VirtualMemory
from engine.translate.x86 import X86_64

MIB = 1 << 20
PAGES, QUICK_PAGES = 262_144, 16_384
DTB = 0x1000
SEED = 5
BATCHES = (1, 64, 4096, 262_144)
PEER_PAGES = 16_384
PEER_TIME = 120
Column = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Image:
    """An address space from 0 on, its memory, and the C that walks it."""

    pages: int
    path: Path
    mapping: memoryview
    memory: Memory
    frames: Column
    library: ctypes.CDLL
    mode: ctypes.Array[ctypes.c_uint64]
    base: int
    """Where the memory's first byte lies in this program."""
    rounds: int
    peers: str

    def random(self, count: int) -> Column:
        """Addresses anywhere."""
        return np.random.default_rng(SEED).integers(0, self.pages * 512, count, np.uint64) * np.uint64(8)

    def sequence(self, count: int) -> Column:
        """One page after another."""
        return np.arange(count, dtype=np.uint64) % np.uint64(self.pages) * np.uint64(4096)

    def table(self, title: str, other: str, pairs: Iterator[Pair]) -> Table:
        """The measured pairs."""
        return tabled(title, other, pairs, self.rounds, clock=time.thread_time_ns)


def rows_for_c(spec: MmuSpec) -> ctypes.Array[ctypes.c_uint64]:
    """`struct mode` of walks.c: the same rows that the engine walks by."""
    words = [len(spec.levels)]
    for level in spec.levels:
        words += [level.shift, (1 << level.bits) - 1, len(level.kinds)]
        for kind in level.kinds:
            inside = (1 << kind.page_bits) - 1 if kind.page_bits else 0
            words += [kind.mask, kind.value, kind.address[0][0] & ~inside, inside]
        words += [0] * 4 * (4 - len(level.kinds))
    return (ctypes.c_uint64 * len(words))(*words)


def compiled(directory: Path) -> ctypes.CDLL:
    """walks.c as a library."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise CannotMeasureError("no C compiler was found: install gcc (Debian: apt install gcc)")
    target = directory / "walks.so"
    command = [compiler, "-O2", "-shared", "-fPIC", str(HERE / "walks.c"), "-o", str(target)]
    subprocess.run(command, check=True, timeout=120)
    library = ctypes.CDLL(str(target))
    pointer, number = ctypes.c_void_p, ctypes.c_uint64
    library.walk_hard.argtypes = [pointer, number, pointer, number, pointer]
    library.walk_rows.argtypes = [pointer, pointer, number, pointer, number, pointer]
    library.tree_hard.argtypes, library.tree_hard.restype = [pointer, number, pointer], number
    library.tree_rows.argtypes, library.tree_rows.restype = [pointer, pointer, number, pointer], number
    library.read_rows.argtypes = [pointer, pointer, number, number, number, pointer]
    return library


def made(directory: Path, pages: int, rounds: int, peers: str) -> Image:
    """Page tables in front, then page frames in an order of chance, each full of its own number."""
    last = -(-pages // 512)
    tables = 4 + last
    path = directory / "image"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (tables + pages) * 4096)
    with path.open("r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0))
    words = np.frombuffer(view, np.uint64)
    frames = (np.random.default_rng(SEED).permutation(pages).astype(np.uint64) + np.uint64(tables)) << np.uint64(12)
    words[512] = 0x2000 | 7
    words[1024] = 0x3000 | 7
    words[1536 : 1536 + last] = (np.arange(last, dtype=np.uint64) + np.uint64(4)) << np.uint64(12) | np.uint64(7)
    words[2048 : 2048 + pages] = frames | np.uint64(0x67)
    words[tables * 512 :] = np.repeat(np.arange(pages, dtype=np.uint64), 512)
    memory = FileMemory(str(path), immutable=True)
    base = int(words.ctypes.data)
    return Image(pages, path, view, memory, frames, compiled(directory), rows_for_c(X86_64), base, rounds, peers)


def _place(column: Column) -> int:
    return int(column.ctypes.data)


def _same(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise CannotMeasureError(f"{what}: the two sides differ; nothing was measured")


# -- sections ------------------------------------------------------------------------------------------------------


def batch_pairs(image: Image, goals: dict[int, float], *, hard: bool) -> Iterator[Pair]:
    """Batches of addresses."""
    for count in BATCHES:
        for title, addresses in (("random", image.random(count)), ("in sequence", image.sequence(count))):
            out = np.empty(count, np.uint64)
            places = _place(addresses), count, _place(out)

            def by_c(places: tuple[int, int, int] = places) -> None:
                if hard:
                    image.library.walk_hard(image.base, DTB, *places)
                else:
                    image.library.walk_rows(image.base, image.mode, DTB, *places)

            def ours(addresses: Column = addresses) -> None:
                translate(image.memory, [(X86_64, DTB)], addresses)

            by_c()
            found = translate(image.memory, [(X86_64, DTB)], addresses)
            _same("translate", (found.kinds.any(), found.physical.tolist()), (False, out.tolist()))
            goal = at_most(goals[count]) if count in goals and title == "random" else None
            yield Pair(f"{count} {title}, each", "ns", by_c, ours, count, goal)


def batch_section(image: Image) -> list[Table]:
    """Batches."""
    goals = {4096: 2.0, 262_144: 3.0}
    found = [
        image.table("Translations, C fed with the same rows", "C, rows", batch_pairs(image, goals, hard=False)),
        image.table("Translations, C written out for x86-64", "C, x86-64", batch_pairs(image, {}, hard=True)),
    ]
    with accelerator.without():
        title = "Translations by numpy alone, C fed with the same rows"
        found.append(Table(title, "C, rows", "numpy", image.table("", "", batch_pairs(image, {}, hard=False)).rows))
    return found


def tree_pairs(image: Image, goal: Goal | None) -> Iterator[Pair]:
    """The whole tree."""
    out = np.empty(3 * image.pages, np.uint64)

    def ours() -> list[object]:
        return list(blocks(image.memory, (X86_64, DTB)))

    wanted = image.library.tree_rows(image.base, image.mode, DTB, _place(out))
    chunks = list(blocks(image.memory, (X86_64, DTB)))
    listed = np.concatenate([chunk.physical for chunk in chunks])
    _same("blocks", (len(listed), listed.tolist()), (wanted, out[1::3].tolist()))
    yield Pair(
        "whole tree, C written out for x86-64", "us",
        lambda: image.library.tree_hard(image.base, DTB, _place(out)), ours, 1, goal,
    )  # fmt: skip
    yield Pair(
        "whole tree, C fed with the same rows", "us",
        lambda: image.library.tree_rows(image.base, image.mode, DTB, _place(out)), ours, 1, goal,
    )  # fmt: skip


def tree_section(image: Image) -> list[Table]:
    """The whole tree."""
    title = f"A tree of {image.pages} shuffled pages"
    tables = [image.table(title, "C", tree_pairs(image, at_most(25.0)))]
    with accelerator.without():
        rows = image.table("", "", tree_pairs(image, None)).rows
        tables.append(Table(f"{title}, by numpy alone", "C", "numpy", rows))
    return tables


def scalar_section(image: Image) -> list[Table]:
    """Single addresses, against times in microseconds."""
    memory = BytesMemory(image.mapping)
    space = VirtualMemory(memory, [(X86_64, DTB)])
    kept = VirtualMemory(memory, [(X86_64, DTB)], keep=True)
    addresses = image.random(1000).tolist()
    near = (image.random(1000) % np.uint64(1 << 21)).tolist()
    cold, warm = Walker(memory, X86_64, DTB), Walker(memory, X86_64, DTB, keep=True)
    many = image.random(4096)

    def each(function: Callable[[int], object], places: list[int]) -> Action:
        def loop() -> None:
            for address in places:
                function(address)

        return loop

    wanted = translate(memory, [(X86_64, DTB)], image.random(1000)).physical.tolist()
    _same("find", [cold.find(address)[0] for address in addresses], wanted)
    works = (
        ("Walker.find, nothing kept", 1500.0, each(cold.find, addresses), 1000),
        ("Walker.find, its last table kept", 400.0, each(warm.find, near), 1000),
        ("VirtualMemory.u64", 900.0, each(space.u64, addresses), 1000),
        ("VirtualMemory.u64, last tables kept", 900.0, each(kept.u64, near), 1000),
        ("VirtualMemory.words of 4096 random addresses, each", 50.0, lambda: space.words(many), 4096),
    )
    rows = []
    for title, limit, action, count in works:
        measured = measure(Pair(title, "ns", action, action, count), image.rounds, time.thread_time_ns)
        rows.append(Row(title, "ns", [limit] * image.rounds, measured.subject, at_most(1.0)))
    return [Table("One address, against what it may take", "may take", "engine", rows)]


def read_section(image: Image) -> list[Table]:
    """1 MiB through page tables."""
    buffer = bytearray(MIB)
    view, place = memoryview(buffer), ctypes.addressof((ctypes.c_char * MIB).from_buffer(buffer))
    starts = (np.random.default_rng(SEED).integers(0, image.pages // 256 - 1, 64) * MIB).tolist()

    def by_c() -> None:
        for start in starts:
            image.library.read_rows(image.base, image.mode, DTB, start, 256, place)

    def copied() -> None:
        for start in starts:
            ctypes.memmove(place, image.base + start, MIB)

    def pairs(memory: Memory, name: str) -> Iterator[Pair]:
        space = VirtualMemory(memory, [(X86_64, DTB)])

        def ours() -> None:
            for start in starts:
                space.readinto(start, view)

        image.library.read_rows(image.base, image.mode, DTB, starts[0], 256, place)
        wanted = bytes(buffer)
        space.readinto(starts[0], view)
        _same("readinto", bytes(buffer), wanted)
        yield Pair(f"{name}, C that translates and copies", "us", by_c, ours, len(starts), at_most(1.3))
        yield Pair(f"{name}, memcpy of 1 MiB in one piece", "us", copied, ours, len(starts))

    live = FileMemory(str(image.path))
    works = ((BytesMemory(image.mapping), "bytes"), (image.memory, "immutable file"), (live, "live file"))
    found = [image.table(f"1 MiB of shuffled pages: {name}", "C", pairs(memory, name)) for memory, name in works]
    live.close()
    return found


def _high_water() -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def _reset_high_water() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def memory_section(_image: Image) -> list[Table]:
    """Memory that a walk of a sparse address space of 2^48 bytes takes, in a process of its own."""
    rows = []
    for name, off in (("accelerator", ""), ("numpy", "1")):
        words = [sys.executable, __file__, "--sparse"]
        environment = {**os.environ, accelerator.SWITCH: off}
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True, env=environment)
        for title, size in json.loads(done.stdout).items():
            rows.append(Row(f"{title}, {name}", "MiB", [32.0], [size / MIB], at_most(1.0)))
    return [Table("Memory over the baseline, walking 2,000 pages in 2^48 bytes", "may take", "engine", rows)]


def sparse() -> int:
    """The child of `memory_section`: prints bytes over the baseline."""
    chance = np.random.default_rng(SEED)
    words: dict[int, dict[int, int]] = {1: {}}
    for address in chance.integers(0, 1 << 36, 2000).tolist():
        table = 1
        for shift in (27, 18, 9):
            entries = words[table]
            index = address >> shift & 511
            if index not in entries:
                words[len(words) + 1] = {}
                entries[index] = len(words) << 12 | 7
            table = entries[index] >> 12
        words[table][address & 511] = 0x1000 | 7
    data = bytearray((len(words) + 1) * 4096)
    column = np.frombuffer(data, np.uint64)
    for number, entries in words.items():
        column[[number * 512 + index for index in entries]] = list(entries.values())
    del words
    memory, found = BytesMemory(data), {}
    accelerator.library()
    list(blocks(BytesMemory(bytes(8192)), (X86_64, DTB)))
    for title, shown in (("pages", {}), ("pages and gaps", {"gaps": True})):
        _reset_high_water()
        before = _high_water()
        for _ in blocks(memory, (X86_64, DTB), **shown):
            pass
        found[title] = _high_water() - before
    print(json.dumps(found))
    return 0


# -- others ---------------------------------------------------------------------------------------------------------


def _asked(python: str, *words: str) -> dict[str, float]:
    program = [python, str(HERE / "translate_peers.py"), *words]
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=PEER_TIME, check=True)
        found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"missing": 0.0, str(error): 0.0}
    return found


def _beside(title: str, words: tuple[str, ...], python: str, works: dict[str, tuple[Action, int]]) -> list[Table]:
    """The peer's figures and ours, in turn."""
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in works}
    for _ in range(3):
        theirs = _asked(python, *words)
        if "missing" in theirs:
            print(f"{title} is not there ({theirs}): pip install memflow volatility3 for --peers", file=sys.stderr)
            return []
        for name, (action, count) in works.items():
            ours = measure(Pair(name, "ns", action, action, count), 3, time.thread_time_ns).subject
            samples[name][0].append(theirs[name])
            samples[name][1].append(sorted(ours)[1])
    rows = [Row(f"{name}, each", "ns", *both, at_most(1.0)) for name, both in samples.items()]
    return [Table(f"Beside {title}", title, "engine", rows)]


def peers_section(image: Image) -> list[Table]:
    """memflow-py's dummy process and Volatility 3's Intel layer."""
    python = image.peers
    space = VirtualMemory(image.memory, [(X86_64, DTB)])
    random, ordered = image.random(4096) % np.uint64(PEER_PAGES << 12), image.sequence(4096)
    few, roots, buffer = random[:64].tolist(), [(X86_64, DTB)], memoryview(bytearray(MIB))
    starts = (np.random.default_rng(SEED).integers(0, PEER_PAGES // 256 - 1, 4) * MIB).tolist()

    def word() -> None:
        for address in few:
            space.u64(address)

    def one() -> None:
        for address in few:
            space.virt_to_phys(address)

    def reads() -> None:
        for start in starts:
            space.readinto(start, buffer)

    read_works: dict[str, tuple[Action, int]] = {
        "word": (word, 64),
        "words, random": (lambda: space.words(random), 4096),
        "words, in sequence": (lambda: space.words(np.arange(4096, dtype=np.uint64) * np.uint64(8)), 4096),
        "MiB": (reads, len(starts)),
    }
    walks: dict[str, tuple[Action, int]] = {
        "one": (one, 64),
        "random": (lambda: translate(image.memory, roots, random), 4096),
        "in sequence": (lambda: translate(image.memory, roots, ordered), 4096),
        "tree": (lambda: list(blocks(image.memory, roots[0], 0, PEER_PAGES << 12)), PEER_PAGES),
        "word": (word, 64),
        "MiB": (reads, len(starts)),
    }
    return [
        *_beside("memflow-py", ("memflow", str(PEER_PAGES << 12)), python, read_works),
        *_beside("Volatility 3", ("volatility", str(image.path), str(DTB)), python, walks),
    ]


SECTIONS: dict[str, Callable[[Image], list[Table]]] = {
    "batch": batch_section,
    "tree": tree_section,
    "scalar": scalar_section,
    "read": read_section,
    "memory": memory_section,
    "peers": peers_section,
}


def main() -> int:
    """The exit code."""
    parser = options(__doc__, quick=f"{QUICK_PAGES} pages", rounds=(9, 3), sections=SECTIONS)
    parser.add_argument("--peers", metavar="PYTHON", default=sys.executable, help="a Python with memflow, volatility3")
    parser.add_argument("--sparse", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sparse:
        return sparse()
    pages = QUICK_PAGES if arguments.quick else PAGES

    def work() -> Outcome:
        with scratch_directory(pages * 4096 + 4 * MIB) as directory:
            image = made(directory, pages, rounds_of(arguments), arguments.peers)
            if accelerator.library() is None:
                print(f"without the accelerator: {accelerator.why_not()}", file=sys.stderr)
            with pinned(arguments):
                return Outcome(in_sections(arguments, SECTIONS, image))

    return finish(arguments, work)


if __name__ == "__main__":
    sys.exit(main())
