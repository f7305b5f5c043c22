"""Mount points: what is mounted where, dead mounts, unmounting, aborting a FUSE connection.

Imports neither pyfuse3 nor trio. Nothing here opens or stats a path on a mount that might hang: facts come
from /proc/self/mountinfo (proc_pid_mountinfo(5)), and the one question to a mount, whether it is dead, is
asked in a thread that is given up when no answer comes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
import shutil
import stat as st
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from cloudfs import serving
from engine.errors import (
    AccessDeniedError,
    EngineError,
    InvalidArgumentError,
    NotFoundError,
    TargetBusyError,
)
from engine.records import dataclass

log = logging.getLogger(__name__)

KIND = "fuse.cloudfs"
"""The file system type of our mounts."""
FUSERMOUNT = "fusermount3"
CONNECTIONS = Path("/sys/fs/fuse/connections")
"""Where fusectl is mounted, if it is: one directory per connection."""
MTAB = Path("/etc/mtab")
"""A link to /proc/mounts, made when a system starts; without it the helper unmounts nothing for users."""

NO_MTAB = f"there is no {MTAB}, which {FUSERMOUNT} needs; as root run `ln -s ../proc/self/mounts {MTAB}`"

# umount2(2), <sys/mount.h>
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

PROBE_LIMIT = 2.0
"""Seconds given to a mount to say that it lives."""
USERS_NAMED = 4
LINKS_FOLLOWED = 40


class MountError(EngineError):
    """The mount cannot be made, or has ended otherwise than it should."""

    code = "mount"


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo."""

    mountpoint: str
    kind: str
    source: str
    device: tuple[int, int]

    @property
    def connection(self) -> Path:
        """The directory of its FUSE connection in fusectl; it need not exist."""
        return CONNECTIONS / str(self.device[1])


def mounts() -> Iterator[MountEntry]:
    """All mounts that this process sees, in the order in which they were made."""
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        before, dash, behind = line.partition(b" - ")
        fields, rest = before.split(b" "), behind.split(b" ")
        if not dash or len(fields) < 5 or len(rest) < 2:
            continue
        major, _, minor = fields[2].partition(b":")
        yield MountEntry(_plain(fields[4]), _plain(rest[0]), _plain(rest[1]), (int(major), int(minor)))


def _plain(field: bytes) -> str:
    """A field of mountinfo without its octal escapes (space, tab, newline, backslash)."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), field))


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute path without `.`, `..` and doubled slashes; of links only those in front of a `..` are followed."""
    parts = os.path.join(os.getcwd(), os.fspath(path)).split("/")
    if ".." in parts:  # behind a link it leads elsewhere than its letters say
        cut = len(parts) - parts[::-1].index("..")
        parts = [os.path.realpath("/".join(parts[:cut])), *parts[cut:]]
    return os.path.normpath("/".join(parts))


def resolve(path: str | os.PathLike[str]) -> str:
    """The absolute path with links followed, without asking the file system that is mounted there."""
    mounted = {entry.mountpoint for entry in mounts()}
    at = absolute(path)
    for _ in range(LINKS_FOLLOWED):
        head, tail = os.path.split(at.rstrip("/"))
        if tail in ("", ".", ".."):
            return os.path.realpath(at)
        at = os.path.join(os.path.realpath(head), tail)
        if at in mounted:
            return at
        try:
            at = os.path.join(os.path.dirname(at), os.readlink(at))
        except OSError:
            return at
    raise InvalidArgumentError(f"{os.fspath(path)} cannot be followed: more than {LINKS_FOLLOWED} links")


def find_mount(path: str | os.PathLike[str]) -> MountEntry | None:
    """What is mounted at `path` (the uppermost, if several are), or None."""
    at = resolve(path)
    found = None
    for entry in mounts():
        if entry.mountpoint == at:
            found = entry
    return found


def standing(mountpoint: str) -> list[tuple[bytes, ...]]:
    """The directories below a mount point in which processes stand, as names from there on.

    Links of /proc are read as text, which waits for nobody; who stands in another mount namespace, or may not be
    looked at, is not seen.
    """
    top = os.fsencode(mountpoint).rstrip(b"/") + b"/"
    return [tuple(place[len(top) :].split(b"/")) for place in _working_directories() if place.startswith(top)]


def _working_directories() -> Iterator[bytes]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield os.readlink(b"/proc/%b/cwd" % name.encode())


def is_mounted(path: str | os.PathLike[str]) -> bool:
    """Whether one of our mounts stands at `path`, alive or dead."""
    entry = find_mount(path)
    return entry is not None and entry.kind == KIND


def is_dead(mountpoint: str, limit: float = PROBE_LIMIT) -> bool:
    """Whether the daemon of a FUSE mount is gone: listing it gives ENOTCONN.

    stat(2) still answers from the kernel's cache. A mount that does not answer in `limit` seconds hangs,
    which is not the same.
    """
    answers: list[int] = []

    def probe() -> None:
        try:
            os.listdir(mountpoint)
        except OSError as error:
            answers.append(error.errno or 0)

    thread = threading.Thread(target=probe, name="cloudfs-probe", daemon=True)
    thread.start()
    thread.join(limit)
    return errno.ENOTCONN in answers


