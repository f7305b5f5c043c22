"""What of a machine a mount can use: what it needs, and what only makes it faster or safer.

Everything is tried as a mount would, but for mounting.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from cloudfs import mountpoint, shim
from engine.records import dataclass

BACKING_DEVICES = Path("/sys/class/bdi")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing, whether a mount uses it, and what follows from that."""

    name: str
    used: bool
    detail: str
    needed: bool = False
    """Nothing can be mounted without it."""


def examine() -> list[Finding]:
    """All findings. Imports pyfuse3, behind the shim."""
    shim.load()
    try:
        import pyfuse3
    except ImportError as error:
        return [Finding("pyfuse3", used=False, detail=f"it cannot be imported: {error}", needed=True)]
    return list(_findings(pyfuse3))


def _findings(pyfuse3: ModuleType) -> Iterator[Finding]:
    release = _libfuse_release(pyfuse3)
    libfuse = "unknown" if release is None else shim.release_name(release)
    yield Finding("pyfuse3", used=True, detail=f"{pyfuse3.__version__} with libfuse {libfuse}", needed=True)
    yield _device()
    yield _helper()
    yield _fast_loop(pyfuse3)
    yield _holes(release)
    yield _abort()
    yield _read_ahead()


def _libfuse_release(pyfuse3: ModuleType) -> int | None:
    """That of the libfuse which pyfuse3 was linked to: 314 is 3.14."""
    try:
        return int(ctypes.CDLL(str(pyfuse3.__file__)).fuse_version())
    except (OSError, AttributeError):
        return None


def _device() -> Finding:
    from cloudfs.mount import DEVICE, MountError, check_device

    try:
        check_device()
    except MountError as error:
        return Finding(DEVICE, used=False, detail=str(error), needed=True)
    return Finding(DEVICE, used=True, detail="it can be opened", needed=True)


def _helper() -> Finding:
    name = mountpoint.FUSERMOUNT
    if shutil.which(name):
        return Finding(name, used=True, detail="it unmounts when the daemon was killed")
    left = "a mount whose daemon was killed stays until `cloudfs umount`; install the package fuse3"
    return Finding(name, used=False, detail=left)


def _fast_loop(pyfuse3: ModuleType) -> Finding:
    import trio

    from cloudfs.fast_loop import behaves, hooked_trio, why_not

    reason = why_not(pyfuse3)
    if reason is None and not trio.run(behaves, hooked_trio()):
        reason = f"trio {trio.__version__} behaves differently"
    return Finding("fast loop", reason is None, reason or "small reads cost a fifth of the CPU")


def _holes(release: int | None) -> Finding:
    loaded = shim.loaded()
    reason = shim.why_not_loaded()
    if loaded is not None and release != loaded.release:
        reason = "it was compiled with headers of another libfuse than pyfuse3 uses"
    if reason is None:
        return Finding("shim", used=True, detail="programs pass over holes, and small reads cost no Python")
    return Finding("shim", used=False, detail=f"reads are slower, and holes are read as zeros: {reason}")


def _abort() -> Finding:
    name = "fusectl"
    if any(entry.mountpoint == str(mountpoint.CONNECTIONS) for entry in mountpoint.mounts()):
        return Finding(name, used=True, detail="the watchdog and `cloudfs umount --force` end a mount that hangs by it")
    instead = "umount2(MNT_FORCE) is used" if os.geteuid() == 0 else "`cloudfs umount --force` ends the daemon instead"
    return Finding(name, used=False, detail=f"it is not mounted on {mountpoint.CONNECTIONS}; {instead}")


def _read_ahead() -> Finding:
    """Root may always write there, unless /sys is read-only as in containers."""
    some = next(BACKING_DEVICES.glob("*/read_ahead_kb"), None) if BACKING_DEVICES.is_dir() else None
    if some is not None and os.access(some, os.W_OK):
        return Finding("read-ahead", used=True, detail="cached files are read in requests of 1 MiB")
    reason = f"only root may set it below {BACKING_DEVICES}" if os.geteuid() else f"{BACKING_DEVICES} is read-only"
    return Finding("read-ahead", used=False, detail=f"cached files are read in requests of 128 KiB: {reason}")
