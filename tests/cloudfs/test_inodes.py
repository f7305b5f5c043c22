"""The inode table: identities, counts, and what to forget."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from made_up_tree import Folder, Text

from cloudfs.inodes import ROOT_INODE, Entry, InodeTable
from cloudfs.node import BrokenNodeError, Directory, Node
from engine.errors import NotFoundError


def table_of(bound: int | None = None) -> InodeTable:
    return InodeTable(Folder("root", {}), bound)


def add_directories(table: InodeTable, count: int, files: int, parent: Entry | None = None) -> list[Entry]:
    """`count` directories of `files` files each, in the order of their use."""
    found = []
    for number in range(count):
        name = f"{number}".encode()
        entry = table.remember(parent or table.root, name, Folder(f"{parent and parent.inode}/{number}", {}))
        table.touch(entry)
        for file in range(files):
            table.remember(entry, b"%d" % file, Text(f"{entry.inode}/{file}", ""))
        found.append(entry)
    return found


def test_the_root_is_inode_1_and_is_never_forgotten() -> None:
    table = table_of()
    table.forget(ROOT_INODE, 1000)
    assert isinstance(table.node(ROOT_INODE), Directory)
    table.check()


def test_equal_identities_are_one_inode_with_the_first_node() -> None:
    table = table_of()
    first, second = Text("a", "1"), Text("a", "2")
    one, two = table.remember(table.root, b"a", first), table.remember(table.root, b"b", second)
    assert one is two
    assert one.node is first
    assert one.lookups == 2
    assert table.known(second) is first
    table.check()


def test_another_class_with_the_same_identity_is_a_bug() -> None:
    class Other(Text):
        pass

    table = table_of()
    table.remember(table.root, b"a", Text("a", ""))
    with pytest.raises(BrokenNodeError):
        table.remember(table.root, b"b", Other("a", ""))
    table.check()


def test_an_inode_lives_until_all_its_look_ups_are_given_back() -> None:
    table = table_of()
    inode = table.remember(table.root, b"a", Text("a", "")).inode
    table.remember(table.root, b"a", Text("a", ""))
    table.forget(inode, 1)
    table.check()
    assert table.node(inode)
    table.forget(inode, 1)
    table.check()
    with pytest.raises(NotFoundError):
        table.node(inode)
    assert len(table) == 1


def test_a_number_is_never_used_twice() -> None:
    table = table_of()
    numbers = set()
    for _ in range(100):
        inode = table.remember(table.root, b"a", Text("a", "")).inode
        numbers.add(inode)
        table.forget(inode, 1)
    assert len(numbers) == 100
    table.check()


def test_forgetting_what_is_not_known_does_nothing() -> None:
    table = table_of()
    table.forget(12345, 1)
    table.check()


def test_directories_gone_from_a_listing_are_named_once() -> None:
    table = table_of()
    for name in (b"1", b"2", b"3"):
        table.remember(table.root, name, Folder(name.decode(), {}))
    table.remember(table.root, b"file", Text("file", ""))
    assert table.vanished(table.root, {b"2", b"new"}) == [(1, b"1"), (1, b"3")]
    assert table.vanished(table.root, {b"2", b"new"}) == []
    table.check()


def test_a_name_that_became_another_directory_keeps_the_new_one() -> None:
    table = table_of()
    old = table.remember(table.root, b"7", Folder("process 7, the first", {}))
    new = table.remember(table.root, b"7", Folder("process 7, the second", {}))
    table.forget(old.inode, 1)
    table.check()
    assert new.inode != old.inode
    assert table.vanished(table.root, set()) == [(1, b"7")]


def test_below_the_bound_nothing_is_surplus() -> None:
    table = table_of(bound=100)
    add_directories(table, 9, 10)
    assert len(table) == 100
    assert table.surplus() == []


def test_above_the_bound_the_least_recently_used_directories_are_surplus() -> None:
    table = table_of(bound=100)
    directories = add_directories(table, 10, 10)  # 111 entries: 31 must go to keep 80
    table.touch(directories[0])
    assert table.surplus() == [(1, b"1"), (1, b"2"), (1, b"3")]
    table.check()


def test_what_is_spared_is_not_surplus() -> None:
    table = table_of(bound=100)
    directories = add_directories(table, 10, 10)
    assert table.surplus(lambda: {directories[1].inode}) == [(1, b"0"), (1, b"2"), (1, b"3")]
    table.check()


def test_what_was_named_as_surplus_is_not_named_again_until_the_table_has_grown() -> None:
    table = table_of(bound=100)
    add_directories(table, 10, 10)
    assert table.surplus()
    assert table.surplus() == []
    root = Folder("more", {})
    add_directories(table, 2, 10, table.remember(table.root, b"more", root))
    again = table.surplus()
    assert again
    assert not set(again) & {(1, b"0"), (1, b"1"), (1, b"2")}
    table.check()


def test_after_the_kernel_forgot_the_bound_holds_again() -> None:
    table = table_of(bound=100)
    directories = add_directories(table, 10, 10)
    for _, name in table.surplus():
        entry = directories[int(name)]
        for inode in [at.inode for at in list(table._by_inode.values()) if at.parent is entry]:
            table.forget(inode, 1)
        table.forget(entry.inode, 1)
    table.check()
    assert len(table) <= 80
    add_directories(table, 10, 10, table.remember(table.root, b"more", Folder("more", {})))
    assert table.surplus()


def test_a_directory_used_below_is_used() -> None:
    table = table_of(bound=10)
    above = table.remember(table.root, b"above", Folder("above", {}))
    below = add_directories(table, 1, 2, above)[0]
    add_directories(table, 3, 2)
    table.touch(below)
    assert table.surplus()[0] == (1, b"0")
    assert (1, b"above") not in table.surplus()


def test_the_directories_below_a_surplus_one_are_not_named_with_it() -> None:
    table = table_of(bound=20)
    above = table.remember(table.root, b"above", Folder("above", {}))
    for number in range(10):  # seen in its listing, never used
        table.remember(above, b"%d" % number, Folder(f"above/{number}", {}))
    add_directories(table, 2, 5)
    assert table.surplus() == [(1, b"above")]
    table.check()


def test_directories_that_were_not_used_since_the_last_call_are_stale() -> None:
    table = table_of(bound=20)
    directories = add_directories(table, 4, 0)
    assert table.stale() == []
    table.touch(directories[2])
    table.touch(directories[0])
    assert table.stale() == [(1, b"1"), (1, b"3")]
    for number in (1, 3):
        table.forget(directories[number].inode, 1)
    table.touch(directories[0])
    assert table.stale() == [(1, b"2")]
    table.forget(directories[2].inode, 1)
    assert table.stale(each=True) == [(1, b"0")]
    table.check()


def test_what_was_seen_in_a_directory_after_its_name_went_is_named_itself_when_nobody_uses_it_any_more() -> None:
    table = table_of(bound=100)
    directory = add_directories(table, 1, 2)[0]
    assert table.vanished(table.root, set()) == [(1, b"0")]
    table.remember(directory, b"late", Text("late", ""))
    table.touch(directory)
    assert table.round_is_due
    assert table.stale() == []
    assert set(table.stale()) == {(directory.inode, name) for name in (b"0", b"1", b"late")} | {(1, b"0")}
    table.check()


def test_a_directory_whose_name_another_one_took_is_out_of_reach_by_it() -> None:
    table = table_of(bound=1000)
    old = add_directories(table, 1, 1)[0]
    table.remember(table.root, b"0", Folder("another", {}))
    table.stale()
    assert (old.inode, b"0") in table.stale()
    table.forget(old.inode, 1)
    assert not table.round_is_due
    table.check()


def test_while_there_are_few_none_is_stale() -> None:
    table = table_of(bound=1000)
    add_directories(table, 3, 2)
    assert not table.round_is_due
    assert table.stale() == []
    assert table.stale() == []


def test_what_is_spared_or_holds_cached_files_is_not_stale() -> None:
    table = table_of(bound=100)
    directories = add_directories(table, 3, 2)
    below = add_directories(table, 2, 1, directories[2])
    cached = table.remember(below[1], b"file", Text("cached", ""))
    table.keep(cached.inode)
    spared = table.inode_at([b"1"])
    assert spared == directories[1].inode
    assert set(table.stale({spared}, each=True)) == {(1, b"0"), (directories[2].inode, b"0")}
    assert (below[1].inode, b"file") not in table.remaining()
    assert {(directories[1].inode, b"0"), (directories[2].inode, b"0")} & set(table.remaining()) == {
        (directories[1].inode, b"0")
    }
    table.check()


def test_a_few_nodes_may_stay_when_nothing_is_asked_for_and_all_where_there_is_no_bound() -> None:
    table = table_of(bound=100)
    add_directories(table, 1, 3)
    assert not table.above_rest
    table = table_of()
    add_directories(table, 10, 10)
    assert not table.above_rest


def test_what_remains_is_named_one_by_one() -> None:
    table = table_of(bound=10)
    first, second = add_directories(table, 2, 1)
    expected = {(1, b"0"), (1, b"1"), (first.inode, b"0"), (second.inode, b"0")}
    assert set(table.remaining()) == expected
    assert set(table.remaining({first.inode})) == expected - {(1, b"0")}
    table.forget(first.inode, 1)
    assert (first.inode, b"0") not in table.remaining()


def test_a_directory_is_found_by_its_names() -> None:
    table = table_of()
    above = add_directories(table, 1, 1)[0]
    below = add_directories(table, 1, 0, above)[0]
    assert table.inode_at([]) == ROOT_INODE
    assert table.inode_at([b"0", b"0"]) == below.inode
    assert table.inode_at([b"0", b"1"]) is None
    assert table.inode_of(below.node) == below.inode
    assert table.inode_of(Text("unknown", "")) is None


def test_a_compact_table_is_the_same_table() -> None:
    table = table_of(bound=100)
    directories = add_directories(table, 10, 5)
    for entry in directories[1:]:
        table.forget(entry.inode, 1)
    size = len(table)
    table.compact()
    assert len(table) == size
    assert table.entry(directories[0].inode) is directories[0]
    table.touch(directories[0])
    assert table.stale(each=True) == [(1, b"0")]


def test_check_names_an_inconsistency() -> None:
    table = table_of()
    entry = table.remember(table.root, b"a", Text("a", ""))
    entry.lookups = 0
    with pytest.raises(AssertionError, match=f"inode {entry.inode} has 0 look-ups"):
        table.check()


class Unsteady(Text):
    """Its identity changes."""

    @property
    def identity(self) -> tuple[str, str]:
        return ("unsteady", self.text)


def test_a_node_whose_identity_changed_is_forgotten_all_the_same() -> None:
    table = table_of()
    node = Unsteady("x", "before")
    inode = table.remember(table.root, b"a", node).inode
    node.text = "after"
    with pytest.raises(AssertionError, match="identity"):
        table.check()
    table.forget(inode, 1)
    table.check()


@settings(max_examples=60, deadline=None)
@given(some.data())
def test_any_order_of_look_ups_and_forgets_keeps_it_consistent(data: some.DataObject) -> None:
    table = table_of(bound=8)
    counts: dict[int, int] = {}
    for _ in range(data.draw(some.integers(0, 60))):
        if counts and data.draw(some.booleans()):
            inode = data.draw(some.sampled_from(sorted(counts)))
            taken = data.draw(some.integers(1, counts[inode]))
            counts[inode] -= taken
            if not counts[inode]:
                del counts[inode]
            table.forget(inode, taken)
        else:
            parents: list[Entry] = [
                entry for entry in table._by_inode.values() if isinstance(entry.node, Directory)
            ]
            parent = data.draw(some.sampled_from(parents))
            name = f"{parent.inode}/{data.draw(some.integers(0, 5))}"
            node: Node = Folder(name, {}) if data.draw(some.booleans()) else Text(name, "")
            entry = table.remember(parent, name.encode().replace(b"/", b"-"), node)
            counts[entry.inode] = counts.get(entry.inode, 0) + 1
            table.touch(parent)
            table.surplus()
        table.check()
    assert {inode: table.entry(inode).lookups for inode in counts} == counts
    assert len(table) == len(counts) + 1


MILLION = """
import resource, sys
from cloudfs.inodes import InodeTable
from cloudfs.node import Directory, File
class Small(File):
    __slots__ = ("identity",)
    def __init__(self, identity): self.identity = identity
    def attributes(self): ...
    def open(self, flags): ...
class Root(Directory):
    __slots__ = ()
    identity = "root"
    def children(self): ...
def used(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
table = InodeTable(Root(), None)
nodes = [Small(number) for number in range(1_000_000)]
before = used()
for node in nodes:
    table.remember(table.root, b"name", node)
print((used() - before) / len(nodes), used() / 1e6)
"""


@pytest.fixture(scope="module")
def million() -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", MILLION], capture_output=True, text=True, timeout=60, check=True
    )
    per_entry, whole = done.stdout.split()
    return float(per_entry), float(whole)


def test_an_entry_takes_about_200_bytes_beside_its_node(million: tuple[float, float]) -> None:
    assert million[0] < 230


def test_a_million_small_nodes_take_less_than_300_megabytes_with_the_table(million: tuple[float, float]) -> None:
    assert million[1] < 320
