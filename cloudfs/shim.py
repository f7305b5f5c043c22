"""The shim: a little C in front of libfuse that adds what pyfuse3 leaves out (`native/fuse_shim.c`).

With it lseek(2) SEEK_DATA and SEEK_HOLE are answered, so that cp, grep and tar pass over what holds no data, closing
a file costs no request, and plain reads and writes of memory no Python (see `shortcuts`). It is compiled at the first
mount, where there are a compiler and the headers of libfuse, and kept in the user's cache directory. Without it all
works, only slower.

It has to be loaded before pyfuse3 is imported: `load`, then `import cloudfs.mount`. Nothing is ever loaded that
another user could have written.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from engine.cache_folder import cache_folders, open_own, private, put
from engine.types import Shortcut

log = logging.getLogger(__name__)

SWITCH = "CLOUDFS_SHIM"
"""Environment variable: `0`, `no` or `off` turn the shim off."""
SOURCE = "fuse_shim.c"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-shared", "-fPIC", "-O2", "-fvisibility=hidden", "-Wl,-z,now")
COMPILE_LIMIT = 30.0
"""Seconds; it takes 0.1."""
FLUSHED = 1 << 62
"""Bit of the handles of files that want to hear of every close(2); the source has it too."""

Reply = Callable[[int, int, int], object]
SeekHandler = Callable[[int, int, int, int, int], None]
"""Called with (request, inode, handle, offset, whence), whence being os.SEEK_DATA or os.SEEK_HOLE."""
_HANDLER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int
)
_COUNTER = ctypes.CFUNCTYPE(None)
_STATES = {
    0: "pyfuse3 did not come by it",
    2: "it was compiled with headers of libfuse {wanted}, and libfuse {running} is in use",
    3: "libfuse {running} lacks functions that it needs",
}
_SERVING = 1

SHORTCUTS = 64
READY, SERVED, BUSY, USED, COUNTS = range(5)
_WRITABLE, _NOWAIT, _TELLS_HOLES = 1, 2, 4


class _Way(ctypes.Structure):
    """`struct shortcut` of the source."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("handle", "base", "size", "mapping", "mapped")),
        ("until", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("descriptor", "pagemap", "pid", "pidfd", "flags")),
    ]


class NoShimError(Exception):
    """The shim cannot be had; the text says why."""


class Shim:
    """The loaded library."""

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path, mode=os.RTLD_GLOBAL | os.RTLD_NOW)
        self._begin = library.cloudfs_shim_begin
        self._begin.argtypes, self._begin.restype = [_HANDLER], None
        self._state = library.cloudfs_shim_state
        self._running = library.cloudfs_shim_running_release
        # Without giving up the interpreter lock: all that it does is one write.
        self._reply = ctypes.PyDLL(path).cloudfs_shim_reply
        self._reply.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.release: int = library.cloudfs_shim_release()
        """Of libfuse's headers: 314 is 3.14."""
        self._handler: object = None
        self._counter: object = None
        self._hasten = library.cloudfs_shim_hasten
        self._hasten.argtypes = [ctypes.c_int64, _COUNTER]
        self._set = ctypes.PyDLL(path).cloudfs_shim_set
        self._set.argtypes, self._set.restype = [ctypes.POINTER(_Way)], None
        shared = (ctypes.c_uint64 * (COUNTS + 4 * SHORTCUTS)).in_dll(library, "cloudfs_shim_words")
        self.words: memoryview = memoryview(shared).cast("B").cast("Q")
        """What both sides write: at `READY`, `SERVED`, `BUSY`, `USED`, and at `COUNTS` four for each shortcut."""

    def begin(self, handler: SeekHandler) -> None:
        """Have `handler` called, in the loop, for the session that is made next. It must raise nothing.

        Every request must be answered once, with `reply`.
        """
        kept = _HANDLER(handler)
        self._begin(kept)
        self._handler = kept

    def end(self) -> None:
        """The session is over: those made from now on have no handler."""
        self._begin(_HANDLER())
        self._handler = self._counter = None

    def hasten(self, spin: float, count: Callable[[], object]) -> bool:
        """Have the session's requests received without waiting, and answered in C where `set` says how.

        It polls for `spin` seconds after each. `count` is called in the loop, before Python gets the next request, when
        any was answered; it must raise nothing. False where that cannot be: then all is as it was.
        """
        self._counter = _COUNTER(count)
        return bool(self._hasten(int(spin * 1e9), self._counter))

    def set(self, handle: int, way: Shortcut | None, until: float = 0.0) -> None:
        """Answer reads and writes of a handle so, `until` then (time.monotonic()); None: leave them to Python.

        Handles are kept by their number modulo `SHORTCUTS`: another one there is forgotten.
        """
        if way is None:
            self._set(_Way(handle=handle))
            return
        flags = _WRITABLE * way.writable | _NOWAIT * way.nowait | _TELLS_HOLES * way.tells_holes
        expires = int(min(way.until, until) * 1e9)
        where = (way.descriptor, way.pagemap, way.pid, way.pidfd)
        self._set(_Way(handle, way.base, way.size, way.mapping, way.mapped, expires, *where, flags))

    def reply(self, request: int, offset: int, error: int) -> None:
        """Answer a request, with `error` where that is not 0; from any thread."""
        self._reply(request, offset, error)

    def why_not(self) -> str | None:
        """Why the session that was made last does without it, or None."""
        state = self._state()
        if state == _SERVING:
            return None
        return _STATES[state].format(wanted=release_name(self.release), running=release_name(self._running()))


