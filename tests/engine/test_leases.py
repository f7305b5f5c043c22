"""Read leases on real files, ended by real writers; /proc/locks tells which leases there are."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from outside_writers import ACTS, MOMENT, holding, outside, runs
from support import as_nobody, require

from engine.connectors.raw import RawConnector
from engine.errors import InvalidArgumentError
from engine.file_memory import LEASED_ROWS, FileMemory
from engine.leases import Lease, take
from engine.machine import Machine
from engine.testing import Truth, check_connector

DATA = os.urandom(300_000)
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    name = tmp_path / "image" if request.param == "disk" else SHARED_MEMORY / f"cloudfs-test-{os.urandom(6).hex()}"
    name.write_bytes(DATA)
    yield str(name)
    name.unlink(missing_ok=True)


on_disk = pytest.mark.parametrize("path", ["disk"], indirect=True)
"""For what has nothing to do with where the file lies."""


def leases_on(path: str) -> int:
    """How many the kernel knows, by proc(5)."""
    status = os.stat(path)
    where = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    lines = Path("/proc/locks").read_text().splitlines()
    return sum("LEASE" in line and where in line.split() for line in lines)


def await_(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def leased(path: str) -> Lease:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = take(descriptor)
    finally:
        os.close(descriptor)
    assert isinstance(found, Lease), found
    return found


def refused(path: str | int) -> str:
    descriptor = os.open(path, os.O_RDONLY) if isinstance(path, str) else os.dup(path)
    try:
        found = take(descriptor)
    finally:
        os.close(descriptor)
    assert isinstance(found, str)
    return found


# -- what gets one -------------------------------------------------------------------------------------------


def test_a_file_that_nobody_writes_to_gets_a_lease_of_the_kernel(path: str) -> None:
    before = leases_on(path)
    lease = leased(path)
    assert lease.held
    assert leases_on(path) == before + 1


def test_a_file_that_another_program_has_open_for_writing_gets_none(path: str) -> None:
    with holding(path, "file = os.open(path, os.O_WRONLY)"):
        assert "has it open for writing" in refused(path)
    assert leased(path).held


def test_a_file_of_which_nothing_but_a_writable_mapping_is_left_gets_none(path: str) -> None:
    with holding(path, "file = os.open(path, os.O_RDWR); mapped = mmap.mmap(file, 4096); os.close(file)"):
        assert "has it open for writing" in refused(path)


def test_memory_that_programs_share_by_descriptor_gets_none_though_the_kernel_would_grant_it() -> None:
    descriptor = os.memfd_create("guest")
    try:
        os.ftruncate(descriptor, 4096)
        reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
        fcntl.fcntl(reading, fcntl.F_SETLEASE, fcntl.F_RDLCK)  # while the other one can write
        os.close(reading)
        assert "no mount" in refused(descriptor)
    finally:
        os.close(descriptor)


def test_a_block_device_gets_none() -> None:
    devices = [f"/dev/{name}" for name in os.listdir("/dev") if stat.S_ISBLK(os.stat(f"/dev/{name}").st_mode)]
    open_ones = [name for name in devices if _opens(name)]
    require(open_ones, "no block device can be opened")
    assert "block device" in refused(open_ones[0])


def _opens(name: str) -> bool:
    try:
        os.close(os.open(name, os.O_RDONLY))
    except OSError:
        return False
    return True


def test_a_file_of_another_user_is_live_for_a_plain_user_and_his_own_is_not(tmp_path: Path) -> None:
    require(os.geteuid() == 0, "only root can become another user")
    folder = SHARED_MEMORY / f"cloudfs-test-{os.urandom(6).hex()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    try:
        (folder / "roots").write_bytes(DATA)
        (folder / "roots").chmod(0o644)
        said = as_nobody(
            """
            from engine.file_memory import FileMemory
            print(FileMemory(sys.argv[1] + "/roots", leased=True).freshness)
            open(sys.argv[1] + "/own", "wb").write(b"x")
            print(FileMemory(sys.argv[1] + "/own", leased=True).freshness)
            """,
            str(folder),
        ).splitlines()
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=False)
    assert said[0].startswith("live: only the owner")
    assert said[1].startswith("immutable: ")


# -- how one ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTS)
def test_a_writer_comes_in_when_everybody_was_told_and_waits_for_a_moment(path: str, act: str) -> None:
    lease = leased(path)
    seen: list[tuple[bool, bytes, int]] = []
    assert lease.on_break(lambda: seen.append((lease.held, Path(path).read_bytes(), leases_on(path))))
    assert outside(path, act) < MOMENT
    assert seen == [(False, DATA, 1)]
    assert not lease.held
    await_(lambda: leases_on(path) == 0)
    assert Path(path).read_bytes() != DATA


@pytest.mark.parametrize(
    "act",
    [
        "open(path, 'rb').read()",
        "mmap.mmap(os.open(path, os.O_RDONLY), 4096, prot=mmap.PROT_READ)[:]",
        "os.chmod(path, 0o600)",
        "os.utime(path)",
        "os.rename(path, path + '.new'); os.rename(path + '.new', path)",
        "os.link(path, path + '.link'); os.unlink(path + '.link')",
        "os.unlink(path)",
    ],
)
def test_whoever_changes_no_byte_ends_no_lease(path: str, act: str) -> None:
    lease = leased(path)
    runs(path, act)
    assert lease.held
    assert not lease._notice()


def test_a_writer_of_the_same_process_comes_in_too(path: str) -> None:
    lease = leased(path)
    with open(path, "r+b") as file:
        file.write(b"NEW!")
    assert not lease.held


def test_a_writer_waits_until_a_reader_of_the_mapping_has_finished(path: str) -> None:
    lease = leased(path)
    assert lease.pin()
    told = threading.Event()
    lease.on_break(told.set)
    with subprocess.Popen(
        [sys.executable, "-c", "import os, sys; os.open(sys.argv[1], os.O_RDWR); print('in')", path],
        stdout=subprocess.PIPE,
    ) as writer:
        await_(lambda: not lease.held)
        assert not told.wait(0.05)
        assert writer.poll() is None
        assert not lease.pin()
        lease.unpin()
        assert told.wait(20)
        assert writer.wait(20) == 0


def test_several_leases_on_one_file_all_end_before_a_writer_comes_in(path: str) -> None:
    leases = [leased(path) for _ in range(5)]
    told: list[int] = []
    for number, lease in enumerate(leases):
        lease.on_break(lambda number=number: told.append(number))
    assert outside(path, "overwrites") < MOMENT
    assert sorted(told) == [0, 1, 2, 3, 4]


def test_one_that_ends_takes_no_other_file_with_it(path: str, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"x")
    other, lease = leased(str(tmp_path / "other")), leased(path)
    outside(path, "overwrites")
    assert (lease.held, other.held) == (False, True)


def test_a_callback_that_fails_holds_nobody_up(path: str, caplog: pytest.LogCaptureFixture) -> None:
    lease = leased(path)
    told = threading.Event()

    def fails() -> None:
        raise RuntimeError("a bug")

    lease.on_break(fails)
    lease.on_break(told.set)
    assert outside(path, "overwrites") < MOMENT
    assert told.is_set()
    assert "a bug" in caplog.text


def test_after_its_end_no_callback_is_taken_and_off_takes_one_back(path: str) -> None:
    lease = leased(path)
    told: list[str] = []
    kept, taken = (lambda: told.append("kept")), (lambda: told.append("taken back"))
    assert lease.on_break(kept)
    assert lease.on_break(taken)
    lease.off(taken)
    lease.off(taken)
    outside(path, "overwrites")
    assert told == ["kept"]
    assert not lease.on_break(kept)


def test_released_it_tells_everybody_too_and_then_holds_nobody_up(path: str) -> None:
    lease = leased(path)
    told = threading.Event()
    lease.on_break(told.set)
    lease.release()
    lease.release()
    assert not lease.held
    assert told.wait(20)
    await_(lambda: leases_on(path) == 0)


def test_without_callbacks_it_is_gone_when_release_returns(path: str) -> None:
    lease = leased(path)
    lease.release()
    assert leases_on(path) == 0


def test_one_that_nobody_refers_to_any_more_is_gone(path: str) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        leased(path)
    gc.collect()
    await_(lambda: leases_on(path) == 0)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


# -- signals, threads, children ------------------------------------------------------------------------------

_ALONE = """
import os, signal, sys, threading, time
from engine.leases import Lease, take
path = sys.argv[1]
lease = take(os.open(path, os.O_RDONLY))
assert isinstance(lease, Lease), lease
"""


def alone(path: str, code: str) -> str:
    """What a program of its own prints that holds a lease."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore:This process:DeprecationWarning", "-c", _ALONE + code, path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


