"""`os/NAME/proc/`: what stands in a look-alike of /proc, over a made-up OS."""

from __future__ import annotations

import gzip
import stat as st

import pytest
from fake_os import Life, fake_machine
from tree import at, names, text

from cloudfs.nodes.root import build_root
from engine.errors import NotFoundError
from engine.oslayer import KernelConfig, SystemFiles

PROC = "os/fake/proc"


class Told(SystemFiles):
    """Files in directories of several depths."""

    FILES = {"version": b"Fake 1\n", "sys/kernel/hostname": b"box\n", "sys/kernel/random/boot_id": b"0\n"}

    def names(self):
        return tuple(self.FILES)

    def read(self, name):
        if name not in self.FILES:
            raise NotFoundError(name)
        return self.FILES[name]


FILES, LINKS = {"comm": b"sh\n", "stat": b"300 (sh) S\n"}, {"exe": "/bin/sh", "fd/3": "socket:[7]"}


class Configured(KernelConfig):
    def config(self):
        return b"CONFIG_FAKE=y\n"


@pytest.fixture
def root(monkeypatch):
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table |= {1: Life(name="init"), 300: Life(name="sh", files=FILES, links=LINKS)}
        known = {SystemFiles: Told(), KernelConfig: Configured()}
        monkeypatch.setattr(type(layer), "capability", lambda self, kind: known.get(kind))
        yield build_root(machine)


def test_an_os_that_tells_no_files_of_its_system_has_none(monkeypatch):
    with fake_machine(monkeypatch) as (machine, layer):
        layer.table[1] = Life()
        assert "proc" not in names(build_root(machine), "os/fake")


def test_it_holds_the_system_s_files_and_a_directory_for_each_process(root):
    assert names(root, PROC) == ["version", "sys", "config.gz", "self", "1", "300"]
    assert names(root, f"{PROC}/sys/kernel") == ["hostname", "random"]
    assert text(root, f"{PROC}/sys/kernel/random/boot_id") == "0\n"
    assert at(root, f"{PROC}/self").target() == "1"


def test_files_say_that_they_are_empty_as_those_of_proc_do(root):
    attributes = at(root, f"{PROC}/version").attributes()
    assert (attributes.size, st.S_ISREG(attributes.mode)) == (0, True)
    assert text(root, f"{PROC}/version") == "Fake 1\n"


def test_the_configuration_is_packed_there_and_plain_beside(root):
    node = at(root, f"{PROC}/config.gz")
    assert gzip.decompress(node.render()) == b"CONFIG_FAKE=y\n"
    assert text(root, "os/fake/config") == "CONFIG_FAKE=y\n"


@pytest.mark.parametrize("name", ["sys/kernel/none", "sys/none", "versio", "2", "01", "net", "kallsyms"])
def test_what_is_not_told_is_not_there(root, name):
    with pytest.raises((FileNotFoundError, NotADirectoryError)):
        at(root, f"{PROC}/{name}")


def test_a_process_has_its_files_and_links_in_plain_words(root):
    assert names(root, f"{PROC}/300") == ["comm", "stat", "maps", "cwd", "exe", "root", "fd", "fdinfo", "task"]
    assert text(root, f"{PROC}/300/comm") == "sh\n"
    assert at(root, f"{PROC}/300/exe").target() == "/bin/sh"
    assert names(root, f"{PROC}/300/fd") == names(root, f"{PROC}/300/fdinfo") == ["3"]
    assert at(root, f"{PROC}/300/fd/3").target() == "socket:[7]"


def test_a_process_of_which_no_files_are_told_has_its_maps(root):
    assert names(root, f"{PROC}/1") == ["maps"]
