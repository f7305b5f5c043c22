"""Mounts: /proc/PID/mounts and mountinfo, of the mount namespace of a process and seen from its root directory.

Options that a file system's own code prints (`size=` of tmpfs, `data=` of ext4) are left out: only that code knows
where they lie.

Sources: Linux fs/proc_namespace.c, fs/mount.h, fs/namespace.c (a list up to 6.7, a tree from 6.8 on),
include/linux/{mount,fs}.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import FaultError, NotFoundError
from engine.oslayers.linux.objects import Objects
from engine.oslayers.linux.paths import DEPTH_LIMIT, Paths
from engine.oslayers.linux.tasks import Tasks
from engine.oslayers.linux.walks import red_black_tree, settled_ring
from engine.records import dataclass

MOUNT_LIMIT = 1 << 17
"""fs.mount-max is 100,000 by default (fs/namespace.c)."""
TEXT_LIMIT = 4096
MNT_READONLY, MNT_SHARED, MNT_UNBINDABLE, MNT_CURSOR = 0x40, 0x1000, 0x2000, 0x1000_0000
SB_RDONLY = 1
_MOUNT_OPTIONS = ((0x01, "nosuid"), (0x02, "nodev"), (0x04, "noexec"), (0x08, "noatime"), (0x10, "nodiratime"),
                  (0x20, "relatime"), (0x80, "nosymfollow"))  # fmt: skip
"""MNT_… of include/linux/mount.h, in the order in which show_mnt_opts prints them."""
_SYSTEM_OPTIONS = ((0x10, "sync"), (0x80, "dirsync"), (0x40, "mand"), (0x200_0000, "lazytime"))
"""SB_… of include/linux/fs.h, as show_sb_opts prints them."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount as a process sees it."""

    number: int
    parent: int
    device: tuple[int, int]
    source: str | None
    kind: str
    """The type of its file system."""
    root: str
    """The directory of the file system that is mounted."""
    place: str
    """Where it is mounted, from the process's root directory on."""
    flags: int
    system_flags: int
    peers: int
    """Number of its peer group, where it is shared; else 0."""
    master: int
    """Number of the peer group from which it receives; 0: from none."""

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written through it."""
        return bool(self.flags & MNT_READONLY or self.system_flags & SB_RDONLY)

    def mounts_line(self) -> str:
        """Its line of /proc/PID/mounts."""
        options = "ro" if self.read_only else "rw"
        options += _named(self.system_flags, _SYSTEM_OPTIONS) + _named(self.flags, _MOUNT_OPTIONS)
        source = escaped("none" if self.source is None else self.source, "#")
        return f"{source} {escaped(self.place)} {escaped(self.kind, '#')} {options} 0 0\n"

    def mountinfo_line(self) -> str:
        """Its line of /proc/PID/mountinfo."""
        options = ("ro" if self.flags & MNT_READONLY else "rw") + _named(self.flags, _MOUNT_OPTIONS)
        tags = f" shared:{self.peers}" if self.flags & MNT_SHARED else ""
        tags += f" master:{self.master}" if self.master else ""
        tags += " unbindable" if self.flags & MNT_UNBINDABLE else ""
        system = ("ro" if self.system_flags & SB_RDONLY else "rw") + _named(self.system_flags, _SYSTEM_OPTIONS)
        source = escaped("none" if self.source is None else self.source, "#")
        major, minor = self.device
        return (
            f"{self.number} {self.parent} {major}:{minor} {escaped(self.root)} {escaped(self.place)} {options}{tags} - "
            f"{escaped(self.kind, '#')} {source} {system}\n"
        )


def _named(flags: int, names: tuple[tuple[int, str], ...]) -> str:
    return "".join(f",{name}" for flag, name in names if flags & flag)


def escaped(text: str, more: str = "") -> str:
    r"""Space, tab, line feed and backslash as a backslash and three octal digits (mangle_path)."""
    for character in "\\ \t\n" + more:
        text = text.replace(character, f"\\{ord(character):03o}")
    return text


class MountTable:
    """Reads the mounts of a process in one operation."""

    def __init__(self, objects: Objects, tasks: Tasks) -> None:
        """Raises NotFoundError where the kernel's types lack what this needs."""
        self.objects = objects
        self.tasks = tasks
        self.paths = Paths(objects)
        self.mount, self.system = objects.struct("mount"), objects.struct("super_block")
        self.space = objects.struct("mnt_namespace")
        self.proxy = objects.struct("nsproxy")["mnt_ns"]
        self.root = objects.struct("fs_struct")["root"].offset
        self.kind_name = objects.struct("file_system_type")["name"]

    def of(self, task: int) -> Iterator[Mount]:
        """The mounts that a task sees, in the order of /proc; none for what has no namespace left (a zombie).

        Raises FaultError where the namespace cannot be read; a mount that cannot be read is counted.
        """
        objects = self.objects
        proxy = objects.pointer(task + self.tasks.task["nsproxy"].offset)
        place = objects.pointer(task + self.tasks.task["fs"].offset)
        if not objects.is_pointer(proxy) or not objects.is_pointer(place):
            return
        space = objects.pointer(proxy + self.proxy.offset)
        top = objects.pointer(place + self.root + self.paths.path_mount.offset)
        root = objects.pointer(place + self.root + self.paths.path_dentry.offset)
        for address in self._members(space):
            try:
                found = self._read(address, (top - self.paths.in_mount, root))
            except (FaultError, NotFoundError):
                objects.skipped["mount"] += 1
                continue
            if found is not None:
                yield found

    def _members(self, space: int) -> list[int]:
        objects = self.objects
        tree, node = self.space.get("mounts.rb_root", "mounts"), self.mount.get("mnt_node")
        if tree is not None and node is not None and tree.size >= objects.word:
            return list(red_black_tree(objects, space + tree.offset, node, MOUNT_LIMIT))
        listed, link = self.space["list"], self.mount["mnt_list"]
        return settled_ring(objects, space + listed.offset, link, MOUNT_LIMIT, kind="mount list")[0]

    def _read(self, address: int, root: tuple[int, int]) -> Mount | None:
        """One mount; None where it does not lie below the process's root directory. Raises FaultError."""
        objects, mount = self.objects, self.mount
        flags = objects.value(address, mount["mnt.mnt_flags"])
        if flags & MNT_CURSOR and "mnt_list" in mount:
            return None
        top = objects.pointer(address + mount["mnt.mnt_root"].offset)
        place = self._path(address, top, root)
        if place is None:
            return None
        block = objects.pointer(address + mount["mnt.mnt_sb"].offset)
        device = objects.value(block, self.system["s_dev"])
        name, master = (objects.pointer(address + mount[member].offset) for member in ("mnt_devname", "mnt_master"))
        parent = objects.pointer(address + mount["mnt_parent"].offset)
        return Mount(
            objects.value(address, mount["mnt_id"]), objects.value(parent, mount["mnt_id"]),
            (device >> 20, device & 0xFFFFF), objects.text(name, TEXT_LIMIT) if name else None, self._kind(block),
            self._path_within(top), place, flags, objects.value(block, self.system["s_flags"]) & 0xFFFF_FFFF,
            objects.value(address, mount["mnt_group_id"]),
            objects.value(master, mount["mnt_group_id"]) if master else 0,
        )  # fmt: skip

    def _kind(self, block: int) -> str:
        objects = self.objects
        kind = objects.pointer(block + self.system["s_type"].offset)
        name = objects.text(objects.pointer(kind + self.kind_name.offset), 64)
        member = self.system.get("s_subtype")
        subtype = objects.pointer(block + member.offset) if member is not None else 0
        return f"{name}.{objects.text(subtype, 64)}" if subtype else name

    def _path_within(self, dentry: int) -> str:
        """The path of a directory in its own file system."""
        names: list[str] = []
        deleted = self.paths.is_deleted(dentry)
        for _ in range(DEPTH_LIMIT):
            parent = self.objects.pointer(dentry + self.paths.parent.offset)
            if parent == dentry:
                break
            names.append(self.paths.component(dentry))
            dentry = parent
        return ("".join("/" + name for name in reversed(names)) or "/") + ("//deleted" if deleted else "")

    def _path(self, mount: int, dentry: int, root: tuple[int, int]) -> str | None:
        """The path from a root directory to a directory of a mount; None where it does not lie below."""
        objects, paths = self.objects, self.paths
        names: list[str] = []
        for _ in range(DEPTH_LIMIT):
            if (mount, dentry) == root:
                return "".join("/" + name for name in reversed(names)) or "/"
            parent = objects.pointer(dentry + paths.parent.offset)
            if dentry == objects.pointer(mount + paths.mount_root.offset) or parent == dentry:
                above = objects.pointer(mount + paths.mount_parent.offset)
                if above == mount or not objects.is_pointer(above):
                    return None
                dentry, mount = objects.pointer(mount + paths.mountpoint.offset), above
                continue
            names.append(paths.component(dentry))
            dentry = parent
        return None
