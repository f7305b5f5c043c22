"""Columns of numbers, with facts about them, kept in the user's cache folder.

    kept = KeptColumns("profiles")
    for entry in kept.entries("3f1c-"):        those whose name begins so, the one used last first
        entry.facts, entry.columns()           what was put there; None where the file is damaged
    kept.put("3f1c-0a", facts, columns)        in one step; what was not used for longest goes, beyond the bounds

A file is plain: a line that says what it is, a header in JSON, the columns as they stand in memory, all under a
checksum. A file that is damaged, foreign or another user's is none. Nothing here ever fails: where there is no folder
that could be used there are no entries, and what is put there is gone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.cache_folder import NotPrivateError, cache_folders, open_own, private, put
from engine.records import dataclass

log = logging.getLogger(__name__)

Columns = Mapping[str, npt.NDArray[Any]]

SWITCH = "CLOUDFS_NO_CACHE"
"""Environment variable: set to anything but 0, no or nothing, nothing is kept and nothing that was is used."""
SUFFIX = ".columns"
FILE_LIMIT = 32
TOTAL_LIMIT = 256 << 20
"""Bytes of all files; one has three to six million."""
ENTRY_LIMIT = 64 << 20
STALE = 3600.0
"""Seconds after which a half-written file is taken away: whoever wrote it is dead."""

_MAGIC = b"CLOUDFS COLUMNS 1\n"
_HEAD = struct.Struct("<II")
"""Bytes of the JSON, and the checksum of it."""
_HEADER_LIMIT = 1 << 16
_TYPES = frozenset({"|u1", "<i4", "<u4", "<i8", "<u8"})
_ALIGNMENT = 64


def turned_off() -> bool:
    """Whether nothing is to be kept, as the environment says."""
    return os.environ.get(SWITCH, "").lower() not in ("", "0", "no")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: its facts are read, its columns not yet."""

    name: str
    facts: dict[str, Any]
    _header: Mapping[str, Any]
    _start: int
    _folder: Path

    def columns(self) -> Columns | None:
        """The columns, and a mark that they were used just now; None where the file is damaged, or gone."""
        try:
            with private(self._folder, make=False) as folder, open(open_own(folder, self.name), "rb") as file:
                found = self._read(file.fileno())
                if found is not None:
                    with contextlib.suppress(OSError):
                        os.utime(file.fileno())
                return found
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _read(self, number: int) -> Columns | None:
        size, rows = self._header["size"], self._header["columns"]
        if not isinstance(size, int) or not 0 <= size <= ENTRY_LIMIT:
            return None
        data = os.pread(number, size, self._start)
        if len(data) != size or zlib.crc32(data) != self._header["checksum"]:
            return None
        found: dict[str, npt.NDArray[Any]] = {}
        for name, kind, start, count in rows:
            if kind not in _TYPES or not 0 <= start <= start + count * np.dtype(kind).itemsize <= size or count < 0:
                return None
            found[name] = np.frombuffer(data, kind, count, start)
        return found


class KeptColumns:
    """Files of one kind: a folder in the user's cache folder, of bounded size."""

    def __init__(self, kind: str, *, files: int = FILE_LIMIT, size: int = TOTAL_LIMIT) -> None:
        self.kind = kind
        self.files = files
        self.size = size

    def entries(self, prefix: str) -> Iterator[Entry]:
        """The entries whose name begins so, the one used last first."""
        for parent in () if turned_off() else cache_folders():
            path = parent / self.kind
            with contextlib.suppress(OSError), private(path, make=False) as folder:
                for _, _, name in _listed(folder):
                    if name.startswith(prefix):
                        entry = _opened(path, folder, name)
                        if entry is not None:
                            yield entry

    def put(self, name: str, facts: Mapping[str, Any], columns: Columns) -> bool:
        """Keep an entry under a name that fits a file; whether that was possible."""
        if turned_off():
            return False
        data = _packed(facts, columns)
        if data is None:
            return False
        reasons = []
        for parent in cache_folders():
            try:
                with private(parent):
                    pass  # the folder that all kinds share is as private as this one
                with private(parent / self.kind) as folder:
                    put(folder, name + SUFFIX, data)
                    self._bound(folder)
                    return True
            except OSError as error:
                reasons.append(f"{parent}: {error}")
        log.info("%s is not kept: %s", name, "; ".join(reasons) or "this user has no home directory")
        return False

    def _bound(self, folder: int) -> None:
        """Take away what was not used for longest, and what was never finished."""
        kept = total = 0
        for _, size, name in _listed(folder):
            kept, total = kept + 1, total + size
            if kept > self.files or total > self.size:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=folder)
        for name in os.listdir(folder):
            if name.startswith("."):
                with contextlib.suppress(OSError):
                    if time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime > STALE:
                        os.unlink(name, dir_fd=folder)


def _listed(folder: int) -> list[tuple[int, int, str]]:
    """(when it was used last, size, name) of every file, the one used last first."""
    found = []
    for name in os.listdir(folder):
        if name.endswith(SUFFIX) and not name.startswith("."):
            with contextlib.suppress(OSError):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                found.append((status.st_mtime_ns, status.st_size, name))
    return sorted(found, reverse=True)


def _opened(path: Path, folder: int, name: str) -> Entry | None:
    """The entry in a file; None where that is damaged, or not ours."""
    try:
        with open(open_own(folder, name), "rb") as file:
            head = file.read(len(_MAGIC) + _HEAD.size)
            length, checksum = _HEAD.unpack_from(head, len(_MAGIC))
            text = file.read(length) if head.startswith(_MAGIC) and length <= _HEADER_LIMIT else b""
        if not text or zlib.crc32(text) != checksum:
            return None
        header = json.loads(text)
        start = _aligned(len(head) + length)
        return Entry(name, dict(header["facts"]), header, start, path)
    except (NotPrivateError, OSError, ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        log.info("%s in the cache is passed over: %s", name, error)
        return None


def _packed(facts: Mapping[str, Any], columns: Columns) -> bytes | None:
    """A whole file; None where it would be larger than one may be."""
    rows, parts, at = [], [], 0
    for name, column in columns.items():
        data = np.ascontiguousarray(column)
        kind = data.dtype.newbyteorder("<").str if data.dtype.itemsize > 1 else "|u1"
        if kind not in _TYPES:
            raise ValueError(f"column {name} is of {data.dtype}, which is not kept")
        raw = data.astype(kind, copy=False).tobytes()
        rows.append((name, kind, at, len(data)))
        parts.append(raw.ljust(_aligned(len(raw)), b"\0"))
        at += len(parts[-1])
    payload = b"".join(parts)
    header = {"facts": dict(facts), "columns": rows, "size": at, "checksum": zlib.crc32(payload)}
    text = json.dumps(header).encode()
    if len(text) > _HEADER_LIMIT or at > ENTRY_LIMIT:
        return None
    head = _MAGIC + _HEAD.pack(len(text), zlib.crc32(text)) + text
    return head.ljust(_aligned(len(head)), b"\0") + payload


def _aligned(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
