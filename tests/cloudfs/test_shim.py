"""The shim: compiled once, kept where only its owner can write, and gone without wherever that is not possible."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import require

from cloudfs import shim

LIMIT = 60
LOAD = """
    import logging, sys
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from cloudfs import shim
    found = shim.load()
    print(found is not None, shim.why_not_loaded())
"""


def can_compile() -> bool:
    try:
        shim._pkg_config("--modversion")
    except shim.NoShimError:
        return False
    return any(map(shim.shutil.which, shim.COMPILERS))


@pytest.fixture(autouse=True)
def compiler():
    require(can_compile(), "there are no C compiler and headers of libfuse")


def python(code: str, folder: Path | None, **environment: str) -> subprocess.Popen[str]:
    """A process with `folder` as its cache."""
    surrounding = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", shim.SWITCH)}
    if folder is not None:
        surrounding["XDG_CACHE_HOME"] = str(folder)
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(code)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**surrounding, **environment},
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    return output, errors


def load(folder: Path | None, **environment: str) -> tuple[str, str]:
    return said(python(LOAD, folder, **environment))


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cloudfs").iterdir())


def test_it_is_kept_as_one_file_that_nobody_else_can_write(tmp_path):
    assert load(tmp_path) == ("True None\n", "")
    (file,) = kept(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o500
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_what_is_kept_is_loaded_without_a_compiler(tmp_path):
    load(tmp_path)
    code = "import cloudfs.shim\ncloudfs.shim.COMPILERS = ()\n" + textwrap.dedent(LOAD)
    assert said(python(code, tmp_path)) == ("True None\n", "")


def test_eight_first_starts_at_once_leave_one_file_and_all_have_it(tmp_path):
    processes = [python(LOAD, tmp_path) for _ in range(8)]
    assert [said(process) for process in processes] == [("True None\n", "")] * 8
    assert len(kept(tmp_path)) == 1


def test_a_truncated_file_is_compiled_anew(tmp_path):
    load(tmp_path)
    (file,) = kept(tmp_path)
    file.chmod(0o700)
    file.write_bytes(file.read_bytes()[:100])
    output, errors = load(tmp_path)
    assert output == "True None\n"
    assert "compiled anew" in errors
    assert file.stat().st_size > 1000


def test_a_file_that_others_can_write_is_replaced_and_not_loaded(tmp_path):
    load(tmp_path)
    (file,) = kept(tmp_path)
    before = file.stat().st_ino
    file.chmod(0o777)
    output, errors = load(tmp_path)
    assert output == "True None\n"
    assert "can be written by other users" in errors
    assert file.stat().st_ino != before


def test_a_symbolic_link_in_its_place_is_replaced_and_not_followed(tmp_path):
    load(tmp_path)
    (file,) = kept(tmp_path)
    other = tmp_path / "other.so"
    file.rename(other)
    file.symlink_to(other)
    assert load(tmp_path)[0] == "True None\n"
    assert not file.is_symlink()


def test_a_directory_that_others_can_write_is_left_alone(tmp_path):
    folder = tmp_path / "cloudfs"
    folder.mkdir()
    folder.chmod(0o777)
    assert load(tmp_path)[0] == "True None\n"
    assert kept(tmp_path) == []


def test_the_home_of_another_user_is_left_alone(tmp_path):
    require(os.geteuid() == 0, "only root can give a directory to another user")
    os.chown(tmp_path, 65534, 65534)
    assert load(tmp_path)[0] == "True None\n"
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_no_directory_does_no_harm(tmp_path):
    nothing = tmp_path / "file"
    nothing.touch()
    assert load(nothing / "cache")[0] == "True None\n"


def test_nothing_is_left_in_the_directory_for_temporary_files(tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    load(tmp_path / "file-that-is-not-there", TMPDIR=str(temporary))
    assert list(temporary.iterdir()) == []


def test_without_a_compiler_one_line_says_what_to_install(tmp_path):
    code = "import cloudfs.shim\ncloudfs.shim.COMPILERS = ()\n" + textwrap.dedent(LOAD)
    output, errors = said(python(code, tmp_path))
    assert output.startswith("False there is no C compiler")
    assert errors.count("\n") == 1
    assert "install the package gcc" in errors


def test_without_the_headers_one_line_says_what_to_install(tmp_path):
    output, errors = load(tmp_path, PKG_CONFIG_PATH="", PKG_CONFIG_LIBDIR=str(tmp_path))
    assert output.startswith("False the headers of libfuse are not there")
    assert errors.count("\n") == 1


def test_a_compiler_that_fails_is_an_info_and_no_error(tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    compiler.chmod(0o755)
    output, errors = load(tmp_path / "cache", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert output.startswith("False")
    assert "could not compile it: cannot" in errors


def test_it_is_not_loaded_behind_pyfuse3(tmp_path):
    output, _ = said(python("import pyfuse3\n" + textwrap.dedent(LOAD), tmp_path))
    assert output == "False pyfuse3 was imported before it\n"


@pytest.mark.parametrize("word", ["0", "no", "OFF"])
def test_the_environment_switches_it_off(tmp_path, word):
    output, _ = load(tmp_path, CLOUDFS_SHIM=word)
    assert output == "False it is switched off\n"
    assert list(tmp_path.iterdir()) == []


def doctor(folder: Path, **environment: str) -> dict[str, dict[str, object]]:
    code = "from cloudfs.cli import main\nraise SystemExit(main(['plugins', 'doctor', '--json']))"
    output, _ = said(python(code, folder, **environment))
    return {row["name"]: row for row in json.loads(output)}


def test_the_doctor_says_that_it_is_used(tmp_path):
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse is not open to this user")
    rows = doctor(tmp_path)
    assert rows["shim"]["used"] is True
    assert {"/dev/fuse", "fast loop", "fusectl", "read-ahead", "pyfuse3", "fusermount3"} <= rows.keys()


def test_the_doctor_says_why_it_is_not_used(tmp_path):
    require(os.access("/dev/fuse", os.R_OK | os.W_OK), "/dev/fuse is not open to this user")
    row = doctor(tmp_path, CLOUDFS_SHIM="0")["shim"]
    assert row["used"] is False
    assert "switched off" in str(row["detail"])