def release_name(number: int) -> str:
    """A release of libfuse as people write it."""
    return f"{number // 100}.{number % 100}"


class _Loaded:
    """What `load` came to, once in a process."""

    shim: Shim | None = None
    reason: str | None = "it was not asked for"


def loaded() -> Shim | None:
    """The shim, where `load` succeeded."""
    return _Loaded.shim


def why_not_loaded() -> str | None:
    """Why there is none, or None."""
    return _Loaded.reason


def load(*, wanted: bool = True) -> Shim | None:
    """Load the shim, compiling it where that was not done yet; None, and one line in the log, where it cannot be.

    Does nothing when called again after a success.
    """
    if _Loaded.shim is None:
        try:
            if not wanted or os.environ.get(SWITCH, "").lower() in ("0", "no", "off"):
                raise NoShimError("it is switched off")
            if "pyfuse3" in sys.modules:
                raise NoShimError("pyfuse3 was imported before it")
            _Loaded.shim, _Loaded.reason = _find(), None
        except (NoShimError, OSError, AttributeError, subprocess.SubprocessError) as error:
            _Loaded.reason = str(error)
            log.info("holes are not told to programs that ask for them (no shim): %s", error)
    return _Loaded.shim


def _find() -> Shim:
    source = files("cloudfs").joinpath("native", SOURCE).read_bytes()
    build = functools.partial(_compile, source)
    name = f"shim-{_digest(source)}.so"
    for folder in cache_folders():
        try:
            with private(folder) as number:
                return _kept(number, name, build)
        except (NoShimError, OSError) as error:
            log.debug("no shim in %s: %s", folder, error)
    # Neither home nor cache can be used, or nothing may be executed there: compile it for this process alone.
    with tempfile.TemporaryDirectory(prefix="cloudfs-shim-") as building:
        made = Path(building, name)
        build(made)
        return Shim(str(made))


def _digest(source: bytes) -> str:
    """What a compiled shim depends on: the source, libfuse's headers, the machine, and pyfuse3's own file."""
    parts = [source, _pkg_config("--modversion").encode(), platform.machine().encode(), " ".join(FLAGS).encode()]
    found = importlib.util.find_spec("pyfuse3")
    if found is not None and found.origin:
        status = os.stat(found.origin)
        parts.append(f"{status.st_size} {status.st_mtime_ns}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _pkg_config(option: str) -> str:
    """What pkg-config says of fuse3."""
    if shutil.which("pkg-config") is None:
        raise NoShimError("there is no pkg-config; install the package pkg-config, a C compiler and libfuse3-dev")
    done = subprocess.run(
        ["pkg-config", option, "fuse3"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=COMPILE_LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise NoShimError("the headers of libfuse are not there; install the package libfuse3-dev")
    return done.stdout.strip()


def _compile(source: bytes, output: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NoShimError(f"there is no C compiler ({', '.join(COMPILERS)}); install the package gcc")
    environment = {**os.environ, "LC_ALL": "C"}
    command = [compiler, *FLAGS, *_pkg_config("--cflags").split(), "-x", "c", "-", "-o", str(output), "-ldl"]
    done = subprocess.run(
        command, input=source, capture_output=True, timeout=COMPILE_LIMIT, check=False, env=environment
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").split("\n", 1)[0]
        raise NoShimError(f"{compiler} could not compile it: {said}")


# -- the cache ---------------------------------------------------------------------------------------------


def _kept(folder: int, name: str, build: Callable[[Path], None]) -> Shim:
    """The shim `name` of a cache directory; compiled, and put there in one step, where it is missing."""
    try:
        return _checked(folder, name)
    except FileNotFoundError:
        pass
    except (NoShimError, OSError, AttributeError) as error:
        log.warning("the shim %s is compiled anew: %s", name, error)
    with tempfile.TemporaryDirectory(prefix="cloudfs-shim-") as building:
        made = Path(building, name)
        build(made)
        put(folder, name, made.read_bytes(), 0o500)
    return _checked(folder, name)


def _checked(folder: int, name: str) -> Shim:
    """Load a file that is a plain one, ours, and writable by no other: by its descriptor, so that it stays the same."""
    number = open_own(folder, name)
    try:
        return Shim(f"/proc/{os.getpid()}/fd/{number}")
    finally:
        os.close(number)
