"""The manual pages are what the command line is, and roff has nothing to say about them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import require

ROOT = Path(__file__).parent.parent
PAGES = ["cloudfs.1", "mount.fuse.cloudfs.8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    subprocess.run(
        [sys.executable, str(ROOT / "scripts/manpages.py"), str(folder)], check=True, timeout=30, cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_what_the_parsers_make_of_it(made, page):
    wanted = (made / page).read_text()
    assert (ROOT / "man" / page).read_text() == wanted, "the command line has changed: run scripts/manpages.py"


def test_there_are_no_other_pages():
    assert sorted(path.name for path in (ROOT / "man").iterdir()) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_roff_takes_a_page_without_a_warning(page):
    require(shutil.which("groff"), "groff is missing")
    command = ["groff", "-man", "-ww", "-Tascii", "-P-c", str(ROOT / "man" / page)]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"cloudfs mount" in done.stdout or b"mount -t fuse.cloudfs" in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_mandoc_takes_a_page_without_a_warning(page):
    require(shutil.which("mandoc"), "mandoc is missing")
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", str(ROOT / "man" / page)], capture_output=True, text=True,
        timeout=30, check=False,
    )  # fmt: skip
    said = [line for line in (done.stdout + done.stderr).splitlines() if "missing date" not in line]
    assert said == [], "the date is left out: a page has the version it was made from"
