"""mount(8), umount(8) and what they run: mount.fuse.cloudfs, linked into /sbin for the time of a test."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounting import is_mounted, require_fuse, take_away
from support import require

from cloudfs.mount_helper import HelperUsageError, read_request, split_options

LINK = Path("/sbin/mount.fuse.cloudfs")
CONTENT = bytes(range(256)) * 64


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def point(tmp_path) -> Iterator[Path]:
    """A directory to mount on; cleared in the end, and after a minute anyhow."""
    require_fuse()
    folder = tmp_path / "mount"
    folder.mkdir()

    timer = threading.Timer(60, take_away, [folder])
    timer.start()
    yield folder
    timer.cancel()
    take_away(folder)
    assert not is_mounted(folder)


@pytest.fixture(scope="module")
def helper(tmp_path_factory) -> Path:
    """The console script as an installation would make it."""
    path = tmp_path_factory.mktemp("helper") / "mount.fuse.cloudfs"
    code = "import sys; from cloudfs.start import mount_helper; sys.exit(mount_helper())"
    # Not in the first line: the path of the interpreter may have spaces.
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{code}" "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def linked(helper) -> Iterator[None]:
    """What the manual asks an administrator to do."""
    require(os.geteuid() == 0, "only root may link the helper into /sbin and use mount(8)")
    require(not os.path.lexists(LINK), f"{LINK} is there already")
    require(shutil.which("mount"), "mount(8) is missing")
    LINK.symlink_to(helper)
    yield
    LINK.unlink()


def run(*words: object) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parent.parent.parent
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip


def memory_of(point: Path) -> Path:
    return point / "connector/raw/phys_mem"


# -- through mount(8) --------------------------------------------------------------------------------


def test_mount_returns_when_the_mount_stands_and_umount_ends_it(linked, image, point):
    options = "rw,nofail,_netdev,x-systemd.automount,allow_other"
    done = run("mount", "-t", "fuse.cloudfs", f"raw:{image}", point, "-o", options)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert memory_of(point).read_bytes() == CONTENT
    done = run("umount", point)
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_mounted(point)


def test_a_line_of_fstab_with_a_target_its_options_and_a_chain_is_mounted(linked, image, point, tmp_path):
    spaced = image.rename(image.with_name("an image, with a comma.raw"))
    target = f"raw:'{spaced}':base=0x1000".replace(" ", "\\040")
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{target} {point} fuse.cloudfs noauto,user,fsname=memory,timeout=7,x-anything=1 0 0\n")
    done = run("mount", "-T", fstab, point)
    assert done.returncode == 0, done.stderr
    found = json.loads(run("findmnt", "--json", "-o", "SOURCE,FSTYPE,OPTIONS", point).stdout)["filesystems"][0]
    assert (found["source"], found["fstype"]) == ("memory", "fuse.cloudfs")
    with memory_of(point).open("rb") as file:
        file.seek(0x1000)
        assert file.read(len(CONTENT)) == CONTENT
    assert run("umount", point).returncode == 0


def test_rw_of_mount_allows_no_writing_but_writable_does(linked, image, point):
    for options, allowed in (("rw", False), ("defaults", False), ("rw,writable", True)):
        assert run("mount", "-t", "fuse.cloudfs", f"raw:{image}", point, "-o", options).returncode == 0
        try:
            with contextlib.nullcontext() if allowed else pytest.raises(OSError, match="Read-only"):
                descriptor = os.open(memory_of(point), os.O_RDWR)
                try:
                    os.pwrite(descriptor, b"written", 16)
                finally:
                    os.close(descriptor)
        finally:
            assert run("umount", point).returncode == 0
    assert image.read_bytes()[16:23] == b"written"


def test_mount_gives_the_exit_codes_of_its_manual(linked, image, point, tmp_path):
    def code(*words: object) -> int:
        done = run("mount", "-t", "fuse.cloudfs", *words)
        assert "Traceback" not in done.stderr
        assert bool(done.stderr) == bool(done.returncode)
        return done.returncode

    missing = tmp_path / "missing.raw"
    assert code(f"raw:{missing}", point) == 32
    assert code(missing, point, "-o", "nofail") == 0
    assert code(f"raw:{missing}", point, "-o", "nofail") == 0
    assert code(f"raw:{image}", point, "-o", f"nofail,log_file={tmp_path}/nowhere/log") == 32
    assert code(f"raw:{image}", point, "-o", "nofail,nonsense") == 1
    assert code(f"raw:{image}", point, "-s", "-f", "-o", "nonsense") == 0
    assert code(f"raw:{image}", point, "-o", "ro,writable") == 1
    assert code(f"raw:{image}", point, "-o", "timeout=-1") == 1
    assert not is_mounted(point)


# -- by itself, as systemd and others call it ---------------------------------------------------------


def test_the_helper_mounts_as_other_helpers_do(helper, image, point):
    done = run(helper, f"raw:{image}", point, "-n", "-o", "rw,noexec,nosuid,nodev,user=me", "-t", "fuse.cloudfs")
    assert done.returncode == 0, done.stderr
    assert memory_of(point).read_bytes() == CONTENT
    assert run(sys.executable, "-m", "cloudfs", "umount", point).returncode == 0


def test_a_mount_point_that_is_missing_fails_in_spite_of_nofail(helper, image, tmp_path):
    done = run(helper, f"raw:{image}", tmp_path / "nowhere", "-o", "nofail")
    assert done.returncode == 32
    assert "does not exist" in done.stderr


def test_with_v_it_says_what_was_mounted(helper, image, point):
    done = run(helper, f"raw:{image}", point, "-v")
    assert (done.returncode, str(point) in done.stdout) == (0, True)


def test_it_says_what_it_is_and_how_it_is_used(helper):
    assert run(helper, "--version").stdout.startswith("cloudfs ")
    assert "writable" in run(helper, "--help").stdout


# -- its words ---------------------------------------------------------------------------------------


def test_a_comma_in_quotes_or_behind_a_backslash_belongs_to_its_option():
    text = r'a,os="x,\"y",b\,c,,d'
    assert split_options(text) == ["a", r'os="x,\"y"', r"b\,c", "d"]


def test_os_and_connector_keep_their_order():
    words = read_request(["qemu:web", "/mnt", "-o", 'os=linux,connector=qemu:"a,b",os=auto']).words
    assert words == ["mount", "--daemon", "--os=linux", '--connector=qemu:"a,b"', "--os=auto", "--", "qemu:web", "/mnt"]


@pytest.mark.parametrize("words", ["", "a", "a b c", "a b -o", "a b -z", 'a b -o "'])
def test_what_mount_would_never_say_is_wrong_usage(words):
    with pytest.raises(HelperUsageError):
        read_request(words.split())


def test_a_target_that_looks_like_an_option_is_a_target():
    assert read_request(["--", "-o", "/mnt"]).words[-2:] == ["-o", "/mnt"]
