"""Modules of this host: the images in a process, and the modules of the kernel.

A process's images are found in its memory and its list of mappings alone; no path is looked at. Only what
memory does not hold, the section table, is looked for in the file itself, with the care of `_open_mapped_file`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.elf_modules import MappedImage, executable_first
from engine.errors import AccessDeniedError, InvalidArgumentError, NotFoundError
from engine.file_memory import FileMemory
from engine.formats.elf import build_id_of, loaded_images, mapped_images
from engine.oslayer import Module, Process, ProcFiles
from engine.oslayers.native.storage import may_wait, parse_mount_table
from engine.types import ModuleInfo, Region, SectionInfo

_DELETED = " (deleted)"


# -- images of a process -------------------------------------------------------------------------------


def process_modules(process: Process) -> Iterator[Module]:
    """The images mapped into a process: the executable first, the others ascending by base.

    Reads the list of mappings, its auxiliary vector, and 2 KiB of every mapped file that may be an image: may
    block where the process's memory may. Where that memory may not be read (Yama) the files that are mapped with
    code in them are given, without architecture and build-id. Raises ProcessExitedError, AccessDeniedError.
    """
    regions = list(process.regions())
    try:
        images = loaded_images(process.memory, regions)
    except AccessDeniedError:
        images = mapped_images(regions)
    return iter([NativeModule(process, image) for image in executable_first(process, images)])


class NativeModule(MappedImage):
    """One image in a process of this host, as it was when the modules were listed."""

    @contextlib.contextmanager
    def file(self) -> Iterator[FileMemory | None]:
        """See `MappedImage.file`; never a file on FUSE or a network."""
        file = _open_mapped_file(self.process, self.image.region)
        try:
            yield file
        finally:
            if file is not None:
                file.close()


# -- the file behind a mapping -------------------------------------------------------------------------


def _open_mapped_file(process: Process, region: Region) -> FileMemory | None:
    """The file that `region` maps, if it may be opened; None where not. May block, as disks do.

    Only where the mapping's device is a local file system. The file is looked at before it is opened, so that
    no device or FIFO ever is, and it must be the very one that is mapped.
    """
    pid, files = process.info.pid, process.capability(ProcFiles)

    @functools.cache
    def table() -> bytes:
        try:
            return files.read("mountinfo") if files is not None else b""
        except (NotFoundError, AccessDeniedError):
            return b""

    if not region.inode or may_wait({region.device: False}, table):
        return None
    mapped = f"/proc/{pid}/map_files/{region.start:x}-{region.stop:x}"
    path = region.path.removesuffix(_DELETED)
    # The kernel shows paths as they are below our root, or, in another mount namespace, below the process's.
    for name, sure in ((mapped, True), (f"/proc/{pid}/root{path}", False), (path, False)):
        flags = os.O_PATH | os.O_CLOEXEC | (0 if sure else os.O_NOFOLLOW)
        with contextlib.suppress(OSError, InvalidArgumentError):
            descriptor = os.open(name, flags)
            try:
                if _is_mapped_file(descriptor, region, table, sure=sure):
                    return FileMemory(f"/proc/self/fd/{descriptor}")
            finally:
                os.close(descriptor)
    return None


def _is_mapped_file(descriptor: int, region: Region, table: Callable[[], bytes], *, sure: bool) -> bool:
    """Whether this is a regular file, and the one that the region maps.

    A link in map_files leads to the mapped file and to no other: `sure`. A path must lead to the same inode of
    the same device; where stat(2) gives devices of its own (btrfs, overlay), that of the file's mount counts.
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return False
    if sure:
        return True
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    return status.st_ino == region.inode and region.device in (device, _mount_device(descriptor, table))


