"""The mount as a service of systemd, and sources whose names a list of options could be broken by."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mounting import is_mounted, mounted, require_fuse
from support import require

UNIT = Path(__file__).parent.parent.parent / "contrib/systemd/cloudfs@.service"


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_a_service_manager_is_told_when_the_mount_stands(tmp_path, abstract):
    require_fuse()
    folder = tmp_path / "mount"
    folder.mkdir()
    address = f"@cloudfs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0"))
        manager.settimeout(20)
        service = subprocess.Popen(
            [sys.executable, "-m", "cloudfs", "mount", str(folder)],
            stdin=subprocess.DEVNULL, env={**os.environ, "NOTIFY_SOCKET": address},
        )  # fmt: skip
        try:
            assert manager.recv(100) == b"READY=1"
            assert is_mounted(folder)
            assert (folder / "README").read_text()
        finally:
            service.send_signal(signal.SIGTERM)
            try:
                assert service.wait(20) == 0
            finally:
                subprocess.run(["umount", "-q", "-l", str(folder)], capture_output=True, timeout=20, check=False)
                service.kill()


def test_a_service_manager_that_does_not_listen_is_no_reason_to_fail(tmp_path):
    with mounted(environment={"NOTIFY_SOCKET": str(tmp_path / "nobody")}) as mount:
        assert (mount.folder / "README").read_text()


def test_systemd_accepts_the_unit(tmp_path):
    require(shutil.which("systemd-analyze"), "systemd-analyze is missing")
    program = tmp_path / "cloudfs"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / "cloudfs@.service"
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/cloudfs", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_starts_what_it_names_with_the_words_that_cloudfs_knows():
    [line] = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert line.split() == ["/usr/local/bin/cloudfs", "mount", "$OPTIONS", "--", "${TARGET}", "%t/cloudfs/%i"]


# -- names that a list of mount options could be broken by --------------------------------------------


HOSTILE = {
    "comma": "a,allow_other,max_read=1",
    "space": "two words",
    "backslash": "back\\slash\\,",
    "newline": "two\nlines",
    "non-ascii": "dümp-日本",
    "invalid": os.fsdecode(b"\xff\xfe"),
    "quotes": "it's \"quoted\"",
    "equals": "base=0x1000",
    "percent": "100%s%n",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_path_does_not_become_mount_options(tmp_path, name):
    image = tmp_path / name
    image.write_bytes(b"memory" * 1000)
    with mounted("-f", str(image)) as mount:
        [line] = [row for row in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
                  if row.split(" ")[4] == str(mount.folder)]  # fmt: skip
        kind, source, options = line.split(" - ")[1].split(" ")
        assert kind == "fuse.cloudfs"
        assert {"allow_other", "max_read=1"} & set(options.split(",")) == set()
        if name.isascii() and name.isprintable():
            shown = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), source)
            assert name in shown.replace('\\"', '"').replace("\\\\", "\\")
        assert (mount.folder / "connector/raw/phys_mem").read_bytes() == image.read_bytes()
