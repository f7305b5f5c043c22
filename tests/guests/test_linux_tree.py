"""The tree of a mount over recorded guests: contents of files, images of modules, registers of threads."""

from __future__ import annotations

import json

import pytest
from guests.program import compiled
from guests.truth import secret_text
from tree import at, names, read_all, text

from cloudfs.nodes.root import build_root
from engine.targets import open_target


@pytest.fixture(scope="module")
def tree(typed):
    with open_target(str(typed.image)) as machine:
        yield build_root(machine)


@pytest.fixture
def keeper(typed, tree) -> str:
    return f"os/linux/processes/{typed.truth.keeper}"


def test_the_image_of_a_module_is_its_file(typed, tree, keeper):
    program = compiled(typed.guest.architecture).read_bytes()
    node = at(tree, f"{keeper}/modules/keeper/image")
    assert node.attributes().size == len(program)
    assert read_all(node) == program


def test_the_vdso_is_an_image_too(typed, tree, keeper):
    assert read_all(at(tree, f"{keeper}/modules/[vdso]/image")).startswith(b"\x7fELF")


def test_files_hold_what_descriptors_lead_to(typed, tree, keeper):
    links = dict(line.split(" ", 1) for line in typed.truth.text(f"/proc/{typed.truth.keeper}/fd").splitlines())
    secrets = {"/tmp/shared": "shared-file", "/tmp/deleted (deleted)": "deleted-file",
               "/memfd:nameless (deleted)": "memfd", "/tmp/private": "private-file"}  # fmt: skip
    listed = set(names(at(tree, f"{keeper}/files")))
    for number, path in links.items():
        assert (number in listed) == (path in (*secrets, "/etc/passwd")), path
        if path in secrets:
            node = at(tree, f"{keeper}/files/{number}")
            data = read_all(node)
            assert secret_text(secrets[path]) in data
            assert len(data) == node.attributes().size
        if number in listed:
            assert at(tree, f"{keeper}/fd/{number}").target() == f"linux:{path}"


def test_a_file_that_is_only_mapped_is_there_under_its_addresses(typed, tree, keeper):
    start, stop = next((a, b) for a, b, _, path in typed.truth.maps(typed.truth.keeper) if path == "/bin/keeper")
    program = compiled(typed.guest.architecture).read_bytes()
    assert read_all(at(tree, f"{keeper}/files/{start:x}-{stop:x}")) == program


def test_a_region_of_a_file_is_whole_though_not_all_of_it_was_touched(typed, tree, keeper):
    program = compiled(typed.guest.architecture).read_bytes()
    name = next(name for name in names(at(tree, f"{keeper}/regions")) if ".r-xp.keeper" in name)
    data = read_all(at(tree, f"{keeper}/regions/{name}"))
    assert data.strip(b"\0") in program


def test_threads_have_registers_as_text_and_as_json(typed, tree, keeper):
    threads = names(at(tree, f"{keeper}/threads"))
    assert threads == names(at(tree, f"{keeper}/task"))
    running = f"{keeper}/threads/{typed.truth.keeper}"
    assert "was running" in text(tree, f"{running}/registers")
    assert json.loads(text(tree, f"{running}/registers.json")) is None
    other = f"{keeper}/threads/{threads[-1]}"
    lines = dict(line.split() for line in text(tree, f"{other}/registers").splitlines())
    assert lines == json.loads(text(tree, f"{other}/registers.json"))
    assert json.loads(text(tree, f"{other}/info.json"))["tid"] == int(threads[-1])
