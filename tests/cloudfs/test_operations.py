"""The handlers, called without a mount; every test ends with a look at the inode table."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import pyfuse3
import pytest
import trio
import trio.testing
from made_up_tree import (
    BAD_NAMES,
    BUGS,
    GOOD_NAMES,
    MEMORY_SIZE,
    BadLink,
    Blocking,
    BugFile,
    Changing,
    Control,
    Folder,
    InlineMemories,
    OpenBytes,
    Text,
    make_tree,
    pattern,
)

from cloudfs.node import Attributes, Directory, Node, OpenFile
from cloudfs.node_calls import Counters
from cloudfs.operations import TreeOperations
from cloudfs.shown_attributes import Owner

T = TypeVar("T")
CONTEXT: Any = None


class Fields:
    """What of a node setattr shall change."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __getattr__(self, name: str) -> bool:
        return name.removeprefix("update_") in self._names


class Kernel:
    """Calls handlers as the kernel does, and keeps count of the look-ups that it owes."""

    def __init__(self, root: Directory, **options: Any) -> None:
        self.invalidated: list[tuple[int, bytes]] = []
        self.room = 1 << 30
        self._listed: list[tuple[bytes, dict[str, Any], int]] = []
        self.counters = Counters()
        self.operations = TreeOperations(
            root,
            counters=self.counters,
            invalidate=lambda parent, name: self.invalidated.append((parent, name)),
            readdir_reply=self._reply,
            owner=Owner(uid=10, gid=20, time_ns=30),
            **options,
        )
        self.owed: dict[int, int] = {}

    def run(self, coroutine: Coroutine[Any, Any, T], limit: float = 20) -> T:
        async def main() -> T:
            with trio.fail_after(limit):
                return await coroutine

        return trio.run(main)

    def _reply(self, token: Any, name: bytes, entry: pyfuse3.EntryAttributes, next_id: int) -> bool:
        if len(self._listed) == self.room:
            return False
        self._listed.append((name, entry.__getstate__(), next_id))
        return True

    def lookup(self, path: str) -> dict[str, Any]:
        """The attributes of a path, component by component, as lookup gives them."""
        found: dict[str, Any] = {"st_ino": 1}
        for name in filter(None, path.split("/")):
            entry = self.run(self.operations.lookup(found["st_ino"], os.fsencode(name), CONTEXT))
            found = dict(entry.__getstate__())
            self._owe(found["st_ino"])
        return found

    def inode(self, path: str) -> int:
        return int(self.lookup(path)["st_ino"])

    def _owe(self, inode: int) -> None:
        self.owed[inode] = self.owed.get(inode, 0) + 1

    def listing(self, path: str, room: int = 1 << 30) -> dict[bytes, dict[str, Any]]:
        """A whole listing, `room` entries at a time."""
        self.room = room
        handle = self.run(self.operations.opendir(self.inode(path) if path else 1, CONTEXT))
        found: dict[bytes, dict[str, Any]] = {}
        at = 0
        while True:
            self._listed = []
            self.run(self.operations.readdir(handle, at, CONTEXT))
            if not self._listed:
                break
            for name, attributes, at in self._listed:  # noqa: B007 (the next readdir goes on there)
                assert name not in found
                found[name] = attributes
                if name not in (b".", b".."):
                    self._owe(attributes["st_ino"])
        self.run(self.operations.releasedir(handle))
        return found

    def open(self, path: str, flags: int = os.O_RDONLY) -> pyfuse3.FileInfo:
        return self.run(self.operations.open(self.inode(path), flags, CONTEXT))

    def read(self, path: str, offset: int = 0, size: int = 4096) -> bytes:
        handle = self.open(path).fh
        try:
            return bytes(self.run(self.operations.read(handle, offset, size)))
        finally:
            self.run(self.operations.release(handle))

    def errno(self, call: Callable[[], object]) -> int:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            call()
        return caught.value.errno

    def end(self) -> None:
        """The table is consistent, and after all look-ups were given back nothing but the root is left."""
        self.operations.inodes.check()
        self.run(self.operations.forget(list(self.owed.items())))
        self.operations.inodes.check()
        assert len(self.operations.inodes) == 1


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel(make_tree())
    yield kernel
    kernel.end()


