"""FileMemory: a file as memory, also while it is cut, grown and closed."""

from __future__ import annotations

import array
import fcntl
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from support import require

from engine import accelerator
from engine.errors import ConnectorClosedError, FaultError, InvalidArgumentError, UnusableTargetError
from engine.file_memory import FileMemory
from engine.testing import Truth, check_memory, check_writes
from engine.types import Extent

DATA = os.urandom(300_000)


@pytest.fixture(params=["disk", "memory"])
def path(request, tmp_path):
    """The same file on a disk and in memory (tmpfs): they are read by different calls."""
    if request.param == "disk":
        name = tmp_path / "image.raw"
    else:
        name = f"/dev/shm/cloudfs-test-{os.getpid()}-{os.urandom(4).hex()}"
    with open(name, "wb") as file:
        file.write(DATA)
    yield str(name)
    os.unlink(name)


def test_a_file_holds_the_contract(path):
    check_memory(lambda: FileMemory(path), Truth(known=[(0, DATA), (299_000, DATA[299_000:])]))


def test_a_writable_file_holds_the_contract_of_writing(path):
    check_writes(FileMemory(path, writable=True), Truth(known=[(0, DATA)]))


def test_a_write_never_makes_the_file_grow(path):
    memory = FileMemory(path, writable=True)
    with pytest.raises(FaultError) as caught:
        memory.write(len(DATA) - 2, b"four")
    assert caught.value.address == len(DATA)
    assert os.path.getsize(path) == len(DATA)
    assert memory.read(len(DATA) - 2, 2) == b"fo"


def test_a_sparse_file_has_extents_where_its_data_is(tmp_path):
    name = tmp_path / "sparse"
    with open(name, "wb") as file:
        file.truncate(1 << 40)
        file.seek(1 << 30)
        file.write(b"x" * 4096)
    memory = FileMemory(str(name))
    extents = list(memory.extents())
    assert extents
    assert sum(extent.size for extent in extents) < 1 << 20
    assert any((1 << 30) in extent for extent in extents)
    assert memory.read((1 << 39) + 5, 10) == bytes(10)
    assert list(memory.extents(1 << 31)) == []


def test_a_file_that_was_cut_faults_at_its_new_end_through_every_door(path):
    memory = FileMemory(path)
    out = np.zeros((2, 8), np.uint8)
    assert not memory.gather(np.array([0, 200_000], np.uint64), out)
    assert memory.size == len(DATA)
    os.truncate(path, 100_000)
    assert memory.size == 100_000
    for act in (
        lambda: memory.read(200_000, 8),
        lambda: memory.u64(200_000),
        lambda: memory.readinto(200_000, memoryview(bytearray(100_000))),
    ):
        with pytest.raises(FaultError) as caught:
            act()
        assert caught.value.address == 200_000
    faults = memory.gather(np.array([0, 200_000, 99_998], np.uint64), out := np.zeros((3, 8), np.uint8))
    assert faults.rows.tolist() == [1, 2]
    assert faults.addresses.tolist() == [200_000, 100_000]
    assert out[0].tobytes() == DATA[:8]
    assert memory.borrow(200_000, 8) is None


def test_a_file_that_grew_is_read_to_its_new_end(path):
    memory = FileMemory(path)
    memory.gather(np.array([0], np.uint64), np.zeros((1, 8), np.uint8))
    with open(path, "ab") as file:
        file.write(b"grown" * 10_000)
    assert memory.size == len(DATA) + 50_000
    assert memory.read(len(DATA), 5) == b"grown"
    out = np.zeros((1, 5), np.uint8)
    assert not memory.gather(np.array([len(DATA) + 49_995], np.uint64), out)
    assert out.tobytes() == b"grown"


def test_cut_and_grown_under_four_readers_nobody_sees_a_wrong_byte_or_a_signal(path):
    memory = FileMemory(path)
    stop = threading.Event()
    wrong: list[object] = []

    def read(seed):
        generator = np.random.default_rng(seed)
        while not stop.is_set():
            address = int(generator.integers(0, len(DATA) - 4096))
            try:
                got = memory.read(address, 4096)
            except FaultError as error:
                got = DATA[address : address + 4096] if error.address % 4096 == 0 or error.address >= 50_000 else error
            # behind the cut a grown file holds zeros
            if not isinstance(got, bytes) or any(a not in (0, b) for a, b in zip(got, DATA[address:], strict=False)):
                wrong.append(got)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        os.truncate(path, 50_000)
        os.truncate(path, len(DATA))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_closed_it_says_so_and_leaves_its_descriptor_to_the_last_reader(path):
    memory = FileMemory(path)
    borrowed = memory.borrow(0, 4096)
    memory.close()
    memory.close()
    with pytest.raises(ConnectorClosedError):
        memory.read(0, 1)
    if borrowed is not None:
        assert bytes(borrowed) == DATA[:4096]


