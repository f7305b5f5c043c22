"""From an image of a Linux machine to the list of its processes: `cloudfs ps` beside Volatility 3 and drgn.

    .venv/bin/python scripts/bench/linux.py [--quick] [--peers PYTHON [--vmlinux FILE]] [--json FILE]

Whole programs, from fork to their end, one after the other: images of 512 MiB and of 5 GiB that the tests have
recorded (`--image FILE` for others), cold (nothing of the image in the page cache, nothing kept of the kernel) and
warm. PYTHON is one that has volatility3, drgn or both; drgn needs the kernel's debug information, FILE. Before
anything is measured, all must list the same processes: a peer that does not, as Volatility 3 where page tables have
five levels, is left out of that image's tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.machine import CannotMeasureError, cloudfs_program, measuring, quietest_cpu
from harness.program import Outcome, finish, options, rounds_of
from harness.table import Row, Table, at_most

ROOT = Path(__file__).resolve().parents[2]
GUESTS = ("amd64-6.1-4level", "amd64-6.1-5gib")
LIMIT = 300.0
MIB = 1 << 20
POLL = 0.0005
"""Seconds between two looks at a program's anonymous memory."""
ALLOWED: Mapping[str, float] = {"cold": float("inf"), "first": 1.0, "again": 0.3}
"""Seconds that `cloudfs ps` may take."""
ALLOWED_MIB = 150.0
CASES = {
    "cold": "nothing in the page cache, nothing kept",
    "first": "image in the page cache, nothing kept of this kernel",
    "again": "the same kernel again",
}
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


@dataclass
class Samples:
    """What the runs of one program took."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """MiB of anonymous memory at the peak: pages of a mapped image belong to nobody."""


@dataclass(frozen=True)
class Side:
    """A program that lists the processes of an image."""

    name: str
    words: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def run(side: Side, samples: Samples | None, cpu: int | None) -> bytes:
    """One run; what it has printed. Raises CannotMeasureError where it fails."""
    environment = os.environ | dict(side.environment)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # Who measures must not wait for a CPU either, or it sees an end long after it came.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, measuring(None):
        with measuring(cpu):
            began = time.perf_counter()
            process = subprocess.Popen(
                side.words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment
            )
        peak, status, usage = _watched(process)
        wall = time.perf_counter() - began
        errors.seek(0)
        output.seek(0)
        if status:
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise CannotMeasureError(f"{side.name} failed: {lines[-1] if lines else status}")
        if samples is not None:
            samples.wall.append(wall)
            samples.cpu.append(usage.ru_utime + usage.ru_stime)
            samples.memory.append(peak / 1024)
        return output.read()


def _watched(process: subprocess.Popen[bytes]) -> tuple[int, int, os.struct_rusage]:
    """(peak of anonymous memory in KiB, exit status, what it used) of a program when it has ended."""
    peak = 0
    ended = threading.Event()

    def look() -> None:
        nonlocal peak
        while not ended.wait(POLL):
            with contextlib.suppress(OSError), open(f"/proc/{process.pid}/status", encoding="ascii") as file:
                found = _ANONYMOUS.search(file.read())
                peak = max(peak, int(found[1]) if found is not None else 0)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    alarm = threading.Timer(LIMIT, process.kill)
    alarm.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        alarm.cancel()
        ended.set()
        looking.join()
    return peak, process.returncode, usage


def drop(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# -- what is compared ------------------------------------------------------------------------------------


def cloudfs_side(image: Path, case: str, kept: Path) -> Side:
    """`cloudfs ps` of an image; profiles are kept in a folder of our own."""
    words = [str(cloudfs_program()), "ps", "--json", *(["--no-cache"] if case != "again" else []), "-f", str(image)]
    return Side("cloudfs ps", words, {"XDG_CACHE_HOME": str(kept), "CLOUDFS_NO_CACHE": ""})


def volatility_side(python: str, image: Path, folder: Path) -> Side:
    """`vol linux.pslist` with an ISF that was made of the same image."""
    run_it = "import sys; sys.argv[0] = 'vol'; from volatility3.cli import main; main()"
    words = [python, "-c", run_it, "--offline", "-q", "-r", "json", "--cache-path", str(folder / "volatility")]
    return Side("Volatility 3", [*words, "-s", str(folder / "symbols"), "-f", str(image), "linux.pslist.PsList"])


DRGN = """
import drgn, json, sys
from drgn.helpers.linux.pid import for_each_task
program = drgn.Program()
program.set_core_dump(sys.argv[1])
program.load_debug_info([sys.argv[2]])
tasks = (task for task in for_each_task(program) if task.pid == task.tgid)
print(json.dumps([{"pid": int(task.pid), "ppid": int(task.real_parent.tgid), "name": task.comm.string_().decode(),
                   "uid": int(task.real_cred.uid.val)} for task in tasks if task.pid]))
