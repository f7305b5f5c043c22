"""What a user does first: ls, cat, xxd, grep, dd on the memory of a program, against what the program itself says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mounting import mounted
from support import REFUSED_WRITE, require
from targets import running_target


def run(*command: str, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, cwd=cwd, capture_output=True, timeout=60, check=check, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def mount():
    with mounted(limit=240) as found:
        yield found


@pytest.fixture(scope="module")
def target():
    with running_target(b"a secret that no other process holds \xfe\xed") as found:
        yield found


@pytest.fixture
def directory(mount, target):
    return mount.folder / "os" / "processes" / str(target.pid)


def test_the_tree_is_listed_with_true_modes_and_owners(mount):
    top = run("ls", "-l", str(mount.folder)).stdout.decode()
    assert {line.split()[-1] for line in top.splitlines()[1:]} == {
        "CACHEDIR.TAG", "README", "connector", "os", "plugins"
    }
    entries = run("ls", "-la", str(mount.folder / "os")).stdout.decode()
    assert "new" in entries
    assert "native" in entries
    assert os.stat(mount.folder).st_mode & 0o777 == 0o555
    assert os.statvfs(mount.folder).f_blocks == 0


def test_every_pid_of_the_host_is_a_directory_owned_as_in_proc(mount):
    listed = {name for name in os.listdir(mount.folder / "os/processes") if name.isdigit()}
    there = {name for name in os.listdir("/proc") if name.isdigit()}
    assert len(listed & there) > 0.8 * len(there)
    assert os.stat(mount.folder / "os/processes/1").st_uid == os.stat("/proc/1").st_uid


@pytest.mark.parametrize("name", ["maps", "cmdline", "environ", "comm", "status"])
def test_a_file_that_proc_has_is_the_same_byte_for_byte(directory, target, name):
    assert run("cat", str(directory / name)).stdout == Path(f"/proc/{target.pid}/{name}").read_bytes()


@pytest.mark.parametrize("name", ["exe", "cwd", "root", "fd/0"])
def test_a_link_that_proc_has_is_the_same(directory, target, name):
    assert os.readlink(directory / name) == os.readlink(f"/proc/{target.pid}/{name}")


def test_xxd_at_the_address_of_the_secret_shows_it(directory, target):
    shown = run("xxd", "-s", hex(target.secret), "-l", "64", "-p", str(directory / "mem")).stdout
    assert bytes.fromhex(shown.decode().replace("\n", "")) == target.ask()[1]


def test_grep_finds_the_secret_in_the_regions_and_nowhere_else(directory, target):
    found = run("grep", "-rlaF", "a secret that no other process holds \udcfe\udced", str(directory / "regions"))
    starts = [int(Path(name).name.split("-")[0], 16) for name in found.stdout.decode().split()]
    maps = Path(f"/proc/{target.pid}/maps").read_text()
    spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps.splitlines()]
    assert any(start <= target.secret < stop for start, stop in spans if start in starts)


def test_dd_reads_a_mebibyte_of_memory_as_it_is(directory, target):
    done = run("dd", f"if={directory / 'mem'}", "bs=1M", "count=1", "iflag=skip_bytes", f"skip={target.pattern}")
    assert done.stdout == bytes(range(256)) * 4096


def test_a_hole_is_an_error_after_the_bytes_before_it(directory, target):
    descriptor = os.open(directory / "mem", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Input/output"):
            os.pread(descriptor, 8, 0x1000)
        stop = max(int(line.split("-")[1].split()[0], 16) for line in Path(f"/proc/{target.pid}/maps").read_text()
                   .splitlines() if "[stack]" in line)  # fmt: skip
        assert len(os.pread(descriptor, 8192, stop - 4096)) == 4096
    finally:
        os.close(descriptor)


def test_modules_have_what_readelf_says(directory, target):
    require(run("sh", "-c", "command -v readelf", check=False).returncode == 0, "there is no readelf")
    libc = next(p for p in (directory / "modules").iterdir() if p.name.startswith("libc.so"))
    path = next(line.split(None, 5)[5] for line in Path(f"/proc/{target.pid}/maps").read_text().splitlines()
                if line.endswith(libc.name))  # fmt: skip
    note = run("readelf", "-n", path).stdout.decode()
    build_id = re.search(r"Build ID: ([0-9a-f]+)", note)
    assert build_id
    assert build_id[1] in (libc / "info").read_text()
    head = run("readelf", "-h", str(libc / "image"))
    assert b"DYN (Shared object file)" in head.stdout
    exports = (libc / "exports").read_text()
    for name in ("malloc", "printf", "getpid"):
        assert re.search(rf"\b{name}\b", exports), name


def test_by_name_leads_to_the_process(mount, target):
    name = Path(f"/proc/{target.pid}/comm").read_text().strip()
    links = [p for p in (mount.folder / "os/processes/by-name").iterdir() if p.name.split("#")[0] == name]
    assert any(os.path.realpath(p).endswith(f"/{target.pid}") for p in links)
    assert os.readlink(mount.folder / "os/processes/by-pid-name" / f"{name} ({target.pid})") == f"../{target.pid}"


def test_without_writable_every_way_to_write_is_refused_and_the_program_is_unchanged(directory, target):
    before = target.ask()
    for flags in (os.O_WRONLY, os.O_RDWR):
        with pytest.raises(OSError, match=REFUSED_WRITE):
            os.open(directory / "mem", flags)
    done = run("sh", "-c", f"printf XXXX | dd of={directory}/mem bs=1 seek={target.secret} conv=notrunc", check=False)
    assert done.returncode != 0
    assert REFUSED_WRITE.encode() in done.stderr
    assert target.ask() == before


def test_with_writable_the_program_sees_what_was_written_and_nothing_else():
    with running_target() as target, mounted("--writable") as mount:
        directory = mount.folder / "os/processes" / str(target.pid)
        dd = f"dd of={directory}/mem bs=8 seek={target.secret} oflag=seek_bytes conv=notrunc"
        run("sh", "-c", f"printf 'A SECRET' | {dd}")
        with open(directory / "mem", "r+b", buffering=0) as file:
            file.seek(target.counter)
            file.write((42).to_bytes(8, "little"))
        number, secret = target.ask()
        assert number == 42
        assert secret.startswith(b"A SECRET of the tests\0")


def test_a_process_that_ends_is_gone_and_its_open_file_says_esrch(mount):
    with running_target() as target:
        directory = mount.folder / "os/processes" / str(target.pid)
        descriptor = os.open(directory / "mem", os.O_RDONLY)
        assert len(os.pread(descriptor, 16, target.secret)) == 16
    try:
        with pytest.raises(ProcessLookupError):
            os.pread(descriptor, 16, target.secret)
    finally:
        os.close(descriptor)
    deadline = time.monotonic() + 5
    while str(target.pid) in os.listdir(directory.parent) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert str(target.pid) not in os.listdir(directory.parent)


def test_instances_are_made_and_removed_by_writing_and_rmdir(mount, tmp_path):
    image = tmp_path / "image.raw"
    image.write_bytes(os.urandom(3 << 20))
    run("sh", "-c", f'echo "img raw:{image}:base=0x100000" > {mount.folder}/connector/new')
    physical = mount.folder / "connector/img/phys_mem"
    assert os.stat(physical).st_size == (3 << 20) + 0x100000
    assert physical.read_bytes() == bytes(0x100000) + image.read_bytes()
    assert "base = 0x100000" in (mount.folder / "connector/img/memory_map").read_text()
    failed = run("sh", "-c", f'echo "img nonsense:x" > {mount.folder}/connector/new', check=False)
    assert failed.returncode != 0
    assert "nonsense" in (mount.folder / "connector/new").read_text()
    os.rmdir(mount.folder / "connector/img")
    assert not physical.exists()


def _churn(stop: threading.Event) -> None:
    """Processes that start and die, all the time."""
    while not stop.is_set():
        subprocess.run([sys.executable, "-S", "-c", "x = bytearray(1 << 20)"], timeout=20, check=False)


READER = r"""
import os, random, sys, time
folder, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
known = [(int(a), int(b), bytes.fromhex(c)) for a, b, c in (x.split(":") for x in sys.argv[4:])]
random.seed(seed)
until, reads, gone = time.monotonic() + seconds, 0, 0
while time.monotonic() < until:
    pid, address, expected = random.choice(known)
    with open(f"{folder}/os/processes/{pid}/mem", "rb", buffering=0) as file:
        for _ in range(20):
            at = random.randrange(len(expected))
            size = random.randrange(1, len(expected) - at + 1)
            got = os.pread(file.fileno(), size, address + at)
            if got != expected[at:at + size]:
                sys.exit(f"wrong bytes of process {pid} at {address + at:#x}: {got[:32].hex()}")
            reads += 1
    name = random.choice(os.listdir(f"{folder}/os/processes"))
    path = f"{folder}/os/processes/{name}"
    try:
        if name.isdigit():
            maps = open(f"{path}/maps", "rb").read()
            comm = open(f"{path}/comm", "rb").read()
            for region in os.listdir(f"{path}/regions")[:3]:
                with open(f"{path}/regions/{region}", "rb") as file:
                    file.read(random.choice([1, 4096, 100_000]))
            os.listdir(f"{path}/modules")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        gone += 1
    except OSError as error:
        if error.errno != 5:
            raise