def kernel_of(children: dict[str, Node], **options: Any) -> Kernel:
    return Kernel(Folder("root", children), **options)


# -- names and attributes ------------------------------------------------------------------------------------


def test_a_path_is_found_component_by_component(kernel: Kernel) -> None:
    assert kernel.read("nested/deep/text") == b"deep\n"


def test_a_name_that_does_not_exist_is_enoent_and_counts_as_no_error(kernel: Kernel) -> None:
    assert kernel.errno(lambda: kernel.lookup("nothing")) == errno.ENOENT
    assert kernel.counters.errors == 0


def test_an_inode_the_kernel_was_never_told_of_is_enoent(kernel: Kernel) -> None:
    assert kernel.errno(lambda: kernel.run(kernel.operations.getattr(999, CONTEXT))) == errno.ENOENT


def test_attributes_that_a_node_leaves_open_are_the_mounting_users(kernel: Kernel) -> None:
    found = kernel.lookup("text")
    assert (found["st_uid"], found["st_gid"], found["st_mtime_ns"]) == (10, 20, 30)
    assert found["st_size"] == 6
    assert found["st_blocks"] == 1
    assert found["entry_timeout"] == found["attr_timeout"] == 1.0


def test_attributes_that_a_node_gives_are_shown() -> None:
    class Special(Text):
        def attributes(self) -> Attributes:
            return Attributes(
                stat.S_IFREG | 0o640, size=1 << 70, uid=1, gid=2, mtime_ns=1_500_000_000_000_000_003, nlink=4, blocks=9
            )

        @property
        def timeout(self) -> float:
            return 300.0

    kernel = kernel_of({"a": Special("a", ""), "b": Text("b", "b")})
    found = kernel.lookup("a")
    assert found["st_mode"] == stat.S_IFREG | 0o640
    assert found["st_size"] == (1 << 63) - 1
    assert (found["st_uid"], found["st_gid"], found["st_nlink"], found["st_blocks"]) == (1, 2, 4, 9)
    assert found["st_mtime_ns"] == found["st_atime_ns"] == found["st_ctime_ns"] == 1_500_000_000_000_000_003
    assert found["attr_timeout"] == 300.0
    assert kernel.lookup("b")["st_mtime_ns"] == 30
    kernel.end()


def test_getattr_shows_what_lookup_showed(kernel: Kernel) -> None:
    for name in ("text", "memory", "link", "nested"):
        found = kernel.lookup(name)
        again = kernel.run(kernel.operations.getattr(found["st_ino"], CONTEXT)).__getstate__()
        assert again == found


def test_a_failing_lookup_leaves_no_inode_behind(kernel: Kernel) -> None:
    inode = kernel.inode("bugs")
    before = len(kernel.operations.inodes)
    for name in (b"attributes-raise", b"wrong-attributes"):
        error = kernel.errno(lambda name=name: kernel.run(kernel.operations.lookup(inode, name, CONTEXT)))
        assert error == errno.EIO
    assert len(kernel.operations.inodes) == before


def test_one_identity_under_two_names_is_one_inode() -> None:
    kernel = kernel_of({"a": Text("same", "x"), "b": Text("same", "x")})
    assert kernel.inode("a") == kernel.inode("b")
    kernel.end()


def test_a_link_gives_its_text(kernel: Kernel) -> None:
    assert kernel.run(kernel.operations.readlink(kernel.inode("link"), CONTEXT)) == b"nested/deep"


@pytest.mark.parametrize("text", ["a\0b", "", "x" * 4096, None, 7, "\ud800"])
def test_a_text_that_no_link_can_have_is_eio(text: object) -> None:
    kernel = kernel_of({"link": BadLink("link", text)})
    inode = kernel.inode("link")
    assert kernel.errno(lambda: kernel.run(kernel.operations.readlink(inode, CONTEXT))) == errno.EIO
    kernel.end()


