"""A file behind a URL, read in blocks: ssh, http, s3 and whatever else fsspec knows.

    RemoteFile("https://host/memory.lime", {})

Read-only. Blocks of a mebibyte are fetched by ranges, several at once, and kept up to 64 MiB. The file is taken for
unchanging while it is open.

fsspec is an optional package (the extra `remote`), and for most schemes wants one more: paramiko for ssh (the extra
`ssh`); of others its own message says which.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from engine.block_memory import BlockMemory
from engine.errors import (
    AccessDeniedError,
    EngineError,
    InvalidArgumentError,
    NotFoundError,
    PluginError,
    ReadOnlyError,
    TargetGoneError,
    TargetTimeoutError,
    UnsupportedError,
    UnusableTargetError,
)
from engine.leases import Lease
from engine.memory import Addresses, Faults, Rows
from engine.middleware import truth

BLOCK = 1 << 20
STORE_LIMIT = 64 << 20
AT_ONCE = 16
"""Blocks that are fetched together: what a store of 64 can take without losing them again."""
SIZE_LIMIT = 1 << 46
SILENCE = 10.0
"""Seconds without a byte after which a web server is taken for gone."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://.", re.DOTALL)

_PARAMIKO = "the package paramiko is not installed: pip install 'cloudfs[ssh]'"

T = TypeVar("T")


def is_url(target: str) -> bool:
    """Whether a target is scheme://… and so no path."""
    return _URL.match(target) is not None


