"""Mounts as the user `nobody`, in a mount namespace of its own: `python as_user.py DIRECTORY` as root.

/dev/fuse may be root's alone on this machine: in the namespace a device that everyone may open lies over it.
Everything is imported before the rights are dropped, since the interpreter may lie where nobody may look.
Prints one JSON object of what was seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import mmap
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import made_up_tree

from cloudfs import mount as mounting
from cloudfs import mountpoint as mountpoints
from cloudfs import serving
from engine.errors import EngineError

CLONE_NEWNS = 0x20000
PR_SET_DUMPABLE = 4
NOBODY = 65534
LIMIT = 50
libc = ctypes.CDLL(None, use_errno=True)


def own_namespace(top: Path) -> Path:
    """A namespace with a /dev/fuse for all, and a mount point that belongs to nobody."""
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    device, mountpoint = top / "fuse", top / "mount"
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(10, 229))
    device.chmod(0o666)
    subprocess.run(["mount", "--bind", device, "/dev/fuse"], check=True)
    top.chmod(0o755)
    mountpoint.mkdir()
    os.chown(mountpoint, NOBODY, NOBODY)
    return mountpoint


def as_nobody(call: Callable[[], object]) -> tuple[int, int]:
    """Fork a child that is `nobody` and writes what `call` gives: its pid and a descriptor to read from."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    signal.alarm(LIMIT)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    libc.prctl(PR_SET_DUMPABLE, 1)  # that it may look at itself in /proc
    try:
        said = str(call())
    except (EngineError, OSError) as error:
        said = f"{type(error).__name__}: {error}"
    os.write(writer, said.encode())
    os._exit(0)


def answer_of(call: Callable[[], object]) -> str:
    pid, reader = as_nobody(call)
    with open(reader) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


class Daemon:
    def __init__(self, mountpoint: Path, **options: object) -> None:
        told, tell = os.pipe()

        def serve() -> str:
            mounting.mount(
                made_up_tree.make_tree(),
                mountpoint,
                mounting.MountOptions(**options),
                ready=lambda: os.write(tell, b"ready"),
            )
            return "unmounted"

        self.pid, self._said = as_nobody(serve)
        os.close(tell)
        self.ready = os.read(told, 5) == b"ready"
        os.close(told)

    def end(self, number: int | None = None) -> str:
        """What it said at its end."""
        if number is not None:
            os.kill(self.pid, number)
        with open(self._said) as file:
            said = file.read()
        os.waitpid(self.pid, 0)
        return said


def read_own_page(mountpoint: Path) -> str:
    """What only the loop could deliver, asked for through the loop: see test_mount_core."""
    file = os.open(mountpoint / "cached", os.O_RDONLY)
    mapping = mmap.mmap(file, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    memory = os.open(mountpoint / "inline" / str(os.getpid()), os.O_RDONLY)
    return os.pread(memory, 16, address).hex()


def daemon_for_root(mountpoint: Path) -> bool:
    with serving.daemon_of(mountpoints.find_mount(mountpoint).device) as daemon:
        return daemon is not None


def main() -> None:
    logging.disable(logging.CRITICAL)
    signal.alarm(LIMIT)
    mountpoint = own_namespace(Path(sys.argv[1]))
    seen: dict[str, object] = {}

    daemon = Daemon(mountpoint)
    seen["text"] = answer_of((mountpoint / "text").read_text)
    seen["owner"] = answer_of(lambda: (mountpoint / "text").stat().st_uid)
    seen["foreign mode"] = answer_of(lambda: (mountpoint / "read-only").open("r+b"))
    seen["unmount"] = answer_of(lambda: mountpoints.unmount(mountpoint))
    seen["end"] = daemon.end()

    daemon = Daemon(mountpoint, auto_unmount=False)
    seen["signal"] = daemon.end(signal.SIGTERM)
    seen["mounted after the signal"] = mountpoints.is_mounted(mountpoint)

    daemon = Daemon(mountpoint, auto_unmount=False)
    daemon.end(signal.SIGKILL)
    seen["mounted after kill -9"] = mountpoints.is_mounted(mountpoint)
    seen["unmount of the dead"] = answer_of(lambda: mountpoints.unmount(mountpoint))
    seen["mounted after that"] = mountpoints.is_mounted(mountpoint)

    # Without fusectl, and with a file of it open all the while: a daemon that lives, one that hears no SIGTERM, and
    # a daemon of another user.
    mountpoints.CONNECTIONS = Path("/nonexistent")
    serving.TERM_LIMIT = 1.0
    for way in ("running", "stopped"):
        daemon = Daemon(mountpoint, auto_unmount=False)
        holder, _ = as_nobody(lambda: (os.open(mountpoint / "text", os.O_RDONLY), signal.pause()))
        if way == "stopped":
            os.kill(daemon.pid, signal.SIGSTOP)
        seen[f"force of a {way} daemon"] = answer_of(lambda: mountpoints.unmount(mountpoint, force=True))
        seen[f"mounted after force, {way}"] = mountpoints.is_mounted(mountpoint)
        seen[f"end of a {way} daemon"] = daemon.end(signal.SIGKILL if mountpoints.is_mounted(mountpoint) else None)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)

    daemon = Daemon(mountpoint, auto_unmount=False)
    seen["daemon of nobody for root"] = daemon_for_root(mountpoint)
    device = mountpoints.find_mount(mountpoint).device
    daemon.end(signal.SIGKILL)
    with serving.announced(device):  # root says that it serves it
        seen["force of another's daemon"] = answer_of(lambda: mountpoints.unmount(mountpoint, force=True))
    seen["unmount after that"] = answer_of(lambda: mountpoints.unmount(mountpoint))

    daemon = Daemon(mountpoint, allow_other=True)
    seen["allow_other"] = "allowed" if daemon.ready else daemon.end()
    if daemon.ready:
        daemon.end(signal.SIGTERM)

    daemon = Daemon(mountpoint, stall_limit=1.0, auto_unmount=False)
    began = time.monotonic()
    seen["own page"] = answer_of(lambda: read_own_page(mountpoint))
    seen["seconds"] = time.monotonic() - began
    seen["watchdog"] = daemon.end()
    seen["mounted after the watchdog"] = mountpoints.is_mounted(mountpoint)
    with contextlib.suppress(OSError):
        mountpoints.umount2(str(mountpoint), mountpoints.MNT_DETACH)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
