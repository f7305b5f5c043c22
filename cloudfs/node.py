"""Nodes: what stands in the tree, without any file system library.

A node is made on look-up and thrown away at will; what it *is* lies in its `identity`, which the inode
table turns into one inode for as long as the kernel knows it. Nodes hold (instance, identity), never a
Process: an open file holds its process until it is released.

All methods may raise any EngineError or OSError; `operations` turns them into an errno.
"""

from __future__ import annotations

import errno
import os
import stat as st
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import ClassVar

from engine.errors import InvalidArgumentError, UnsupportedError
from engine.leases import Lease
from engine.records import dataclass
from engine.types import Shortcut


@dataclass(slots=True)
class Attributes:
    """What stat(2) tells of a node; the inode number is the table's.

    Never changed once it was given; not frozen, since that makes it four times as dear (0.7 µs), and a
    listing makes one for every child. A node whose attributes never change gives the same object always.
    """

    mode: int
    """Type and permission bits."""
    size: int = 0
    uid: int | None = None
    """None: the mounting user."""
    gid: int | None = None
    mtime_ns: int | None = None
    """None: the time of the mount."""
    nlink: int = 1
    blocks: int | None = None
    """In units of 512; None: what `size` needs."""


class Node(ABC):
    """Anything with a name."""

    __slots__ = ()

    @property
    @abstractmethod
    def identity(self) -> Hashable:
        """What makes this node itself: equal identities are one inode.

        Of a process: instance, generation, pid and start time, so that a reused PID is another file.
        """

    @abstractmethod
    def attributes(self) -> Attributes:
        """What stat(2) shows."""

    @property
    def may_block(self) -> bool:
        """Whether listing, look-up, opening or attributes may wait; they run in a thread then."""
        return False

    @property
    def thread_group(self) -> Hashable:
        """What is waited for where `may_block`; None is a group too.

        Nodes of one group share a few worker threads, so that a target that hangs holds up only itself.
        """
        return None

    @property
    def timeout(self) -> float:
        """Seconds for which the kernel may believe name and attributes."""
        return 1.0


_DIRECTORY_ATTRIBUTES = Attributes(st.S_IFDIR | 0o555)
_LINK_ATTRIBUTES = Attributes(st.S_IFLNK | 0o777)


class Directory(Node):
    """A node with children."""

    __slots__ = ()

    @abstractmethod
    def children(self) -> Iterator[tuple[str, Node]]:
        """Names and nodes, in a stable order."""

    def child(self, name: str) -> Node | None:
        """The child of that name or None; overridden wherever a look-up need not list."""
        for found, node in self.children():
            if found == name:
                return node
        return None

    def remove_child(self, name: str) -> None:
        """rmdir(2) of a child. PermissionError unless the directory is one of instances."""
        raise PermissionError(f"{name} cannot be removed: only instances can")

    def rest(self) -> None:
        """Let go of what is kept below it to be quick: nobody has asked for anything for a while. Asked of the root."""

    def attributes(self) -> Attributes:
        """See `Node.attributes`."""
        return _DIRECTORY_ATTRIBUTES


class Link(Node):
    """A symbolic link."""

    __slots__ = ()

    @abstractmethod
    def target(self) -> str | bytes:
        """What readlink(2) gives."""

    def attributes(self) -> Attributes:
        """See `Node.attributes`."""
        return _LINK_ATTRIBUTES


class File(Node):
    """A regular file."""

    __slots__ = ()

    takes_commands: ClassVar[bool] = False
    """Lines written to it are commands: O_TRUNC, O_APPEND, truncate(2) and utimensat(2) are accepted and
    ignored, and every close(2) comes as `OpenFile.flush`. All other files refuse these with EPERM.
    """

    @abstractmethod
    def open(self, flags: int) -> OpenFile:
        """Open it; `flags` are open(2)'s.

        The boundary has already refused to write where the mode has no write bit (EROFS), and what
        `takes_commands` tells.
        """


class OpenFile(ABC):
    """An open file: one for every open(2), released once."""

    direct_io: bool = True
    """Live bytes: the kernel keeps none of them."""
    keep_cache: bool = False
    """Immutable bytes: the kernel may keep them over closing and opening."""
    lease: Lease | None = None
    """With `keep_cache`: they are immutable only for as long as it is held. The boundary sees to what follows."""

    @property
    def may_block(self) -> bool:
        """Whether `read` and `write` may wait for something; they run in a thread then."""
        return False

    @abstractmethod
    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        """At most `size` bytes from `offset`; fewer mean end of file or a hole behind them.

        `scratch` (at least `size` bytes) may be filled and a slice of it returned: it is valid until the
        reply is sent.
        """

    def read_nowait(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview | None:
        """Like `read`, but None where it might have to wait: then `read` is called in a thread."""
        return None if self.may_block else self.read(offset, size, scratch)

    def write(self, offset: int, data: bytes) -> int:
        """Store bytes, give the count."""
        raise UnsupportedError("this file cannot be written")

    def seek(self, offset: int, whence: int) -> int | None:
        """lseek(2): where, from `offset` on, data (os.SEEK_DATA) or a hole (os.SEEK_HOLE) begins.

        None: nothing is known of holes, and all of what stat(2) shows is data. OSError(ENXIO) where there is none;
        the end of the file is a hole. May name as data what is a hole, where to find out would take long.
        """
        return None

    def seek_nowait(self, offset: int, whence: int) -> int | None:
        """Like `seek`, but None where it might have to wait or is not simple: then `seek` is called in a thread."""
        return None

    def shortcut(self) -> Shortcut | None:
        """How its bytes are had without calling it, offset = address there; None where it has to be called.

        What was read and written so is told to `count`.
        """
        return None

    def count(self, reads: int, bytes_read: int, writes: int, bytes_written: int) -> None:
        """So many were answered by the shortcut."""

    def flush(self) -> None:
        """close(2) of one of its descriptors, for files that take commands; an error is close(2)'s."""

    def release(self) -> None:
        """The last descriptor is closed. It must not wait: it drops what the file held."""


def no_data() -> OSError:
    """What lseek(2) fails with behind the last data."""
    return OSError(errno.ENXIO, os.strerror(errno.ENXIO))


def seek_dense(offset: int, whence: int, size: int) -> int:
    """The answer of `OpenFile.seek` for a file that is data up to its size."""
    if not 0 <= offset < size:
        raise no_data()
    return offset if whence == os.SEEK_DATA else size


class TextLink(Link):
    """A link with a fixed text."""

    __slots__ = ("_identity", "_text")

    def __init__(self, identity: Hashable, text: str) -> None:
        self._identity = identity
        self._text = text

    @property
    def identity(self) -> Hashable:
        """See `Node.identity`."""
        return self._identity

    def target(self) -> str | bytes:
        """See `Link.target`."""
        return self._text


class BrokenNodeError(Exception):
    """A node gave what its contract forbids: a bug of its author, so not an EngineError."""


NAME_MAX = 255
_ENCODING = sys.getfilesystemencoding()
_ENCODING_ERRORS = sys.getfilesystemencodeerrors()


def check_name(name: str) -> bytes:
    """The bytes of a file name.

    Raises InvalidArgumentError where no file can be called so, and UnicodeEncodeError for a lone surrogate
    that stands for no byte.
    """
    if "/" not in name and "\0" not in name and name not in (".", ".."):
        raw = name.encode(_ENCODING, _ENCODING_ERRORS)
        if 0 < len(raw) <= NAME_MAX:
            return raw
    raise InvalidArgumentError(f"no file can be called {name!r}")


NodeFactory = Callable[[], Node]
