"""Every program under scripts/ starts where nothing but cloudfs is installed, and tells how it is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted(
    path for path in (ROOT / "scripts").rglob("*.py") if 'if __name__ == "__main__":' in path.read_text("utf-8")
)
BARE = """
import runpy, sys
for name in ("pytest", "hypothesis", "_pytest"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""As `python FILE` runs it, but for packages that are for tests alone."""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT / "scripts")))
def test_a_program_starts_without_a_path_set_and_shows_its_usage(program: Path, tmp_path: Path) -> None:
    # With the tests' path it would find what its user lacks: `engine` beside tests/engine, for one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["CLOUDFS_NO_ACCELERATOR"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(program), "--help"],
        capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr
    assert list(tmp_path.iterdir()) == [], "asking how it is used must do nothing"


def test_a_peer_without_work_says_how_it_is_used() -> None:
    program = ROOT / "scripts" / "bench" / "translate_peers.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")
