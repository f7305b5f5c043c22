"""What recordings are made with, where it can be tried without a guest."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from guests import kernels, program, recorder
from guests.catalogue import GUESTS, MACHINES, selected
from guests.kernels import KernelFiles
from guests.machine import ram_extents
from guests.truth import parse_sections, secret_text
from support import require


def test_a_folder_that_is_not_finished_is_not_there(tmp_path: Path) -> None:
    def interrupted() -> None:
        with kernels.made_whole(tmp_path / "place") as folder:
            (folder / "half").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_finished_folder_replaces_the_one_before(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with kernels.made_whole(tmp_path / "place") as folder:
            (folder / content).touch()
    assert [path.name for path in tmp_path.glob("place/*")] == ["new"]


def test_a_sparse_copy_has_the_same_bytes_and_holes_for_zeros(tmp_path: Path) -> None:
    chance = random.Random(5)
    pages = [chance.choice((bytes(4096), chance.randbytes(4096), bytes(4095) + b"\1")) for _ in range(3000)]
    (tmp_path / "source").write_bytes(b"".join(pages) + bytes(8 << 20))
    recorder.sparse_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == (tmp_path / "source").read_bytes()
    used = sum(any(page) for page in pages)
    assert (tmp_path / "target").stat().st_blocks * 512 <= used * 4096 + 65536


def test_busybox_unpacks_the_initramfs_that_is_made_for_a_guest(tmp_path: Path) -> None:
    require(shutil.which("busybox"), "busybox is missing")
    for name in ("image", "busybox", "init"):
        (tmp_path / name).write_bytes(name.encode())
    files = KernelFiles("package", "1", tmp_path / "image", (), tmp_path / "busybox")
    made = program.initramfs(files, tmp_path / "init")
    listed = subprocess.run(
        "busybox gzip -dc | busybox cpio -t", shell=True, input=made, capture_output=True, timeout=30, check=True
    ).stdout.decode()  # fmt: skip
    assert {"init", "bin/busybox", "bin/sleep", "etc/passwd", "dev/console"} <= set(listed.split())


def test_ram_of_a_pc_is_one_extent_though_parts_of_it_are_views_that_cannot_be_written() -> None:
    mtree = """
FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): ram KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000c3fff (prio 0, rom): ram @00000000000c0000
  00000000000c4000-00000000bfffffff (prio 0, ram): ram @00000000000c4000
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios
  0000000100000000-000000017fffffff (prio 0, ram): ram @00000000c0000000
"""
    assert ram_extents(mtree) == [
        (0, 0xA0000, 0), (0xC0000, 0xC0000000 - 0xC0000, 0xC0000), (0x100000000, 0x80000000, 0xC0000000)
    ]  # fmt: skip


def test_sections_hold_any_bytes() -> None:
    content = bytes(range(256)) + b"\nnext 3\n"
    told = b"first %d\n%s\nempty 0\n\n" % (len(content), content)
    assert parse_sections(told) == {"first": content, "empty": b""}


def test_secrets_differ_by_name_and_are_of_one_size() -> None:
    assert len(secret_text("heap")) == len(secret_text("a-name-that-is-longer-than-others")) == 48
    assert secret_text("heap") != secret_text("stack")


def test_each_guest_has_a_kernel_a_machine_and_a_compiler() -> None:
    for guest in GUESTS.values():
        assert kernels.KERNELS[guest.kernel].architecture == guest.architecture
        assert {guest.architecture} <= MACHINES.keys() & program.COMPILERS.keys()
    assert 0 < len(selected(everything=False)) < len(selected(everything=True)) == len(GUESTS)


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLOUDFS_GUESTS", str(tmp_path))
    assert kernels.cache_root() == tmp_path
    monkeypatch.delenv("CLOUDFS_GUESTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels.cache_root() == tmp_path / "cloudfs" / "guests"


def test_one_session_at_a_time_holds_a_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLOUDFS_GUESTS", str(tmp_path))
    with kernels.locked("thing"):
        tried = subprocess.run(
            ["python3", "-c", f"import fcntl; fcntl.flock(open({str(tmp_path / 'locks/thing')!r}), 6)"],
            capture_output=True, text=True, timeout=30, check=False, env=os.environ,
        )  # fmt: skip
    assert "BlockingIOError" in tried.stderr
