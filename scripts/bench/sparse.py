"""Files full of holes: what the shim is worth, and how far the mount is from tmpfs itself.

    .venv/bin/python scripts/bench/sparse.py [--quick] [--json FILE]

The file is sparse, with pages of data at equal distances. With the shim programs learn where these are; without it
they read every byte.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harness.daemons import mounted
from harness.machine import (
    CannotMeasureError,
    cloudfs_program,
    measuring,
    quietest_cpu,
    require_fuse,
    scratch_directory,
)
from harness.program import Outcome, finish, options, rounds_of
from harness.table import Goal, Row, Table, at_most

PAGE = 4096
PIECES = 512
SMALL = 1 << 30
"""Bytes of the file that is also read as a whole."""
LARGE = 1 << 40
LIMIT = 60.0
SCRATCH = SMALL + (64 << 20)

Action = Callable[[Path], object]


def make_sparse(path: Path, size: int) -> None:
    """A file of `size` bytes with `PIECES` pages of data, the last one at its end."""
    with open(path, "wb") as file:
        file.truncate(size)
        for number in range(1, PIECES + 1):
            os.pwrite(file.fileno(), b"a line\n".ljust(PAGE, b"."), size // PIECES * number - PAGE)


def walk(path: Path) -> None:
    """Visit every piece of data by lseek(2); CannotMeasureError where there are not as many as were written."""
    found = at = 0
    with open(path, "rb", buffering=0) as file:
        number = file.fileno()
        try:
            while True:
                at = os.lseek(number, os.lseek(number, at, os.SEEK_DATA), os.SEEK_HOLE)
                found += 1
        except OSError:
            pass
    if found != PIECES:
        raise CannotMeasureError(f"{path} has {found} pieces of data instead of {PIECES}: is the shim not in use?")


def open_and_close(path: Path) -> None:
    """One thousand times."""
    for _ in range(1000):
        os.close(os.open(path, os.O_RDONLY))


def command(*words: str) -> Action:
    """A command that is given the path instead of `{}`."""

    def run(path: Path) -> None:
        line = [str(path) if word == "{}" else word for word in words]
        done = subprocess.run(line, capture_output=True, timeout=LIMIT)
        if done.returncode:
            raise CannotMeasureError(f"{words[0]} failed: {done.stderr.decode(errors='replace').strip()}")

    return run


def row(
    title: str, unit: str, scale: float, action: Action, sides: tuple[Path, Path], rounds: int, goal: Goal | None = None
) -> Row:
    """Both sides in turn; `scale` turns seconds into `unit`."""
    samples: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for path, found in zip(sides, samples, strict=True):
            began = time.perf_counter()
            action(path)
            found.append(scale * (time.perf_counter() - began))
    return Row(title, unit, samples[0], samples[1], goal)


@contextmanager
def sides(directory: Path, cpu: int | None) -> Iterator[dict[str, Path]]:
    """The files, by name: `large` on tmpfs and through the mount, `small` through it with and without the shim.

    Each mount has a file of its own: what is read of a hole of tmpfs through a mapping is a hole no more.
    """
    found = {"large": directory / "large.raw"}
    make_sparse(found["large"], LARGE)
    with ExitStack() as stack:
        for name, size, words in (("large-shim", LARGE, ()), ("shim", SMALL, ()), ("plain", SMALL, ("--no-shim",))):
            image, where = directory / f"{name}.raw", directory / name
            make_sparse(image, size)
            line = [str(cloudfs_program()), "mount", "-c", f"raw:{image}", *words, str(where)]
            daemon = stack.enter_context(mounted("cloudfs", line, where, cpu))
            found[name] = daemon.path("connector/raw/phys_mem")
        yield found


def measure(found: dict[str, Path], copy: Path, rounds: int) -> list[Table]:
    """Both tables."""
    plain = (found["plain"], found["shim"])
    disk = (found["large"], found["large-shim"])
    copying = command("cp", "--sparse=always", "{}", str(copy))
    counting = command("grep", "-c", "a line", "{}")
    return [
        Table(
            "What the shim is worth: a file of 1 GiB with 2 MiB of data", "--no-shim", "cloudfs",
            [
                row("open + close", "µs", 1e3, open_and_close, plain, rounds, at_most(0.95)),
                row("cp --sparse=always", "ms", 1e3, copying, plain, rounds, at_most(0.3)),
            ],
        ),
        Table(
            "Holes: a file of 1 TiB with 2 MiB of data", "tmpfs", "cloudfs",
            [
                row("one piece by lseek", "µs", 1e6 / PIECES, walk, disk, rounds),
                row("cp --sparse=always", "ms", 1e3, copying, disk, rounds),
                row("grep -c", "ms", 1e3, counting, disk, rounds),
            ],
        ),
    ]  # fmt: skip


def main() -> int:
    """The exit code."""
    arguments = options(__doc__, quick="less", rounds=(7, 2)).parse_args()

    def work() -> Outcome:
        require_fuse()
        cpu = None if arguments.unpinned else quietest_cpu()
        with scratch_directory(SCRATCH) as directory, sides(directory, cpu) as found, measuring(cpu):
            return Outcome(measure(found, directory / "copy", rounds_of(arguments)))

    return finish(arguments, work, code=2)


if __name__ == "__main__":
    sys.exit(main())
