"""Shape: members are taken by what columns prove, hand-made and hostile ones; what is not proved is absent."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.errors import FaultError
from engine.memory import Memory
from engine.oslayers.linux.shape.cred import find_cred
from engine.oslayers.linux.shape.ring import find_ring
from engine.oslayers.linux.shape.sample import Sample
from engine.oslayers.linux.shape.tasks import (
    PF_KTHREAD,
    TaskColumns,
    find_exit,
    find_flags,
    find_parents,
    find_pid,
    find_start,
    find_state,
    mm_candidates,
)
from engine.oslayers.linux.shape.threads import find_threads
from engine.oslayers.linux.shape.types import list_head

BASE = 0xC000_0000
TASKS = 40
STRIDE = 0x4000
SIZE = 1 << 20
# Where this kernel has its members, in bytes.
STATE, FLAGS, LINK, MM, EXIT, PID, PARENT, NODE, START, CRED, COMM, SIGNAL = (
    16, 28, 968, 1008, 1036, 1108, 1120, 1208, 1284, 1400, 1412, 1468,
)  # fmt: skip
CREDENTIALS, SIGNALS, SPACES = SIZE - 0x1000, SIZE - 0x4000, SIZE - 0x6000


class Kernel(Memory):
    """Memory from BASE on, with words to write."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    @property
    def size(self) -> int:
        return BASE + SIZE

    def readinto(self, address: int, buffer: memoryview) -> None:
        start = address - BASE
        if not 0 <= start <= SIZE - len(buffer):
            raise FaultError(address)
        buffer[:] = self.data[start : start + len(buffer)]

    def put(self, address: int, *words: int, width: int = 4) -> None:
        for place, word in enumerate(words):
            at = address - BASE + width * place
            self.data[at : at + width] = word.to_bytes(width, "little")

    def name(self, row: int, name: bytes) -> None:
        at = self.task(row) + COMM - BASE
        self.data[at : at + 16] = name.ljust(16, b"\0")

    def task(self, row: int) -> int:
        return BASE + 0x1000 + row * STRIDE


@pytest.fixture
def kernel() -> Kernel:
    """The idle task, init, kthreadd, 27 threads of the kernel, 10 processes."""
    made = Kernel()
    everything = (1 << 41) - 1
    made.put(BASE + CREDENTIALS, 4)
    made.put(BASE + CREDENTIALS + 40, 0, everything, everything, everything, 0, width=8)
    for row in range(TASKS):
        at, own = made.task(row), row > 29 or row == 1
        after, before = made.task((row + 1) % TASKS), made.task((row - 1) % TASKS)
        made.put(at + LINK, after + LINK, before + LINK)
        made.name(row, b"task%d" % row if row else b"swapper/0")
        made.put(at + PID, row, row)
        made.put(at + PARENT, *[made.task(0 if row < 3 else 1 if own else 2)] * 2)
        made.put(at + STATE, 0 if not row else 1 if own else 0x402)
        made.put(at + FLAGS, 0x400100 if own else PF_KTHREAD | 0x40)
        made.put(at + EXIT, 0, 0, 17 if row > 2 else 0)
        made.put(at + START, *[row * 10_000_000] * 2, width=8)
        made.put(at + CRED, BASE + CREDENTIALS, BASE + CREDENTIALS)
        made.put(at + MM, *[BASE + SPACES + 64 * row] * 2 if own else [0, 0])
        signal = BASE + SIGNALS + 64 * row
        made.put(at + SIGNAL, signal)
        made.put(at + NODE, signal + 16, signal + 16)
        made.put(signal, 1, 1, 1, 0, at + NODE, at + NODE)
    return made


def columns_of(kernel: Kernel, *, lenient: bool = False) -> TaskColumns:
    sample = Sample.read(kernel, [kernel.task(row) for row in range(TASKS)], 2048, BASE)
    columns = TaskColumns(sample.lenient() if lenient else sample)
    columns.take("tasks", LINK, list_head(4))
    find_pid(columns)
    return columns


def offsets(columns: TaskColumns) -> dict[str, int]:
    return {name: offset for name, (offset, _) in columns.members.items()}


# -- the ring ------------------------------------------------------------------------------------------


