"""What stands behind a mapping: memory alone, a file on a disk of this host, or something one may wait for.

A mapping names its file system by device number alone. The number is looked up in the mount tables, ours
and that of the process; the kernel's internal file systems stand in no table and are known by asking the
kernel for one object of each. What is found nowhere may be anything, a FUSE file system too.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
import platform
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping

from engine.mounts import Backing, backing_of_type, filesystems, shared_memory_device
from engine.mounts import parse_mount_table as parse_mount_table

Device = tuple[int, int]

MEMORY_FILESYSTEMS = frozenset(("tmpfs", "ramfs", "hugetlbfs"))
"""Their holes take memory when they are read through a mapping."""
DEVICE_FILESYSTEMS = frozenset(
    "binfmt_misc bpf cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs mqueue nsfs proc pstore securityfs "
    "sysfs tracefs".split()
)
"""What is mapped of them is a device (/dev/mem, a PCI resource below /sys): never waited for, never touched."""
TABLE_AGE = 1.0
"""Seconds for which this machine's mount table is believed."""

_DEVICE_FIELD = re.compile(rb"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) *(/\[aio\])?")
_MFD_HUGETLB = 0x0004
_HUGE_SHIFT = 26
"""Where among memfd_create's flags the page size's logarithm stands (asm-generic/hugetlb_encode.h)."""
_IO_SETUP = {"x86_64": (206, 207), "aarch64": (0, 1), "riscv64": (0, 1)}
"""Numbers of io_setup and io_destroy."""


class Storage(enum.Enum):
    """Where the bytes of a mapping come from where no page is present."""

    ANONYMOUS = enum.auto()
    """Nowhere: zeros."""
    SHARED_MEMORY = enum.auto()
    """The kernel's own tmpfs or hugetlbfs: MAP_SHARED without a file, memfd, System V."""
    MEMORY_FILE = enum.auto()
    """A file of a mounted tmpfs or hugetlbfs."""
    FILE = enum.auto()
    """Any other file."""
    DEVICE = enum.auto()
    """A device or an object of the kernel: there is nothing to read but the pages that are present."""
    KERNEL = enum.auto()
    """A page of the kernel: [vdso], [vvar]."""


def _device(number: int) -> Device:
    return os.major(number), os.minor(number)


def _device_of(create: Callable[[], int]) -> Iterator[Device]:
    try:
        descriptor = create()
    except (OSError, AttributeError):
        return
    try:
        yield _device(os.fstat(descriptor).st_dev)
    finally:
        os.close(descriptor)


def _huge_page_shifts() -> list[int]:
    try:
        names = os.listdir("/sys/kernel/mm/hugepages")
    except OSError:
        return []
    sizes = [re.fullmatch(r"hugepages-(\d+)kB", name) for name in names]
    return [(int(size[1]) * 1024).bit_length() - 1 for size in sizes if size]


@functools.cache
def huge_page_devices() -> frozenset[Device]:
    """The kernel's internal hugetlbfs, one for each page size."""
    found: set[Device] = set()
    for shift in _huge_page_shifts():
        found.update(_device_of(functools.partial(os.memfd_create, "size", _MFD_HUGETLB | shift << _HUGE_SHIFT)))
    return frozenset(found)


@functools.cache
def shared_memory_devices() -> frozenset[Device]:
    """The kernel's internal tmpfs and hugetlbfs: shared anonymous mappings, memfd, System V."""
    return huge_page_devices() | {shared_memory_device()}


@functools.cache
def object_devices() -> frozenset[Device]:
    """Internal file systems of objects mapped without a disk: anon_inode (KVM, io_uring), sockets."""
    return frozenset(
        [
            *_device_of(lambda: os.eventfd(0, os.EFD_CLOEXEC)),
            *_device_of(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()),
        ]
    )


