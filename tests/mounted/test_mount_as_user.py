"""A mount of a user who is not root: one run of as_user.py, and what it saw."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support import require


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    require(os.geteuid() == 0, "becoming another user in a namespace needs root")
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse cannot be used here")
    require(shutil.which("fusermount3"), "fusermount3 is not installed")
    # Not below pytest's own folder, which every pytest that starts closes to others again.
    with tempfile.TemporaryDirectory(prefix="cloudfs-test-") as top:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("as_user.py")), top],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    require("unshare" not in done.stderr, "mount namespaces cannot be made here")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_user_mounts_reads_and_owns_what_is_shown(seen: dict[str, Any]) -> None:
    assert seen["text"] == "hello\n"
    assert seen["owner"] == "65534"


def test_the_kernel_refuses_what_the_mode_forbids(seen: dict[str, Any]) -> None:
    assert seen["foreign mode"].startswith("PermissionError")


def test_a_user_unmounts_what_he_mounted(seen: dict[str, Any]) -> None:
    assert seen["unmount"] == "None"
    assert seen["end"] == "unmounted"


def test_a_signal_unmounts(seen: dict[str, Any]) -> None:
    assert seen["signal"] == "unmounted"
    assert not seen["mounted after the signal"]


def test_a_user_clears_a_dead_mount(seen: dict[str, Any]) -> None:
    assert seen["mounted after kill -9"]
    assert seen["unmount of the dead"] == "None"
    assert not seen["mounted after that"]


@pytest.mark.parametrize(("way", "end"), [("running", "unmounted"), ("stopped", "")])
def test_force_of_a_user_without_fusectl_ends_his_own_daemon(seen: dict[str, Any], way: str, end: str) -> None:
    assert seen[f"force of a {way} daemon"] == "None"
    assert not seen[f"mounted after force, {way}"]
    assert seen[f"end of a {way} daemon"] == end


def test_the_process_of_another_user_is_no_daemon_that_could_be_ended(seen: dict[str, Any]) -> None:
    assert seen["daemon of nobody for root"] is False
    assert seen["force of another's daemon"].startswith("AccessDeniedError: ")
    assert "nor is it served by a process of this user" in seen["force of another's daemon"]
    assert seen["unmount after that"] == "None"


def test_letting_others_in_is_refused_in_the_helpers_words(seen: dict[str, Any]) -> None:
    if seen["allow_other"] != "allowed":  # as /etc/fuse.conf says
        assert seen["allow_other"].startswith("MountError: ")
        assert "user_allow_other" in seen["allow_other"]


def test_the_watchdog_ends_the_mount_without_the_rights_of_root(seen: dict[str, Any]) -> None:
    assert seen["own page"].startswith(("OSError", "ConnectionAbortedError"))
    assert seen["seconds"] < 10
    assert "was unmounted: one request had held up all others" in seen["watchdog"]
    assert not seen["mounted after the watchdog"]
