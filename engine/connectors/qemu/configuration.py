"""Files that a QEMU's command line names (-readconfig), as the process sees them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from engine.connectors.qemu.places import reach
from engine.mounts import Backing, backing_of_file

SIZE_MOST = 1 << 20
"""Bytes of a file; those of Proxmox have 2 KiB."""


def reader(pid: int) -> Callable[[str], str | None]:
    """What reads files by their names in a process of this host: gives their text, None where that cannot be had."""

    def read(path: str) -> str | None:
        try:
            number = reach(path, pid)
        except (OSError, ValueError):
            return None
        try:
            return _text(number)
        except OSError:
            return None
        finally:
            os.close(number)

    return read


def _text(number: int) -> str | None:
    """The text of a file that does not make its reader wait. Raises OSError."""
    if not stat.S_ISREG(os.fstat(number).st_mode) or backing_of_file(number) is Backing.REMOTE:
        return None
    with open(f"/proc/self/fd/{number}", "rb", buffering=0) as file:
        data = file.read(SIZE_MOST + 1)
    return data.decode(errors="replace") if len(data) <= SIZE_MOST else None
