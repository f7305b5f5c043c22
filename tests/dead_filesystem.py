"""A FUSE file system that stops answering, in a process of its own: `python dead_filesystem.py FOLDER`.

Two files, `cached` and `direct`, of 16 MiB each; the first mebibyte is answered at once, the rest never. A third one,
`closed`, is never opened: who tries waits for ever. So does who looks up any other name but `missing`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

SIZE = 16 << 20
ANSWERED = 1 << 20
NAMES = (b"cached", b"direct", b"closed")
MNT_FORCE, MNT_DETACH = 1, 2


def abort(*folders: Path | str) -> None:
    """End the connections of these mounts and take them away, without a look at them.

    Root does it by umount2(2), others by what the kernel lends the owner of a connection, where fusectl is mounted.
    """
    libc = ctypes.CDLL(None)
    for folder in map(os.fspath, folders):
        number = connection_of(folder)
        if libc.umount2(os.fsencode(folder), MNT_FORCE) and number is not None:
            with contextlib.suppress(OSError):
                Path(f"/sys/fs/fuse/connections/{number}/abort").write_text("1")
        if libc.umount2(os.fsencode(folder), MNT_DETACH) and number is not None:
            subprocess.run(["fusermount3", "-uz", folder], check=False, timeout=30, stderr=subprocess.DEVNULL)


def connection_of(folder: str) -> int | None:
    """The number of the FUSE connection of the last mount there: the minor of its device (proc_pid_mountinfo(5))."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        words = line.split(" ")
        if words[4].encode(errors="surrogateescape").decode("unicode_escape") == folder:
            found = int(words[2].partition(":")[2])
    return found


GUARD = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    sys.path.insert(0, sys.argv[1])
    from dead_filesystem import abort
    abort(*(word for word in sys.argv[3:] if not word.isdigit()))
    for word in sys.argv[3:]:
        if word.isdigit():
            try: os.kill(int(word), signal.SIGKILL)
            except OSError: pass
"""


@contextlib.contextmanager
def guarded(seconds: float, *words: object) -> Iterator[None]:
    """After so many seconds another process aborts these mounts and kills these PIDs, whatever hangs here."""
    command = [sys.executable, "-c", GUARD, str(Path(__file__).parent), str(seconds), *map(str, words)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate(timeout=30)


@contextlib.contextmanager
def dead_filesystem(folder: Path, limit: float = 60) -> Iterator[Path]:
    """The file system at `folder`, aborted at the end, and after `limit` seconds anyhow."""
    folder.mkdir(exist_ok=True)
    daemon = subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True)
    with guarded(limit, folder, daemon.pid):
        try:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == "ready\n"
            yield folder
        finally:
            abort(folder)
            daemon.kill()
            daemon.communicate(timeout=10)


def main() -> None:
    import pyfuse3
    import trio

    class Operations(pyfuse3.Operations):
        def init(self) -> None:
            threading.Timer(0.1, lambda: print("ready", flush=True)).start()

        def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o755
            entry.st_size = 0 if inode == 1 else SIZE
            entry.entry_timeout = entry.attr_timeout = 300
            return entry

        async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
            return self._attributes(inode)

        async def lookup(self, parent: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
            if name == b"missing":
                raise pyfuse3.FUSEError(2)
            if name not in NAMES:
                await trio.sleep_forever()
            return self._attributes(2 + NAMES.index(name))

        async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
            if NAMES[inode - 2] == b"closed":
                await trio.sleep_forever()
            direct = NAMES[inode - 2] == b"direct"
            return pyfuse3.FileInfo(fh=inode, direct_io=direct, keep_cache=True)

        async def read(self, fh: int, off: int, size: int) -> bytes:
            if off + size > ANSWERED:
                await trio.sleep_forever()
            return b"a" * size

    pyfuse3.init(Operations(), sys.argv[1], {"fsname=dead", "default_permissions"})
    with contextlib.suppress(BaseException):
        trio.run(pyfuse3.main)


if __name__ == "__main__":
    main()
