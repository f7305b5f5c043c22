"""The inode table: which inode stands for which node, and for how long.

The kernel counts how often it was told of an inode (look-ups and listings) and gives the count back with
FORGET; an inode lives in between. Numbers are never used twice, so a reused PID is never an old file.
A pure data structure: no I/O, no locks (one thread), about 200 bytes per entry beside the node.

The kernel forgets on its own only when memory is short. Above `bound` entries `surplus` names the
directories that were least recently used: once their names are invalidated, the kernel forgets all below.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable

from cloudfs.node import BrokenNodeError, Directory, Node
from engine.errors import NotFoundError

ROOT_INODE = 1
DEFAULT_BOUND = 100_000
KEPT = 0.8
"""How much of the bound is kept when directories are invalidated, so that it is not done all the time."""
AT_REST = 0.05
"""How much of it may stay when nobody has asked for anything for a while: two plain processes, 2 MB; else all goes."""


class DirectoryRecord:
    """What is remembered of a directory beside its entry."""

    __slots__ = ("children", "directories", "keeps", "used")

    def __init__(self, used: int) -> None:
        self.used = used
        """The round in which it was used last."""
        self.keeps = False
        """The kernel caches a file below it for longer than it is open: the pages would go with the name."""
        self.children = 0
        """Entries of the table whose parent this is."""
        self.directories: dict[bytes, Entry] = {}
        """Those of them that are directories, by name."""


class Entry:
    """One inode that the kernel knows."""

    __slots__ = ("directory", "identity", "inode", "lookups", "name", "node", "parent")

    def __init__(
        self, inode: int, identity: Hashable, node: Node, parent: Entry | None, name: bytes, used: int = 0
    ) -> None:
        self.inode = inode
        self.identity = identity
        self.node = node
        self.lookups = 0
        self.parent = parent
        """The directory in which it was seen first."""
        self.name = name
        """What it was called there."""
        self.directory = DirectoryRecord(used) if isinstance(node, Directory) else None


class InodeTable:
    """Identities and inodes, with the kernel's look-up counts."""

    def __init__(self, root: Directory, bound: int | None = DEFAULT_BOUND) -> None:
        self.bound = bound
        self._next = ROOT_INODE + 1
        self.root = Entry(ROOT_INODE, root.identity, root, None, b"")
        self.root.lookups = 1
        self._by_inode: dict[int, Entry] = {ROOT_INODE: self.root}
        self._by_identity: dict[Hashable, Entry] = {self.root.identity: self.root}
        self._recency: dict[int, Entry] = {}
        """Directories, the least recently used first; those already invalidated stand in it no more."""
        self._newest: Entry | None = None
        self._threshold = bound
        self._round = 0
        self._named: set[int] = set()
        """Directories that were invalidated, with those below them; until the kernel has forgotten them."""

    def __len__(self) -> int:
        return len(self._by_inode)

    def __contains__(self, inode: int) -> bool:
        return inode in self._by_inode

    def entry(self, inode: int) -> Entry:
        """The entry of an inode. Raises NotFoundError where the kernel was never told of it."""
        try:
            return self._by_inode[inode]
        except KeyError:
            raise NotFoundError(f"inode {inode} is not known") from None

    def node(self, inode: int) -> Node:
        """The node of an inode. Raises NotFoundError where the kernel was never told of it."""
        return self.entry(inode).node

    def remember(self, parent: Entry, name: bytes, node: Node) -> Entry:
        """The entry of a node that the kernel is being told of as `name` in `parent`; counts one look-up.

        Where its identity is known already the entry keeps the node that it has, with what that remembers.
        Raises BrokenNodeError where a node of another class has the same identity.
        """
        identity = node.identity
        entry = self._by_identity.get(identity)
        if entry is None:
            entry = self._add(identity, node, parent, name)
        elif type(entry.node) is not type(node):
            raise BrokenNodeError(
                f"{type(node).__name__} {identity!r} has the identity of a {type(entry.node).__name__}"
            )
        entry.lookups += 1
        return entry

    def known(self, node: Node) -> Node:
        """The node that stands for its identity already, else `node` itself."""
        entry = self._by_identity.get(node.identity)
        return node if entry is None else entry.node

    def _add(self, identity: Hashable, node: Node, parent: Entry, name: bytes) -> Entry:
        entry = Entry(self._next, identity, node, parent, name, self._round)
        self._next += 1
        self._by_inode[entry.inode] = self._by_identity[identity] = entry
        record = parent.directory
        if record is not None:
            record.children += 1
            if entry.directory is not None:
                before = record.directories.get(name)
                if before is not None:  # the kernel invalidates it when it sees another inode by that name
                    self._leave_below(before)
                record.directories[name] = entry
                self._recency[entry.inode] = entry
                self._newest = None
        return entry

    def forget(self, inode: int, count: int) -> None:
        """Take `count` look-ups back; at none the entry goes. Unknown inodes are ignored, the root stays."""
        entry = self._by_inode.get(inode)
        if entry is None:
            return
        entry.lookups -= count
        if entry.lookups > 0:
            return
        if entry is self.root:
            entry.lookups = 1
            return
        self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        del self._by_inode[entry.inode], self._by_identity[entry.identity]
        if entry.directory is not None:
            self._recency.pop(entry.inode, None)
            self._named.discard(entry.inode)
        record = entry.parent.directory if entry.parent is not None else None
        if record is not None:
            record.children -= 1
            if entry.directory is not None and record.directories.get(entry.name) is entry:
                del record.directories[entry.name]
        if self.bound is not None and len(self._by_inode) <= self.bound:
            self._threshold = self.bound

    # -- what the kernel should forget ---------------------------------------------------------------------

    def touch(self, entry: Entry) -> None:
        """Note that a directory is in use, and so are those above it."""
        if entry is self._newest:
            return
        self._newest = entry
        recency = self._recency
        above: Entry | None = entry
        while above is not None and above is not self.root:
            if self._by_inode.get(above.inode) is above:
                recency.pop(above.inode, None)
                recency[above.inode] = above
                if above.directory is not None:
                    above.directory.used = self._round
            above = above.parent

    def keep(self, inode: int) -> None:
        """Note that the kernel caches this file also while nobody has it open."""
        above = self.entry(inode).parent
        while above is not None and above.directory is not None and not above.directory.keeps:
            above.directory.keeps = True
            above = above.parent

    def vanished(self, entry: Entry, names: Container[bytes]) -> list[tuple[int, bytes]]:
        """Directories once seen in `entry` that a complete listing, `names`, has no more: (parent, name).

        Each is named once.
        """
        record = entry.directory
        if record is None or not record.directories:
            return []
        gone = [name for name in record.directories if name not in names]
        for name in gone:
            self._leave_below(record.directories.pop(name))
        return [(entry.inode, name) for name in gone]

    def surplus(self, spared: Callable[[], Container[int | None]] = tuple) -> list[tuple[int, bytes]]:
        """(parent inode, name) of what should be invalidated to come back under the bound; mostly nothing.

        Not the inodes that `spared` gives, which is asked where there is something to invalidate.
        """
        if self.bound is None or self._threshold is None or len(self._by_inode) <= self._threshold:
            return []
        chosen = self._least_used(int(self.bound * KEPT), spared())
        # FORGETs come later, and none for what is held open: ask again when it has grown by a tenth.
        self._threshold = len(self._by_inode) + self.bound // 10
        return chosen

    def _least_used(self, keep: int, spared: Container[int | None]) -> list[tuple[int, bytes]]:
        """Directories whose invalidation leaves about `keep` entries; they are candidates no more."""
        excess = len(self._by_inode) - keep
        chosen: list[tuple[int, bytes]] = []
        for inode, entry in list(self._recency.items()):
            if excess <= 0:
                break
            if inode in self._recency and inode not in spared and entry.parent is not None:
                chosen.append((entry.parent.inode, entry.name))
                excess -= self._leave_below(entry)
        self._newest = None
        return chosen

    def _leave_below(self, entry: Entry) -> int:
        """Take a directory and those below it out of the candidates; gives how many entries they have."""
        count = 0
        pending = [entry]
        while pending:
            at = pending.pop()
            self._recency.pop(at.inode, None)
            self._named.add(at.inode)
            if at.directory is not None:
                count += at.directory.children
                pending += at.directory.directories.values()
        return count + 1

    # -- when nobody asks for anything ---------------------------------------------------------------------

    @property
    def above_rest(self) -> bool:
        """Whether there are more entries than may stay while nobody asks for any."""
        return self.bound is not None and len(self._by_inode) > self.bound * AT_REST

    @property
    def round_is_due(self) -> bool:
        """Whether `stale` has something to look at."""
        return self.above_rest or bool(self._named)

    def stale(self, spared: Container[int | None] = (), *, each: bool = False) -> list[tuple[int, bytes]]:
        """(parent inode, name) of the directories that were not used since the last call; with `each`, of all.

        But for the inodes `spared`, and those with files that the kernel caches while nobody has them open; none while
        there are few.
        """
        chosen = self._left_over(spared)
        for inode, entry in list(self._recency.items()) if each or self.above_rest else ():
            record = entry.directory
            if record is None or entry.parent is None or (record.used >= self._round and not each):
                break
            if inode in self._recency and inode not in spared and not record.keeps:
                chosen.append((entry.parent.inode, entry.name))
                self._leave_below(entry)
        self._round += 1
        self._newest = None
        return chosen

    def _left_over(self, spared: Container[int | None]) -> list[tuple[int, bytes]]:
        """What is in directories that were invalidated before and are not in use, and yet not forgotten.

        They were open when their names went, and what was seen in them later has to be named itself.
        """
        known = self._by_inode
        left = {
            inode
            for inode in self._named
            if inode not in spared and (record := known[inode].directory) is not None and record.used < self._round
        }
        if not left:
            return []
        return [
            (above.inode, entry.name)
            for inode, entry in known.items()
            if (above := entry.parent) is not None and (inode in left or above.inode in left) and inode not in spared
        ]

    def remaining(self, spared: Container[int | None] = ()) -> list[tuple[int, bytes]]:
        """(parent inode, name) of every entry but the inodes `spared`, and files that the kernel caches.

        Invalidating a directory that is open reaches no more what is seen in it later: that has to be named itself.
        """
        known = self._by_inode
        return [
            (above.inode, entry.name)
            for inode, entry in known.items()
            if inode not in spared
            and (above := entry.parent) is not None
            and known.get(above.inode) is above
            and not (above.directory is not None and above.directory.keeps)
        ]

    def inode_at(self, names: Iterable[bytes]) -> int | None:
        """The inode of a directory by its names from the root on, or None where it is not known."""
        at: Entry | None = self.root
        for name in names:
            at = at.directory.directories.get(name) if at is not None and at.directory is not None else None
        return None if at is None else at.inode

    def inode_of(self, node: Node) -> int | None:
        """The inode of what has the identity of that node, or None where it is not known."""
        entry = self._by_identity.get(node.identity)
        return None if entry is None else entry.inode

    def compact(self) -> None:
        """Make the tables as small as what they hold: a dict keeps the room that it once had."""
        self._by_inode = dict(self._by_inode)
        self._by_identity = dict(self._by_identity)
        self._recency = dict(self._recency)
        self._named = set(self._named)

    # -- for tests -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the first inconsistency, if there is one."""

        def holds(condition: bool, what: str) -> None:
            if not condition:
                raise AssertionError(f"inode table: {what}")

        children: dict[int, int] = {}
        holds(self._by_inode.get(ROOT_INODE) is self.root, "the root is gone")
        holds(len(self._by_inode) == len(self._by_identity), "inodes and identities differ in number")
        for inode, entry in self._by_inode.items():
            holds(entry.inode == inode < self._next, f"inode {inode} stands at a wrong number")
            holds(entry.lookups > 0, f"inode {inode} has {entry.lookups} look-ups")
            holds(self._by_identity.get(entry.identity) is entry, f"inode {inode} has lost its identity")
            holds(entry.node.identity == entry.identity, f"the identity of inode {inode} has changed")
            holds(
                (entry.directory is not None) == isinstance(entry.node, Directory),
                f"inode {inode} has the record of another kind of node",
            )
            if entry.parent is not None:
                children[id(entry.parent)] = children.get(id(entry.parent), 0) + 1
        for inode, entry in self._by_inode.items():
            if entry.directory is None:
                continue
            holds(entry.directory.children == children.get(id(entry), 0), f"inode {inode} miscounts its children")
            for name, child in entry.directory.directories.items():
                holds(
                    self._by_inode.get(child.inode) is child and child.parent is entry,
                    f"inode {inode} names a directory {name!r} that is not its own",
                )
        holds(self._named <= self._by_inode.keys(), "it remembers that it named what is gone")
        for inode, entry in self._recency.items():
            holds(self._by_inode.get(inode) is entry, f"forgotten inode {inode} is still a candidate")
