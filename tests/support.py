"""What tests share. Import it with `from support import require` (tests/ is on the path, see pyproject)."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the test where this machine lacks something; fail instead under CLOUDFS_TEST_REQUIRE=all."""
    if condition:
        return
    if os.environ.get("CLOUDFS_TEST_REQUIRE") == "all":
        pytest.fail(f"CLOUDFS_TEST_REQUIRE=all, but {reason}")
    pytest.skip(reason)


def applies(condition: object, reason: str) -> None:
    """Leave a test whose question does not arise here: another kernel, guest or mode. Nothing could be installed."""
    if not condition:
        pytest.skip(reason)


REFUSED_WRITE = "Read-only file system" if os.geteuid() == 0 else "Permission denied"
"""What opening a memory file for writing gives where nothing may be written: root gets past the mode."""


def require_abort() -> None:
    """Skip where a FUSE connection cannot be aborted from outside."""
    there = Path("/sys/fs/fuse/connections").is_dir() and any(Path("/sys/fs/fuse/connections").iterdir())
    require(os.geteuid() == 0 or there, "only root, or the owner by fusectl, may abort a FUSE connection")


def as_nobody(code: str, *arguments: str, timeout: float = 20, imports: str = "engine") -> str:
    """What a Python program prints that runs without rights: as root it becomes uid 65534 once all is imported.

    The packages, and `imports`, are imported first, since a checkout may lie where nobody may look.
    """
    program = (
        "import os, sys\nimport engine, engine.targets, engine.file_memory, engine.connectors.raw\n"
        f"import engine.oslayers.native.modules, {imports}\n"
        "if os.geteuid() == 0:\n    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n" + textwrap.dedent(code)
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def calls_of(act: Callable[[], object]) -> int:
    """How many functions are called meanwhile, of Python and of C: what something costs, whatever else runs here."""
    count = 0

    def called(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count