@functools.cache
def aio_device() -> Device | None:
    """The internal file system of the rings of io_setup(2); None where it cannot be found out."""
    numbers = _IO_SETUP.get(platform.machine())
    if numbers is None:
        return None
    library = ctypes.CDLL(None)
    ring = ctypes.c_ulong(0)
    if library.syscall(ctypes.c_long(numbers[0]), ctypes.c_uint(1), ctypes.byref(ring)) != 0:
        return None
    try:
        # The context that io_setup(2) gives is the address at which the ring is mapped.
        with open("/proc/self/maps", "rb") as maps:
            line = next((text for text in maps if text.startswith(b"%08x-" % ring.value)), b"")
    finally:
        library.syscall(ctypes.c_long(numbers[1]), ring)
    found = _DEVICE_FIELD.match(line)
    return (int(found[1], 16), int(found[2], 16)) if found else None


class MountTable:
    """The mount table of this program, read again when it is older than a second."""

    def __init__(self) -> None:
        self._state: tuple[float, Mapping[Device, str]] = (float("-inf"), {})

    def filesystems(self) -> Mapping[Device, str]:
        """Device → type of file system, of all mounts."""
        when, table = self._state
        now = time.monotonic()
        if now - when > TABLE_AGE:
            table = filesystems()
            self._state = (now, table)
        return table


MOUNTS = MountTable()


@functools.cache
def zero_device() -> tuple[Device, int] | None:
    """Device and inode of /dev/zero, whose private mappings are anonymous memory."""
    try:
        status = os.stat("/dev/zero")
    except OSError:
        return None
    return _device(status.st_dev), status.st_ino


def storage_of(device: Device, inode: int, name: bytes, *, shared: bool) -> Storage:
    """What stands behind a mapping, by what its line in maps says; `name` is needed only without inode."""
    if device == (0, 0) and inode == 0:
        ordinary = name in (b"", b"[heap]") or name.startswith((b"[stack", b"[anon:"))
        return Storage.ANONYMOUS if ordinary else Storage.KERNEL
    if device in shared_memory_devices():
        return Storage.SHARED_MEMORY
    if not shared and (device, inode) == zero_device():
        return Storage.ANONYMOUS
    if device in object_devices():
        return Storage.DEVICE
    filesystem = MOUNTS.filesystems().get(device)
    if filesystem in MEMORY_FILESYSTEMS:
        return Storage.MEMORY_FILE
    return Storage.DEVICE if filesystem in DEVICE_FILESYSTEMS else Storage.FILE


def mapped_devices(lines: Iterator[bytes]) -> dict[Device, bool]:
    """The devices in the lines of a maps file, each with whether it seems to be that of io_setup's rings."""
    found: dict[Device, bool] = {}
    seen: set[bytes] = set()
    for line in lines:
        # Most lines repeat a device: the field is compared before it is taken to pieces.
        field = line.split(b" ", 4)[3]
        if field in seen:
            continue
        match = _DEVICE_FIELD.match(line)
        if match is None:
            continue
        seen.add(field)
        found[int(match[1], 16), int(match[2], 16)] = match[4] is not None
    return found


def _waits(filesystem: str | None) -> bool:
    """Whether a type of file system may wait.

    A local one may itself stand on a file elsewhere (a loop device, an overlay): what guards against that is
    that no page of a file is read in the loop unless it is present, see `NativeMemory.readinto_nowait`.
    """
    if filesystem is None:
        return True
    return filesystem not in DEVICE_FILESYSTEMS and backing_of_type(filesystem) is Backing.REMOTE


def may_wait(devices: dict[Device, bool], own_table: Callable[[], bytes | None]) -> bool:
    """Whether a page of one of these devices may have to be waited for.

    `own_table` gives the process's own mountinfo: it may live in another mount namespace, as in a container.
    """
    unknown = []
    table = MOUNTS.filesystems()
    for device, ring in devices.items():
        if device == (0, 0) or device in shared_memory_devices() or device in object_devices():
            continue
        if device in table:
            if _waits(table[device]):
                return True
        elif not (ring and device == aio_device()):
            unknown.append(device)
    if not unknown:
        return False
    other = parse_mount_table(own_table() or b"")
    return any(_waits(other.get(device)) for device in unknown)
