"""The leases of several files as one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from outside_writers import MOMENT, outside
from support import require

from engine.leases import JointLease, Lease, take


def leased(path: Path) -> Lease:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = take(descriptor)
    finally:
        os.close(descriptor)
    require(isinstance(found, Lease), f"there are no leases here: {found}")
    assert isinstance(found, Lease)
    return found


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"part.{number:03}" for number in range(1, 4)]
    for path in paths:
        path.write_bytes(bytes(8192))
    return paths


@pytest.fixture
def joint(parts: list[Path]) -> JointLease:
    return JointLease([leased(path) for path in parts])


def await_(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_ends_with_the_first_of_them_before_the_writer_gets_in(joint: JointLease, parts: list[Path]) -> None:
    told: list[bytes] = []
    assert joint.held
    joint.on_break(lambda: told.append(parts[1].read_bytes()[:4]))
    assert outside(parts[1], "overwrites") < MOMENT
    assert told == [bytes(4)], "the file was as before when it was told"
    assert not joint.held


def test_it_tells_once_whoever_else_writes(joint: JointLease, parts: list[Path]) -> None:
    told: list[int] = []
    joint.on_break(lambda: told.append(1))
    for path in parts:
        assert outside(path, "overwrites") < MOMENT
    assert told == [1]


def test_a_writer_of_any_part_waits_for_readers(joint: JointLease, parts: list[Path]) -> None:
    assert joint.pin()
    told = threading.Event()
    joint.on_break(told.set)
    with subprocess.Popen(
        [sys.executable, "-c", "import os, sys; os.open(sys.argv[1], os.O_RDWR)", str(parts[2])]
    ) as writer:
        await_(lambda: not joint.held)
        assert not told.wait(0.05)
        assert writer.poll() is None
        assert not joint.pin()
        joint.unpin()
        assert told.wait(20)
        assert writer.wait(20) == 0


def test_nothing_is_called_where_one_part_has_a_writer_already(parts: list[Path]) -> None:
    leases = [leased(path) for path in parts]
    assert outside(parts[0], "overwrites") < MOMENT
    joint = JointLease(leases)
    assert not joint.held
    assert not joint.on_break(lambda: None)


def test_released_it_lets_writers_of_every_part_in(joint: JointLease, parts: list[Path]) -> None:
    told = threading.Event()
    joint.on_break(told.set)
    joint.release()
    assert not joint.held
    assert told.wait(20)
    for path in parts:
        assert outside(path, "overwrites") < MOMENT


def test_a_forked_child_has_none(parts: list[Path]) -> None:
    code = """
import os, sys
from engine.leases import JointLease, take
joint = JointLease([take(os.open(path, os.O_RDONLY)) for path in sys.argv[1:]])
child = os.fork()
if not child:
    os._exit(joint.held * 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), joint.held)
"""
    leased(parts[0]).release()  # skips where there are none
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *map(str, parts)], capture_output=True,
                          text=True, timeout=60, check=False)  # fmt: skip
    assert done.stdout == "0 True\n", done.stderr
