"""Text files: rendered whole, a snapshot for each open, so that a reader never sees half of two states.

tar, rsync and cp believe st_size. So what renders in less than a millisecond is rendered for stat(2) already,
and the open that follows gets the same bytes: the kernel is told to believe sizes for half a second, and a
rendering lives for one. What is dearer (`sized=False`) says 0, as /proc does, and README lists it. All are
direct I/O: pages of two snapshots never mix.

Every listing asks for the attributes of every child (READDIRPLUS), so the eight text files of a process are
rendered when its directory is listed: 0.3 ms together, maps of 350 regions 0.45 ms more (measured). That was found
cheap enough, since nothing is rendered for the list of processes itself, and what looks into a process's address
space is done in a thread, one for a whole directory.
"""

from __future__ import annotations

import stat as st
from collections.abc import Callable, Hashable
from typing import Any

from cloudfs import render
from cloudfs.node import Attributes, File, OpenFile, seek_dense
from cloudfs.nodes.contexts import Context
from cloudfs.nodes.kept import KEPT
from engine.errors import ConnectorClosedError, EngineError, ProcessExitedError

Text = str | bytes

RENDERING_LIFETIME = 1.0
"""Seconds for which a rendering may be handed out by open."""
SIZE_LIFETIME = 0.45
"""Seconds for which it may be handed out by stat: whoever opens while the kernel believes the size gets it."""
SIZE_TIMEOUT = 0.5
SOON = 0.05
"""Seconds before that from which on a rendering is made anew in a thread."""
IMMUTABLE_TIMEOUT = 300.0
"""Seconds for which the kernel may believe names and attributes over a target that cannot change."""


class TextFile(File):
    """A file whose bytes `make` gives, text with its undecodable bytes as Python has them (PEP 383)."""

    __slots__ = ("_context", "_identity", "_make", "_may_block", "_mode", "_sized")

    def __init__(
        self,
        context: Context,
        name: str,
        make: Callable[[], Text],
        *,
        mode: int = 0o444,
        sized: bool = True,
        may_block: bool | None = None,
    ) -> None:
        """A file of `context`; `may_block` as the context where it is not said."""
        self._context = context
        self._identity = (name, context.key)
        self._make = make
        self._mode = st.S_IFREG | mode
        self._sized = sized
        self._may_block = context.may_block if may_block is None else may_block

    @property
    def identity(self) -> Hashable:
        """See `Node.identity`."""
        return self._identity

    @property
    def may_block(self) -> bool:
        """See `Node.may_block`."""
        return self._may_block and not (self._context.at_hand and self._is_rendered())

    @property
    def thread_group(self) -> Hashable:
        """See `Node.thread_group`."""
        return self._context.thread_group

    @property
    def timeout(self) -> float:
        """See `Node.timeout`."""
        return SIZE_TIMEOUT if self._sized else 1.0

    @property
    def sized(self) -> bool:
        """Whether stat tells its size."""
        return self._sized

    def _is_rendered(self) -> bool:
        """Whether the next who asks for the attributes, or opens it, gets what is there already."""
        found = KEPT.find(self._context.instance, ("text", self._identity)) if self._sized else None
        return found is not None and found[0] < SIZE_LIFETIME - SOON

    def _rendering(self, lifetime: float) -> bytes:
        key = ("text", self._identity)
        found = KEPT.find(self._context.instance, key)
        if found is not None and found[0] < lifetime:
            kept: bytes = found[1]
            return kept
        data = self.render()
        return KEPT.store(self._context.instance, key, data, len(data), lifetime=lifetime)

    def render(self) -> bytes:
        """The bytes as they are now."""
        text = self._make()
        return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")

    def attributes(self) -> Attributes:
        """See `Node.attributes`; what cannot be read is there and has no size, as in /proc."""
        size = 0
        if self._sized:
            try:
                size = len(self._rendering(SIZE_LIFETIME))
            except (ConnectorClosedError, ProcessExitedError):
                raise
            except (EngineError, OSError):
                pass
        owner = self._context.owner()
        return Attributes(self._mode, size) if owner is None else Attributes(self._mode, size, *owner)

    def open(self, flags: int) -> OpenFile:
        """See `File.open`."""
        return OpenText(self._rendering(RENDERING_LIFETIME) if self._sized else self.render())


class OpenText(OpenFile):
    """A snapshot."""

    __slots__ = ("_view",)

    def __init__(self, data: bytes) -> None:
        self._view = memoryview(data)

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        """See `OpenFile.read`."""
        return self._view[offset : offset + size]

    def seek_nowait(self, offset: int, whence: int) -> int | None:
        """See `OpenFile.seek_nowait`."""
        return seek_dense(offset, whence, len(self._view))


def json_file(context: Context, name: str, make: Callable[[], Any], *, may_block: bool | None = None) -> TextFile:
    """A file that holds one JSON document."""
    return TextFile(context, name, lambda: render.to_json(make()), may_block=may_block)


def info_file(context: Context, name: str, make: Callable[[], Any], *, may_block: bool | None = None) -> TextFile:
    """A file that holds a record as lines `key: value`."""
    return TextFile(context, name, lambda: render.info_text(make()), may_block=may_block)


class FixedText(TextFile):
    """A small file that never changes."""

    __slots__ = ()

    def __init__(self, context: Context, name: str, text: str) -> None:
        super().__init__(context, name, lambda: text)

    @property
    def timeout(self) -> float:
        """See `Node.timeout`."""
        return IMMUTABLE_TIMEOUT

