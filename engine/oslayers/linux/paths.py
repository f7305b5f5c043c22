"""Paths: from a dentry and its mount to the name that /proc prints.

Sources: Linux fs/d_path.c, include/linux/{dcache,mount,fs}.h, fs/mount.h; releases 5.10 to 7.x.
"""

from __future__ import annotations

from engine.errors import FaultError
from engine.oslayers.linux.objects import Objects, decoded

DEPTH_LIMIT = 4096
FOLDERS_KEPT = 8192
"""Paths of folders that one reader remembers: it may be there for as long as a mount."""
NAME_LIMIT = 256
"""NAME_MAX and its NUL."""
FILE_TYPE = 0xF000
SOCKET, FIFO, REGULAR, BLOCK = 0xC000, 0x1000, 0x8000, 0x6000
"""S_IFMT and kinds of files (include/uapi/linux/stat.h)."""


class Paths:
    """Paths in one operation: what was resolved once is kept as long as it."""

    def __init__(self, objects: Objects) -> None:
        """Raises NotFoundError where the types lack what a path needs."""
        self.objects = objects
        dentry, mount, inode = objects.struct("dentry"), objects.struct("mount"), objects.struct("inode")
        self.parent, self.inode_of = dentry["d_parent"], dentry["d_inode"]
        self.name, self.length = dentry["d_name.name"], dentry["d_name.len"]
        self.hashed = dentry["d_hash.pprev"]
        self.in_mount = mount["mnt"].offset
        self.mount_root = mount["mnt.mnt_root"]
        self.mount_parent, self.mountpoint = mount["mnt_parent"], mount["mnt_mountpoint"]
        self.file_path = objects.struct("file")["f_path"].offset
        path = objects.struct("path")
        self.path_mount, self.path_dentry = path["mnt"], path["dentry"]
        self.file_inode = objects.struct("file")["f_inode"]
        self.mode, self.number, self.block = inode["i_mode"], inode["i_ino"], inode["i_sb"]
        self.device = objects.struct("super_block")["s_dev"]
        self.block_type = objects.struct("super_block")["s_type"]
        self.type_name = objects.struct("file_system_type")["name"]
        self._types: dict[int, str] = {}
        self._folders: dict[tuple[int, int], str] = {}
        self._devices: dict[int, int] = {}

    def of_path(self, address: int) -> str | None:
        """The path of the `struct path` at `address`; None where it is empty. Raises FaultError."""
        mount = self.objects.pointer(address + self.path_mount.offset)
        dentry = self.objects.pointer(address + self.path_dentry.offset)
        return self._path(mount, dentry) if mount and dentry else None

    def of_file(self, file: int) -> str | None:
        """The path of an open file as /proc/PID/fd and maps show it. Raises FaultError."""
        inode = self.objects.pointer(file + self.file_inode.offset)
        dentry = self.objects.pointer(file + self.file_path + self.path_dentry.offset)
        if inode and dentry and self.objects.pointer(dentry + self.parent.offset) == dentry:
            kind = self.objects.value(inode, self.mode) & FILE_TYPE
            name = self.component(dentry)
            if kind == SOCKET:
                return f"socket:[{self.objects.value(inode, self.number)}]"
            if kind == FIFO:
                return f"pipe:[{self.objects.value(inode, self.number)}]"
            if self.file_system(inode) == "anon_inodefs":
                return f"anon_inode:{name}"
            if kind == REGULAR and name != "/":  # simple_dname: memfd, SysV and huge anonymous memory
                return f"/{name} (deleted)"
        return self.of_path(file + self.file_path)

    def inode(self, file: int) -> int:
        """The address of an open file's inode. Raises FaultError."""
        return self.objects.pointer(file + self.file_inode.offset)

    def device_and_number(self, inode: int) -> tuple[tuple[int, int], int]:
        """((major, minor), inode number) of an inode. Raises FaultError."""
        block = self.objects.pointer(inode + self.block.offset)
        if block not in self._devices:
            self._devices[block] = self.objects.value(block, self.device)
        device = self._devices[block]  # MKDEV: 20 bits of minor (include/linux/kdev_t.h)
        return (device >> 20, device & 0xFFFFF), self.objects.value(inode, self.number)

    def file_system(self, inode: int) -> str:
        """The type of the file system of an inode: ext4, tmpfs, sockfs … Raises FaultError."""
        block = self.objects.pointer(inode + self.block.offset)
        if block not in self._types:
            kind = self.objects.pointer(block + self.block_type.offset)
            self._types[block] = self.objects.text(self.objects.pointer(kind + self.type_name.offset), 64)
        return self._types[block]

    def is_deleted(self, dentry: int) -> bool:
        """Whether the name was removed: unhashed, and not the root of its file system. Raises FaultError."""
        if self.objects.pointer(dentry + self.parent.offset) == dentry:
            return False
        return not self.objects.pointer(dentry + self.hashed.offset)

    def _path(self, mount: int, dentry: int) -> str:
        """Names upwards, over the mounts' roots, to the root of the mount that hangs on no other."""
        deleted = self.is_deleted(dentry)
        text = self._folder(mount - self.in_mount, dentry)
        return (text or "/") + (" (deleted)" if deleted else "")

    def _folder(self, mount: int, dentry: int) -> str:
        objects, names, steps = self.objects, [], 0
        known = ""
        start = mount, dentry
        while steps < DEPTH_LIMIT:
            steps += 1
            found = self._folders.get((mount, dentry))
            if found is not None:
                known = found
                break
            parent = objects.pointer(dentry + self.parent.offset)
            if dentry == objects.pointer(mount + self.mount_root.offset) or parent == dentry:
                above = objects.pointer(mount + self.mount_parent.offset)
                if above == mount or not objects.is_pointer(above):
                    break
                dentry, mount = objects.pointer(mount + self.mountpoint.offset), above
                continue
            names.append(self.component(dentry))
            dentry = parent
            if not objects.is_pointer(dentry):
                raise FaultError(dentry)
        path = known + "".join("/" + name for name in reversed(names))
        if len(self._folders) >= FOLDERS_KEPT:
            self._folders.clear()
        self._folders[start] = path
        return path

    def component(self, dentry: int) -> str:
        """The name of a dentry in its directory. Raises FaultError."""
        length = min(self.objects.value(dentry, self.length), NAME_LIMIT)
        text = self.objects.pointer(dentry + self.name.offset)
        return decoded(self.objects.memory.read(text, length))