def test_setattr_is_eperm_but_for_sizes_and_times_of_control_files(kernel: Kernel) -> None:
    def set_of(path: str, *names: str) -> int:
        fields: Any = Fields(*names)
        entry = pyfuse3.EntryAttributes()
        try:
            kernel.run(kernel.operations.setattr(kernel.inode(path), entry, fields, None, CONTEXT))
        except pyfuse3.FUSEError as error:
            return error.errno
        return 0

    for path in ("memory", "text", "nested"):
        for name in ("size", "mode", "uid", "gid", "atime", "mtime"):
            assert set_of(path, name) == errno.EPERM
    assert set_of("control", "size", "mtime", "ctime", "atime") == 0
    assert set_of("control", "mode") == errno.EPERM
    assert set_of("control", "uid", "gid") == errno.EPERM


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unlink", (1, b"text")),
        ("mkdir", (1, b"new", 0o755)),
        ("mknod", (1, b"new", 0o644, 0)),
        ("create", (1, b"new", 0o644, os.O_WRONLY)),
        ("symlink", (1, b"new", b"text")),
        ("link", (2, 1, b"new")),
        ("rename", (1, b"text", 1, b"new", 0)),
    ],
)
def test_nothing_can_be_made_or_renamed(kernel: Kernel, name: str, arguments: tuple[Any, ...]) -> None:
    handler = getattr(kernel.operations, name)
    assert kernel.errno(lambda: kernel.run(handler(*arguments, CONTEXT))) == errno.EPERM


@pytest.mark.parametrize("name", ["getxattr", "access", "poll", "fsync", "listxattr"])
def test_what_costs_a_request_and_gives_nothing_is_not_implemented(name: str) -> None:
    assert getattr(TreeOperations, name) is getattr(pyfuse3.Operations, name)
    assert not TreeOperations.supports_dot_lookup


def test_df_sees_no_blocks(kernel: Kernel) -> None:
    data = kernel.run(kernel.operations.statfs(CONTEXT))
    assert (data.f_blocks, data.f_namemax) == (0, 255)


# -- directories ---------------------------------------------------------------------------------------------


def test_a_listing_begins_with_the_dots_and_has_every_child(kernel: Kernel) -> None:
    found = list(kernel.listing("nested"))
    assert found == [b".", b"..", b"deep"]


@pytest.mark.parametrize("room", [1, 2, 3, 7])
def test_a_listing_in_small_replies_is_the_same(kernel: Kernel, room: int) -> None:
    assert list(kernel.listing("many", room)) == list(kernel.listing("many"))


def test_a_listing_longer_than_a_batch_is_whole() -> None:
    kernel = Kernel(make_tree(files=700))
    assert len(kernel.listing("many")) == 702
    kernel.end()


def test_a_listing_gives_the_inodes_and_attributes_that_lookup_gives(kernel: Kernel) -> None:
    for name, attributes in kernel.listing("nested").items():
        if name not in (b".", b".."):
            assert attributes == kernel.lookup(f"nested/{name.decode()}")


def test_the_dots_are_the_directory_and_the_one_above_it(kernel: Kernel) -> None:
    found = kernel.listing("nested/deep")
    assert found[b"."]["st_ino"] == kernel.inode("nested/deep")
    assert found[b".."]["st_ino"] == kernel.inode("nested")


def test_names_that_no_file_can_have_are_skipped_and_counted_and_hide_nothing(kernel: Kernel) -> None:
    found = kernel.listing("bad names")
    assert set(found) - {b".", b".."} == {os.fsencode(name) for name in GOOD_NAMES}
    assert kernel.counters.skipped == len(BAD_NAMES) + 3


def test_a_child_whose_attributes_fail_is_listed_with_its_type_and_asked_again_at_once(kernel: Kernel) -> None:
    found = kernel.listing("bad listing")
    assert set(found) == {b".", b"..", b"first", b"broken", b"fault", b"wrong", b"last"}
    for name in (b"broken", b"fault", b"wrong"):
        assert found[name]["st_mode"] == stat.S_IFREG
        assert found[name]["attr_timeout"] == 0.0
    assert found[b"last"]["st_size"] == 2


