"""Images under a lease on a real mount: cached hard while nobody writes to them, and never stale once somebody may."""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from mounting import is_mounted, mounted, take_away
from outside_writers import ACTS, MOMENT, holding, outside

SHARED_MEMORY = Path("/dev/shm")
SIZE = 8 << 20


@dataclass
class Images:
    """A mount, and images that are opened on it one after the other."""

    mount: Path
    folder: Path
    _names: Iterator[int] = field(default_factory=lambda: iter(range(10_000)))

    def image(self, options: str = "") -> Image:
        name = f"image{next(self._names)}"
        file = self.folder / name
        file.write_bytes(b"OLD!" * (SIZE // 4))
        (self.mount / "connector/new").write_text(f"{name} raw:{file}{options}\n")
        return Image(file, self.mount / "connector" / name)


@dataclass
class Image:
    """A file, and the instance that shows it."""

    file: Path
    instance: Path

    @property
    def memory(self) -> Path:
        return self.instance / "phys_mem"

    def open(self) -> int:
        return os.open(self.memory, os.O_RDONLY)

    def cached(self) -> int:
        """A descriptor all of whose pages the kernel has cached."""
        descriptor = self.open()
        assert len(read_all(descriptor)) == SIZE
        return descriptor

    def info(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.instance / "info.json").read_text())
        return found

    def reads(self, file: str = "info") -> int:
        """How many reads came to the daemon; a file may show what it showed a second ago, but for its first reader."""
        found = re.search(r'\breads"?: +(\d+)', (self.instance / file).read_text())
        assert found is not None
        return int(found[1])


def read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.pread(descriptor, 1 << 20, sum(map(len, parts))):
        parts.append(part)
    return b"".join(parts)


def errno_of(descriptor: int, offset: int = 0) -> int:
    with pytest.raises(OSError) as caught:
        os.pread(descriptor, 4, offset)
    assert caught.value.errno is not None
    return caught.value.errno


def await_(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module", params=["disk", "memory"])
def images(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    folder = tmp_path_factory.mktemp("images")
    if request.param == "memory":
        folder = SHARED_MEMORY / f"cloudfs-test-{os.urandom(6).hex()}"
        folder.mkdir()
    try:
        with mounted("dummy:size=1M") as mount:
            yield Images(mount.folder, folder)
    finally:
        subprocess.run(["rm", "-rf", str(folder)], timeout=30, check=False)


# -- while it is held ----------------------------------------------------------------------------------------


def test_what_was_read_once_is_not_asked_for_again(images: Images) -> None:
    image = images.image()
    os.close(image.cached())
    before = image.reads("info")
    descriptor = image.open()
    assert read_all(descriptor) == image.file.read_bytes()
    os.close(descriptor)
    assert image.reads("info.json") == before > 0


def test_it_can_be_mapped_shared_and_a_live_one_cannot(images: Images) -> None:
    descriptors = [images.image(options).open() for options in ("", ":live=yes")]
    with mmap.mmap(descriptors[0], 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[:4] + mapping[-4:] == b"OLD!OLD!"
    with pytest.raises(OSError, match="No such device") as caught:
        mmap.mmap(descriptors[1], 0, prot=mmap.PROT_READ)
    assert caught.value.errno == errno.ENODEV
    for descriptor in descriptors:
        os.close(descriptor)


def test_programs_that_read_the_image_itself_leave_it_cached(images: Images) -> None:
    image = images.image()
    descriptor = image.cached()
    assert image.file.read_bytes() == b"OLD!" * (SIZE // 4)
    before = image.reads("info")
    assert os.pread(descriptor, 4096, 4096) == b"OLD!" * 1024
    os.close(descriptor)
    assert image.reads("info.json") == before
    assert image.info()["live"] is False


# -- when a writer comes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_the_writer_waits_for_a_moment_and_then_nobody_gets_an_old_byte(images: Images, act: str) -> None:
    image = images.image()
    old = image.cached()
    assert outside(image.file, act) < MOMENT
    fresh = image.open()
    assert read_all(fresh) == image.file.read_bytes()
    assert read_all(fresh) != b"OLD!" * (SIZE // 4)
    if image.file.stat().st_size:
        assert errno_of(old) == errno.ESTALE
    else:
        assert os.pread(old, 4, 0) == b""
    assert os.fstat(old).st_size == image.memory.stat().st_size == image.file.stat().st_size
    os.close(old)
    os.close(fresh)


def test_info_says_that_it_is_live_now_and_why(images: Images) -> None:
    image = images.image()
    assert image.info()["freshness"] == (
        "immutable: nobody has it open for writing, and a read lease tells before anybody does"
    )
    outside(image.file, "overwrites")
    await_(lambda: image.info()["live"] is True)
    assert image.info()["freshness"] == "live: another program has opened it for writing"


def test_afterwards_it_is_read_directly_and_mapped_shared_no_more(images: Images) -> None:
    image = images.image()
    os.close(image.cached())
    outside(image.file, "overwrites")
    descriptor = image.open()
    with pytest.raises(OSError, match="No such device"):
        mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
    for letter in (b"a", b"b"):
        with image.file.open("r+b") as file:
            file.write(letter)
        assert os.pread(descriptor, 1, 0) == letter
    os.close(descriptor)


def test_a_guest_that_maps_the_file_later_is_seen_at_once_though_it_makes_no_system_call(images: Images) -> None:
    image = images.image()
    os.close(image.cached())
    code = """
file = os.open(path, os.O_RDWR)
mapped = mmap.mmap(file, 4096); os.close(file)
import threading
def change():
    for line in sys.stdin:
        mapped[:4] = line.strip().encode()
        print("changed", flush=True)
threading.Thread(target=change, daemon=True).start()
print("done", flush=True); threading.Event().wait()
"""
    with holding(image.file, code) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        descriptor = image.open()
        for word in ("one!", "two!", "3333"):
            guest.stdin.write(f"{word}\n")
            guest.stdin.flush()
            assert guest.stdout.readline() == "changed\n"
            assert os.pread(descriptor, 4, 0) == word.encode()
        os.close(descriptor)


def test_a_page_that_a_program_has_mapped_is_gone_with_the_others(images: Images) -> None:
    image = images.image()
    code = """
import mmap, os, sys
mapped = mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ)
print(mapped[:4].decode(), flush=True)
sys.stdin.readline()
print(mapped[:4].decode(), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image.memory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "OLD!\n"
        assert outside(image.file, "overwrites") < MOMENT
        rest, _ = program.communicate("\n", timeout=30)
        assert (program.returncode, rest) == (-signal.SIGBUS, "")


class Reader(threading.Thread):
    """Reads here and there until told to stop; notes what is neither right nor ESTALE."""

    def __init__(self, image: Image, written: threading.Event, *, anew: bool) -> None:
        super().__init__()
        self.image, self.written, self.anew = image, written, anew
        self.stop = threading.Event()
        self.wrong: list[object] = []
        self.after = 0
        """Reads that began when all was written."""
        self.rounds = 0

    def run(self) -> None:
        descriptor = self.image.cached()
        while not self.stop.is_set():
            self.rounds += 1
            if self.anew:
                os.close(descriptor)
                descriptor = self.image.open()
            self.look(descriptor, self.rounds * 4096 % SIZE)
        os.close(descriptor)

    def look(self, descriptor: int, offset: int) -> None:
        after = self.written.is_set()
        try:
            data = os.pread(descriptor, 4, offset)
        except OSError as error:
            if error.errno != errno.ESTALE:
                self.wrong.append(error)
        else:
            if data != b"NEW!" and (after or data != b"OLD!"):
                self.wrong.append((after, data))
        self.after += after


def test_a_writer_who_comes_while_eight_read_does_not_wait_and_nobody_gets_an_old_byte(images: Images) -> None:
    for _ in range(4):
        image, written = images.image(), threading.Event()
        readers = [Reader(image, written, anew=anew) for anew in (False, True) * 4]
        for reader in readers:
            reader.start()
        try:
            await_(lambda readers=readers: all(reader.rounds > 20 for reader in readers))
            assert outside(image.file, "overwrites all") < MOMENT
            written.set()
            await_(lambda readers=readers: all(reader.after > 20 for reader in readers))
        finally:
            for reader in readers:
                reader.stop.set()
                reader.join()
        assert not [wrong for reader in readers for wrong in reader.wrong]


# -- how else it ends, and where there is none ---------------------------------------------------------------


def test_after_rmdir_a_writer_waits_for_nobody_and_a_held_descriptor_gives_no_old_byte(images: Images) -> None:
    image = images.image()
    descriptor = image.cached()
    image.instance.rmdir()
    assert outside(image.file, "overwrites") < MOMENT
    assert errno_of(descriptor) in (errno.ENODEV, errno.ESTALE)
    os.close(descriptor)


def test_an_image_that_a_guest_runs_in_is_live_from_the_start(images: Images) -> None:
    file = images.folder / "guest"
    file.write_bytes(b"OLD!" * 4096)
    with holding(file, "file = os.open(path, os.O_RDWR); mapped = mmap.mmap(file, 4096); os.close(file)"):
        (images.mount / "connector/new").write_text(f"guest raw:{file}\n")
        image = Image(file, images.mount / "connector/guest")
        assert image.info()["freshness"] == "live: another program has it open for writing"
        descriptor = image.open()
        outside(file, "overwrites")
        assert os.pread(descriptor, 4, 0) == b"NEW!"
        os.close(descriptor)
    image.instance.rmdir()


def test_a_file_on_fuse_is_live_since_others_may_write_to_it_unseen(images: Images) -> None:
    inner = images.image()
    with mounted(f"raw:{inner.memory}") as outer:
        info = json.loads((outer.folder / "connector/raw/info.json").read_text())
    assert info["live"] is True
    assert info["freshness"].startswith("live: on a filesystem of type fuse.cloudfs")


def test_a_mount_in_the_background_hears_of_writers_too(tmp_path: Path) -> None:
    file, folder = tmp_path / "image", tmp_path / "mount"
    file.write_bytes(b"OLD!" * 1024)
    folder.mkdir()
    command = [sys.executable, "-m", "cloudfs", "mount", "--daemon", f"raw:{file}", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        image = Image(file, folder / "connector/raw")
        descriptor = image.open()
        assert os.pread(descriptor, 4096, 0) == b"OLD!" * 1024
        assert image.info()["live"] is False
        assert outside(file, "overwrites") < MOMENT
        assert errno_of(descriptor) == errno.ESTALE
        os.close(descriptor)
        assert image.memory.read_bytes() == b"NEW!" * 1024
    finally:
        subprocess.run([sys.executable, "-m", "cloudfs", "umount", str(folder)], timeout=60, check=False)
        if is_mounted(folder):
            take_away(folder)


def test_a_daemon_that_was_killed_holds_up_no_writer(tmp_path: Path) -> None:
    file = tmp_path / "image"
    file.write_bytes(b"OLD!" * 1024)
    holder = "import sys, time; from engine import Machine; machine = Machine(); "
    holder += "machine.open('connector', 'raw:' + sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "open\n"
        program.kill()
        program.wait(30)
    assert outside(file, "overwrites") < MOMENT
