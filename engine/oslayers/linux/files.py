"""What a process has open: its table of descriptors, and the file behind each.

Sources: Linux include/linux/{fdtable,fs,fs_struct,eventpoll}.h, fs/file.c; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.kernel import Kernel
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.paths import FIFO, FILE_TYPE, REGULAR, SOCKET, Paths
from engine.oslayers.linux.tasks import Tasks
from engine.records import dataclass
from engine.types import OpenFileInfo

KINDS = {REGULAR: "file", 0x4000: "directory", SOCKET: "socket", FIFO: "pipe", 0xA000: "link", 0x2000: "device",
         0x6000: "device"}  # fmt: skip
"""Kinds of files by S_IFMT (include/uapi/linux/stat.h)."""
DESCRIPTOR_LIMIT = 1 << 20
"""fs.nr_open by default (sysctl_nr_open of fs/file.c)."""


@dataclass(frozen=True, slots=True)
class OpenDescriptor:
    """One descriptor of a process."""

    number: int
    file: int
    """The kernel's address of its `struct file`."""
    path: str | None
    """As readlink(2) of /proc/PID/fd/N gives it; None where it cannot be read."""
    flags: int | None
    """As open(2) took them (f_flags)."""
    position: int | None
    inode: int | None
    """The kernel's address of its inode."""


class Descriptors:
    """Reads the descriptors of processes in one operation."""

    def __init__(self, kernel: Kernel, tasks: Tasks) -> None:
        """Raises NotFoundError where the kernel's types lack what this needs."""
        self.objects: Objects = kernel.objects()
        self.task = tasks.task
        self.paths = Paths(self.objects)
        table, files = self.objects.struct("fdtable"), self.objects.struct("files_struct")
        self.table_of = files["fdt"]
        self.most, self.array, self.closing = table["max_fds"], table["fd"], table["close_on_exec"]
        file = self.objects.struct("file")
        self.size = self.objects.struct("inode")["i_size"]
        self.flags, self.position, self.inode = file["f_flags"], file["f_pos"], file["f_inode"]

    def files(self, task: int) -> list[tuple[int, int]]:
        """(number, address of the `struct file`) of every open descriptor, ascending. Empty for a kernel thread."""
        objects = self.objects
        try:
            files = objects.pointer(task + self.task["files"].offset)
            if not objects.is_pointer(files):
                return []
            table = objects.pointer(files + self.table_of.offset)
            count = min(objects.value(table, self.most), DESCRIPTOR_LIMIT)
            data = objects.memory.read(objects.pointer(table + self.array.offset), count * objects.word)
        except FaultError:
            objects.skipped["descriptor table"] += 1
            return []
        pointers = np.frombuffer(data, objects.word_type)
        numbers = np.flatnonzero(pointers).tolist()
        return [(number, int(pointers[number])) for number in numbers if objects.is_pointer(int(pointers[number]))]

    def closes_on_exec(self, task: int, number: int) -> bool:
        """Whether a descriptor is closed when its process runs another program. Raises FaultError."""
        objects = self.objects
        table = objects.pointer(objects.pointer(task + self.task["files"].offset) + self.table_of.offset)
        bits = objects.pointer(table + self.closing.offset)
        return bool(objects.memory.u8(bits + number // 8) >> number % 8 & 1)

    def of(self, task: int) -> Iterator[OpenDescriptor]:
        """Every open descriptor of a task, ascending."""
        for number, file in self.files(task):
            yield self.describe(number, file)

    def describe(self, number: int, file: int) -> OpenDescriptor:
        """One descriptor; what cannot be read of it is None."""
        objects = self.objects
        path: str | None = None
        flags = position = inode = None
        try:
            flags, position = objects.value(file, self.flags), objects.value(file, self.position)
            inode = objects.pointer(file + self.inode.offset)
            path = self.paths.of_file(file)
        except FaultError:
            objects.skipped["file"] += 1
        return OpenDescriptor(number, file, path, flags, position, inode)

    def info(self, number: int, file: int) -> OpenFileInfo:
        """One descriptor as the engine's record."""
        objects, one = self.objects, self.describe(number, file)
        kind = inode = device = size = None
        try:
            if one.inode:
                mode = objects.value(one.inode, self.paths.mode) & FILE_TYPE
                kind = KINDS.get(mode, "anonymous")
                device, inode = self.paths.device_and_number(one.inode)
                size = objects.value(one.inode, self.size) if kind in ("file", "directory") else None
        except FaultError:
            objects.skipped["file"] += 1
        if one.path is not None and one.path.startswith("anon_inode:"):
            kind = "anonymous"
        return OpenFileInfo(number, one.path, kind, one.flags, one.position, inode, device, size)

    def folder(self, task: int, name: str) -> str | None:
        """The path of a task's `pwd` or `root`; None where it has none, or it cannot be read."""
        try:
            place = self.objects.pointer(task + self.task["fs"].offset)
            if not self.objects.is_pointer(place):
                return None
            return self.paths.of_path(place + self.objects.struct("fs_struct")[name].offset)
        except (FaultError, NotFoundError):
            return None
