"""What hangs on a lease in a mount: bounded, and gone with the mount; with a mount around it in tests/mounted."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from cloudfs.leased_files import PRUNE, Expired, LeasedFiles
from cloudfs.node import OpenFile
from engine.leases import Lease, take

T = TypeVar("T")


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    (tmp_path / "image").write_bytes(b"x")
    descriptor = os.open(tmp_path / "image", os.O_RDONLY)
    found = take(descriptor)
    os.close(descriptor)
    assert isinstance(found, Lease)
    return found


def in_loop(call: Callable[[], T]) -> T:
    async def main() -> T:
        return call()

    return trio.run(main)


def test_inodes_that_the_kernel_has_forgotten_are_not_kept(lease: Lease) -> None:
    files = LeasedFiles(lambda _: None, lambda _: None, lambda inode: inode % 100 == 0)

    def add_many() -> None:
        assert all(files.add(lease, inode) for inode in range(50 * PRUNE))

    in_loop(add_many)
    assert len(files._leases[lease].numbers) < 2 * PRUNE
    assert set(range(0, 48 * PRUNE, 100)) <= files._leases[lease].numbers


def test_a_lease_that_has_ended_takes_no_file(lease: Lease) -> None:
    files = LeasedFiles(lambda _: None, lambda _: None, lambda _: True)
    lease.release()
    assert not in_loop(lambda: files.add(lease, 7))
    assert not files._leases


def test_handles_expire_in_the_loop_before_the_kernel_drops_pages_and_all_pages_before_the_lease_ends(
    lease: Lease,
) -> None:
    seen: list[object] = []
    done = threading.Event()
    loop = threading.get_ident()

    def expire(ended: Lease) -> None:
        seen.append(("expire", ended is lease, ended.held, threading.get_ident() == loop))

    def invalidate(inode: int) -> None:
        seen.append((inode, threading.get_ident() == loop))
        if inode == 8:
            raise FileNotFoundError

    files = LeasedFiles(expire, invalidate, lambda _: True)

    async def main() -> None:
        assert files.add(lease, 8)
        assert files.add(lease, 9)
        lease.on_break(done.set)
        lease.release()
        with trio.fail_after(20):
            while not done.is_set():
                await trio.sleep(0.005)

    trio.run(main)
    assert seen[0] == ("expire", True, False, True)
    assert sorted(seen[1:]) == [(8, False), (9, False)]
    assert not files._leases


def test_when_the_mount_has_ended_nothing_is_asked_of_it(lease: Lease) -> None:
    seen: list[object] = []
    files = LeasedFiles(seen.append, seen.append, lambda _: True)
    assert in_loop(lambda: files.add(lease, 7))
    files.close()
    lease.release()
    assert not seen


class Zeros(OpenFile):
    """A file that is released once."""

    released = 0

    def read(self, offset: int, size: int, scratch: memoryview) -> bytes | memoryview:
        return bytes(size)

    def release(self) -> None:
        self.released += 1


def test_an_expired_file_answers_estale_and_is_released_with_what_it_was() -> None:
    file = Zeros()
    expired = Expired(file)
    scratch = memoryview(bytearray(16))
    for read in (expired.read, expired.read_nowait):
        with pytest.raises(OSError, match="Stale file handle"):
            read(0, 16, scratch)
    expired.release()
    assert file.released == 1