def test_the_ring_is_found_with_all_tasks_and_their_names(kernel: Kernel) -> None:
    ring = find_ring(kernel, kernel.task(0), BASE)
    assert ring is not None
    assert (ring.link, ring.comm, ring.closed) == (LINK, COMM, True)
    assert ring.tasks == [kernel.task(row) for row in range(TASKS)]


def test_names_may_be_what_a_program_made_of_them(kernel: Kernel) -> None:
    for row, name in ((33, b"\x01\xff\n" + b"\x80" * 12), (34, b"")):
        kernel.name(row, name)
    ring = find_ring(kernel, kernel.task(0), BASE)
    assert ring is not None
    assert len(ring.tasks) == TASKS


def test_a_ring_that_is_cut_gives_what_is_on_both_sides(kernel: Kernel) -> None:
    kernel.put(kernel.task(20) + LINK, 0, 0)
    ring = find_ring(kernel, kernel.task(0), BASE)
    assert ring is not None
    assert not ring.closed
    assert sorted(ring.tasks) == [kernel.task(row) for row in range(TASKS) if row != 20]


def test_a_ring_that_misses_its_head_ends(kernel: Kernel) -> None:
    kernel.put(kernel.task(30) + LINK, kernel.task(5) + LINK)
    ring = find_ring(kernel, kernel.task(0), BASE)
    assert ring is not None
    assert len(ring.tasks) <= TASKS


def test_a_list_of_others_is_no_ring_of_tasks(kernel: Kernel) -> None:
    for row in range(TASKS):
        if row % 2:
            kernel.name(row, b"\xee" * 16)
    assert find_ring(kernel, kernel.task(0), BASE) is None


@pytest.mark.parametrize("seed", range(20))
def test_noise_has_no_ring(seed: int) -> None:
    kernel, chance = Kernel(), random.Random(seed)
    kernel.data[:] = chance.randbytes(SIZE)
    for place in range(0, 0x8000, 4):  # many pointers, some in pairs
        if chance.random() < 0.5:
            kernel.put(BASE + place, BASE + chance.randrange(SIZE) & ~3)
    assert find_ring(kernel, BASE, BASE) is None
    assert find_ring(kernel, BASE + SIZE, BASE) is None


# -- columns -------------------------------------------------------------------------------------------