def test_a_listing_that_fails_before_its_first_child_gives_the_error() -> None:
    class Failing(Folder):
        def children(self) -> Iterator[tuple[str, Node]]:
            raise PermissionError(errno.EACCES, "not yours")

    kernel = kernel_of({"failing": Failing("failing", {})})
    assert kernel.errno(lambda: kernel.listing("failing")) == errno.EACCES
    kernel.end()


def test_a_directory_that_cannot_be_listed_cannot_be_opened() -> None:
    # ripgrep 13 asks readdir(3) for the next entry for ever where that fails.
    class Failing(Folder):
        def children(self) -> Iterator[tuple[str, Node]]:
            raise PermissionError(errno.EACCES, "not yours")

    kernel = kernel_of({"failing": Failing("failing", {})})
    inode = kernel.inode("failing")
    assert kernel.errno(lambda: kernel.run(kernel.operations.opendir(inode, CONTEXT))) == errno.EACCES
    kernel.end()


def test_a_rewound_directory_is_listed_anew() -> None:
    children: dict[str, Node] = {"a": Text("a", "")}
    kernel = kernel_of(children)
    handle = kernel.run(kernel.operations.opendir(1, CONTEXT))

    def names() -> list[bytes]:
        kernel._listed = []
        kernel.run(kernel.operations.readdir(handle, 0, CONTEXT))
        for name, attributes, _ in kernel._listed:
            if not name.startswith(b"."):
                kernel._owe(attributes["st_ino"])
        return [name for name, _, _ in kernel._listed]

    assert names() == [b".", b"..", b"a"]
    children["b"] = Text("b", "")
    assert names() == [b".", b"..", b"a", b"b"]
    kernel.end()


def test_directories_gone_from_a_listing_are_invalidated(kernel: Kernel) -> None:
    folder = kernel.operations.inodes.node(kernel.inode("changing"))
    assert isinstance(folder, Changing)
    kernel.listing("changing")
    assert kernel.invalidated == []
    folder.generation = 2
    kernel.listing("changing")
    assert kernel.invalidated == [(kernel.inode("changing"), b"0"), (kernel.inode("changing"), b"1")]


def test_above_the_bound_old_directories_are_invalidated() -> None:
    folders: dict[str, Node] = {
        str(number): Folder(f"folder {number}", {str(i): Text(f"{number}/{i}", "") for i in range(10)})
        for number in range(20)
    }
    kernel = kernel_of(folders, inode_bound=100)
    for number in range(20):
        kernel.listing(str(number))
    assert kernel.invalidated[:3] == [(1, b"0"), (1, b"1"), (1, b"2")]
    kernel.end()


def test_rmdir_removes_an_instance(kernel: Kernel) -> None:
    inode = kernel.inode("instances")
    kernel.run(kernel.operations.rmdir(inode, b"idle", CONTEXT))
    assert set(kernel.listing("instances")) == {b".", b"..", b"busy"}


def test_rmdir_of_a_busy_instance_is_ebusy_and_of_anything_else_eperm(kernel: Kernel) -> None:
    inode = kernel.inode("instances")
    assert kernel.errno(lambda: kernel.run(kernel.operations.rmdir(inode, b"busy", CONTEXT))) == errno.EBUSY
    assert kernel.errno(lambda: kernel.run(kernel.operations.rmdir(1, b"nested", CONTEXT))) == errno.EPERM


# -- files ---------------------------------------------------------------------------------------------------


def test_a_read_gives_the_bytes_of_the_memory(kernel: Kernel) -> None:
    whole = pattern(MEMORY_SIZE)
    for offset, size in ((0, 8), (4095, 2), (1 << 20, 1 << 20), (MEMORY_SIZE - 3, 100), (MEMORY_SIZE, 5)):
        assert kernel.read("memory", offset, size) == whole[offset : offset + size]


def test_a_read_larger_than_the_kernels_largest_is_answered(kernel: Kernel) -> None:
    assert kernel.read("memory", 0, MEMORY_SIZE) == pattern(MEMORY_SIZE)


