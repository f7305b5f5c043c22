"""The lines of /proc/PID/maps (proc_pid_maps(5)) as Regions, read in pieces: a process may have a million."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

from engine.types import Region, Rights

_CHUNK = 1 << 16
_RIGHTS = {
    bytes((read, write, execute)): (Rights.READ if read == ord("r") else Rights.NONE)
    | (Rights.WRITE if write == ord("w") else Rights.NONE)
    | (Rights.EXECUTE if execute == ord("x") else Rights.NONE)
    for read in b"r-"
    for write in b"w-"
    for execute in b"x-"
}


def read_lines(descriptor: int) -> Iterator[bytes]:
    """The lines of a text file without their newline, a piece of it at a time."""
    rest = b""
    while chunk := os.read(descriptor, _CHUNK):
        lines = (rest + chunk).split(b"\n")
        rest = lines.pop()
        yield from lines
    if rest:
        yield rest


def parse_region(line: bytes) -> Region:
    r"""One line of a maps file.

    The kernel writes a newline in a name as `\012` (fs/proc/task_mmu.c); it is one again in `path`. The
    ` (deleted)` behind the name of a file that is gone stays.
    """
    span, permissions, offset, device, inode, rest = (line + b" ").split(b" ", 5)
    start, _, stop = span.partition(b"-")
    major, _, minor = device.partition(b":")
    path = rest[:-1].lstrip(b" ")
    first = int(start, 16)
    return Region(
        first,
        int(stop, 16) - first,
        _RIGHTS[permissions[:3]],
        permissions[3] == ord("s"),
        int(offset, 16),
        (int(major, 16), int(minor, 16)),
        int(inode),
        os.fsdecode(path.replace(b"\\012", b"\n")) if path else "",
    )


def parse_regions(descriptor: int) -> Iterator[Region]:
    """The regions of an open maps file, ascending and disjoint, though the process goes on meanwhile."""
    done = 0
    for line in read_lines(descriptor):
        region = parse_region(line)
        if region.start < done < region.stop:
            moved = done - region.start
            region = replace(region, start=done, size=region.size - moved, offset=region.offset + moved)
        if region.start >= done:
            done = region.stop
            yield region