def test_every_member_is_found_where_it_stands(kernel: Kernel) -> None:
    columns = columns_of(kernel)
    find_parents(columns, kernel)
    columns.take("mm", MM, list_head(4).members().fields[0].type)
    for search in (find_flags, find_state, find_exit, find_start):
        search(columns)
    assert find_threads(columns, kernel)["signal_struct"]["thread_head"][0] == 16
    assert find_cred(columns, kernel)["cred"]["uid"][0] == 4
    found = offsets(columns)
    expected = {
        "pid": PID, "tgid": PID + 4, "real_parent": PARENT, "parent": PARENT + 4, "flags": FLAGS, "__state": STATE,
        "exit_state": EXIT, "exit_code": EXIT + 4, "exit_signal": EXIT + 8, "start_time": START,
        "start_boottime": START + 8, "thread_node": NODE, "signal": SIGNAL, "real_cred": CRED, "cred": CRED + 4,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert MM in mm_candidates(columns)


def test_two_columns_that_could_be_pids_prove_none(kernel: Kernel) -> None:
    for row in range(TASKS):
        kernel.put(kernel.task(row) + 1600, row, row)
    assert "pid" not in columns_of(kernel).members


def test_a_pid_that_two_tasks_have_proves_none(kernel: Kernel) -> None:
    kernel.put(kernel.task(7) + PID, 8, 8)
    assert "pid" not in columns_of(kernel).members


def test_one_torn_record_in_32_may_disagree_and_no_more(kernel: Kernel) -> None:
    kernel.put(kernel.task(7) + PID, 8, 9)
    assert "pid" not in columns_of(kernel).members
    assert offsets(columns_of(kernel, lenient=True))["pid"] == PID
    kernel.put(kernel.task(9) + PID, 11, 9)
    assert "pid" not in columns_of(kernel, lenient=True).members


def test_parents_in_a_circle_are_none(kernel: Kernel) -> None:
    kernel.put(kernel.task(1) + PARENT, kernel.task(31), kernel.task(31))
    columns = columns_of(kernel)
    find_parents(columns, kernel)
    assert "real_parent" not in columns.members


def test_parents_that_lead_nowhere_are_none(kernel: Kernel) -> None:
    kernel.put(kernel.task(31) + PARENT, BASE + SIZE + 64, BASE + SIZE + 64)
    columns = columns_of(kernel)
    find_parents(columns, kernel)
    assert "real_parent" not in columns.members


def test_a_pointer_whose_bits_agree_is_no_flags(kernel: Kernel) -> None:
    """As that to a shared record, which threads of the kernel have alike."""
    for row in range(TASKS):
        own = row > 29 or row == 1
        kernel.put(kernel.task(row) + 700, BASE + 0x40_0000 + 64 * row if own else BASE + 0x20_0000)
    columns = columns_of(kernel)
    find_parents(columns, kernel)
    columns.take("mm", MM, list_head(4).members().fields[0].type)
    find_flags(columns)
    assert offsets(columns)["flags"] == FLAGS


def test_a_column_that_has_everybody_end_is_no_flags(kernel: Kernel) -> None:
    for row in range(TASKS):
        kernel.put(kernel.task(row) + 24, 0x7FFF & ~PF_KTHREAD if row > 29 or row == 1 else 0xFFFF_FFFF)
    columns = columns_of(kernel)
    find_parents(columns, kernel)
    columns.take("mm", MM, list_head(4).members().fields[0].type)
    find_flags(columns)
    assert offsets(columns)["flags"] == FLAGS


def test_two_columns_that_could_be_flags_prove_none(kernel: Kernel) -> None:
    for row in range(TASKS):
        kernel.put(kernel.task(row) + 700, 0 if row > 29 or row == 1 else PF_KTHREAD)
    columns = columns_of(kernel)
    find_parents(columns, kernel)
    columns.take("mm", MM, list_head(4).members().fields[0].type)
    find_flags(columns)
    assert "flags" not in columns.members


def test_times_that_fall_back_are_no_start_times(kernel: Kernel) -> None:
    kernel.put(kernel.task(20) + START, 5, 5, width=8)
    columns = columns_of(kernel)
    find_start(columns)
    assert "start_time" not in columns.members


def test_numbers_that_all_have_alike_are_no_start_times(kernel: Kernel) -> None:
    for row in range(1, TASKS):
        kernel.put(kernel.task(row) + 1800, *[543] * 2, width=8)
    columns = columns_of(kernel)
    find_start(columns)
    assert offsets(columns)["start_time"] == START


@pytest.mark.parametrize(("place", "value"), [(48, 0), (56, 1), (72, 7), (4, 5), (0, 0)])
def test_credentials_that_contradict_themselves_are_none(kernel: Kernel, place: int, value: int) -> None:
    kernel.put(BASE + CREDENTIALS + place, value)
    columns = columns_of(kernel)
    assert find_cred(columns, kernel) == {}
    assert "real_cred" not in columns.members


def test_a_thread_list_that_does_not_lead_back_is_none(kernel: Kernel) -> None:
    kernel.put(BASE + SIGNALS + 64 * 12 + 16, kernel.task(3))
    columns = columns_of(kernel)
    assert find_threads(columns, kernel) == {}
    assert "signal" not in columns.members


def test_a_count_of_threads_that_is_wrong_is_not_taken(kernel: Kernel) -> None:
    kernel.put(BASE + SIGNALS + 64 * 12 + 8, 3)
    found = find_threads(columns_of(kernel), kernel)["signal_struct"]
    assert set(found) == {"thread_head"}


@pytest.mark.parametrize("seed", range(10))
def test_noise_proves_nothing(seed: int) -> None:
    chance = np.random.default_rng(seed)
    data = chance.integers(0, 256, (TASKS, 2048), np.uint8)
    pids = np.arange(TASKS, dtype="<u4")
    data[:, PID : PID + 4] = data[:, PID + 4 : PID + 8] = pids.view(np.uint8).reshape(TASKS, 4)
    columns = TaskColumns(Sample(np.arange(TASKS, dtype=np.uint64) * STRIDE + BASE, data, 4, BASE))
    columns.take("tasks", LINK, list_head(4))
    find_pid(columns)
    find_parents(columns, Kernel())
    columns.take("mm", MM, list_head(4).members().fields[0].type)
    for search in (find_flags, find_state, find_exit, find_start):
        search(columns)
    assert find_threads(columns, Kernel()) == find_cred(columns, Kernel()) == {}
    assert set(columns.members) == {"tasks", "pid", "tgid", "mm"}
