"""The mount's options and its refusals, without a mount."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
from made_up_tree import make_tree

from cloudfs import mount as mounting
from cloudfs.mount import MountError, MountOptions, check_device, mount
from engine.errors import EngineError, InvalidArgumentError


def test_permissions_are_always_checked_by_the_kernel_and_others_are_kept_out() -> None:
    words = MountOptions().words()
    assert {"default_permissions", "subtype=cloudfs", "nosuid", "nodev", "noexec"} <= words
    assert not words & {"allow_other", "ro"}
    assert "allow_other" in MountOptions(allow_other=True).words()


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("/data/a,allow_other", "fsname=/data/a\\,allow_other"),
        ("back\\slash", "fsname=back\\\\slash"),
        ("ümlaut\udcff", "fsname=?mlaut?"),
        ("new\nline", "fsname=new?line"),
        ("", "fsname=cloudfs"),
    ],
)
def test_the_source_is_one_option_whatever_it_is(source: str, word: str) -> None:
    assert word in MountOptions(source=source).words()


@pytest.mark.parametrize("word", ["max_read=4096", "ro", "kernel_cache", "fsname=x", "a,b", ""])
def test_options_that_would_end_or_spoil_the_mount_are_refused(word: str) -> None:
    with pytest.raises(InvalidArgumentError, match="is not known"):
        MountOptions(extra=(word,)).words()


def test_known_options_are_passed_on() -> None:
    assert "noatime" in MountOptions(extra=("noatime",)).words()


def test_without_the_helper_there_is_no_auto_unmount(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting.mountpoints, "FUSERMOUNT", "no-such-program")
    assert "auto_unmount" not in MountOptions().words()


def test_a_machine_without_fuse_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "DEVICE", "/dev/no-fuse")
    with pytest.raises(MountError, match=re.escape("there is no /dev/no-fuse; load the kernel's module")):
        mount(make_tree(), tmp_path)


def test_a_device_that_cannot_be_opened_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MountError, match=re.escape("/dev/fuse cannot be opened (Permission denied)")):
        check_device()


def test_a_user_without_the_helper_is_told_which_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", lambda *arguments: os.dup(0))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(mounting.mountpoints, "FUSERMOUNT", "no-such-program")
    with pytest.raises(MountError, match="install the package fuse3"):
        check_device()


def test_a_user_is_told_what_the_helper_needs_before_anything_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", lambda *arguments: os.dup(0))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(mounting.mountpoints, "FUSERMOUNT", "sh")
    monkeypatch.setattr(mounting.mountpoints, "MTAB", tmp_path / "mtab")
    with pytest.raises(MountError, match=re.escape("as root run `ln -s ../proc/self/mounts /etc/mtab`")):
        check_device()


def test_a_mount_error_is_an_error_of_the_engine() -> None:
    assert issubclass(MountError, EngineError)
    assert MountError.code == "mount"
