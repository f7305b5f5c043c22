"""Whatever a process maps, holds open or waits for: the mount goes on answering, and nothing needs a reboot.

Every test has a guard, another process, that aborts the connections when its time is up.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from dead_filesystem import ANSWERED, abort, dead_filesystem, guarded
from mounting import Mount, is_mounted, mounted
from patience import client, outcome, read_at, responsive
from support import require

LIMIT = 80

def look_at_all(directory: Path, address: int) -> dict[str, object]:
    """What reading everything of a process comes to."""
    return {
        "mem": outcome(lambda: read_at(directory / "mem", 14, address)),
        "maps": outcome(lambda: len((directory / "maps").read_bytes()) > 100),
        "fd": outcome(lambda: [os.readlink(directory / "fd" / name) for name in os.listdir(directory / "fd")]),
        "exe": outcome(lambda: os.readlink(directory / "exe")),
        "cwd": outcome(lambda: os.readlink(directory / "cwd")),
        "modules": outcome(lambda: len(os.listdir(directory / "modules")) > 0),
        "regions": outcome(lambda: len(os.listdir(directory / "regions")) > 3),
        "info": outcome(lambda: len((directory / "info").read_bytes()) > 10),
    }


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(8 << 20))
    return path


def processes(mount: Mount) -> Path:
    return mount.folder / "os/native/processes"


# -- a process inside our own mount ------------------------------------------------------------------------


INSIDE = {
    "an open file": "os.chdir('/'); file = open(folder + '/connector/raw/phys_mem', 'rb'); file.read(1); said = []",
    "its working directory": "os.chdir(folder + '/connector/raw'); said = []",
    "a mapped file": "at = map_file(folder + '/connector/raw/phys_mem', 8 << 20); assert at; said = [at]",
    "a mapped live file": """
