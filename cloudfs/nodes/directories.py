"""What directories of the tree share: a context, an owner, entries of which a broken one hides no other."""

from __future__ import annotations

import logging
import stat as st
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from cloudfs.entries import Entries
from cloudfs.node import Attributes, Directory, Link, Node
from cloudfs.nodes.contexts import Context
from engine.errors import EngineError

X = TypeVar("X", bound=Context)

log = logging.getLogger(__name__)


class ContextDirectory(Directory, Generic[X]):
    """A directory that belongs to a context; its identity is its name there."""

    __slots__ = ("_identity", "_may_block", "_mode", "context")

    def __init__(self, context: X, name: str, *, mode: int = 0o555, may_block: bool | None = None) -> None:
        self.context = context
        self._identity = (name, context.key)
        self._mode = st.S_IFDIR | mode
        self._may_block = context.may_block if may_block is None else may_block

    @property
    def identity(self) -> Hashable:
        """See `Node.identity`."""
        return self._identity

    @property
    def may_block(self) -> bool:
        """See `Node.may_block`."""
        return self._may_block

    @property
    def thread_group(self) -> Hashable:
        """See `Node.thread_group`."""
        return self.context.thread_group

    def attributes(self) -> Attributes:
        """See `Node.attributes`."""
        owner = self.context.owner()
        return Attributes(self._mode) if owner is None else Attributes(self._mode, 0, *owner)


class EntryDirectory(ContextDirectory[X]):
    """A directory that holds what is registered for its type."""

    __slots__ = ("entries",)

    def __init__(
        self, context: X, name: str, entries: Entries[X], *, mode: int = 0o555, may_block: bool | None = None
    ) -> None:
        super().__init__(context, name, mode=mode, may_block=may_block)
        self.entries = entries

    def check(self) -> None:
        """Raise what says that the thing is gone, before its entries are asked."""
        self.context.owner()

    def children(self) -> Iterator[tuple[str, Node]]:
        """See `Directory.children`."""
        self.check()
        yield from entries_of(self.entries, self.context)

    def child(self, name: str) -> Node | None:
        """See `Directory.child`."""
        self.check()
        return self.entries.child(self.context, name)


def entries_of(entries: Entries[X], context: X) -> Iterator[tuple[str, Node]]:
    """All entries that the object has, without those that fail: a bug is logged, a refusal is not."""
    for name in entries.names():
        try:
            node = entries.child(context, name)
        except (EngineError, OSError) as error:
            log.debug("%s: entry %s is left out: %s", entries.what, name, error)
        except Exception:
            log.exception("%s: entry %s met a bug", entries.what, name)
        else:
            if node is not None:
                yield name, node


class ContextLink(Link):
    """A link with a fixed text that belongs to a context."""

    __slots__ = ("_context", "_identity", "_text")

    def __init__(self, context: Context, name: str, text: str) -> None:
        self._context = context
        self._identity = (name, text, context.key)
        self._text = text

    @property
    def identity(self) -> Hashable:
        """See `Node.identity`."""
        return self._identity

    def target(self) -> str | bytes:
        """See `Link.target`."""
        return self._text
