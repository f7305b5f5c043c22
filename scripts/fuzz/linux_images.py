"""Fuzz the OS layer `linux`: images of recorded guests, cut, damaged, planted with lies, and everything read of them.

    .venv/bin/python scripts/fuzz/linux_images.py [SECONDS] [--seed N] [--most SECONDS] [--guest NAME …] [--kind KIND …]

Each case damages a copy of a guest's RAM in memory and reads all that the layer tells: processes with their maps,
files, threads and modules, sockets, symbols, the log. Whatever the damage, nothing but an EngineError may leave it,
no case may take longer than `--most` seconds of CPU, and what can be known is shown. Ends with an error, and says
with which seed, where that is not so.

| kind | what is done |
|---|---|
| cut | the image ends anywhere |
| zeros, noise | 0.1 to 5 % of the pages that hold data are zeros, or random bytes |
| pointers | words of tasks and of what they point to are changed: null, odd, into user space, to one another (loops) |
| names | control bytes, invalid UTF-8, no NUL in names of tasks, files and modules |
| planted | copies of VMCOREINFO, of types and of the banner, with a change in each, all over free pages |
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # before tests/engine

from guests.recorder import recorded

from cloudfs.render import maps_line, process_record
from engine.bytes_memory import BytesMemory
from engine.errors import EngineError
from engine.file_memory import FileMemory
from engine.oslayer import (
    Base,
    KernelLog,
    OpenFiles,
    PhysicalMaps,
    Process,
    ProcFiles,
    Sockets,
    Symbols,
)
from engine.oslayers.linux import LinuxLayer
from engine.types import Extent

GUESTS = ("amd64-6.1-4level", "amd64-6.12", "arm64-6.1", "i386-6.1")
PAGE = 4096
LISTED = 20_000
"""Things of one kind that a case looks at; no guest has as many."""
NASTY = (b"\x1b[2J", b"\xff\xfe", b"a\nb", b"..", b"/", b"\xed\xb2\x80", b"\t\x7f", b"%n{}", b"\xc3")

os.environ["CLOUDFS_NO_CACHE"] = "1"


class TooLongError(BaseException):
    """A case has used up its time: no handler in between may take it for an error."""


class Image(BytesMemory):
    """A guest's RAM, copied page by page where it is written to; holes of the file stay holes."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        with open(path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            clean = FileMemory(str(path), immutable=True)
            self.holding = [extent for extent in clean.extents() if size is None or extent.start < size]
        super().__init__(memoryview(mapping)[:size], writable=True)
        self.page_size = PAGE

    def extents(self, start: int = 0, stop: int | None = None) -> Iterator[Extent]:
        """See `Memory.extents`."""
        stop = self.size if stop is None else min(stop, self.size)
        for extent in self.holding:
            low, high = max(start, extent.start), min(stop, extent.stop)
            if low < high:
                yield Extent(low, high - low)

    def pages(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The pages that hold data."""
        return np.concatenate([np.arange(one.start, one.stop - PAGE + 1, PAGE) for one in self.holding])


@dataclass
class Guest:
    """A guest as it was recorded, and where in its RAM things stand."""

    name: str
    path: Path
    layer: LinuxLayer
    processes: int
    objects: dict[str, list[int]]
    """Physical addresses, by kind."""


@dataclass
class Totals:
    """What came of the cases."""

    cases: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)
    shown: dict[str, list[float]] = field(default_factory=dict)
    """Share of the processes that were shown, of the images that could be opened."""
    skipped: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    poor: list[str] = field(default_factory=list)
    """Cases in which less than half of the processes are shown."""
    slowest: tuple[float, str] = (0.0, "")


# -- guests ---------------------------------------------------------------------------------------------


def prepared(name: str) -> Guest:
    """A guest, with the places of its kernel's objects."""
    path = Path(recorded(name).image)
    layer = LinuxLayer.open(Base(FileMemory(str(path), immutable=True)), {})
    found: dict[str, set[int]] = {}
    try:
        processes = list(layer.processes())
    except EngineError:
        processes = []
    memory = layer.kernel.found.memory

    def add(kind: str, address: int) -> None:
        with contextlib.suppress(EngineError):
            if address >= layer.kernel.found.candidate.kernel_start:
                found.setdefault(kind, set()).add(memory.virt_to_phys(address))

    for process in processes:
        add("task", process.info.object or 0)
    for address in [address for each in processes for address in [each.info.object or 0] if address]:
        with contextlib.suppress(EngineError):  # what a task points to: its mm, cred, files, signal and whatever else
            for word in np.frombuffer(memory.read_padded(address, 4096), "<u8").tolist():
                add("behind a task", word)
    for symbol in ("modules", "init_pid_ns", "init_task", "iomem_resource", "init_net", "net_namespace_list", "prb"):
        place = layer.kernel.profile.symbol(symbol)
        if place is not None:
            add("roots", place)
    for module in layer.modules():
        add("module", getattr(module, "address", 0))
    return Guest(name, path, layer, len(processes), {kind: sorted(places) for kind, places in found.items()})


# -- damage --------------------------------------------------------------------------------------------


Chance = np.random.Generator
Damage = Callable[[Guest, Image, Chance], None]


def zeros(_: Guest, image: Image, chance: Chance) -> None:
    """Some pages are gone."""
    for page in _some_pages(image, chance):
        image.write(page, bytes(PAGE))


def noise(_: Guest, image: Image, chance: Chance) -> None:
    """Some pages are something else."""
    for page in _some_pages(image, chance):
        image.write(page, chance.bytes(PAGE))


def _some_pages(image: Image, chance: Chance) -> list[int]:
    pages = image.pages()
    share = float(chance.choice([0.001, 0.005, 0.01, 0.05]))
    found: list[int] = chance.choice(pages, max(1, int(share * len(pages))), replace=False).tolist()
    return found


def pointers(guest: Guest, image: Image, chance: Chance) -> None:
    """Words in the kernel's objects lead elsewhere: nowhere, to user space, in circles."""
    places = [place for kind in guest.objects.values() for place in kind]
    word = guest.layer.kernel.profile.word
    tasks = [process.info.object or 0 for process in guest.layer.processes()] if guest.processes else [0]
    for place in chance.choice(places, min(len(places), int(chance.integers(1, 400)))).tolist() if places else []:
        at = place + word * int(chance.integers(0, 4096 // word))
        if at + word > image.size:
            continue
        old = int.from_bytes(image.read(at, word), "little")
        near = int(chance.choice(tasks)) + word * int(chance.integers(0, 512))
        top = (1 << 8 * word) - 1
        bit = 1 << int(chance.integers(0, 8 * word))
        values = (0, top, old ^ 1, old + 8, old ^ bit, near, near | 1, 0x7FFF_F000, at, old & 0xFFFF, old | top >> 1)
        new = values[int(chance.integers(0, len(values)))]
        image.write(at, (new & top).to_bytes(word, "little"))


def names(guest: Guest, image: Image, chance: Chance) -> None:
    """Names are hostile: of tasks and of what they have open, by the bytes that stand there."""
    wanted = {process.info.name.encode("utf-8", "surrogateescape") for process in guest.layer.processes()}
    wanted = {name for name in wanted if len(name) > 2} | {b"busybox", b"passwd", b"lib", b"bin"}
    for kind in guest.objects.values():
        for place in kind:
            page = bytearray(image.read_padded(place, 4096))
            changed = False
            for name in wanted:
                at = page.find(name)
                if at >= 0 and chance.random() < 0.5:
                    nasty = NASTY[int(chance.integers(0, len(NASTY)))] * 16
                    page[at : at + len(name)] = nasty[: len(name)]
                    changed = True
            if changed:
                image.write(place, bytes(page[: image.size - place]))
    data = np.flatnonzero(chance.random(len(image.pages())) < 0.02)  # dentries and the like, wherever they are
    for page_at in image.pages()[data].tolist():
        page = bytearray(image.read(page_at, PAGE))
        for name in (b"libc", b"busybox", b"passwd", b".so", b"tmp", b"proc"):
            at = page.find(name)
            if at >= 0:
                page[at : at + len(name)] = (NASTY[int(chance.integers(0, len(NASTY)))] * 4)[: len(name)]
        image.write(page_at, bytes(page))


def planted(guest: Guest, image: Image, chance: Chance) -> None:
    """Lies all over: VMCOREINFO with other addresses, the head of the types, banners."""
    found = guest.layer.kernel.found
    text = bytearray(found.vmcoreinfo.raw)
    pages = image.pages()
    head = b""
    start = guest.layer.kernel.profile.symbol("__start_BTF")
    if start is not None:
        with contextlib.suppress(EngineError):
            head = found.memory.read_padded(start, 64 * PAGE)
    kernel = {found.memory.virt_to_phys(found.image.start) // PAGE}
    for page in chance.choice(pages, 60, replace=False).tolist():
        if page // PAGE in kernel:
            continue
        what = int(chance.integers(0, 4))
        if what == 0:
            lie = bytearray(text)
            for _ in range(int(chance.integers(0, 6))):
                at = int(chance.integers(20, len(lie)))
                lie[at] = int(chance.choice(list(b"0123456789abcdefx=()\n-")))
            image.write(page, bytes(lie[: PAGE - 1]) + b"\0")
        elif what == 1 and head:
            lie = bytearray(head[: min(len(head), image.size - page)])
            lie[int(chance.integers(8, 4000))] ^= int(chance.integers(1, 256))
            image.write(page, bytes(lie))
        elif what == 2:
            image.write(page, b"Linux version 9.9.9-planted (a@b) # SMP\n\0" * 64)
        else:
            note = (11).to_bytes(4, "little") + len(text).to_bytes(4, "little") + bytes(4) + b"VMCOREINFO\0\0"
            image.write(page, (note + bytes(text))[:PAGE])


KINDS: dict[str, Damage | None] = {
    "cut": None, "zeros": zeros, "noise": noise, "pointers": pointers, "names": names, "planted": planted,
}  # fmt: skip


def damaged(guest: Guest, kind: str, seed: int) -> Image:
    """The image of a case."""
    chance = np.random.default_rng(seed)
    size = None
    if kind == "cut":
        whole = guest.path.stat().st_size
        size = int(whole * chance.random()) if chance.random() < 0.9 else int(chance.integers(0, 3 * PAGE))
        size = max(1, size if chance.random() < 0.5 else size // PAGE * PAGE)
    image = Image(guest.path, size)
    damage = KINDS[kind]
    if damage is not None:
        damage(guest, image, chance)
    return image


# -- what is read ----------------------------------------------------------------------------------------


def bounded(things: Iterator[object] | Sequence[object]) -> list[object]:
    """At the most `LISTED` of them: a case that has more is a fault."""
    found: list[object] = []
    for thing in things:
        found.append(thing)
        if len(found) > LISTED:
            raise AssertionError(f"more than {LISTED} {type(thing).__name__}")
    return found


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """What the layer may raise."""
    with contextlib.suppress(EngineError):
        yield


def read_process(process: Process) -> None:
    """All that is known of a process."""
    with allowed():
        repr(process_record(process.info))
    with allowed():
        for region in bounded(process.regions()):
            maps_line(region)  # type: ignore[arg-type]  # bounded() gives what it was given
    with allowed():
        bounded(process.threads())
    with allowed():
        for module in bounded(process.modules()):
            with allowed():
                repr(module.info)  # type: ignore[attr-defined]  # as above
    files = process.capability(ProcFiles)
    if files is not None:
        for name in files.names():
            with allowed():
                files.read(name)
        for link in ("exe", "cwd", "root"):
            with allowed():
                files.link(link)
        with allowed():
            for number in files.descriptors()[:64]:
                with allowed():
                    files.link(f"fd/{number}")
    opened = process.capability(OpenFiles)
    if opened is not None:
        with allowed():
            bounded(opened.open_files())
    maps = process.capability(PhysicalMaps)
    if maps is not None:
        with allowed():
            for count, _ in enumerate(maps.physical_maps()):
                if count > LISTED:
                    break
    with allowed():
        process.memory.read_padded(0x40_0000, 4096)


def read_all(image: Image, totals: Totals, label: str, expected: int, name: str) -> None:
    """Open an image and read everything."""
    try:
        layer = LinuxLayer.open(Base(image), {})
    except EngineError as error:
        totals.reasons[str(error)[:60]] += 1
        return
    totals.opened[label] += 1
    repr(layer.info)
    processes: list[object] = []
    try:
        processes = bounded(layer.processes())
    except EngineError as error:
        totals.reasons[f"no processes: {str(error)[:100]}"] += 1
    if expected:
        if len(processes) < expected / 2:
            totals.poor.append(f"{len(processes)} of {expected} processes, {layer.info.notes}: {name}")
        totals.shown.setdefault(label, []).append(min(1.0, len(processes) / expected))
    for process in processes:
        read_process(process)  # type: ignore[arg-type]  # bounded() gives what it was given
    with allowed():
        for module in bounded(layer.modules()):
            with allowed():
                repr(module.info)  # type: ignore[attr-defined]  # as above
    log = layer.capability(KernelLog)
    if log is not None:
        with allowed():
            for count, record in enumerate(log.records()):
                repr(record)
                assert count < 1 << 20, "a log without an end"
    sockets = layer.capability(Sockets)
    if sockets is not None:
        with allowed():
            repr(bounded(sockets.sockets()))
    symbols = layer.capability(Symbols)
    if symbols is not None:
        with allowed():
            symbols.find("init_task")
            symbols.at(layer.kernel.found.image.start + 12345)
    totals.skipped.update(layer.info.skipped)


# -- the program ------------------------------------------------------------------------------------------


def one(guest: Guest, kind: str, seed: int, most: float, totals: Totals) -> None:
    """One case, within its time."""
    name = f"--guest {guest.name} --kind {kind} --seed {seed}"
    label = f"{guest.name} {kind}"
    totals.cases[label] += 1
    image = damaged(guest, kind, seed)
    began = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_PROF, most)
        read_all(image, totals, label, guest.processes, name)
    except TooLongError:
        totals.failures.append(f"{name}: more than {most:.0f} s\n{traceback.format_exc(limit=-12)}")
    except Exception:
        totals.failures.append(f"{name}\n{traceback.format_exc(limit=-8)}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        del image
        gc.collect()  # the layer and its memory know one another
    totals.slowest = max(totals.slowest, (time.process_time() - began, name))


def _too_long(*_: object) -> None:
    raise TooLongError


def report(totals: Totals) -> None:
    """Print what came of it."""
    for label, count in sorted(totals.cases.items()):
        shares = totals.shown.get(label, [])
        share = f", {100 * sum(shares) / len(shares):.1f} % of the processes" if shares else ""
        print(f"{label:30} {count:5} cases, {totals.opened[label]:5} opened{share}")
    print("left out:", ", ".join(f"{kind} {count}" for kind, count in totals.skipped.most_common(24)) or "nothing")
    for reason, count in totals.reasons.most_common(8):
        print(f"{count:6} refused: {reason}")
    for case in totals.poor[:20]:
        print(f"poor: {case}")
    print(f"slowest: {totals.slowest[0]:.1f} s of CPU, {totals.slowest[1]}")
    seen: set[str] = set()
    for failure in totals.failures:
        last = failure.strip().rsplit("\n", 2)[-2:]
        if (key := "".join(last)) not in seen:
            seen.add(key)
            print(f"\nFAILED {failure}")
    print(f"{len(totals.failures)} of {sum(totals.cases.values())} cases failed")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", nargs="?", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="run this one case of every guest and kind that is named")
    parser.add_argument("--most", type=float, default=20.0, help="seconds of CPU that a case may take (20)")
    parser.add_argument("--guest", action="append", help=f"guests of the catalogue ({', '.join(GUESTS)})")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="kinds of damage (all)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGPROF, _too_long)
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
    guests = [prepared(name) for name in arguments.guest or GUESTS]
    totals = Totals()
    kinds = arguments.kind or list(KINDS)
    seed, stop = int(time.time()), time.monotonic() + arguments.seconds
    try:
        if arguments.seed is not None:
            for guest in guests:
                for kind in kinds:
                    one(guest, kind, arguments.seed, arguments.most, totals)
        while arguments.seed is None and time.monotonic() < stop:
            seed += 1
            one(guests[seed % len(guests)], kinds[seed // len(guests) % len(kinds)], seed, arguments.most, totals)
    except KeyboardInterrupt:
        pass
    report(totals)
    return 1 if totals.failures else 0


if __name__ == "__main__":
    sys.exit(main())
