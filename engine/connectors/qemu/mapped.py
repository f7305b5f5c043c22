"""QEMU's mappings as memory: files and shared memory by their own descriptors, all else through the process.

A file is opened through /proc/PID/map_files or /proc/PID/fd, never by its name: QEMU may have a mount namespace of its
own, the name may be gone, or mean another file by now. What a guest in a guest maps is read through its process.

A hole of such a file is a page that the guest has not touched: it may get one when words are gathered from there,
as it would when the guest looked there itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence

from engine.connectors.qemu.finding import Guest
from engine.connectors.qemu.presence import Presence
from engine.connectors.qemu.ram import Run, region_at
from engine.connectors.qemu.sources import UntouchedRam
from engine.errors import EngineError, UnusableTargetError
from engine.file_memory import FileMemory
from engine.joined_memory import JoinedMemory
from engine.memory import Memory
from engine.memory_map import MappedMemory, MapRange, MemoryMap
from engine.mounts import Backing, filesystem_of, huge_memory_devices, parse_mount_table
from engine.records import dataclass
from engine.types import Region

SELDOM = 0.001
"""Seconds after which a read of a file asks again whether its QEMU is still there."""
DESCRIPTORS_MOST = 1 << 16
MOUNTS_MOST = 16 << 20
"""Bytes of a table of mounts; the kernel's limit is 100,000 of them (fs.mount-max)."""


@dataclass(frozen=True, slots=True)
class Part:
    """`size` bytes of a source from `start` on, which stand at the physical address `base`."""

    base: int
    source: Memory
    start: int
    size: int


class Mapped:
    """Opens what a guest's QEMU has mapped; the same file once."""

    def __init__(self, guest: Guest, found: Sequence[Run], *, writable: bool) -> None:
        self.guest = guest
        self.runs = found
        self.writable = writable
        self.notes: list[str] = []
        self._files: dict[tuple[tuple[int, int], int], FileMemory | None] = {}

    def physical(self, ranges: Sequence[MapRange]) -> tuple[Memory, MemoryMap]:
        """Physical memory made of ranges of QEMU's addresses, and the map of where its bytes lie.

        Addresses in the map are those in the one file, or else those in QEMU.
        """
        parts = [part for entry in ranges for part in self._parts(entry)]
        sources = list(dict.fromkeys(part.source for part in parts))
        if len(sources) == 1:
            source = sources[0]
            memory_map = MemoryMap([MapRange(part.base, part.size, part.start) for part in parts])
            whole = memory_map.coalesced()
            if len(whole) == 1 and (whole[0].base, whole[0].real_base, whole[0].length) == (0, 0, source.size):
                return source, memory_map
            return MappedMemory(source, memory_map), memory_map
        ascending = sorted(parts, key=lambda part: part.base)
        memory = JoinedMemory([(part.base, part.source.window(part.start, part.size)) for part in ascending])
        return memory, MemoryMap(ranges)

    def _parts(self, entry: MapRange) -> list[Part]:
        """A range cut at QEMU's mappings."""
        found: list[Part] = []
        done = 0
        while done < entry.length:
            at = entry.real_base + done
            region = region_at(self.runs, at)
            if region is None:
                raise UnusableTargetError(f"{self.guest} maps no memory at {at:#x} that it reads and writes")
            size = min(region.stop - at, entry.length - done)
            file = self._file(region)
            source: Memory = self._process(region) if file is None else file
            start = at if file is None else at - region.start + region.offset
            found.append(Part(entry.base + done, source, start, size))
            done += size
        return found

    def _process(self, region: Region) -> Memory:
        memory = self.guest.process.memory
        if self.guest.on_host or region.shared or region.path:
            return memory
        return self._untouched(memory)

    def _untouched(self, memory: Memory) -> Memory:
        if self._zeros is None:
            self._zeros = UntouchedRam(memory)
        return self._zeros

    _zeros: UntouchedRam | None = None

    def _file(self, region: Region) -> FileMemory | None:
        """The file that a mapping shares with others; None where it is to be read through the process."""
        if not self.guest.on_host or not region.shared or not region.inode:
            return None
        key = region.device, region.inode
        if key not in self._files:
            self._files[key] = self._opened(region)
        return self._files[key]

    def _opened(self, region: Region) -> FileMemory | None:
        reason = "no descriptor of it is open"
        mounts = self._mounts()
        for path in self._paths(region):
            try:
                status = os.stat(path)
                if status.st_ino != region.inode or _device(status.st_dev) != region.device:
                    continue
                huge = mounts.get(region.device) == "hugetlbfs" or _is_huge(path)
                if huge and self.writable:
                    reason = "files of huge pages are written through the process"
                    break
                file = FileMemory(path, writable=self.writable, fills_holes=not huge, mounts=mounts)
            except (OSError, EngineError) as error:
                reason = str(error)
                continue
            if file.backing is Backing.REMOTE:
                reason = "it lies on a filesystem that may have to be waited for"
                break
            return file
        self.notes.append(f"{region.path} is read through the process: {reason}")
        return None

    def _mounts(self) -> Mapping[tuple[int, int], str]:
        """What is mounted where QEMU is: a filesystem may be seen there alone."""
        try:
            with open(f"/proc/{self.guest.pid}/mountinfo", "rb") as file:
                return parse_mount_table(file.read(MOUNTS_MOST))
        except OSError:
            return {}

    def _paths(self, region: Region) -> list[str]:
        """Where the file can be opened; by a name in no case."""
        folder = f"/proc/{self.guest.pid}"
        paths = [f"{folder}/map_files/{region.start:x}-{region.stop:x}"]
        with contextlib.suppress(OSError):
            for name in os.listdir(f"{folder}/fd")[:DESCRIPTORS_MOST]:
                with contextlib.suppress(OSError):
                    if os.readlink(f"{folder}/fd/{name}") == region.path:
                        paths.append(f"{folder}/fd/{name}")
        return paths

    def looker(self, presence: Presence) -> Callable[[], None]:
        """How often it is asked after a read whether the process is still there.

        What is read through a process is its own, or fails: on this host it is known by its descriptors, in a guest
        its memory looks for itself after every read (`Process.memory`). A file stays as it was.
        """
        return presence.glance(SELDOM) if any(file is not None for file in self._files.values()) else _nothing

    def close(self) -> None:
        """Give back what was opened."""
        for file in self._files.values():
            if file is not None:
                file.close()


def _nothing() -> None:
    """No look is needed."""


def _device(number: int) -> tuple[int, int]:
    return os.major(number), os.minor(number)


def _is_huge(path: str) -> bool:
    number = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        device = _device(os.fstat(number).st_dev)
        return device in huge_memory_devices() or filesystem_of(number) == "hugetlbfs"
    finally:
        os.close(number)
