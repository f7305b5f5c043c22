"""The rules for what is no process of this host, on a real mount: names, links, broken entries, what hangs."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import mounted
from toy_package import BROKEN, KERNEL_BYTES, NAMES, PIT, installed


@pytest.fixture(scope="module")
def top(tmp_path_factory) -> Iterator[Path]:
    """A mount of a connector, an OS on it, and nothing else."""
    environment = installed(tmp_path_factory.mktemp("toy"))
    with mounted("-c", "dummy:size=4M", "-o", "toy", limit=120, environment=environment) as mount:
        yield mount.folder


def shell(line: str, *arguments: object, timeout: float = 30) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["bash", "-c", line, "bash", *map(str, arguments)], capture_output=True, timeout=timeout,
        stdin=subprocess.DEVNULL, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip


# -- who holds what ------------------------------------------------------------------------------------------


def test_a_connector_under_an_os_is_busy_and_new_says_who_holds_it(top):
    done = shell('rmdir "$1"/connector/dummy', top)
    assert b"Device or resource busy" in done.stderr
    said = (top / "connector/new").read_text()
    assert "failed: rmdir dummy" in said
    assert "toy stands on it" in said


def test_children_first_is_the_order_in_which_instances_go(top):
    (top / "connector/new").write_text("base dummy:size=64K\n")
    (top / "os/new").write_text("upper -c base toy\n")
    with pytest.raises(OSError, match="busy"):
        os.rmdir(top / "connector/base")
    os.rmdir(top / "os/upper")
    os.rmdir(top / "connector/base")
    assert "done: rmdir base" in (top / "connector/new").read_text()
    assert not (top / "connector/base").exists()


# -- names ---------------------------------------------------------------------------------------------------


def by_name(top: Path) -> dict[bytes, bytes]:
    directory = os.fsencode(top / "os/toy/processes/by-name")
    return {name: os.readlink(directory + b"/" + name) for name in os.listdir(directory)}


def test_whatever_processes_are_called_each_is_listed_by_name_under_a_name_a_terminal_can_show(top):
    links = by_name(top)
    assert {int(target[3:]) for target in links.values()} >= set(NAMES)
    for name in links:
        assert 0 < len(name) <= 255
        assert re.fullmatch(rb"[^/\x00-\x1f\x7f]+", name), name
        assert name.decode()


def test_a_name_too_long_for_a_file_is_cut_and_whole_in_info(top):
    cut = next(name for name, target in by_name(top).items() if target == b"../14")
    assert re.fullmatch(rb"(long)+\w*~[0-9a-f]+", cut)
    assert NAMES[14] in (top / "os/toy/processes/14/info.json").read_text()


def test_find_walks_over_hostile_names_without_a_complaint(top):
    done = shell('find "$1"/os/toy/processes/by-name "$1"/os/toy/processes/by-pid-name -ls', top)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""


# -- links and owners ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exe", "cwd", "root", "fd/0"])
def test_a_link_of_a_target_says_where_it_leads_there_and_leads_nowhere_here(top, name):
    path = top / "os/toy/processes/10" / name
    assert re.fullmatch(r"toy:/[a-z/]*", os.readlink(path))
    assert not path.exists()


def test_copying_a_process_copies_its_links_and_follows_none(top, tmp_path):
    done = shell('cp -r "$1"/os/toy/processes/10/fd "$2"/', top, tmp_path)
    assert done.returncode == 0, done.stderr
    assert os.readlink(tmp_path / "fd/0") == "toy:/etc/passwd"


def test_files_of_a_target_belong_to_who_has_mounted_them(top):
    told = os.stat(top / "os/toy/processes/10/mem")
    assert (told.st_uid, told.st_gid) == (os.getuid(), os.getgid())


# -- broken and far away -------------------------------------------------------------------------------------


def test_a_broken_process_is_listed_and_hides_no_other(top):
    listed = {name for name in os.listdir(top / "os/toy/processes") if name.isdigit()}
    assert listed == {str(pid) for pid in (*NAMES, BROKEN)}
    done = shell('ls -l "$1"/os/toy/processes', top)
    assert done.returncode == 0, done.stderr


def test_what_is_broken_in_a_process_is_an_error_and_its_directory_can_be_listed(top):
    directory = top / f"os/toy/processes/{BROKEN}"
    assert "regions" in os.listdir(directory)
    done = shell('cat "$1"/info; ls "$1"/regions; cat "$1"/mem', directory)
    assert done.stderr.count(b"Input/output error") == 3


def test_the_offset_in_the_kernels_mem_is_its_address_without_the_top_bit(top):
    mem = top / "os/toy/mem"
    assert mem.stat().st_size == 0
    shown = shell('xxd -s 0x7fff888000000000 -l 16 -p "$1"', mem).stdout
    assert bytes.fromhex(shown.decode()) == KERNEL_BYTES[:16]
    read = shell('dd if="$1" bs=4096 count=1 iflag=skip_bytes skip=$((0x7fff888000000000)) status=none', mem)
    assert read.stdout == KERNEL_BYTES


# -- what hangs ----------------------------------------------------------------------------------------------


def test_a_target_that_never_answers_is_etimedout_for_its_reader_and_nobody_else_waits(tmp_path):
    with mounted("--timeout", "2", "-c", "tar-pit", environment=installed(tmp_path / "toy")) as mount:
        memory = mount.folder / "connector/tar-pit/phys_mem"
        failed: list[int | None] = []

        def read() -> None:
            with contextlib.suppress(FileNotFoundError), open(memory, "rb", buffering=0) as file:
                try:
                    os.pread(file.fileno(), 4096, PIT)
                except OSError as error:
                    failed.append(error.errno)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        slowest = 0.0
        while any(reader.is_alive() for reader in readers):
            begun = time.monotonic()
            os.listdir(mount.folder)
            os.listdir(mount.folder / "connector")
            slowest = max(slowest, time.monotonic() - begun)
            time.sleep(0.01)
        assert failed == [errno.ETIMEDOUT] * 3
        assert slowest < 1.0