_WRITER = "import subprocess\nsubprocess.run([sys.executable, '-c', 'import sys; open(sys.argv[1], \"r+b\")', path])\n"


@on_disk
@pytest.mark.parametrize("disposition", ["SIG_DFL", "SIG_IGN"])
def test_the_signal_neither_ends_the_process_nor_is_lost_whatever_it_does_with_it(path: str, disposition: str) -> None:
    said = alone(path, f"signal.signal(signal.SIGIO, signal.{disposition})\n{_WRITER}print(lease.held)")
    assert said == "False\n"


@on_disk
def test_a_handler_of_the_program_never_hears_of_it(path: str) -> None:
    code = "heard = []\nsignal.signal(signal.SIGIO, lambda *_: heard.append(1))\n"
    assert alone(path, f"{code}{_WRITER}print(lease.held, heard)") == "False []\n"


@on_disk
def test_whatever_else_signals_the_process_is_handled_in_the_main_thread(path: str) -> None:
    code = """
heard = []
signal.signal(signal.SIGUSR1, lambda *_: heard.append(threading.current_thread().name))
[thread] = [thread for thread in threading.enumerate() if thread.name == "cloudfs-leases"]
signal.pthread_kill(thread.ident, signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGUSR1)
print(heard, lease.held)
"""
    assert alone(path, code) == "['MainThread'] True\n"