"""


def drgn_side(python: str, core: Path, vmlinux: Path) -> Side:
    """A script of drgn over an ELF core that was made of the image."""
    return Side("drgn", [python, "-c", DRGN, str(core), str(vmlinux)])


def processes(side: Side, output: bytes) -> list[tuple[int, str]]:
    """(PID, name as the kernel keeps it) of what a program has printed, ascending; to a worker we add what it does."""
    pid, name = ("PID", "COMM") if side.name == "Volatility 3" else ("pid", "name")
    found = [(row[pid], row[name][:15]) for row in json.loads(output)]
    return sorted((number, "kworker" if text.startswith("kworker/") else text) for number, text in found)


# -- what peers need ----------------------------------------------------------------------------------------


def write_core(image: Path, target: Path) -> None:
    """An ELF core of an image: its RAM as segments, VMCOREINFO as a note; holes stay holes."""
    from engine.file_memory import FileMemory
    from engine.memory_map import MappedMemory
    from engine.oslayer import Base
    from engine.oslayers.linux import LinuxLayer

    memory = FileMemory(str(image), immutable=True)
    layer = LinuxLayer.open(Base(memory), {"cache": "no"})
    physical = layer.physical_memory
    whole = [(0, memory.size, 0)]
    if isinstance(physical, MappedMemory):
        whole = [(each.base, each.length, each.real_base) for each in physical.memory_map.coalesced()]
    text = layer.kernel.found.vmcoreinfo.raw
    name = b"VMCOREINFO\0\0"
    note = len(name[:11]).to_bytes(4, "little") + len(text).to_bytes(4, "little") + bytes(4) + name
    note += text + bytes(-len(text) % 4)
    count = len(whole) + 1
    start = 64 + 56 * count
    data = -(-(start + len(note)) // 4096) * 4096
    number = lambda value, size=8: value.to_bytes(size, "little")  # noqa: E731 - as a column of the table below
    head = b"\x7fELF\2\1\1" + bytes(9) + number(4, 2) + number(62, 2) + number(1, 4) + number(0) + number(64)
    head += number(0) + number(0, 4) + number(64, 2) + number(56, 2) + number(count, 2) + number(0, 2) * 3
    rows = [(4, 0, start, 0, len(note)), *((1, 7, data + at, base, size) for base, size, at in whole)]
    for kind, flags, offset, physical_start, size in rows:
        head += number(kind, 4) + number(flags, 4) + number(offset) + number(0) + number(physical_start)
        head += number(size) + number(size) + number(0)
    with open(target, "wb") as core:
        core.write(head + note)
        for extent in memory.extents():
            for at in range(extent.start, extent.stop, 16 * MIB):
                core.seek(data + at)
                core.write(memory.read_padded(at, min(16 * MIB, extent.stop - at)))
        core.truncate(data + memory.size)


def peers_of(image: Path, folder: Path, python: str, vmlinux: Path | None) -> Iterator[tuple[Side, Path]]:
    """The peers that this Python has, each with the file that it reads."""
    core = folder / f"{image.parent.name}.core"
    write_core(image, core)
    whole = core.stat().st_size < 3 << 30  # a raw file of more lacks the hole below 4 GiB, which Volatility must see
    if not subprocess.run([python, "-c", "import volatility3"], capture_output=True, check=False).returncode:
        symbols = folder / "symbols" / "linux"
        symbols.mkdir(parents=True, exist_ok=True)
        made = symbols / "kernel.json"
        if not made.exists():
            subprocess.run([sys.executable, str(ROOT / "scripts" / "isf.py"), str(image), str(made)], check=True)
        (folder / "volatility").mkdir(exist_ok=True)
        read = image if whole else core
        yield volatility_side(python, read, folder), read
    if vmlinux is not None:
        yield drgn_side(python, core, vmlinux), core


# -- tables -----------------------------------------------------------------------------------------------


def compare(image: Path, peers: Sequence[tuple[Side, Path]], folder: Path, rounds: int, cpu: int | None) -> list[Table]:
    """The tables of one image."""
    status = image.stat()
    title = f"{image.parent.name}: {status.st_size // MIB} MiB, {status.st_blocks * 512 // MIB} of them on disk"
    wanted, peers = _agreeing(image, peers, folder)
    print(f"{title}: {wanted} processes", file=sys.stderr)
    found: dict[tuple[str, str], Samples] = {}
    for case in CASES:
        ours = cloudfs_side(image, case, folder / "kept")
        sides = [(ours, image), *(peers if case != "first" else [])]
        for side, read in sides:
            samples = found.setdefault((side.name, case), Samples())
            for _ in range(rounds):
                if case == "cold":
                    drop(read)
                    drop(image)
                run(side, samples, cpu)
    tables = [_against_allowance(title, found, rounds)]
    for side, _ in peers:
        rows = [
            Row(f"{name}, {case}", unit, values(found[side.name, case]), values(found["cloudfs ps", case]), None)
            for case in ("cold", "again")
            for name, unit, values in FIGURES
        ]
        tables.append(Table(title, side.name, "cloudfs ps", rows))
    return tables


def _wall(samples: Samples) -> list[float]:
    return samples.wall


def _cpu(samples: Samples) -> list[float]:
    return samples.cpu


def _memory(samples: Samples) -> list[float]:
    return samples.memory


FIGURES: tuple[tuple[str, str, Callable[[Samples], list[float]]], ...] = (
    ("time", "s", _wall), ("CPU", "s", _cpu), ("anonymous memory", "MiB", _memory),
)  # fmt: skip


def _against_allowance(title: str, found: Mapping[tuple[str, str], Samples], rounds: int) -> Table:
    rows = []
    for case, meaning in CASES.items():
        own = found["cloudfs ps", case]
        goal = at_most(1.0) if ALLOWED[case] < float("inf") else None
        allowed = ALLOWED[case] if goal is not None else 1.0
        rows.append(Row(f"time: {meaning}", "s", [allowed] * rounds, own.wall, goal))
        rows.append(Row(f"CPU: {case}", "s", [allowed] * rounds, own.cpu))
    most = [max(found["cloudfs ps", case].memory[each] for case in CASES) for each in range(rounds)]
    rows.append(Row("anonymous memory at the peak", "MiB", [ALLOWED_MIB] * rounds, most, at_most(1.0)))
    return Table(f"{title}: what `cloudfs ps` may take", "allowed", "cloudfs ps", rows)


def _agreeing(image: Path, peers: Sequence[tuple[Side, Path]], folder: Path) -> tuple[int, list[tuple[Side, Path]]]:
    """How many processes we list, and the peers that list the same; of the others it is said. Warms caches, too.

    A peer may leave out those that have ended and are not yet buried, as Volatility does.
    """
    ours = cloudfs_side(image, "again", folder / "kept")
    output = run(ours, None, None)
    wanted = processes(ours, output)
    dead = {row["pid"] for row in json.loads(output) if row["state"] in ("Z", "X")}
    good = []
    for side, read in peers:
        try:
            found = processes(side, run(side, None, None))
        except CannotMeasureError as error:
            print(f"{image.parent.name}: {error}", file=sys.stderr)
            continue
        only = [row for row in sorted(set(found) ^ set(wanted)) if row[0] not in dead or row in found]
        if only:
            told = f"{side.name} lists {len(found)} processes where there are {len(wanted)}: it is left out"
            print(f"{image.parent.name}: {told}", file=sys.stderr)
        else:
            good.append((side, read))
    return len(wanted), good


# -- steps --------------------------------------------------------------------------------------------------


OPENING = {
    "find_vmcoreinfo": "look for VMCOREINFO in every page",
    "find_kernel": "find the kernel's page tables and image",
    "begin_profile": "symbols",
    "finish_profile": "types, where they were not kept with the symbols",
    "with_true_layout": "layout of RAM",
}
"""What `LinuxLayer.open` calls, and what that is."""


def steps(path: str) -> dict[str, float]:
    """Milliseconds of each step of `cloudfs ps`, in this program; profiles are kept as the environment says."""
    found: dict[str, float] = {}
    began = time.perf_counter()
    from cloudfs.commands import ps  # noqa: F401 - what the command imports before it does anything

    imported = time.perf_counter()
    found["import what every command needs"] = 1e3 * (imported - began)
    from engine.file_memory import FileMemory
    from engine.oslayer import Base
    from engine.oslayers.linux import layer as layers

    began = time.perf_counter()
    found["import the layer"] = 1e3 * (began - imported)
    spent = dict.fromkeys(OPENING, 0.0)
    for name in OPENING:
        setattr(layers, name, _timed(getattr(layers, name), spent, name))
    layer = layers.LinuxLayer.open(Base(FileMemory(path, immutable=True)), {})
    whole = 1e3 * (time.perf_counter() - began)
    spent["find_kernel"] -= spent["find_vmcoreinfo"]  # which it asks for
    found |= {title: spent[name] for name, title in OPENING.items()}
    found["what else opening takes"] = whole - sum(spent.values())
    began = time.perf_counter()
    layer.pids()
    listed = time.perf_counter()
    found["list tasks"] = 1e3 * (listed - began)
    for process in layer.processes():
        _ = process.info
    found["record of every process"] = 1e3 * (time.perf_counter() - listed)
    return found


def _timed(function: Callable[..., object], spent: dict[str, float], name: str) -> Callable[..., object]:
    """The function, and the milliseconds that it takes, added up."""

    def timed(*arguments: object, **options: object) -> object:
        began = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spent[name] += 1e3 * (time.perf_counter() - began)

    return timed


def step_table(image: Path, folder: Path, rounds: int, cpu: int | None) -> Table:
    """Each step with types and symbols searched for, and with those that were kept."""
    sides = {}
    for name, off in (("searched", "1"), ("kept", "")):
        environment = {"XDG_CACHE_HOME": str(folder / "kept"), "CLOUDFS_NO_CACHE": off, "OPENBLAS_NUM_THREADS": "1"}
        sides[name] = Side(name, [sys.executable, __file__, "--steps", str(image)], environment)
    for side in sides.values():
        run(side, None, cpu)
    taken = {name: [json.loads(run(side, None, cpu)) for _ in range(rounds)] for name, side in sides.items()}
    rows = [
        Row(step, "ms", [each[step] for each in taken["searched"]], [each[step] for each in taken["kept"]])
        for step in taken["kept"][0]
    ]
    return Table(f"{image.parent.name}: steps, page cache warm", "searched", "kept", rows)


# -- the program -------------------------------------------------------------------------------------------


def recorded_images() -> list[Path]:
    """The images of the tests' guests, booted and recorded now where they are not there. Raises CannotMeasureError."""
    sys.path.append(str(ROOT / "tests"))
    from guests.kernels import GuestError
    from guests.recorder import recorded

    try:
        return [Path(recorded(name).image) for name in GUESTS]
    except GuestError as error:
        raise CannotMeasureError(f"no guest can be recorded here ({error}): give --image FILE") from None