at = map_file(f"{folder}/os/native/processes/{os.getpid()}/mem", 1 << 20, ctypes.addressof(secret) // 4096 * 4096)
assert at
said = [at]""",
}


@pytest.mark.parametrize("inside", INSIDE)
def test_a_process_with_something_of_the_mount_is_read_through_it(image: Path, inside: str) -> None:
    with mounted("--timeout", "5", limit=LIMIT) as mount, guarded(LIMIT, mount.folder):
        command = f"raw raw:{image}:immutable=yes" if inside == "a mapped file" else f"raw raw:{image}"
        (mount.folder / "connector/new").write_text(command + "\n")
        with client(INSIDE[inside], mount.folder) as (process, (secret, *mapped)), responsive(mount):
            directory = processes(mount) / str(process.pid)
            for _ in range(2):
                found = look_at_all(directory, secret)
                assert found["mem"] == b"a known secret"
                assert found["maps"] is found["modules"] is found["regions"] is found["info"] is True, found
                assert isinstance(found["fd"], list)
            for at in mapped:  # not one page of it is present: reading it asks the mount for the file
                want = image.read_bytes()[:4096] if inside == "a mapped file" else None
                got = outcome(lambda at=at: read_at(directory / "mem", 4096, at))
                assert got == want if want is not None else isinstance(got, bytes | int), got
        process.wait(10)


LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1")


def program_in(mount: Mount, tmp_path: Path) -> tuple[str, Path]:
    """The system's loader, and a program in the mount: the image is that of sleep(1)."""
    loader = next((path for path in LOADERS if os.path.exists(path)), None)
    require(loader is not None and shutil.which("sleep"), "there is no loader of glibc, or no sleep(1)")
    image = tmp_path / "program"
    shutil.copy(shutil.which("sleep"), image)
    (mount.folder / "connector/new").write_text(f"raw raw:{image}:immutable=yes\n")
    return loader, mount.folder / "connector/raw/phys_mem"


def test_what_is_in_the_mount_cannot_be_run(tmp_path: Path) -> None:
    with mounted("--timeout", "5", limit=LIMIT) as mount, guarded(LIMIT, mount.folder):
        loader, program = program_in(mount, tmp_path)
        with pytest.raises(PermissionError):
            subprocess.run([program, "0"], timeout=10, check=False)
        done = subprocess.run([loader, program, "0"], capture_output=True, text=True, timeout=10, check=False)
        assert "failed to map segment" in done.stderr


def test_a_process_that_runs_a_program_of_the_mount_is_read_through_it(tmp_path: Path) -> None:
    require(os.geteuid() == 0, "only root may allow that programs of a mount are run")
    with mounted("--timeout", "5", limit=LIMIT) as mount, guarded(LIMIT, mount.folder):
        loader, program = program_in(mount, tmp_path)
        subprocess.run(["mount", "-o", "remount,bind,exec", mount.folder], timeout=10, check=True)
        with subprocess.Popen([loader, program, "70"]) as process:
            try:
                until = time.monotonic() + 10
                while str(program) not in Path(f"/proc/{process.pid}/maps").read_text():
                    assert time.monotonic() < until
                    assert process.poll() is None
                    time.sleep(0.01)
                directory = processes(mount) / str(process.pid)
                maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
                start = next(line for line in maps if str(program) in line).split("-")[0]
                with responsive(mount):
                    found = look_at_all(directory, int(start, 16))
                    assert found["mem"] == program.read_bytes()[:14]
                    assert found["maps"] is found["modules"] is found["regions"] is found["info"] is True, found
                    modules = outcome(lambda: os.listdir(directory / "modules"))
                    assert isinstance(modules, list)
                    assert "phys_mem" in modules
                    image = outcome((directory / "modules/phys_mem/image").read_bytes)
                    assert isinstance(image, bytes)
                    assert image[:4] == b"\x7fELF"
            finally:
                process.kill()


# -- a file system that does not answer --------------------------------------------------------------------


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    with dead_filesystem(tmp_path / "dead", LIMIT) as folder:
        yield folder


def test_a_process_that_maps_what_nobody_delivers_costs_only_who_reads_that_page(dead: Path) -> None:
    with mounted("--timeout", "1", limit=LIMIT) as mount, guarded(LIMIT, mount.folder, dead):
        code = "at = map_file(folder + '/cached', 16 << 20); assert at; said = [at]"
        with client(code, dead) as (process, (secret, at)), responsive(mount):
            directory = processes(mount) / str(process.pid)
            assert outcome(lambda: read_at(directory / "mem", 14, secret)) == b"a known secret"
            assert outcome(lambda: read_at(directory / "mem", 8, at)) == b"a" * 8
            assert outcome(lambda: read_at(directory / "mem", 8, at + 8 * ANSWERED)) == errno.ETIMEDOUT
            abort(dead)  # else neither the thread of the daemon nor the process itself would ever end
        process.wait(10)


STUCK = """
# A child waits for a page of `direct`: that page is locked. Then this process maps the file, which wants the page
# away and waits for it with its mmap_lock held for writing (fuse_file_mmap, invalidate_inode_pages2). The mapping
# stands in no list yet: nothing tells that this process has to do with a FUSE file system.
other = os.fork()
if other == 0:
    ctypes.string_at(map_file(folder + '/direct', 16 << 20) + (8 << 20), 1)
    os._exit(0)
import time
while open(f"/proc/{other}/stat").read().rsplit(")", 1)[1].split()[0] != "D":
    time.sleep(0.01)
threading.Thread(target=map_file, args=(folder + '/direct', 16 << 20), daemon=True).start()
time.sleep(0.3)
said = [other]
"""


@pytest.mark.parametrize("read_before", [False, True])
def test_a_process_whose_memory_is_locked_for_ever_holds_up_no_other(dead: Path, read_before: bool) -> None:
    with contextlib.ExitStack() as s:
        mount = s.enter_context(mounted("--timeout", "1", limit=LIMIT))
        s.enter_context(guarded(LIMIT, mount.folder, dead))
        code = STUCK
        if read_before:
            code = "print(ctypes.addressof(secret), flush=True); sys.stdin.readline()\n" + STUCK
        process, (secret, *_) = s.enter_context(client(code, dead))
        directory = processes(mount) / str(process.pid)
        descriptors = []
        if read_before:
            descriptors.append(s.enter_context(open(directory / "mem", "rb", buffering=0)))
            assert os.pread(descriptors[0].fileno(), 14, secret) == b"a known secret"
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(1.1)  # a look is believed for a second
        with responsive(mount):
            late = (errno.ETIMEDOUT,)
            assert outcome(lambda: read_at(directory / "mem", 14, secret)) in late
            if read_before:
                assert outcome(lambda: os.pread(descriptors[0].fileno(), 14, secret)) in late
            found = {name: outcome(lambda name=name: (directory / name).read_bytes()) for name in ("maps", "cmdline")}
            assert found["cmdline"] in late
            assert outcome(lambda: os.readlink(directory / "cwd")) == os.getcwd()
            mine = processes(mount) / str(os.getpid())
            assert outcome(lambda: len((mine / "maps").read_bytes()) > 100) is True
            names = outcome(lambda: os.listdir(processes(mount) / "by-name"))
            assert isinstance(names, list), "one bad entry never hides the rest"
            abort(dead)
        process.kill()
        process.wait(10)


def test_a_hundred_requests_for_what_does_not_come_leave_the_other_processes_alone(dead: Path) -> None:
    with mounted("--timeout", "1", limit=LIMIT) as mount, guarded(LIMIT, mount.folder, dead):
        code = "at = map_file(folder + '/cached', 16 << 20); assert at; said = [at]"
        with client(code, dead) as (process, (_, at)):
            path = processes(mount) / str(process.pid) / "mem"
            threads = [
                threading.Thread(target=lambda: outcome(lambda: read_at(path, 8, at + 8 * ANSWERED)), daemon=True)
                for _ in range(100)
            ]
            with responsive(mount):
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(30)
                mine = processes(mount) / str(os.getpid())
                assert outcome(lambda: len((mine / "maps").read_bytes()) > 100) is True
                assert outcome(lambda: len(os.listdir(mine / "regions")) > 3) is True
                abort(dead)
        process.wait(10)


def test_an_image_on_a_file_system_that_does_not_answer_costs_only_its_readers(dead: Path, image: Path) -> None:
    with mounted("--timeout", "1", limit=LIMIT) as mount, guarded(LIMIT, mount.folder, dead), responsive(mount):
        new = mount.folder / "connector/new"
        command = f"dead raw:{dead}/direct\n"
        assert outcome(lambda: new.write_text(command)) in (errno.ETIMEDOUT, len(command))
        if (mount.folder / "connector/dead").exists():
            memory = mount.folder / "connector/dead/phys_mem"
            assert outcome(lambda: read_at(memory, 8, 0)) == b"a" * 8
            assert outcome(lambda: read_at(memory, 8, 8 * ANSWERED)) == errno.ETIMEDOUT
        assert outcome(lambda: new.write_text(f"raw raw:{image}\n")) == len(f"raw raw:{image}\n")
        assert outcome(lambda: read_at(mount.folder / "connector/raw/phys_mem", 4096, 0)) == image.read_bytes()[:4096]
        abort(dead)


def test_readers_of_a_file_that_nobody_changes_do_not_wait_for_one_another(dead: Path) -> None:
    with mounted("--timeout", "1", limit=LIMIT) as mount, guarded(LIMIT, mount.folder, dead), responsive(mount):
        (mount.folder / "connector/new").write_text(f"dead raw:{dead}/direct:immutable=yes\n")
        memory = mount.folder / "connector/dead/phys_mem"
        assert outcome(lambda: read_at(memory, 4096, ANSWERED - 4096)) == b"a" * 4096
        came: list[object] = []
        page = functools.partial(read_at, memory, 8, 8 * ANSWERED)
        threads = [threading.Thread(target=lambda: came.append(outcome(page)), daemon=True) for _ in range(8)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert came == [errno.ETIMEDOUT] * 8
        assert time.monotonic() - began < 4, "each waited until the one before was given up"
        abort(dead)


GATHER = """
import sys, threading, numpy
from engine import FileMemory
memory = FileMemory(sys.argv[1], immutable=True)
addresses = numpy.arange(100, dtype=numpy.uint64) * 64 + int(sys.argv[2])
thread = threading.Thread(target=lambda: memory.gather(addresses, numpy.empty((100, 8), numpy.uint8)), daemon=True)
thread.start()
thread.join(0.5)
print("alive", thread.is_alive(), flush=True)
thread.join()
print("ended", flush=True)
"""


def test_a_column_of_words_that_do_not_come_holds_up_no_other_thread_and_ends_no_process(dead: Path) -> None:
    words = [sys.executable, "-c", GATHER, str(dead / "cached"), str(8 * ANSWERED)]
    with guarded(20, dead), subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "alive True\n"
        abort(dead)
        assert reader.stdout.readline() == "ended\n"
    assert reader.returncode == 0


# -- what does not run -------------------------------------------------------------------------------------


def test_a_stopped_process_is_read_like_any_other() -> None:
    with mounted("--timeout", "5", limit=LIMIT) as mount, guarded(LIMIT, mount.folder):
        with client("said = []", "/") as (process, (secret,)), responsive(mount):
            process.send_signal(signal.SIGSTOP)
            found = look_at_all(processes(mount) / str(process.pid), secret)
            assert found["mem"] == b"a known secret"
            assert found["maps"] is found["modules"] is found["regions"] is found["info"] is True
        process.wait(10)


def test_force_ends_a_mount_while_requests_wait(dead: Path) -> None:
    top = Path(tempfile.mkdtemp(prefix="cloudfs-test-"))
    command = [sys.executable, "-m", "cloudfs", "mount", "--timeout", "60", str(top)]
    daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    with guarded(LIMIT, top, dead, daemon.pid):
        try:
            until = time.monotonic() + 15
            while not is_mounted(top):
                assert daemon.poll() is None
                assert time.monotonic() < until
                time.sleep(0.02)
            code = "at = map_file(folder + '/cached', 16 << 20); assert at; said = [at]"
            with client(code, dead) as (process, (_, at)):
                path = top / f"os/native/processes/{process.pid}/mem"
                words = ["dd", f"if={path}", "bs=1", "count=1", f"skip={at + 8 * ANSWERED}", "iflag=skip_bytes"]
                reader = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                time.sleep(0.5)
                assert reader.poll() is None
                command = [sys.executable, "-m", "cloudfs", "umount", "--force", str(top)]
                assert subprocess.run(command, timeout=20, check=False).returncode == 0
                assert reader.wait(10) == 1
                assert not is_mounted(top)
                abort(dead)
            daemon.wait(20)
        finally:
            abort(top)
            daemon.kill()
            daemon.wait(10)
            os.rmdir(top)
