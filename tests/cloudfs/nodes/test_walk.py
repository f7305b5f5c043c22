"""The whole tree, walked: every file opens and reads or says why, every link leads somewhere, names agree."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
from fake_os import READ, FakeModule, Life, Pieces, fake_machine
from tree import SCRATCH, at, directory, kind_of, read, read_all, walk

from cloudfs.inodes import InodeTable
from cloudfs.node import Directory, File, Link
from cloudfs.nodes.root import build_root
from engine.bytes_memory import BytesMemory
from engine.chain import Spec
from engine.errors import AccessDeniedError, FaultError, NotFoundError
from engine.targets import open_target
from engine.types import ExportInfo, ImportInfo, ModuleInfo, Region, SectionInfo, ThreadInfo

LINKS_OUT = ("exe", "cwd", "root", "proc")
"""Links that lead out of the tree, or nowhere; fd/N too."""


def look_at(root, path, node):
    """What the kernel asks of a node: all of it must be as the contract says."""
    hash(node.identity)
    attributes = node.attributes()
    kinds = {"directory": Directory, "file": File, "link": Link}
    assert isinstance(node, kinds[kind_of(node)]), path
    assert attributes.size >= 0
    assert attributes.nlink == 1
    assert isinstance(node, Link) or not attributes.mode & 0o022, f"{path} is writable by others"
    assert 0 < node.timeout <= 300 or (isinstance(node, File) and node.takes_commands and node.timeout == 0)
    if isinstance(node, Link):
        check_link(root, path, node)
    if isinstance(node, File):
        check_file(path, node, attributes.size)


def check_link(root, path, node):
    try:
        text = os.fsdecode(node.target())
    except (NotFoundError, AccessDeniedError):
        assert "/processes/" in path
        return
    assert text
    parts = path.split("/")
    if (parts[-1] in LINKS_OUT and "by-name" not in parts) or parts[-2] == "fd":
        return
    at(root, "/".join([*parts[:-1], text]))


def check_file(path, node, size):
    try:
        data = read_all(node, 1 << 20)
    except (AccessDeniedError, NotFoundError):
        return
    except FaultError:
        assert path.endswith("/mem"), path
        return
    if size and not path.endswith("/mem"):
        assert len(data) == min(size, len(data)) or len(data) >= 1 << 20, path
        if size <= 1 << 20:
            assert len(data) == size, path
    assert not stat.S_IMODE(node.attributes().mode) & 0o111


@pytest.fixture
def rich(monkeypatch):
    """A fake machine that has one of everything."""
    with fake_machine(monkeypatch) as (machine, layer):
        pieces = {0x1000: b"A" * 4096, 0x4000: b"C" * 4096}
        module = FakeModule(
            ModuleInfo("m", "/m", 0x1000, 4096),
            BytesMemory(b"A" * 4096),
            sections=[SectionInfo(".text", 0x1000, 16)],
            exports=[ExportInfo("e", 0)],
            imports=[ImportInfo("i")],
        )
        files = dict.fromkeys(("cmdline", "environ", "comm", "stat", "status", "maps", "5/comm"), b"x\n")
        layer.table[1] = Life(
            name="init", files=files, links={"exe": "/init", "cwd": "/", "root": "/", "fd/3": "/dev/null"},
            pieces=pieces, modules=[module], threads=[ThreadInfo(5, "t", None, 1)],
            regions=[Region(0x1000, 0x4000, READ, path="/m")], owner=(1, 2),
        )  # fmt: skip
        layer.table[2] = Life(name="../..")
        layer.kernel = Pieces({0xFFFF_8880_0000_0000: b"k" * 4096})
        layer.physical = BytesMemory(b"p" * 5000)
        layer.kernel_modules = [module]
        machine.open("connector", Spec("dummy", "", {"size": "1M", "holes": "yes", "metrics": "yes"}))
        yield build_root(machine)


def test_everything_in_a_made_tree_can_be_looked_at(rich):
    seen = 0
    for path, node in walk(rich):
        look_at(rich, path, node)
        seen += 1
    assert seen > 80


def test_every_listed_name_is_found_by_look_up_as_the_same_node(rich):
    for path, node in walk(rich):
        parent, _, name = path.rpartition("/")
        found = directory(rich, parent).child(name)
        assert found is not None, path
        assert found.identity == node.identity, path
        assert type(found) is type(node), path


def test_one_identity_is_one_kind_of_node_in_the_inode_table(rich):
    table = InodeTable(rich)
    for _, node in walk(rich):
        assert table.known(node) is node or table.known(node).identity == node.identity
        table.remember(table.root, b"x", node)
    table.check()


def test_names_that_are_not_listed_are_not_found(rich):
    for path, node in [("", rich), *walk(rich)]:
        if isinstance(node, Directory):
            for name in ("nothing", "NEW", "info ", "%00", "\udcff"):
                assert node.child(name) is None, f"{path}/{name}"


@pytest.fixture(scope="module")
def sleeper():
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.communicate()


def test_everything_of_a_real_process_can_be_looked_at(sleeper):
    with open_target("native") as machine:
        root = build_root(machine)
        seen = 0
        for path, node in walk(root, f"os/native/processes/{sleeper}"):
            look_at(root, path, node)
            seen += 1
        assert seen > 150


def test_everything_of_this_very_process_can_be_looked_at():
    with open_target("native") as machine:
        root = build_root(machine)
        for path, node in walk(root, f"os/native/processes/{os.getpid()}", skip=frozenset({"modules"})):
            look_at(root, path, node)


def test_everything_beside_processes_can_be_looked_at():
    with open_target("native") as machine:
        root = build_root(machine)
        for path, node in walk(root, skip=frozenset({"processes"})):
            look_at(root, path, node)


def test_all_processes_of_this_host_can_be_listed_while_they_come_and_go():
    with open_target("native") as machine:
        root = build_root(machine)
        churn = [subprocess.Popen(["true"]) for _ in range(20)]
        for _, node in directory(root, "os/native/processes").children():
            try:
                node.attributes()
                if isinstance(node, Directory):
                    for _, child in node.children():
                        child.attributes()
            except NotFoundError:
                continue
        for process in churn:
            process.wait(30)


def test_the_memory_of_a_real_process_is_what_it_says(sleeper):
    with open_target("native") as machine:
        root = build_root(machine)
        maps = read_all(at(root, f"os/processes/{sleeper}/maps")).decode()
        stack = next(line for line in maps.splitlines() if line.endswith("[stack]"))
        start, stop = (int(word, 16) for word in stack.split()[0].split("-"))
        with open(f"/proc/{sleeper}/mem", "rb", buffering=0) as mem:
            wanted = os.pread(mem.fileno(), stop - start, start)
        file = at(root, f"os/processes/{sleeper}/mem").open(os.O_RDONLY)
        assert read(file, start, stop - start) == wanted
        assert file.read_nowait(start, stop - start, SCRATCH) == wanted
        region = f"{start:08x}-{stop:08x}.rw-p.[stack]"
        assert read_all(at(root, f"os/processes/{sleeper}/regions/{region}")) == wanted
        file.release()
