"""Attributes of nodes as FUSE wants them."""

from __future__ import annotations

import os
import time
from dataclasses import field

from pyfuse3 import EntryAttributes

from cloudfs.inodes import Entry
from cloudfs.node import Attributes
from engine.records import dataclass

MAX_SIZE = (1 << 63) - 1
"""Of a file: off_t is signed."""


@dataclass(slots=True)
class Owner:
    """What a node's attributes show where they say None."""

    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    time_ns: int = field(default_factory=time.time_ns)


class ShownAttributes:
    """The one EntryAttributes object of a mount: pyfuse3 copies it before anything else can run."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._entry = EntryAttributes()
        self._attributes: Attributes | None = None
        self._time: int | None = None

    def forget(self) -> None:
        """Hold no attributes of a node any more."""
        self._attributes = None

    def show(self, entry: Entry, attributes: Attributes, timeout: float) -> EntryAttributes:
        """The object, filled."""
        shown = self._entry
        if attributes is not self._attributes:
            self._attributes = None  # until all of it stands there
            self._fill(shown, attributes)
            self._attributes = attributes
        shown.st_ino = entry.inode
        shown.entry_timeout = shown.attr_timeout = timeout
        return shown

    def _fill(self, shown: EntryAttributes, attributes: Attributes) -> None:
        owner = self._owner
        size = attributes.size
        if not 0 <= size <= MAX_SIZE:
            size = MAX_SIZE if size > 0 else 0
        uid, gid, when, blocks = attributes.uid, attributes.gid, attributes.mtime_ns, attributes.blocks
        shown.st_mode = attributes.mode
        shown.st_nlink = attributes.nlink
        shown.st_uid = owner.uid if uid is None else uid
        shown.st_gid = owner.gid if gid is None else gid
        shown.st_size = size
        shown.st_blocks = (size + 511) // 512 if blocks is None else blocks
        if when is None:
            when = owner.time_ns
        if when != self._time:  # three setters, dearer than all the others together
            self._time = None
            shown.st_atime_ns = shown.st_mtime_ns = shown.st_ctime_ns = when
            self._time = when
