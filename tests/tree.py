"""Looking at a tree of nodes as the kernel would: by path, by reading on until the end, by walking it all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from cloudfs.node import Directory, File, Link, Node, OpenFile, check_name

SCRATCH = memoryview(bytearray(1 << 20))


def at(root: Directory, path: str) -> Node:
    """The node at a path; links on the way are followed. Raises FileNotFoundError."""
    trail: list[Node] = [root]
    parts = path.split("/")[::-1]
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        if part == "..":
            trail.pop()
            continue
        here = trail[-1]
        assert isinstance(here, Directory), f"{part} of {path} stands in no directory"
        node = here.child(part)
        if node is None:
            raise FileNotFoundError(path)
        if isinstance(node, Link) and parts:
            parts += os.fsdecode(node.target()).split("/")[::-1]
            continue
        trail.append(node)
    return trail[-1]


def directory(root: Directory, path: str) -> Directory:
    """The directory at a path."""
    found = at(root, path)
    assert isinstance(found, Directory)
    return found


def names(root: Directory, path: str = "") -> list[str]:
    """What a directory lists."""
    return [name for name, _ in directory(root, path).children()]


def open_at(root: Directory, path: str, flags: int = os.O_RDONLY) -> OpenFile:
    """An open file."""
    found = at(root, path)
    assert isinstance(found, File), path
    return found.open(flags)


def read(file: OpenFile, offset: int = 0, size: int = 1 << 20) -> bytes:
    """One read, inline if that is possible, else as in a thread."""
    data = file.read_nowait(offset, size, SCRATCH)
    return bytes(file.read(offset, size, SCRATCH) if data is None else data)


def read_all(node: Node, limit: int = 64 << 20) -> bytes:
    """All bytes of a file, read as cat(1) does."""
    assert isinstance(node, File)
    file = node.open(os.O_RDONLY)
    parts: list[bytes] = []
    offset = 0
    try:
        while offset < limit and (data := read(file, offset)):
            parts.append(data)
            offset += len(data)
    finally:
        file.flush()
        file.release()
    return b"".join(parts)


def text(root: Directory, path: str) -> str:
    """The text of a file."""
    return read_all(at(root, path)).decode()


def walk(root: Directory, path: str = "", *, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, Node]]:
    """Every node below, with its path; each listed name must be found by look-up too, as the same node."""
    for name, node in directory(root, path).children():
        check_name(name)
        where = f"{path}/{name}".lstrip("/")
        yield where, node
        if isinstance(node, Directory) and name not in skip:
            yield from walk(root, where, skip=skip)


def kind_of(node: Node) -> str:
    """What the mode says that it is."""
    mode = node.attributes().mode
    return {stat.S_IFDIR: "directory", stat.S_IFREG: "file", stat.S_IFLNK: "link"}[stat.S_IFMT(mode)]