def test_descriptors_come_back(path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        memory = FileMemory(path)
        memory.gather(np.array([0], np.uint64), np.zeros((1, 8), np.uint8))
        memory.close()
    del memory
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidArgumentError, match="neither a regular file nor a block device"):
        FileMemory(str(tmp_path / "fifo"))
    with pytest.raises(InvalidArgumentError, match="neither"):
        FileMemory("/dev/zero")
    with pytest.raises(IsADirectoryError):
        FileMemory(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        FileMemory(str(tmp_path / "absent"))


def test_a_file_of_64_tebibytes_is_read_at_its_far_end(tmp_path):
    name = f"/dev/shm/cloudfs-test-{os.getpid()}-far"
    try:
        with open(name, "wb") as file:
            file.truncate(1 << 46)
            file.seek((1 << 46) - 4)
            file.write(b"last")
        memory = FileMemory(name)
        assert memory.read((1 << 46) - 4, 4) == b"last"
        out = np.zeros((1, 4), np.uint8)
        assert not memory.gather(np.array([(1 << 46) - 4], np.uint64), out)
        assert out.tobytes() == b"last"
        assert len(list(memory.extents())) == 1
        assert next(iter(memory.extents())) == Extent((1 << 46) - 4096, 4096)
    finally:
        os.unlink(name)


def test_columns_over_a_file_that_another_process_cuts_and_grows_all_the_time_are_no_signal(path):
    memory = FileMemory(path)
    cutter = subprocess.Popen(
        [sys.executable, "-c", "import os, sys\nwhile True: [os.truncate(sys.argv[1], n) for n in (0, 300000)]", path]
    )
    try:
        generator = np.random.default_rng(1)
        for _ in range(300):
            addresses = generator.integers(0, 299_990, 200).astype(np.uint64)
            out = np.empty((200, 8), np.uint8)
            memory.gather(addresses, out)
    finally:
        cutter.kill()
        cutter.wait()


def test_reading_a_sparse_file_in_memory_gives_it_no_pages():
    name = f"/dev/shm/cloudfs-test-{os.getpid()}-holes"
    try:
        with open(name, "wb") as file:
            file.truncate(64 << 20)
        for immutable in (False, True):
            memory = FileMemory(name, immutable=immutable)
            addresses = np.arange(0, 64 << 20, 4096, dtype=np.uint64)
            values, faults = memory.words(addresses)
            assert not faults
            assert not values.any()
            assert memory.borrow(0, 1 << 20) is None
            assert memory.read(0, 1 << 20) == bytes(1 << 20)
        assert os.stat(name).st_blocks == 0
    finally:
        os.unlink(name)


def test_words_that_are_not_bytes_are_written_by_their_bytes(path):
    memory = FileMemory(path, writable=True)
    with pytest.raises(FaultError) as caught:
        memory.write(len(DATA) - 16, memoryview(array.array("I", range(16))))
    assert caught.value.address == len(DATA)
    assert os.path.getsize(path) == len(DATA)


def test_to_refuse_a_fifo_does_not_open_it(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    writer = subprocess.Popen([sys.executable, "-c", "import sys; open(sys.argv[1], 'wb').write(b'kept')",
                               str(tmp_path / "fifo")])  # fmt: skip
    try:
        for _ in range(20):
            with pytest.raises(UnusableTargetError):
                FileMemory(str(tmp_path / "fifo"))
        assert (tmp_path / "fifo").read_bytes() == b"kept"
    finally:
        writer.kill()
        writer.wait()


def test_a_reader_never_reads_by_a_number_that_close_gave_to_another_file(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode() * 1000)
    stop = threading.Event()
    current = [FileMemory(str(tmp_path / "one"))]
    wrong = []

    def read():
        while not stop.is_set():
            try:
                data = current[0].read(0, 3)
            except ConnectorClosedError:
                continue
            except Exception as error:
                data = repr(error)
            if data != b"one":
                wrong.append(data)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(500):
        old, current[0] = current[0], FileMemory(str(tmp_path / "one"))
        old.close()
        os.close(os.open(tmp_path / "two", os.O_RDONLY))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_columns_of_a_live_file_come_from_its_mapping_and_are_right(path):
    require(accelerator.library() is not None, f"there is no accelerator: {accelerator.why_not()}")
    memory = FileMemory(path)
    addresses = np.random.default_rng(3).integers(0, len(DATA) + 100, 5000).astype(np.uint64)
    for width in (1, 4, 8, 13, 4096):
        out = np.empty((len(addresses), width), np.uint8)
        faults = memory.gather(addresses, out)
        padded = np.frombuffer(DATA + bytes(5000), np.uint8)
        wanted = np.lib.stride_tricks.sliding_window_view(padded, width)[addresses.astype(np.int64)]
        assert np.array_equal(out, wanted)
        assert faults.rows.tolist() == np.flatnonzero(addresses + np.uint64(width) > len(DATA)).tolist()
        assert faults.addresses.tolist() == [max(len(DATA), int(addresses[row])) for row in faults.rows]
    assert memory._mapping is not None


def test_threads_that_gather_from_a_live_file_survive_that_it_is_cut_and_grown_all_the_time(path):
    require(accelerator.library() is not None, f"there is no accelerator: {accelerator.why_not()}")
    memory = FileMemory(path)
    cutter = subprocess.Popen(
        [sys.executable, "-c", "import os, sys\nwhile True: [os.truncate(sys.argv[1], n) for n in (0, 300000)]", path]
    )
    rounds: list[int] = []
    wrong: list[int] = []

    def gather(seed: int) -> None:
        generator = np.random.default_rng(seed)
        for _ in range(400):
            addresses = generator.integers(0, 299_990, 300).astype(np.uint64)
            out = np.empty((300, 8), np.uint8)
            memory.gather(addresses, out)
            before = np.frombuffer(DATA, np.uint8)[addresses.astype(np.int64)[:, None] + np.arange(8)]
            rounds.append(seed)
            wrong.extend(np.flatnonzero((out != 0) & (out != before)).tolist())

    try:
        threads = [threading.Thread(target=gather, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        cutter.kill()
        cutter.wait()
    assert len(rounds) == 4 * 400
    assert not wrong


def test_a_bus_error_that_is_not_ours_still_ends_a_program_and_asks_its_own_handler(tmp_path):
    require(accelerator.library() is not None, f"there is no accelerator: {accelerator.why_not()}")
    program = """
import faulthandler, mmap, os, sys
import numpy as np
from engine.file_memory import FileMemory
if sys.argv[2] == "handler":
    faulthandler.enable()
memory = FileMemory(sys.argv[1])
with open(sys.argv[1], "r+b") as file:
    mapping = mmap.mmap(file.fileno(), 0)
assert not memory.gather(np.zeros(100, np.uint64), np.empty((100, 8), np.uint8))
os.truncate(sys.argv[1], 0)
faults = memory.gather(np.full(100, 50_000, np.uint64), np.empty((100, 8), np.uint8))
assert len(faults) == 100
print("alive", flush=True)
mapping[50_000]
"""
    for handler in ("handler", "none"):
        (tmp_path / "image").write_bytes(bytes(100_000))
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "image"), handler],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.stdout == "alive\n"
        assert done.returncode == -signal.SIGBUS
        assert ("Fatal Python error: Bus error" in done.stderr) == (handler == "handler")


def sealed(data: bytes, seals: int) -> FileMemory:
    """A guest's RAM as QEMU keeps it in a memfd."""
    number = os.memfd_create("ram", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.truncate(number, len(data))
        os.pwrite(number, data, 0)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
        return FileMemory(f"/proc/self/fd/{number}", fills_holes=True)
    finally:
        os.close(number)


def test_few_bytes_of_a_guest_s_ram_that_nobody_can_cut_take_no_system_call(monkeypatch):
    memory = sealed(DATA, fcntl.F_SEAL_SHRINK)
    other = sealed(DATA, fcntl.F_SEAL_GROW)
    check_memory(lambda: sealed(DATA, fcntl.F_SEAL_SHRINK), Truth(known=[(0, DATA), (299_000, DATA[299_000:])]))
    calls: list[str] = []

    def noted(name, call):
        return lambda *words: (calls.append(name), call(*words))[1]

    for name, call in (("pread", os.pread), ("preadv", os.preadv)):
        monkeypatch.setattr(os, name, noted(name, call))
    for at in (0, 4093, 150_000):
        assert memory.u64(at) == int.from_bytes(DATA[at : at + 8], "little")
        assert memory.read(at, 100) == DATA[at : at + 100]
    assert calls == []
    assert other.u64(8) == int.from_bytes(DATA[8:16], "little")
    assert calls == ["pread"]


def test_whole_pages_of_a_guest_s_ram_that_are_read_get_no_page():
    """Who reads all of it would make a guest as large as it may become."""
    number = os.memfd_create("ram", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    try:
        os.truncate(number, 1 << 20)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        memory = FileMemory(f"/proc/self/fd/{number}", fills_holes=True)
        for at in range(0, 1 << 20, 4096):
            assert memory.read(at, 4096) == bytes(4096)
            assert memory.read_nowait(at, 4096) == memory.read_nowait(at, 512) * 8
            memory.readinto_nowait(at, memoryview(bytearray(4096)))
        assert os.fstat(number).st_blocks == 0
    finally:
        os.close(number)
