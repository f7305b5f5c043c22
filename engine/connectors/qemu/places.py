"""Where a path of a QEMU's command line is found: as the process sees it now, or saw it when it began.

A QEMU that became a daemon stands in /, one with -chroot in another root, though it opened its files before that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_ENVIRONMENT_MOST = 1 << 20


def places(path: str, pid: int) -> Iterator[str]:
    """Paths by which a path of a process of this host may be reached, the likely ones first."""
    if path.startswith("/"):
        yield f"/proc/{pid}/root{path}"
        yield path
        return
    yield f"/proc/{pid}/cwd/{path}"
    with contextlib.suppress(OSError):
        if began := _folder_of_old(pid):
            yield f"/proc/{pid}/root{began}/{path}"
            yield f"{began}/{path}"


def _folder_of_old(pid: int) -> str | None:
    """Where the process stood when it began, as its shell told it. Raises OSError."""
    with open(f"/proc/{pid}/environ", "rb", buffering=0) as file:
        words = file.read(_ENVIRONMENT_MOST).split(b"\0")
    folder = next((word[4:] for word in words if word.startswith(b"PWD=/")), None)
    return None if folder is None else os.fsdecode(folder)


def reach(path: str, pid: int) -> int:
    """An O_PATH descriptor of the first of those places that is there. Raises OSError, ValueError."""
    first: OSError | None = None
    for place in places(path, pid):
        try:
            return os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            first = first or error
    assert first is not None
    raise first