def _mount_device(descriptor: int, table: Callable[[], bytes]) -> tuple[int, int] | None:
    """The device of the mount that an open file was found in (proc_pid_fdinfo(5), mnt_id)."""
    found = re.search(r"^mnt_id:\s*(\d+)", Path(f"/proc/self/fdinfo/{descriptor}").read_text(), re.MULTILINE)
    if found is None:
        return None
    line = re.compile(rb"^%s .*$" % found[1].encode(), re.MULTILINE)
    match = line.search(Path("/proc/self/mountinfo").read_bytes()) or line.search(table())
    return next(iter(parse_mount_table(match[0])), None) if match is not None else None


# -- modules of the kernel -----------------------------------------------------------------------------


class KernelModule(Module):
    """A loaded module of this host's kernel, as /proc/modules and sysfs show it; its memory cannot be read."""

    def __init__(self, name: str, size: int, base: int | None, directory: Path) -> None:
        self._name = name
        self._size = size
        self._base = base
        self._directory = directory

    @property
    def info(self) -> ModuleInfo:
        """See `Module.info`; the build-id is read from sysfs."""
        return ModuleInfo(self._name, None, self._base, self._size, _kernel_architecture(), self._build_id())

    @property
    def memory(self) -> None:
        """None: this host's kernel memory is not shown."""
        return None

    def _build_id(self) -> str | None:
        try:
            data = _read_start(self._directory / "notes" / ".note.gnu.build-id", _NOTE_LIMIT)
        except OSError:
            return None
        return build_id_of(data, "<" if sys.byteorder == "little" else ">")

    def sections(self) -> Iterator[SectionInfo]:
        """See `Module.sections`: ascending by base; nothing where the kernel hides addresses.

        The kernel tells where a section begins, not how long it is: the size is what lies before the next
        one, for the last of a range up to the end of the page. Raises AccessDeniedError.
        """
        directory = self._directory / "sections"
        try:
            names = os.listdir(directory)
        except OSError:
            return
        starts: list[tuple[int, str]] = []
        for name in names:
            try:
                text = _read_start(directory / name, 64)
            except PermissionError:
                raise AccessDeniedError(f"{directory / name} cannot be read{_as_root()}") from None
            except OSError:
                continue
            with contextlib.suppress(ValueError):
                starts.append((int(text, 16), name))
        starts = sorted(entry for entry in starts if entry[0])
        for number, (start, name) in enumerate(starts):
            stop = starts[number + 1][0] if number + 1 < len(starts) else start + self._size + 1
            # Ranges of code, of data, of what is only read lie far apart since Linux 6.4.
            yield SectionInfo(name, start, stop - start if stop - start <= self._size else -start % 4096 or 4096)


_NOTE_LIMIT = 4096


def _read_start(path: Path, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(size) or b""


@functools.cache
def _kernel_architecture() -> str:
    """The machine of the kernel, by the names that ELF images are called by."""
    machine = platform.machine()
    if re.fullmatch(r"i[3-6]86", machine):
        return "i386"
    return "arm" if re.fullmatch(r"armv\d.*l", machine) else machine


def _as_root() -> str:
    return "; run as root" if os.geteuid() else ", root though it is, as in a container"


def kernel_modules(
    listing: str | Path = "/proc/modules", directory: str | Path = "/sys/module"
) -> Iterator[KernelModule]:
    """The modules of the kernel in the order of /proc/modules (the latest first); none where it has no such file.

    A base is None where the kernel hides addresses (kernel.kptr_restrict) from this user. Lines that cannot
    be understood are left out.
    """
    try:
        lines = Path(listing).read_bytes().splitlines()
    except FileNotFoundError:
        return
    except PermissionError:
        raise AccessDeniedError(f"{listing} cannot be read by this user{_as_root()}") from None
    for line in lines:
        fields = os.fsdecode(line).split()
        try:
            name, size, base = fields[0], int(fields[1]), int(fields[5], 16)
        except (IndexError, ValueError):
            continue
        if "/" not in name and name not in (".", ".."):
            yield KernelModule(name, size, base or None, Path(directory) / name)