def test_a_read_stops_at_a_hole_and_begins_in_it_with_eio(kernel: Kernel) -> None:
    assert kernel.read("holed", 4090, 100) == pattern(4096)[4090:]
    assert kernel.errno(lambda: kernel.read("holed", 4096, 100)) == errno.EIO
    assert kernel.counters.errors == 1
    assert kernel.counters.bugs == 0


def test_reads_and_writes_are_counted(kernel: Kernel) -> None:
    kernel.read("memory", 0, 100)
    handle = kernel.open("memory", os.O_RDWR).fh
    assert kernel.run(kernel.operations.write(handle, 5, b"abc")) == 3
    assert bytes(kernel.run(kernel.operations.read(handle, 4, 5))) == pattern(5)[4:5] + b"abc" + pattern(9)[8:]
    counters = kernel.counters
    assert (counters.reads, counters.bytes_read) == (2, 105)
    assert (counters.writes, counters.bytes_written) == (1, 3)


def test_live_and_immutable_files_are_told_apart_at_open(kernel: Kernel) -> None:
    live, cached = kernel.open("memory"), kernel.open("cached")
    assert (live.direct_io, live.keep_cache, live.nonseekable) == (True, False, False)
    assert (cached.direct_io, cached.keep_cache, cached.nonseekable) == (False, True, False)


@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_APPEND, os.O_RDONLY | os.O_TRUNC])
def test_a_memory_file_is_neither_truncated_nor_appended_to(kernel: Kernel, flags: int) -> None:
    assert kernel.errno(lambda: kernel.open("memory", flags)) == errno.EPERM


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC])
def test_writing_where_the_mode_has_no_write_bit_is_erofs(kernel: Kernel, flags: int) -> None:
    assert kernel.errno(lambda: kernel.open("read-only", flags)) == errno.EROFS
    assert kernel.errno(lambda: kernel.open("text", flags)) == errno.EROFS


def test_a_control_file_takes_truncation_and_appending(kernel: Kernel) -> None:
    handle = kernel.open("control", os.O_WRONLY | os.O_TRUNC | os.O_APPEND).fh
    assert kernel.run(kernel.operations.write(handle, 77, b"one\ntwo\n")) == 8
    assert kernel.read("control") == b"# one\n# two\n"


def test_the_flush_of_a_control_file_runs_the_rest_and_gives_its_error(kernel: Kernel) -> None:
    handle = kernel.open("control", os.O_WRONLY).fh
    kernel.run(kernel.operations.flush(handle))
    kernel.run(kernel.operations.write(handle, 0, b"rest"))
    assert kernel.read("control") == b""
    kernel.run(kernel.operations.flush(handle))
    assert kernel.read("control") == b"# rest\n"
    kernel.run(kernel.operations.write(handle, 0, b"fail"))
    assert kernel.errno(lambda: kernel.run(kernel.operations.flush(handle))) == errno.EEXIST


def test_other_files_hear_nothing_of_a_flush() -> None:
    class Deaf(OpenBytes):
        def flush(self) -> None:
            raise AssertionError("flushed")

    class DeafFile(Text):
        def open(self, flags: int) -> OpenFile:
            return Deaf(b"")

    kernel = kernel_of({"deaf": DeafFile("deaf", "")})
    kernel.run(kernel.operations.flush(kernel.open("deaf").fh))
    kernel.end()


def test_a_file_is_released_once() -> None:
    files: list[OpenBytes] = []

    class Watched(Text):
        def open(self, flags: int) -> OpenFile:
            files.append(OpenBytes(b"x"))
            return files[-1]

    kernel = kernel_of({"a": Watched("a", "")})
    kernel.read("a")
    assert [file.released for file in files] == [1]
    kernel.open("a")
    kernel.operations.close()
    kernel.operations.close()
    assert [file.released for file in files] == [1, 1]
    kernel.end()


