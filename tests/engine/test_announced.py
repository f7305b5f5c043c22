"""Entry points of other distributions: found wherever Python finds them, at little cost where there are none."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from engine.announced import Announced, announced

METADATA = "Metadata-Version: 2.1\nName: made-up\nVersion: 1.2\n"
POINTS = "[cloudfs.connectors]\nmine = made_up:Mine\n"
FOUND = Announced("mine", "made_up:Mine", "made-up 1.2")


def test_an_entry_point_of_a_directory_is_found(tmp_path, monkeypatch):
    about = tmp_path / "made_up-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    (about / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert FOUND in list(announced("cloudfs.connectors"))
    assert list(announced("cloudfs.oslayers")) == []


def test_an_entry_point_in_an_archive_is_found(tmp_path, monkeypatch):
    path = tmp_path / "made_up.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("made_up-1.2.dist-info/METADATA", METADATA)
        archive.writestr("made_up-1.2.dist-info/entry_points.txt", POINTS)
    monkeypatch.syspath_prepend(str(path))
    assert FOUND in list(announced("cloudfs.connectors"))


@pytest.mark.parametrize("there", [False, True])
def test_what_finds_distributions_is_imported_only_where_one_announces_something(tmp_path, there):
    about = tmp_path / "made_up-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA)
    (about / "entry_points.txt").write_text(POINTS if there else "[console_scripts]\nx = y:z\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; known = 'importlib.metadata' in sys.modules\n"
        "from engine.announced import announced; found = list(announced('cloudfs.connectors'))\n"
        "print(len(found), 'importlib.metadata' in sys.modules and not known)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == ("1 True\n" if there else "0 False\n")
