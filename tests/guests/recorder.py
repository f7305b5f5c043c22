"""Makes recordings of guests, once: the cache is keyed by all that goes into one."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from guests.catalogue import GUESTS, MACHINES, Guest
from guests.kernels import GuestError, KernelFiles, MissingError, cache_root, locked, made_whole, provide
from guests.machine import command_line, started
from guests.oracle import Answers, ask, ask_in_interrupt, stop_in_user_mode
from guests.program import program_digest
from guests.recording import FACTS, IMAGE, TRUTH, Recording
from guests.truth import Truth

_SOURCES = ("oracle", "program", "recorder")
_ATTEMPTS = 2
_KEPT_UNUSED = 3 * 86400.0
_BLOCK = 4 << 20
_PAGE = 4096


def recorded(name: str) -> Recording:
    """The recording of a guest of the catalogue, made now if it is not in the cache.

    Raises GuestError: no QEMU, no compiler, no package, or a guest that does not boot.
    """
    guest = GUESTS[name]
    kernel = provide([guest.kernel])[guest.kernel]
    place = cache_root() / "recordings" / f"{name}-{_key(guest, kernel)}"
    with locked(f"recording-{name}"):
        if not place.exists():
            for attempt in range(1, _ATTEMPTS + 1):
                try:
                    with made_whole(place) as folder:
                        _record(guest, kernel, folder)
                    break
                except MissingError:
                    raise
                except GuestError:  # a boot may fail on a host that gives it no time
                    if attempt == _ATTEMPTS:
                        raise
            _forget_unused(guest, place)
    os.utime(place)
    return Recording(place)


def _key(guest: Guest, kernel: KernelFiles) -> str:
    """A sum over the recipe: guest, kernel, program, QEMU and our own code."""
    parts = [guest.name, kernel.package, kernel.version, program_digest(), _qemu_version(guest)]
    parts += command_line(guest, Path("FOLDER"))
    parts += [Path(__file__).with_name(f"{name}.py").read_text() for name in _SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def version_of(binary: str) -> str:
    if not shutil.which(binary):
        raise MissingError(f"{binary} is missing")
    told = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    return told.splitlines()[0]


def _qemu_version(guest: Guest) -> str:
    return version_of(MACHINES[guest.architecture].binary)


def _forget_unused(guest: Guest, place: Path) -> None:
    """Take away what was cut short, and recordings after older recipes that nobody has opened for days."""
    key = "[0-9a-f]" * 16
    for unfinished in place.parent.glob(f".{guest.name}-{key}.*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for other in place.parent.glob(f"{guest.name}-{key}"):
        if other != place and time.time() - other.stat().st_mtime > _KEPT_UNUSED:
            shutil.rmtree(other, ignore_errors=True)


def _record(guest: Guest, kernel: KernelFiles, folder: Path) -> None:
    seconds: dict[str, float] = {}
    with started(guest) as running:
        seconds["boot"] = running.start()
        clock = time.monotonic()
        truth = running.fetch_truth()
        seconds["truth"] = time.monotonic() - clock
        running.finish()
        of_kernel = ask_in_interrupt(running, truth)
        stop_in_user_mode(running, truth)
        clock = time.monotonic()
        sparse_copy(running.ram, folder / IMAGE)
        seconds["copy"] = time.monotonic() - clock
        clock = time.monotonic()
        answers = ask(running, truth, of_kernel)
        seconds["oracle"] = time.monotonic() - clock
        facts = {
            "guest": {
                "name": guest.name, "architecture": guest.architecture, "kernel": kernel.package,
                "version": kernel.version, "qemu": _qemu_version(guest),
                "command": command_line(guest, Path("FOLDER")), "memory": guest.memory << 20,
                "page_size": truth.page_size, "keeper": truth.keeper,
                "seconds": {name: round(spent, 2) for name, spent in seconds.items()},
            },
            "paging": guest.paging,
            "extents": running.extents,
            "notes": running.serial.notes(),
        }  # fmt: skip
    _write(folder, facts, truth, answers)


def _write(folder: Path, facts: Mapping[str, object], truth: Truth, answers: Answers) -> None:
    translations = {"as_kernel": answers.as_kernel}
    if answers.as_user:
        translations["as_user"] = answers.as_user
    (folder / FACTS).write_text(json.dumps(
        {**facts, "registers": answers.registers, "secrets": truth.secrets, "translations": translations}
    ))  # fmt: skip
    with zipfile.ZipFile(folder / TRUTH, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in truth.items():
            archive.writestr(name, content)
        for name, text in answers.texts.items():
            archive.writestr(f"monitor/{name}", text)


def sparse_copy(source: Path, target: Path) -> None:
    """A copy with holes for pages of zeros."""
    with open(source, "rb") as reading, open(target, "wb") as writing:
        size = os.fstat(reading.fileno()).st_size
        writing.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(reading.fileno(), at, os.SEEK_DATA) // _PAGE * _PAGE
            except OSError:  # nothing but a hole up to the end
                return
            block = os.pread(reading.fileno(), min(_BLOCK, size - at), at)
            pages = np.frombuffer(block, np.uint64).reshape(-1, _PAGE // 8)
            used = pages.any(axis=1)
            edges = np.flatnonzero(np.diff(np.concatenate(([False], used, [False])).astype(np.int8)))
            for first, stop in edges.reshape(-1, 2) * _PAGE:
                os.pwrite(writing.fileno(), block[first:stop], at + int(first))
            at += len(block)


def describe(recording: Recording) -> str:
    """One line for people."""
    told, answers = recording.facts["guest"], recording.translations
    mapped = sum(pa is not None for _, pa in answers)
    seconds = " ".join(f"{name} {spent}" for name, spent in told["seconds"].items())
    size = recording.image.stat().st_blocks * 512 >> 20
    notes = "; ".join(recording.facts["notes"]) or "-"
    return (
        f"{told['name']:18} {recording.facts['paging']:24} {size:4} MiB, {mapped} mapped,"
        f" {len(answers) - mapped} not; seconds: {seconds}; notes: {notes}"
    )
