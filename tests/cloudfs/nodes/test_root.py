"""The root: README that is true, plugins, what keeps indexers out, entries of other packages."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import types

import pytest
from fake_os import Life, fake_machine
from support import require
from tree import at, names, read_all, text, walk

from cloudfs.node import File, Node
from cloudfs.nodes import contexts
from cloudfs.nodes.contexts import ProcessContext, process_entry
from cloudfs.nodes.files.text import TextFile
from cloudfs.nodes.kept import KEPT
from cloudfs.nodes.readme import UNSIZED
from cloudfs.nodes.root import build_root
from engine.chain import Spec
from engine.machine import Machine
from engine.targets import open_target


@pytest.fixture
def native():
    with open_target("native") as machine:
        yield build_root(machine)


def test_the_root_has_what_readme_says(native):
    assert names(native) == ["README", "connector", "os", "plugins", ".ignore", "CACHEDIR.TAG"]


def test_a_backup_program_recognises_the_tag(native):
    # https://bford.info/cachedir/: the file's first 43 bytes
    assert read_all(at(native, "CACHEDIR.TAG"))[:43] == b"Signature: 8a477f597d28d172789f06886806bc55"


def test_readme_is_one_screen_and_names_every_entry(native):
    shown = text(native, "README")
    lines = shown.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 100
    assert shown.isprintable() or all(line.isprintable() for line in lines)
    for entries in (contexts.root_entry, contexts.connector_entry, contexts.os_entry, contexts.process_entry,
                    contexts.module_entry):  # fmt: skip
        for name in entries.names():
            assert name in shown, name


def test_every_entry_says_in_one_line_what_it_is():
    for entries in (contexts.root_entry, contexts.connector_entry, contexts.os_entry, contexts.process_entry,
                    contexts.module_entry, contexts.thread_entry,
                    contexts.thread_facts_entry):  # fmt: skip
        for name, summary in entries.describe():
            assert summary.endswith("."), f"{entries.what}: {name}"


def test_what_says_size_0_and_has_bytes_stands_in_readme(native):
    pid = os.getpid()
    found = set()
    for path, node in walk(native, skip=frozenset({"processes", "regions", "sections"})):
        if isinstance(node, File) and not node.attributes().size and read_all_but_mem(path, node):
            found.add(path.split("/")[-1])
    for path, node in walk(native, f"os/native/processes/{pid}", skip=frozenset({"regions", "sections", "task"})):
        if isinstance(node, File) and not node.attributes().size and read_all_but_mem(path, node):
            found.add(path.split("/")[-1])
    assert found == set(UNSIZED)


def read_all_but_mem(path, node):
    return True if path.split("/")[-1] == "mem" else read_all(node)


def test_the_examples_of_readme_work_word_for_word(native):
    from mounting import mounted

    shell = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, "check": True}
    with mounted(limit=120) as mount:
        shown = (mount.folder / "README").read_text()
        lines = [line.strip() for line in shown.split("directory:\n")[1].split("\n\n")[0].splitlines()]
        assert len(lines) >= 4
        for line in lines:
            require(subprocess.run(["sh", "-c", f"command -v {line.split()[0]}"], check=False,
                                   stdout=subprocess.DEVNULL).returncode == 0, f"no {line.split()[0]}")  # fmt: skip
            done = subprocess.run(["bash", "-ec", f"{line}\n:"], cwd=mount.folder, **shell)  # no exec: $$ stays a shell
            assert done.stdout, line


def test_readme_has_examples_for_a_dump(monkeypatch):
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[42] = Life()
        machine.open("connector", Spec("dummy"), name="vm")
        shown = text(build_root(machine), "README")
        assert "os/processes/42/maps" in shown
        assert "xxd -l 64 connector/vm/phys_mem" in shown


def test_readme_of_an_empty_tree_has_no_example_that_fails():
    with Machine() as machine:
        shown = text(build_root(machine), "README")
        assert "os/processes" not in shown.split("Here:")[0]
        assert "cat connector/new os/new" in shown


def test_plugins_lists_what_is_installed(native):
    shown = text(native, "plugins")
    for word in ("native", "raw", "dummy", "built in"):
        assert word in shown


# -- entries of other packages ------------------------------------------------------------------------------------


class FakeEntryPoint:
    def __init__(self, name, load):
        self.name = name
        self.value = f"{name}:module"
        self.load = load
        self.dist = types.SimpleNamespace(name="pack", version="1.2")


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages with entries are installed; what they register is taken back."""
    found: list[FakeEntryPoint] = []
    real = importlib.metadata.entry_points

    def entry_points(**select):
        return found if select.get("group") == "cloudfs.nodes" else real(**select)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    registered = dict(process_entry._made)
    yield found
    process_entry._made.clear()
    process_entry._made.update(registered)


def test_another_package_adds_a_file_to_every_process(installed, monkeypatch):
    def load():
        @process_entry("quota")
        def quota(process: ProcessContext) -> Node | None:
            """Its quota."""
            return TextFile(process, "quota", lambda: f"quota of {process.pid}\n")

    installed.append(FakeEntryPoint("quota", load))
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[9] = Life()
        root = build_root(machine)
        assert text(root, "os/fake/processes/9/quota") == "quota of 9\n"
        assert "quota" in names(root, "os/processes/9")
        assert "Its quota." in text(root, "README")


def test_a_broken_package_is_reported_and_harms_nobody(installed):
    def load():
        raise ImportError("No module named 'nonesuch'")

    installed.append(FakeEntryPoint("broken", load))
    with Machine() as machine:
        root = build_root(machine)
        line = next(line for line in text(root, "plugins").splitlines() if "broken" in line)
        assert "pack 1.2" in line
        assert "nonesuch" in line
        assert "plugins" in names(root)


def test_an_entry_with_a_bug_hides_no_other(installed, monkeypatch, caplog):
    def load():
        @process_entry("buggy")
        def buggy(process: ProcessContext) -> Node | None:
            """Fails."""
            raise ZeroDivisionError

    installed.append(FakeEntryPoint("buggy", load))
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[9] = Life()
        listed = names(build_root(machine), "os/fake/processes/9")
        assert "mem" in listed
        assert "buggy" not in listed
        assert "ZeroDivisionError" in caplog.text


def test_the_tree_needs_neither_pyfuse3_nor_trio():
    code = (
        "import sys; from engine.machine import Machine; from cloudfs.nodes.root import build_root\n"
        "build_root(Machine()); assert not {'trio', 'pyfuse3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("live", [False, True])
def test_at_rest_the_root_lets_go_of_what_is_kept_of_live_targets_alone(monkeypatch, live):
    with fake_machine(monkeypatch, live=live) as (machine, layer):
        layer.table[7] = Life()
        root = build_root(machine)
        instance = machine.instances("oslayer")[0]
        process = instance.process(7)
        KEPT.store(instance, "key", "value")
        root.rest()
        assert (instance.process(7) is not process) == live
        assert (KEPT.find(instance, "key") is None) == live
