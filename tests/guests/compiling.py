"""Programs of one file for guests of amd64, whose only program they are."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from guests.kernels import GuestError, MissingError, cache_root, locked, made_whole
from guests.program import FLAGS

_LIMIT = 120.0


def compile_alone(source: Path, output: Path) -> None:
    """Raises MissingError without a compiler, GuestError where it refuses."""
    if not shutil.which("gcc"):
        raise MissingError("gcc is missing, which compiles programs of guests")
    command = ["gcc", *FLAGS, "-o", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT, check=False)
    if done.returncode:
        raise GuestError(f"gcc could not compile {source.name}, a program of guests: {done.stderr[-2000:]}")


def compiled_alone(source: Path) -> bytes:
    """The program that a file becomes; kept by what it is made of."""
    key = hashlib.sha256(" ".join(FLAGS).encode() + source.read_bytes()).hexdigest()[:16]
    place = cache_root() / "programs" / f"{source.stem}-{key}"
    with locked(f"program-{source.stem}"):
        if not place.exists():
            with made_whole(place) as folder:
                compile_alone(source, folder / "init")
    return (place / "init").read_bytes()
