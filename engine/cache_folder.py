"""The user's cache folder: where it is, and that nobody else can write to it.

    for folder in cache_folders():            $XDG_CACHE_HOME/cloudfs, or ~/.cache/cloudfs
        with private(folder) as number:       a descriptor of it, made where it is not there
            ...

What is kept there only makes things faster: whoever asks for it has to do without it as well.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat as st
from collections.abc import Iterator
from pathlib import Path


class NotPrivateError(OSError):
    """Others own what should be this user's alone, or may write to it; the text says what."""


def cache_folders() -> Iterator[Path]:
    """Where it may be: below $XDG_CACHE_HOME or ~/.cache; the true home where sudo left another's."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        yield Path(given, "cloudfs")
        return
    homes = [os.environ.get("HOME", "")]
    with contextlib.suppress(KeyError):
        homes.append(pwd.getpwuid(os.geteuid()).pw_dir)
    yield from (Path(home, ".cache", "cloudfs") for home in dict.fromkeys(homes) if os.path.isabs(home))


@contextlib.contextmanager
def private(folder: Path, *, make: bool = True) -> Iterator[int]:
    """A descriptor of `folder`, with `make` created (mode 0700) where it is not there.

    Raises NotPrivateError where others may write to it, FileNotFoundError and other OSErrors as open(2) does.
    """
    if make:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        nearest = missing[-1].parent if missing else folder
        if nearest.stat().st_uid != os.geteuid():
            raise NotPrivateError(f"{nearest} belongs to another user")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        check_owner(number, str(folder))
        yield number
    finally:
        os.close(number)


def check_owner(number: int, name: str) -> os.stat_result:
    """The status of what is open. Raises NotPrivateError where it is another's, or others may write to it."""
    status = os.fstat(number)
    if status.st_uid != os.geteuid():
        raise NotPrivateError(f"{name} belongs to another user")
    if status.st_mode & (st.S_IWGRP | st.S_IWOTH):
        raise NotPrivateError(f"{name} can be written by other users")
    return status


def open_own(folder: int, name: str) -> int:
    """A descriptor, for reading, of a plain file of the folder that is ours alone.

    Raises NotPrivateError where it is not, FileNotFoundError and other OSErrors as open(2) does; never waits.
    """
    number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    try:
        if not st.S_ISREG(os.fstat(number).st_mode):
            raise NotPrivateError(f"{name} is no plain file")
        check_owner(number, name)
    except BaseException:
        os.close(number)
        raise
    return number


def put(folder: int, name: str, data: bytes | memoryview, mode: int = 0o600) -> None:
    """Put a file there in one step: of several processes the last one wins, and nobody sees a part of it."""
    temporary = f".{name[:64]}.{os.urandom(8).hex()}"
    number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=folder)
    try:
        with open(number, "wb") as file:
            file.write(data)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise
