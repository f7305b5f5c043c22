"""Columns that are kept in the user's cache folder: found again, bounded, and never believed when damaged."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.kept_columns import STALE, SUFFIX, KeptColumns

FACTS = {"words": ["a", 1, None], "nested": {"x": 2}}
COLUMNS = {"bytes": np.frombuffer(b"some bytes", np.uint8), "numbers": np.arange(1000, dtype=np.int32),
           "wide": np.array([2**64 - 1], np.uint64), "none": np.empty(0, np.int64)}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the entries of this test lie; not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CLOUDFS_NO_CACHE", raising=False)
    return tmp_path / "cache" / "cloudfs" / "kind"


def names(kept: KeptColumns, prefix: str = "") -> list[str]:
    return [entry.name.removesuffix(SUFFIX) for entry in kept.entries(prefix)]


def test_what_was_kept_is_found_again(folder):
    kept = KeptColumns("kind")
    assert kept.put("one", FACTS, COLUMNS)
    (entry,) = kept.entries("on")
    assert entry.facts == FACTS
    found = entry.columns()
    assert found is not None
    assert set(found) == set(COLUMNS)
    for name, column in COLUMNS.items():
        assert found[name].dtype == column.dtype
        assert found[name].tolist() == column.tolist()


def test_another_prefix_finds_nothing(folder):
    kept = KeptColumns("kind")
    kept.put("one", FACTS, COLUMNS)
    assert names(kept, "ones") == []


def test_nobody_else_can_look_into_the_folder(folder):
    KeptColumns("kind").put("one", FACTS, COLUMNS)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / f"one{SUFFIX}").stat().st_mode & 0o777 == 0o600


def test_a_folder_in_which_others_may_write_is_not_used(folder):
    kept = KeptColumns("kind")
    kept.put("one", FACTS, COLUMNS)
    folder.chmod(0o777)
    assert names(kept) == []
    assert not kept.put("two", FACTS, COLUMNS)


def test_a_folder_that_cannot_be_made_is_no_error(folder):
    folder.parent.parent.parent.joinpath("cache").write_text("a file where the folder should be")
    kept = KeptColumns("kind")
    assert not kept.put("one", FACTS, COLUMNS)
    assert names(kept) == []


def test_a_variable_turns_it_off(folder, monkeypatch):
    kept = KeptColumns("kind")
    kept.put("one", FACTS, COLUMNS)
    monkeypatch.setenv("CLOUDFS_NO_CACHE", "1")
    assert names(kept) == []
    assert not kept.put("two", FACTS, COLUMNS)
    assert [path.name for path in folder.iterdir()] == [f"one{SUFFIX}"]


def test_the_entry_used_last_comes_first_and_the_one_not_used_for_longest_goes(folder):
    kept = KeptColumns("kind", files=3)
    for number, name in enumerate(("one", "two", "three")):
        kept.put(name, FACTS, COLUMNS)
        os.utime(folder / f"{name}{SUFFIX}", (number, number))
    used = {entry.name: entry for entry in kept.entries("")}[f"one{SUFFIX}"]
    assert used.columns() is not None
    assert names(kept) == ["one", "three", "two"]
    kept.put("four", FACTS, COLUMNS)
    assert sorted(names(kept)) == ["four", "one", "three"]


def test_all_entries_together_have_a_bound(folder):
    kept = KeptColumns("kind", size=30_000)
    for name in "abcdefgh":
        kept.put(name, FACTS, COLUMNS)
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert 15_000 < total <= 30_000


def test_what_was_never_finished_is_taken_away(folder):
    kept = KeptColumns("kind")
    kept.put("one", FACTS, COLUMNS)
    old, new = folder / ".one.half", folder / ".two.half"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (old.stat().st_mtime - 2 * STALE,) * 2)
    kept.put("two", FACTS, COLUMNS)
    assert (old.exists(), new.exists()) == (False, True)


def test_a_file_of_another_kind_and_a_link_are_passed_over(folder):
    kept = KeptColumns("kind")
    kept.put("one", FACTS, COLUMNS)
    (folder / f"foreign{SUFFIX}").write_bytes(b"\x80\x04 a pickle, perhaps")
    (folder / f"empty{SUFFIX}").write_bytes(b"")
    (folder / f"link{SUFFIX}").symlink_to(folder / f"one{SUFFIX}")
    os.mkfifo(folder / f"pipe{SUFFIX}", 0o600)
    (folder / f"directory{SUFFIX}").mkdir()
    assert names(kept) == ["one"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(at=st.integers(0, 5000), value=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_file_gives_what_was_kept_or_nothing(folder, at, value, cut):
    kept = KeptColumns("kind")
    kept.put("one", FACTS, COLUMNS)
    path = folder / f"one{SUFFIX}"
    data = bytearray(path.read_bytes())
    at %= len(data)
    if cut:
        del data[at:]
    else:
        data[at] ^= value
    path.write_bytes(data)
    for entry in kept.entries("one"):
        assert entry.facts == FACTS
        found = entry.columns()
        assert found is None or all(found[name].tolist() == column.tolist() for name, column in COLUMNS.items())