def umount2(mountpoint: str, flags: int) -> None:
    """umount2(2), which the standard library lacks. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), ctypes.c_int(flags | UMOUNT_NOFOLLOW)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), mountpoint)


def abort(entry: MountEntry) -> None:
    """End a FUSE connection from the kernel's side: whoever waits for it gets an error.

    By fusectl where that is mounted (the owner may), else by umount2(MNT_FORCE) (root may), which aborts
    even where it then fails with EBUSY. Raises AccessDeniedError.
    """
    try:
        (entry.connection / "abort").write_bytes(b"1\n")
    except OSError:
        try:
            umount2(entry.mountpoint, MNT_FORCE)
        except OSError as error:
            if error.errno == errno.EPERM:
                raise AccessDeniedError(
                    f"{entry.mountpoint} cannot be aborted: that needs root, or {CONNECTIONS} "
                    "(mount -t fusectl fusectl there)"
                ) from None
            if error.errno != errno.EBUSY:
                raise


def detach(mountpoint: str) -> None:
    """Unmount lazily: at once for everyone who comes, at the last close for those who hold it open."""
    _unmount(mountpoint, lazily=True)


def unmount(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Unmount one of our mounts, as `cloudfs umount` does.

    A mount whose daemon is gone is detached, though files of it be open. `force` aborts the connection
    first, so that whoever waits for the mount is freed; a user who may not do that has his own daemon ended, by
    SIGKILL where it does not listen to SIGTERM. Raises NotFoundError, InvalidArgumentError (another
    kind of mount), TargetBusyError, AccessDeniedError.
    """
    entry = find_mount(path)
    if entry is None:
        raise NotFoundError(f"{os.fspath(path)} cannot be unmounted: nothing is mounted there")
    if entry.kind != KIND:
        raise InvalidArgumentError(
            f"{entry.mountpoint} is not unmounted: it is a {entry.kind} mount, not one of cloudfs; use umount(8)"
        )
    if force:
        try:
            abort(entry)
        except AccessDeniedError as error:
            if not serving.end_daemon(entry.device, lambda: find_mount(entry.mountpoint) != entry):
                raise AccessDeniedError(
                    f"{error}; nor is it served by a process of this user that could be ended"
                ) from None
        _detach_if_there(entry)  # a daemon that lives unmounts it too
        return
    try:
        _unmount(entry.mountpoint, lazily=False)
    except TargetBusyError:
        if not is_dead(entry.mountpoint):
            raise TargetBusyError(
                f"{entry.mountpoint} is busy{_by_whom(entry.mountpoint)}: close what is open there, cd out of it "
                "first, or end it for everyone with --force"
            ) from None
        detach(entry.mountpoint)


def _detach_if_there(entry: MountEntry) -> None:
    try:
        if find_mount(entry.mountpoint) == entry:
            detach(entry.mountpoint)
    except (OSError, EngineError):
        if find_mount(entry.mountpoint) == entry:
            raise


def _unmount(mountpoint: str, *, lazily: bool) -> None:
    try:
        umount2(mountpoint, MNT_DETACH if lazily else 0)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise TargetBusyError(f"{mountpoint} is busy") from None
        if error.errno != errno.EPERM:
            raise
        _unmount_by_helper(mountpoint, lazily=lazily)


def _unmount_by_helper(mountpoint: str, *, lazily: bool) -> None:
    """By the setuid helper of FUSE, which lets users unmount what they mounted."""
    program = shutil.which(FUSERMOUNT)
    if program is None:
        raise AccessDeniedError(
            f"{mountpoint} cannot be unmounted: that needs root, or {FUSERMOUNT} of the package fuse3"
        )
    command = [program, "-u", *(["-z"] if lazily else []), "--", mountpoint]
    done = subprocess.run(
        command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode == 0:
        return
    if "busy" in done.stderr.lower():
        raise TargetBusyError(f"{mountpoint} is busy")
    if not MTAB.exists():
        raise AccessDeniedError(f"{mountpoint} cannot be unmounted: {NO_MTAB}")
    raise AccessDeniedError(f"{mountpoint} cannot be unmounted: {' '.join(done.stderr.split())}")


def _by_whom(mountpoint: str) -> str:
    """« (by 12 (bash), …)»: who has a file or directory of the mount open, as far as we may see."""
    names = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if _uses(pid, mountpoint):
            try:
                name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
            except OSError:
                continue
            names.append(f"{pid} ({name})")
            if len(names) == USERS_NAMED:
                names.append("…")
                break
    return f" (used by {', '.join(names)})" if names else ""


def _uses(pid: int, mountpoint: str) -> bool:
    """By links alone: maps and cmdline of a process that hangs on the mount hang too."""
    below = mountpoint.rstrip("/") + "/"
    try:
        links = [f"/proc/{pid}/cwd", f"/proc/{pid}/root"]
        links += [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return False
    for link in links:
        try:
            text = os.readlink(link)
        except OSError:
            continue
        if text == mountpoint or text.startswith(below):
            return True
    return False


def prepare(path: str | os.PathLike[str], *, nonempty: bool = False) -> str:
    """The absolute path of a directory that can be mounted on.

    A dead mount of ours that stands there is cleared away first. Raises MountError with a sentence.
    """
    name = os.fspath(path)
    entry = find_mount(name)
    if entry is not None and entry.kind == KIND:
        if not is_dead(entry.mountpoint):
            raise MountError(
                f"{name} cannot be mounted on: {entry.source} is mounted there already; "
                f"unmount it with `cloudfs umount {name}`"
            )
        detach(entry.mountpoint)
        log.warning("a mount of %s was cleared away from %s: its daemon is gone", entry.source, name)
    try:
        mode = os.stat(name).st_mode
        if not st.S_ISDIR(mode):
            raise MountError(f"{name} cannot be mounted on: it is not a directory")
        with os.scandir(name) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError:
        raise MountError(f"{name} cannot be mounted on: it does not exist; make it with `mkdir {name}`") from None
    except OSError as error:
        raise MountError(f"{name} cannot be mounted on: {error.strerror}") from None
    if not empty and not nonempty:
        raise MountError(
            f"{name} cannot be mounted on: it is not empty, and what is in it would be hidden; "
            "take another directory, or pass --nonempty"
        )
    return os.path.realpath(name)