print(reads, gone)
"""


@pytest.mark.slow
def test_64_readers_over_processes_that_start_and_die_see_no_wrong_byte_and_leak_nothing():
    seconds = float(os.environ.get("CLOUDFS_TEST_SOAK_SECONDS", "60"))
    stop = threading.Event()
    with running_target(os.urandom(64)) as one, running_target(os.urandom(64)) as two, mounted(
        "--self-check", limit=seconds + 90
    ) as mount:  # fmt: skip
        known = []
        for target in (one, two):
            known.append(f"{target.pid}:{target.secret}:{target.ask()[1].hex()}")
            known.append(f"{target.pid}:{target.pattern}:{(bytes(range(256)) * 16).hex()}")
        descriptors = Path(f"/proc/{mount.daemon.pid}/fd")
        os.listdir(mount.folder / "os/processes")
        before = len(os.listdir(descriptors))
        churn = [threading.Thread(target=_churn, args=(stop,)) for _ in range(2)]
        readers = [
            subprocess.Popen([sys.executable, "-S", "-c", READER, str(mount.folder), str(seconds), str(seed), *known],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for seed in range(64)
        ]  # fmt: skip
        for thread in churn:
            thread.start()
        results = [reader.communicate(timeout=seconds + 60) for reader in readers]
        stop.set()
        for thread in churn:
            thread.join()
        wrong = [error for reader, (_, error) in zip(readers, results, strict=True) if reader.returncode]
        assert not wrong, wrong[0]
        assert sum(int(out.split()[0]) for out, _ in results) > 64 * 20
        assert mount.daemon.poll() is None, "the daemon is alive"
        deadline = time.monotonic() + 20
        while len(os.listdir(descriptors)) > before + 4 and time.monotonic() < deadline:
            time.sleep(0.2)
            run("ls", "-l", f"{mount.folder}/os/processes/")  # what is older than a second goes at the next look
        assert len(os.listdir(descriptors)) <= before + 4, "descriptors came back"