def _patience(url: str) -> dict[str, Any]:
    """What fsspec is told so that a web server that falls silent is an error after SILENCE (its own limit: minutes)."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}}


def _why_not_reached(error: BaseException | None) -> str | None:
    """What stands behind a FileNotFoundError of fsspec when it is not that the file is missing."""
    why = None
    for _ in range(8):
        if (error := None if error is None else error.__cause__ or error.__context__) is None:
            break
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return None if status in (404, 410) else f"the server answers with status {status}"
        if isinstance(error, TimeoutError):
            return f"no answer within {SILENCE:g} s"
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            why = os.strerror(number) if (number := error.errno or 0) > 0 else error.strerror or str(error)
    return why


class RemoteFile(BlockMemory):
    """The bytes of a file behind a URL; offset = address."""

    lease: Lease | None = None
    immutable = True
    freshness = "immutable: what is behind a URL is taken for unchanging while it is open"

    def __init__(self, url: str, options: Mapping[str, str], *, writable: bool = False) -> None:
        """Ask for the file's size. Raises PluginError where fsspec is missing, or lacks what a scheme wants.

        NotFoundError, AccessDeniedError, TargetTimeoutError and TargetGoneError where it cannot be had,
        UnsupportedError where it cannot be read in ranges, InvalidArgumentError with live=yes.
        """
        self.path = without_password(url)
        if truth("live", options.get("live", "no")):
            raise InvalidArgumentError(f"{self.path}: what is behind a URL cannot be read live: leave live= out")
        if writable:
            raise ReadOnlyError(f"{self.path}: what is behind a URL is read-only: leave --writable out")
        self._files, self._place = self._asked(lambda: _fsspec().url_to_fs(url, **_patience(url)))
        size = self._size()
        starts = np.arange(0, size, BLOCK, dtype=np.uint64)
        lengths = np.minimum(np.uint64(size) - starts, np.uint64(BLOCK))
        super().__init__(starts, lengths, self._block, limit=STORE_LIMIT, may_block=True)

    def _size(self) -> int:
        info = self._asked(lambda: self._files.info(self._place))
        size = info.get("size")
        if info.get("type") == "directory":
            raise UnusableTargetError(f"{self.path} is a directory")
        if type(size) is not int or not 0 <= size <= SIZE_LIMIT:
            raise UnsupportedError(f"{self.path}: the server does not tell its size: download it first")
        if self.path.startswith(("http://", "https://")) and size > 1:
            self._asked(lambda: self._read_last(size))
        return size

    def _read_last(self, size: int) -> None:
        """Ask a web server for one byte: many send all of the file, which would not fit into memory."""
        try:
            with self._files.open(self._place, "rb", cache_type="none", size=size) as file:
                file.seek(size - 1)
                file.read(1)
        except ValueError:
            raise UnsupportedError(f"{self.path}: the server gives no parts of it: download it first") from None

    def _asked(self, question: Callable[[], T]) -> T:
        """What a question to fsspec gives, its errors as the engine's."""
        try:
            return question()
        except EngineError:
            raise
        except FileNotFoundError as error:  # fsspec says so too where a web server was not reached or refused
            if (why := _why_not_reached(error)) is not None:
                raise TargetGoneError(f"{self.path} cannot be opened: {why}") from None
            raise NotFoundError(f"there is no {self.path}") from None
        except PermissionError:
            raise AccessDeniedError(f"{self.path} may not be read by this user") from None
        except TimeoutError:
            raise TargetTimeoutError(f"{self.path}: no answer in time") from None
        except ImportError as error:
            why = _PARAMIKO if self.path.startswith(("ssh://", "sftp://")) else str(error)
            raise PluginError("remote", f"{self.path} cannot be opened: {why}") from None
        except ValueError as error:
            raise InvalidArgumentError(f"{self.path} cannot be opened: {error}") from None
        except Exception as error:  # whatever the library of that scheme raises
            raise TargetGoneError(f"{self.path} cannot be read: {error or type(error).__name__}") from None

    def _block(self, index: int) -> bytes:
        return self._fetched([index])[0]

    def _fetched(self, indices: list[int]) -> list[bytes]:
        size = self.size
        starts = [index * BLOCK for index in indices]
        stops = [min(size, start + BLOCK) for start in starts]
        places = [self._place] * len(indices)
        found = self._asked(lambda: self._files.cat_ranges(places, starts, stops, on_error="raise"))
        for start, stop, data in zip(starts, stops, found, strict=True):
            if len(data) != stop - start:
                raise TargetGoneError(
                    f"{self.path}: {len(data)} bytes came where {stop - start} were asked for, at {start:#x}: it has "
                    "changed, or the server gives no parts of it"
                )
        return [bytes(data) for data in found]

    def _prefetch(self, indices: Iterable[int]) -> None:
        """Fetch blocks that are not there together; only what one request takes, for more would push others out."""
        missing = [index for index in indices if not self.is_kept(index)]
        if len(missing) > 1:
            for index, data in zip(missing, self._fetched(missing), strict=True):
                self.keep(index, data)

    def readinto(self, address: int, buffer: memoryview) -> None:
        """See `Memory.readinto`. Raises TargetTimeoutError and TargetGoneError, too."""
        count, last = -(-self.size // BLOCK), (address + len(buffer) - 1) // BLOCK
        for first in range(max(0, address) // BLOCK, min(count, last + 1), AT_ONCE):
            self._prefetch(range(first, min(count, last + 1, first + AT_ONCE)))
            start, stop = max(address, first * BLOCK), min(address + len(buffer), (first + AT_ONCE) * BLOCK)
            super().readinto(start, buffer[start - address : stop - address])
        if last >= count or address < 0:
            super().readinto(address, buffer)  # says where it ends

    def gather(self, addresses: Addresses, out: Rows) -> Faults:
        """See `Memory.gather`. Raises TargetTimeoutError and TargetGoneError, too."""
        blocks = np.unique(addresses // np.uint64(BLOCK))
        blocks = blocks[blocks < np.uint64(-(-self.size // BLOCK))]
        if len(blocks) <= AT_ONCE:
            self._prefetch(blocks.tolist())
            return super().gather(addresses, out)
        return self._gather_in_parts(addresses, out)

    def _gather_in_parts(self, addresses: Addresses, out: Rows) -> Faults:
        order = np.argsort(addresses, kind="stable")
        blocks = (addresses[order] // np.uint64(BLOCK)).astype(np.int64)
        groups = np.cumsum(np.concatenate(([0], np.diff(blocks) != 0))) // AT_ONCE
        found: list[tuple[int, int, int]] = []
        for rows in np.split(order, np.flatnonzero(np.diff(groups)) + 1):
            part = np.empty((len(rows), out.shape[1]), np.uint8)
            faults = self.gather(addresses[rows], part)
            out[rows] = part
            found += zip(
                rows[faults.rows].tolist(), faults.addresses.tolist(), faults.kinds.tolist(), strict=True
            )
        return Faults.of(sorted(found))

    def close(self) -> None:
        """Nothing is held open between requests."""


def without_password(url: str) -> str:
    """A URL as it may be shown: without the password of its user."""
    try:
        parts = urlsplit(url)
        if parts.password is None:
            return url
        host = parts.hostname or ""
        shown = f"{parts.username}:…@{host}" + (f":{parts.port}" if parts.port else "")
        return urlunsplit(parts._replace(netloc=shown))
    except ValueError:
        return url


def _fsspec() -> Any:
    try:
        import fsspec.core
    except ImportError:
        raise PluginError(
            "remote", "URLs are read by the package fsspec, which is not installed: pip install 'cloudfs[remote]'"
        ) from None
    return fsspec.core