# -- bugs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BUGS if name != "enosys"])
def test_a_bug_in_a_read_is_eio(kernel: Kernel, name: str) -> None:
    assert kernel.errno(lambda: kernel.read(f"bugs/{name}")) == errno.EIO


@pytest.mark.parametrize("name", [name for name in BUGS if name != "enosys"])
def test_a_bug_in_a_write_is_eio(kernel: Kernel, name: str) -> None:
    handle = kernel.open(f"bugs/{name}", os.O_WRONLY).fh
    assert kernel.errno(lambda: kernel.run(kernel.operations.write(handle, 0, b"abc"))) == errno.EIO


def test_enosys_of_a_node_does_not_switch_reading_off(kernel: Kernel) -> None:
    assert kernel.errno(lambda: kernel.read("bugs/enosys")) == errno.EOPNOTSUPP


@pytest.mark.parametrize("count", [-1, 0, 4, True, 2.0, None, "3"])
def test_a_count_that_a_write_cannot_have_is_eio(count: object) -> None:
    kernel = kernel_of({"bug": BugFile("bug", lambda size: count)})
    handle = kernel.open("bug", os.O_WRONLY).fh
    assert kernel.errno(lambda: kernel.run(kernel.operations.write(handle, 0, b"abc"))) == errno.EIO
    kernel.end()


def test_a_bug_in_open_is_eio(kernel: Kernel) -> None:
    assert kernel.errno(lambda: kernel.open("bugs/open-raises")) == errno.EIO
    assert kernel.errno(lambda: kernel.open("bugs/open-returns-str")) == errno.EIO


def test_a_child_that_is_no_node_is_eio() -> None:
    kernel = kernel_of({"text": "not a node"})
    assert kernel.errno(lambda: kernel.lookup("text")) == errno.EIO
    kernel.end()


def test_an_identity_that_cannot_be_hashed_is_eio_and_hides_nothing() -> None:
    class Unhashable(Text):
        @property
        def identity(self) -> Any:
            return ["list"]

    kernel = kernel_of({"bad": Unhashable("bad", ""), "good": Text("good", "")})
    assert kernel.errno(lambda: kernel.lookup("bad")) == errno.EIO
    assert set(kernel.listing("")) == {b".", b"..", b"good"}
    kernel.end()


