"""Which filesystem a device number belongs to: decides what may block and what must not be touched.

Reads tables of mounts (proc_pid_mountinfo(5)) and nothing else: a path is never looked at, since
looking at a path of a filesystem that does not answer hangs.
"""

from __future__ import annotations

import enum
import functools
import os
import re
import stat
from collections.abc import Mapping

_MFD_HUGETLB = 4
"""include/uapi/linux/memfd.h; bits 26 and up are the binary logarithm of the size of a page."""
_HUGE_BITS = (16, 21, 23, 25, 28, 29, 30, 34)


class Backing(enum.Enum):
    """How reading a file of a filesystem behaves."""

    MEMORY = "memory"
    """tmpfs and the like: never waits."""
    DISK = "disk"
    """A local disk: waits for what is not in the page cache, and ends."""
    REMOTE = "remote"
    """FUSE, network, or unknown: may wait for ever, or for ourselves."""


_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs", "rootfs"})
_DISK = frozenset(
    "bcachefs btrfs cramfs erofs exfat ext2 ext3 ext4 f2fs hfs hfsplus iso9660 jfs minix msdos nilfs2 ntfs ntfs3 "
    "overlay reiserfs romfs squashfs ubifs udf ufs vfat xfs zfs".split()
)


def backing_of_type(filesystem: str) -> Backing:
    """What a filesystem type of mountinfo means; an unknown one is taken for remote."""
    if filesystem in _MEMORY:
        return Backing.MEMORY
    return Backing.DISK if filesystem in _DISK else Backing.REMOTE


def parse_mount_table(text: bytes) -> dict[tuple[int, int], str]:
    """(major, minor) → filesystem type, of the text of a mountinfo file; the kernel escapes spaces in all fields."""
    found = {}
    for major, minor, filesystem in re.findall(rb"^\d+ \d+ (\d+):(\d+) .*? - (\S+)", text, re.MULTILINE):
        found[int(major), int(minor)] = filesystem.decode("ascii", "replace")
    return found


def filesystems() -> Mapping[tuple[int, int], str]:
    """(major, minor) → filesystem type of every mount of this process's mount namespace, as it is now."""
    with open("/proc/self/mountinfo", "rb") as file:
        return parse_mount_table(file.read())


@functools.cache
def shared_memory_device() -> tuple[int, int]:
    """The device of memfd, shared anonymous and System V memory: the kernel's own mount, in no mountinfo."""
    descriptor = os.memfd_create("cloudfs-probe")
    try:
        device = os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)
    return os.major(device), os.minor(device)


@functools.cache
def huge_memory_devices() -> frozenset[tuple[int, int]]:
    """The devices of memfds of huge pages: mounts of the kernel's own, one for each size of page that it has."""
    found = set()
    for bits in _HUGE_BITS:
        try:
            descriptor = os.memfd_create("cloudfs-probe", _MFD_HUGETLB | bits << 26)
        except (OSError, AttributeError):  # not this size; a kernel without them
            continue
        try:
            device = os.fstat(descriptor).st_dev
        finally:
            os.close(descriptor)
        found.add((os.major(device), os.minor(device)))
    return frozenset(found)


def filesystem_of(descriptor: int) -> str | None:
    """The filesystem type of the mount through which a file was opened; None where it is none that is seen here.

    By the mount's number (proc_pid_fdinfo(5)): of a subvolume the device number tells nothing, and memory that
    programs share (memfd, System V) lies on mounts of the kernel's own.
    """
    with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
        number = re.search(rb"^mnt_id:\s*(\d+)$", file.read(), re.MULTILINE)
    if number is None:
        return None
    with open("/proc/self/mountinfo", "rb") as file:
        found = re.search(rb"^%s \d+ .*? - (\S+)" % number[1], file.read(), re.MULTILINE)
    return None if found is None else found[1].decode("ascii", "replace")


def backing_of_file(descriptor: int, mounts: Mapping[tuple[int, int], str] | None = None) -> Backing:
    """How reading this open file behaves; `mounts` are those of a process that sees others than this one does."""
    status = os.fstat(descriptor)
    if stat.S_ISBLK(status.st_mode):
        return Backing.DISK
    device = status.st_dev
    key = (os.major(device), os.minor(device))
    if key == shared_memory_device() or key in huge_memory_devices():
        return Backing.MEMORY
    found = filesystems().get(key) or (mounts or {}).get(key)
    if found is not None:
        return backing_of_type(found)
    # btrfs gives subvolumes device numbers of their own: known by its path's mount instead.
    return Backing.DISK if "btrfs" in filesystems().values() else Backing.REMOTE
