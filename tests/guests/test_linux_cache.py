"""Profiles that are kept: a guest opened again shows the same, and no dump gets what was not made of its own bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from guests.recording import Recording

from engine.file_memory import FileMemory
from engine.formats.btf import Btf
from engine.oslayer import Base
from engine.oslayers.linux import LinuxLayer, profile


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of kept profiles."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CLOUDFS_NO_CACHE", raising=False)
    return tmp_path / "cache" / "cloudfs" / "profiles"


@pytest.fixture
def searches(monkeypatch) -> list[str]:
    """What was searched for in a kernel's image, in their order."""
    found: list[str] = []
    for name in ("load_kallsyms", "load_btf", "load_ksymtab"):
        monkeypatch.setattr(profile, name, _counted(found, name, getattr(profile, name)))
    return found


def _counted(found: list[str], name: str, call: Callable[..., object]) -> Callable[..., object]:
    def counted(*arguments, **options):
        found.append(name)
        return call(*arguments, **options)

    return counted


def opened(path: Path, **options: str) -> LinuxLayer:
    return LinuxLayer.open(Base(FileMemory(str(path), immutable=True)), options)


def symbols(layer: LinuxLayer) -> list[tuple[str, str, int]]:
    known = layer.kernel.profile
    found = [(each.name, each.kind, each.address) for each in known.kallsyms or ()]
    return found + [(each.name, "", each.address) for each in known.exports or ()]


def layouts(layer: LinuxLayer) -> dict[str, list[tuple[str, int, int]]]:
    types = layer.kernel.profile.types
    names = ("task_struct", "mm_struct", "vm_area_struct", "file", "dentry", "sock", "module")
    found = {name: types.struct(name) for name in names} if types is not None else {}
    return {name: [(each.name, each.offset, each.size) for each in layout or ()] for name, layout in found.items()}


def test_what_is_opened_again_shows_the_same_and_searches_for_nothing(recording, searches, folder):
    first = opened(recording.image)
    assert searches
    assert len(list(folder.iterdir())) == 1
    searches.clear()
    again = opened(recording.image)
    assert searches == []
    assert symbols(again) == symbols(first)
    assert layouts(again) == layouts(first)
    assert again.info == first.info


def test_one_profile_serves_every_boot_of_a_kernel(guest, searches, folder):
    """The same build with another KASLR slide, another paging mode: the symbols are those of this boot."""
    one, other = opened(guest("amd64-6.1-4level").image), guest("amd64-6.1-pti")
    plain = opened(other.image, cache="no")
    assert symbols(plain) != symbols(one)
    searches.clear()
    cached = opened(other.image)
    assert searches == []
    assert symbols(cached) == symbols(plain)
    assert len(list(folder.iterdir())) == 1


def test_with_cache_no_nothing_is_used_and_nothing_kept(guest, searches, folder):
    opened(guest("amd64-6.1-4level").image, cache="no")
    assert searches
    assert not folder.exists()


def changed(recording: Recording, target: Path, name: str, offset: int, data: bytes) -> Path:
    """A copy of the recorded RAM with other bytes behind a symbol of the kernel."""
    layer = opened(recording.image, cache="no")
    address = layer.kernel.profile.require(name) + offset
    at = layer.kernel.found.memory.virt_to_phys(address)
    subprocess.run(["cp", "--sparse=always", str(recording.image), str(target)], check=True, timeout=60)
    with open(target, "r+b") as file:
        file.seek(at)
        file.write(data)
    return target


def test_a_dump_that_only_claims_the_build_id_neither_gets_what_was_kept_nor_leaves_what_others_get(
    guest, tmp_path, searches, folder
):
    recording = guest("amd64-6.1-4level")
    true = opened(recording.image)
    # A name among the strings of the types, which nobody looks up: sound, but other bytes.
    planted = changed(recording, tmp_path / "planted", "__stop_BTF", -5, b"XYZ\0")
    searches.clear()
    assert opened(planted).kernel.profile.types is not None
    assert "load_btf" in searches
    assert len(list(folder.iterdir())) == 2
    searches.clear()
    assert symbols(opened(recording.image)) == symbols(true)
    assert searches == []
    (tmp_path / "planted").unlink()


def test_of_a_dump_without_types_no_profile_is_kept(guest, tmp_path, folder):
    """Else a whole image of the same kernel would be told that it has none."""
    recording = guest("amd64-6.1-4level")
    bare = changed(recording, tmp_path / "bare", "__start_BTF", 0, bytes(4096))
    assert not isinstance(opened(bare).kernel.profile.types, Btf)
    assert not folder.exists()
    assert opened(recording.image).kernel.profile.types is not None
    (tmp_path / "bare").unlink()


def test_a_folder_that_cannot_be_written_is_no_error(guest, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert opened(guest("amd64-6.1-4level").image).pids()


def test_a_damaged_profile_is_made_anew(guest, folder, searches):
    recording = guest("amd64-6.1-4level")
    first = opened(recording.image)
    (kept,) = folder.iterdir()
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    searches.clear()
    assert symbols(opened(recording.image)) == symbols(first)
    assert searches
    searches.clear()
    opened(recording.image)
    assert searches == []




def test_types_are_whole_where_ram_lies_otherwise_than_was_guessed_at_first(guest):
    """More than 3 GiB without the hole: page tables that lead to parts of the kernel lie where the guess has others."""
    recording = guest("amd64-6.1-5gib")
    types = opened(recording.image, cache="no").kernel.profile.types
    assert types is not None
    types.check()
    opened(recording.image)
    assert layouts(opened(recording.image)) == layouts(opened(guest("amd64-6.1-4level").image))
