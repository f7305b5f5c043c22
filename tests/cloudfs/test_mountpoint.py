"""Mount points, without a mount of ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import require

from cloudfs import mountpoint as mountpoints
from cloudfs.mountpoint import MountError, find_mount, is_dead, is_mounted, mounts, prepare, resolve, standing, unmount
from engine.errors import InvalidArgumentError, NotFoundError


def test_it_imports_neither_pyfuse3_nor_trio() -> None:
    code = "import cloudfs.mountpoint, sys; print({'pyfuse3', 'trio', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "set()"


def test_the_mounts_are_those_that_findmnt_shows() -> None:
    done = subprocess.run(
        ["findmnt", "-rn", "-o", "FSTYPE,MAJ:MIN"], capture_output=True, text=True, timeout=30, check=False
    )
    require(done.returncode == 0, "findmnt does not work here")
    shown = sorted(line.split()[0] for line in done.stdout.splitlines() if not line.startswith("fuse"))
    assert sorted(entry.kind for entry in mounts() if not entry.kind.startswith("fuse")) == shown


def test_what_is_mounted_is_found_by_its_path() -> None:
    entry = find_mount("/proc")
    assert entry is not None
    assert (entry.kind, entry.mountpoint) == ("proc", "/proc")
    device = os.stat("/proc").st_dev
    assert entry.device == (os.major(device), os.minor(device))
    assert find_mount("/proc/self") is None
    assert find_mount("/nonexistent/x") is None


def test_links_to_a_mount_are_followed(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("/proc")
    (tmp_path / "two").symlink_to("one")
    entry = find_mount(tmp_path / "two")
    assert entry is not None
    assert entry.mountpoint == "/proc"


def test_a_relative_path_and_a_trailing_slash_are_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("dir/") == str(tmp_path / "dir")
    assert resolve("dir/..") == str(tmp_path)
    assert resolve(".") == str(tmp_path)
    assert resolve("/") == "/"


def test_links_that_go_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InvalidArgumentError, match="links"):
        resolve(tmp_path / "a")


@pytest.fixture
def odd_mount(tmp_path: Path) -> Iterator[Path]:
    require(os.geteuid() == 0, "mounting a tmpfs needs root")
    path = tmp_path / "a b\tc\nd\\e#ü\udcff"
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", os.fsencode(path)], timeout=30, check=False)
    require(done.returncode == 0, "a tmpfs cannot be mounted here")
    yield path
    subprocess.run(["umount", os.fsencode(path)], timeout=30, check=True)


def test_a_mount_point_of_odd_letters_is_found(odd_mount: Path) -> None:
    entry = find_mount(odd_mount)
    assert entry is not None
    assert (entry.mountpoint, entry.kind) == (str(odd_mount), "tmpfs")
    assert not is_mounted(odd_mount)


def test_a_mount_that_is_not_ours_is_not_unmounted(odd_mount: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="tmpfs"):
        unmount(odd_mount)
    with pytest.raises(InvalidArgumentError, match="tmpfs"):
        unmount(odd_mount, force=True)
    assert find_mount(odd_mount) is not None


def test_another_kind_of_mount_can_be_mounted_on(odd_mount: Path) -> None:
    assert prepare(odd_mount) == str(odd_mount)


def test_a_live_directory_is_not_dead(tmp_path: Path) -> None:
    assert not is_dead(str(tmp_path))
    assert not is_dead(str(tmp_path / "missing"))


def test_what_is_not_mounted_is_not_unmounted(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nothing is mounted"):
        unmount(tmp_path)


def test_a_directory_that_can_be_mounted_on_is_given_as_its_real_path(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("dir")
    assert prepare(tmp_path / "link") == str(tmp_path / "dir")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing", "does not exist; make it with `mkdir"),
        ("file", "not a directory"),
        ("full", "not empty"),
        ("file/x", "Not a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_mounted_on_is_refused_in_a_sentence(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(MountError, match=re.escape(words)):
        prepare(tmp_path / name)


def test_a_full_directory_is_mounted_on_where_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    assert prepare(tmp_path, nonempty=True) == str(tmp_path)


def test_who_uses_a_directory_is_named(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w"):
        assert f"{os.getpid()} (" in mountpoints._by_whom(str(tmp_path))
    assert mountpoints._by_whom(str(tmp_path)) == ""


def test_where_processes_stand_is_found_by_names_below_the_mount_point(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b c"
    place.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", "input()"], cwd=place, stdin=subprocess.PIPE)
    try:
        assert standing(str(tmp_path)) == [(b"a", b"b c")]
        assert standing(f"{tmp_path}/a") == [(b"b c",)]
        assert standing(f"{tmp_path}/a/b") == []
        assert (*os.fsencode(tmp_path).split(b"/")[1:], b"a", b"b c") in standing("/")
    finally:
        process.communicate(timeout=10)