def main() -> int:
    """The exit code."""
    parser = options(__doc__, quick="few runs", rounds=(9, 3))
    parser.add_argument("--image", type=Path, action="append", metavar="FILE", help="an image; may be given again")
    parser.add_argument("--peers", metavar="PYTHON", help="a Python that has volatility3, drgn or both")
    parser.add_argument("--vmlinux", type=Path, metavar="FILE", help="debug information of the kernel, for drgn")
    parser.add_argument("--steps", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps is not None:
        print(json.dumps(steps(arguments.steps)))
        return 0
    rounds = rounds_of(arguments)

    def work() -> Outcome:
        tables: list[Table] = []
        with tempfile.TemporaryDirectory(prefix="cloudfs-bench-") as name:
            folder = Path(name)
            (folder / "kept").mkdir(mode=0o700)
            cpu = None if arguments.unpinned else quietest_cpu()
            for image in [path.resolve() for path in arguments.image or recorded_images()]:
                peers = list(peers_of(image, folder, arguments.peers, arguments.vmlinux)) if arguments.peers else []
                tables += compare(image, peers, folder, rounds, cpu)
                tables.append(step_table(image, folder, rounds, cpu))
        return Outcome(tables)

    return finish(arguments, work, subprocess.CalledProcessError, OSError)


if __name__ == "__main__":
    sys.exit(main())
