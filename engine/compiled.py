"""C that is compiled on first use, where there is a compiler, and kept in the user's cache directory.

Nothing is ever loaded that another user could have written. What is loaded this way only makes things faster: whoever
asks for it has to do without it as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import platform
import pwd
import secrets
import shutil
import stat as st
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

log = logging.getLogger(__name__)

COMPILERS = ("cc", "gcc", "clang")
COMPILE_LIMIT = 30.0
"""Seconds; it takes half of one."""
_turns = itertools.count(1)
_Library = TypeVar("_Library")


class NotCompiledError(Exception):
    """The library cannot be had; the text says why."""


@dataclass(frozen=True)
class Source:
    """A library in one C file."""

    name: str
    text: bytes
    options: Sequence[str] = ("-O2",)

    @property
    def file_name(self) -> str:
        """Its name in the cache: another one for another text, machine or set of options."""
        parts = [self.text, platform.machine().encode(), " ".join(self.options).encode()]
        digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
        return f"{self.name}-{digest[:32]}.so"


def load(source: Source, open_library: Callable[[str], _Library]) -> _Library:
    """What `open_library` makes of the path of the compiled library.

    Raises NotCompiledError where there is no compiler, or no place that is this user's own and lets files be executed.
    """
    reasons = []
    for folder in _cache_folders():
        try:
            with _private(folder) as number:
                return _kept(number, source, open_library)
        except (NotCompiledError, OSError, AttributeError) as error:
            reasons.append(f"{folder}: {error}")
    raise NotCompiledError("; ".join(reasons) or "this user has no home directory")


def _compile(source: Source, output: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise NotCompiledError(f"there is no C compiler ({', '.join(COMPILERS)}); install the package gcc")
    command = [compiler, "-shared", "-fPIC", "-fvisibility=hidden", *source.options, "-x", "c", "-", "-o", str(output)]
    try:
        done = subprocess.run(
            command, input=source.text, capture_output=True, timeout=COMPILE_LIMIT, check=False,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotCompiledError(f"{compiler} took longer than {COMPILE_LIMIT:.0f} s") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").split("\n", 1)[0]
        raise NotCompiledError(f"{compiler} could not compile it: {said}")


def _cache_folders() -> Iterator[Path]:
    """Where it may be kept: below $XDG_CACHE_HOME or ~/.cache; the true home where sudo left another's."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        yield Path(given, "cloudfs")
        return
    homes = [os.environ.get("HOME", "")]
    with contextlib.suppress(KeyError):
        homes.append(pwd.getpwuid(os.geteuid()).pw_dir)
    yield from (Path(home, ".cache", "cloudfs") for home in dict.fromkeys(homes) if os.path.isabs(home))


@contextlib.contextmanager
def _private(folder: Path) -> Iterator[int]:
    """A descriptor of `folder`, made where it is not there; NotCompiledError where others may write to it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    nearest = missing[-1].parent if missing else folder
    if nearest.stat().st_uid != os.geteuid():
        raise NotCompiledError(f"{nearest} belongs to another user")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_owner(number, str(folder))
        yield number
    finally:
        os.close(number)


def _check_owner(number: int, name: str) -> None:
    status = os.fstat(number)
    if status.st_uid != os.geteuid():
        raise NotCompiledError(f"{name} belongs to another user")
    if status.st_mode & (st.S_IWGRP | st.S_IWOTH):
        raise NotCompiledError(f"{name} can be written by other users")


def _kept(folder: int, source: Source, open_library: Callable[[str], _Library]) -> _Library:
    """The library of a cache directory; compiled, and put there in one step, where it is missing."""
    name = source.file_name
    try:
        return _checked(folder, name, open_library)
    except FileNotFoundError:
        pass
    except (NotCompiledError, OSError, AttributeError) as error:
        log.warning("%s is compiled anew: %s", name, error)
    with tempfile.TemporaryDirectory(prefix="cloudfs-") as building:
        made = Path(building, name)
        _compile(source, made)
        _store(folder, name, made.read_bytes())
    return _checked(folder, name, open_library)


def _store(folder: int, name: str, data: bytes) -> None:
    """Put a file there in one step: of several processes the last one wins, and all bring the same."""
    temporary = f".{name}.{secrets.token_hex(8)}"
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o500, dir_fd=folder)
    try:
        with open(number, "wb") as file:
            file.write(data)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise


def _checked(folder: int, name: str, open_library: Callable[[str], _Library]) -> _Library:
    """Load a file that is a plain one, ours, and writable by no other: by its descriptor, so that it stays the same."""
    number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        if not st.S_ISREG(os.fstat(number).st_mode):
            raise NotCompiledError(f"{name} is no plain file")
        _check_owner(number, name)
        # The C library knows what it has loaded by name: none may be had twice, and numbers of descriptors are.
        return open_library(f"/proc/{os.getpid()}/fd/{'./' * next(_turns)}{number}")
    finally:
        os.close(number)