@on_disk
def test_a_program_ends_while_it_holds_one(path: str) -> None:
    assert alone(path, "print('ends')") == "ends\n"
    assert leases_on(path) == 0


@on_disk
def test_in_a_forked_child_it_counts_as_ended_and_the_parents_goes_on(path: str) -> None:
    code = f"""
child = os.fork()
if not child:
    os._exit(lease.held * 1)
assert os.waitpid(child, 0)[1] == 0 and lease.held
{_WRITER}
print(lease.held)
"""
    assert alone(path, code) == "False\n"


@on_disk
def test_a_forked_child_that_outlives_its_parent_holds_nobody_up(path: str) -> None:
    code = """
child = os.fork()
if not child:
    os.close(1)
    time.sleep(60)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", _ALONE + code, path], stdout=subprocess.PIPE, timeout=60, check=False)
    try:
        assert done.returncode == -signal.SIGKILL
        assert leases_on(path) == 0
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


@on_disk
def test_a_forked_child_can_take_one_of_its_own(path: str) -> None:
    code = f"""
lease.release()
child = os.fork()
if not child:
    lease = take(os.open(path, os.O_RDONLY))
    {_WRITER.replace(chr(10), chr(10) + "    ")}
    os._exit(lease.held * 1)
print(os.waitpid(child, 0)[1])
"""
    assert alone(path, code) == "0\n"


@on_disk
def test_taking_many_starts_one_thread(path: str) -> None:
    leases = [leased(path) for _ in range(10)]
    assert sum(thread.name == "cloudfs-leases" for thread in threading.enumerate()) == 1
    assert all(lease.held for lease in leases)


# -- files as memory -----------------------------------------------------------------------------------------


def test_a_leased_file_is_immutable_until_a_writer_comes_and_then_tells_its_size_anew(path: str) -> None:
    memory = FileMemory(path, leased=True)
    assert memory.immutable
    assert memory.freshness.startswith("immutable: nobody has it open for writing")
    outside(path, "appends")
    assert not memory.immutable
    assert memory.freshness == "live: another program has opened it for writing"
    assert memory.size == len(DATA) + 4
    assert memory.read(len(DATA), 4) == b"NEW!"


def test_closing_the_memory_ends_its_lease(path: str) -> None:
    memory = FileMemory(path, leased=True)
    assert leases_on(path) == 1
    memory.close()
    assert leases_on(path) == 0


def test_a_file_opened_for_writing_takes_none(path: str) -> None:
    memory = FileMemory(path, writable=True, leased=True)
    assert not memory.immutable
    assert memory.freshness == "live: it is opened for writing"
    assert leases_on(path) == 0


def test_columns_come_from_the_mapping_of_a_leased_file_and_all_rows_are_right(path: str) -> None:
    memory = FileMemory(path, leased=True)
    addresses = np.random.default_rng(3).integers(0, len(DATA) + 100, 2 * LEASED_ROWS + 77).astype(np.uint64)
    out = np.empty((len(addresses), 8), np.uint8)
    faults = memory.gather(addresses, out)
    assert memory._mapping is not None
    padded = np.frombuffer(DATA + bytes(200), np.uint8)
    assert np.array_equal(out, padded[addresses.astype(np.int64)[:, None] + np.arange(8)])
    assert faults.rows.tolist() == [row for row, address in enumerate(addresses.tolist()) if address + 8 > len(DATA)]
    assert faults.addresses.tolist() == [max(len(DATA), int(addresses[row])) for row in faults.rows]


def test_cut_by_others_under_columns_it_gives_old_bytes_or_faults_and_no_signal(path: str) -> None:
    generator = np.random.default_rng(1)
    for _ in range(4):
        memory = FileMemory(path, leased=True)
        stop = threading.Event()
        wrong: list[object] = []

        def gather(memory: FileMemory = memory, stop: threading.Event = stop, wrong: list[object] = wrong) -> None:
            addresses = generator.integers(0, len(DATA) - 8, 3 * LEASED_ROWS).astype(np.uint64)
            truth = np.frombuffer(DATA, np.uint8)[addresses.astype(np.int64)[:, None] + np.arange(8)]
            while not stop.is_set():
                out = np.empty((len(addresses), 8), np.uint8)
                faults = memory.gather(addresses, out)
                fine = np.ones(len(addresses), bool)
                fine[faults.rows] = False
                if not np.array_equal(out[fine], truth[fine]):
                    wrong.append(addresses)

        readers = [threading.Thread(target=gather) for _ in range(2)]
        for reader in readers:
            reader.start()
        assert outside(path, "cuts it by its name") < MOMENT
        stop.set()
        for reader in readers:
            reader.join()
        assert not wrong
        Path(path).write_bytes(DATA)


# -- the connector -------------------------------------------------------------------------------------------


@on_disk
def test_an_image_with_a_lease_holds_the_contract_of_connectors(path: str) -> None:
    connector = RawConnector.open(path, {}, parent=None, writable=False)
    assert connector.lease is not None
    check_connector(connector, Truth(known=[(0, DATA)]))


@on_disk
@pytest.mark.parametrize(
    ("options", "live", "why"),
    [
        ({}, False, "immutable: nobody has it open for writing, and a read lease tells before anybody does"),
        ({"immutable": "yes"}, False, "immutable: immutable=yes says so"),
        ({"live": "yes"}, True, "live: live=yes says so"),
        ({"live": "no", "immutable": "no"}, False, "immutable: nobody has it open for writing, and a read lease"),
    ],
)
def test_info_says_whether_an_image_is_live_and_why(path: str, options: dict[str, str], live: bool, why: str) -> None:
    info = RawConnector.open(path, options, parent=None, writable=False).info
    assert info.live is live
    assert info.freshness is not None
    assert info.freshness.startswith(why)


@on_disk
def test_an_image_cannot_be_both_immutable_and_live(path: str) -> None:
    with pytest.raises(InvalidArgumentError, match="exclude each other"):
        RawConnector.open(path, {"immutable": "yes", "live": "yes"}, parent=None, writable=False)


@on_disk
def test_said_to_be_immutable_it_stays_so_whoever_writes(path: str) -> None:
    connector = RawConnector.open(path, {"immutable": "yes"}, parent=None, writable=False)
    outside(path, "overwrites")
    assert not connector.info.live
    assert connector.lease is None


@on_disk
def test_an_instance_and_what_stands_on_it_turn_live_when_a_writer_comes(path: str) -> None:
    with Machine() as machine:
        instance = machine.open("connector", f"raw:{path}")
        base = machine._base(instance.spec, instance)
        assert (instance.live, base.may_cache) == (False, True)
        assert outside(path, "overwrites") < MOMENT
        assert (instance.live, base.may_cache) == (True, False)
        assert instance.memory.read(0, 4) == b"NEW!"
        machine.reopen(instance)
        assert not instance.live


def test_an_os_on_an_image_is_not_live_and_sees_page_tables_that_a_writer_changed(tmp_path: Path) -> None:
    #   0x1000 -> 0x2000 -> 0x3000 -> 0x4000 -> 0x6000 "A"; the writer puts 0x5000 -> 0x7000 "B" below 0x3000
    image = tmp_path / "image"
    pages = bytearray(0x8000)
    for table, following in ((0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000, 0x6000), (0x5000, 0x7000)):
        pages[table : table + 8] = (following | 3).to_bytes(8, "little")
    pages[0x6000:0x8000] = b"A" * 0x1000 + b"B" * 0x1000
    image.write_bytes(pages)
    with Machine() as machine:
        connector = machine.open("connector", f"raw:{image}")
        system = machine.open("oslayer", "raw-dtb:dtb=0x1000", parent=connector)
        memory = system.layer.kernel_memory
        assert memory is not None
        assert (memory.read(0, 4), system.live, system.lease) == (b"AAAA", False, connector.lease)
        with image.open("r+b") as file:
            file.seek(0x3000)
            file.write((0x5003).to_bytes(8, "little"))
        assert (memory.read(0, 4), system.live) == (b"BBBB", True)


@on_disk
def test_an_instance_that_is_removed_holds_up_no_writer(path: str) -> None:
    with Machine() as machine:
        machine.open("connector", f"raw:{path}", name="image")
        machine.remove("connector", "image")
        assert leases_on(path) == 0


@on_disk
def test_opening_the_same_image_for_writing_turns_the_other_instance_live(path: str) -> None:
    with Machine() as reading, Machine(writable=True) as writing:
        one = reading.open("connector", f"raw:{path}")
        other = writing.open("connector", f"raw:{path}")
        other.memory.write(0, b"OURS")
        assert one.live
        assert one.memory.read(0, 4) == b"OURS"


@pytest.mark.parametrize("lower", ["lower", "top/lower"])
def test_on_an_overlay_it_ends_before_the_file_is_copied_up(tmp_path: Path, lower: str) -> None:
    require(os.geteuid() == 0, "only root mounts an overlay")
    for name in ("top", "merged"):
        (tmp_path / name).mkdir()
    libc = ctypes.CDLL(None, use_errno=True)

    def mounted(kind: str, where: Path, options: str) -> bool:
        return libc.mount(b"none", bytes(where), kind.encode(), 0, options.encode()) == 0

    require(mounted("tmpfs", tmp_path / "top", ""), "no tmpfs can be mounted")
    try:
        for name in (lower, "top/upper", "top/work"):
            (tmp_path / name).mkdir()
        (tmp_path / lower / "image").write_bytes(DATA)
        options = f"lowerdir={tmp_path}/{lower},upperdir={tmp_path}/top/upper,workdir={tmp_path}/top/work"
        require(mounted("overlay", tmp_path / "merged", options), "no overlay can be mounted")
        try:
            memory = FileMemory(str(tmp_path / "merged/image"), leased=True)
            memory.words(np.arange(0, 4096, 8, dtype=np.uint64))
            assert memory.immutable
            assert outside(tmp_path / "merged/image", "overwrites") < MOMENT
            assert memory.words(np.arange(0, 4096, 8, dtype=np.uint64))[0].tobytes() == b"NEW!" * 1024
            memory.close()
            memory._mapping = None
        finally:
            del memory
            libc.umount2(bytes(tmp_path / "merged"), 2)
    finally:
        libc.umount2(bytes(tmp_path / "top"), 2)