def test_a_bug_is_logged_with_its_traceback_and_not_over_and_over(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(30):
            kernel.errno(lambda: kernel.read("bugs/raises"))
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "RuntimeError: a bug" in caplog.text
    assert "made_up_tree.py" in caplog.text
    assert kernel.counters.bugs == 30


def test_an_error_on_purpose_is_no_bug_and_stands_in_the_log_for_who_asks(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        kernel.errno(lambda: kernel.read("holed", 4096))
    assert "address 0x1000 cannot be accessed" in caplog.text
    assert kernel.counters.bugs == 0


def test_tests_of_nodes_can_have_bugs_raised() -> None:
    kernel = Kernel(make_tree(), reraise=True)
    with pytest.raises(RuntimeError, match="a bug"):
        kernel.read("bugs/raises")
    kernel.end()


# -- what may wait -------------------------------------------------------------------------------------------


def test_a_read_that_waits_holds_up_no_other(kernel: Kernel) -> None:
    operations = kernel.operations
    blocking = operations.inodes.node(kernel.inode("blocking"))
    assert isinstance(blocking, Blocking)
    slow, fast = kernel.open("blocking").fh, kernel.open("text").fh
    order: list[bytes] = []

    async def read(handle: int) -> None:
        order.append(bytes(await operations.read(handle, 0, 100)))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, slow)
            while not operations.threads.busy:
                await trio.lowlevel.checkpoint()
            await read(fast)
            blocking.event.set()

    kernel.run(main())
    assert order == [b"hello\n", b"late"]


def test_what_does_not_answer_in_time_is_etimedout() -> None:
    event = threading.Event()
    kernel = kernel_of({"file": Blocking("file", event)}, timeout=0.05)
    handle = kernel.open("file").fh
    try:
        assert kernel.errno(lambda: kernel.run(kernel.operations.read(handle, 0, 4))) == errno.ETIMEDOUT
        assert kernel.operations.threads.abandoned == 1
    finally:
        event.set()
    kernel.end()


def test_a_file_opened_too_late_is_released() -> None:
    event = threading.Event()
    file = Blocking("file", event, slow=True)
    kernel = kernel_of({}, timeout=0.05)
    entry = kernel.operations.inodes.remember(kernel.operations.inodes.root, b"file", file)
    kernel._owe(entry.inode)

    async def main() -> None:
        with pytest.raises(pyfuse3.FUSEError):
            await kernel.operations.open(entry.inode, os.O_RDONLY, CONTEXT)
        event.set()
        while not (file.opened and file.opened[0].released):
            await trio.lowlevel.checkpoint()

    kernel.run(main())
    assert len(file.opened) == 1
    kernel.end()


def test_a_target_that_hangs_holds_up_only_its_own_group() -> None:
    event, ready = threading.Event(), threading.Event()
    ready.set()
    kernel = kernel_of({"hangs": Blocking("hangs", event), "works": Blocking("works", ready)}, timeout=0.2)
    hangs, works = kernel.open("hangs").fh, kernel.open("works").fh
    failures: list[int] = []

    async def read_hanging() -> None:
        try:
            await kernel.operations.read(hangs, 0, 4)
        except pyfuse3.FUSEError as error:
            failures.append(error.errno)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(read_hanging)
            await trio.testing.wait_all_tasks_blocked()
            assert bytes(await kernel.operations.read(works, 0, 4)) == b"late"

    try:
        kernel.run(main())
        assert failures == [errno.ETIMEDOUT] * 100
        assert kernel.operations.threads.busy <= 16
    finally:
        event.set()
    kernel.end()


def test_a_listing_asks_children_that_may_block_in_one_thread_and_lists_all_when_they_hang() -> None:
    event = threading.Event()
    children: dict[str, Node] = {f"slow{i}": Blocking(f"slow{i}", event, slow=True) for i in range(5)}
    children["text"] = Text("text", "x")
    kernel = kernel_of(children, timeout=0.05)
    found = kernel.listing("")
    assert len(found) == 8
    assert found[b"slow0"]["st_mode"] == stat.S_IFREG
    assert found[b"slow0"]["attr_timeout"] == 0.0
    assert kernel.operations.threads.abandoned == 1
    event.set()
    found = kernel.listing("")
    assert stat.S_IMODE(found[b"slow0"]["st_mode"]) == 0o444
    kernel.end()


def test_a_directory_that_may_block_is_listed_and_looked_up_in_a_thread() -> None:
    threads: set[int] = set()

    class Remote(Folder):
        @property
        def may_block(self) -> bool:
            return True

        def children(self) -> Iterator[tuple[str, Node]]:
            threads.add(threading.get_ident())
            yield from super().children()

        def child(self, name: str) -> Node | None:
            threads.add(threading.get_ident())
            return super().child(name)

    kernel = kernel_of({"remote": Remote("remote", {"text": Text("text", "x")})})
    kernel.listing("remote")
    kernel.lookup("remote/text")
    assert threads
    assert threading.get_ident() not in threads
    kernel.end()


def test_a_numbered_directory_is_looked_up_without_being_listed(kernel: Kernel) -> None:
    assert isinstance(kernel.operations.inodes.node(kernel.inode("inline")), InlineMemories)
    assert kernel.lookup(f"inline/{os.getpid()}")["st_mode"] == stat.S_IFREG | 0o400


def test_a_control_file_keeps_each_descriptors_rest_apart(kernel: Kernel) -> None:
    one, two = kernel.open("control", os.O_WRONLY).fh, kernel.open("control", os.O_WRONLY).fh
    kernel.run(kernel.operations.write(one, 0, b"on"))
    kernel.run(kernel.operations.write(two, 0, b"two\n"))
    kernel.run(kernel.operations.write(one, 2, b"e\n"))
    control = kernel.operations.inodes.node(kernel.inode("control"))
    assert isinstance(control, Control)
    assert control.lines == [b"two", b"one"]
