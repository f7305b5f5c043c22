"""A daemon tells whoever has started it how its start went."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

LIMIT = 30.0
HEAD = "import os, signal, sys, time\nfrom cloudfs.daemon import Outcome, begin\n"
MIDDLE = """
side = begin()
if isinstance(side, Outcome):
    print(side.said, side.code, flush=True)
    sys.exit(side.code)
"""


def start(code: str, **settings) -> subprocess.CompletedProcess[bytes]:
    """Run a program that becomes a daemon with `code` in the child."""
    program = [sys.executable, "-c", HEAD + MIDDLE + code]
    return subprocess.run(program, capture_output=True, timeout=LIMIT, check=False, **settings)


def gone(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.02)
    return False


def test_the_parent_returns_when_the_child_has_started_and_says_what_it_is_told():
    done = start("side.started('it is\\nup ' + str(os.getpid())); time.sleep(20)")
    text, pid, code = done.stdout.decode().rsplit(" ", 2)
    os.kill(int(pid), signal.SIGKILL)
    assert (done.returncode, text, code) == (0, "it is\nup", "0\n")


def test_what_a_child_says_before_it_has_started_is_seen_and_later_not():
    done = start("sys.stderr.write('early\\n'); side.started(); sys.stderr.write('late\\n')")
    assert done.stderr == b"early\n"


def test_the_parent_has_the_exit_code_of_a_child_that_does_not_start():
    done = start("sys.stderr.write('why\\n'); sys.exit(3)")
    assert (done.returncode, done.stderr) == (3, b"why\n")


def test_a_child_that_is_killed_before_it_has_started_is_an_error():
    done = start("os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == 1
    assert b"killed by SIGKILL before it had started" in done.stderr


def test_the_child_is_in_a_session_of_its_own_and_holds_nothing_of_the_parent():
    reading, writing = os.pipe()
    code = (
        "held = sorted(os.readlink(f'/proc/self/fd/{n}') for n in (0, 1, 2));"
        "side.started(f'{os.getsid(0) == os.getpid()} {held[:2]}'); time.sleep(20)"
    )
    # As a shell leaves a descriptor open: nobody may have to wait until the daemon ends.
    done = start(code, pass_fds=[writing])
    os.close(writing)
    assert b"True ['/dev/null', '/dev/null']" in done.stdout
    assert os.read(reading, 1) == b"", "all writing ends are closed"
    os.close(reading)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_when_the_parent_is_interrupted_the_child_ends(number, tmp_path):
    pid_file = tmp_path / "pid"
    code = f"open({str(pid_file)!r} + '.new', 'w').write(str(os.getpid()));" \
           f"os.rename({str(pid_file)!r} + '.new', {str(pid_file)!r}); time.sleep(1); side.started(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", HEAD + MIDDLE + code], stderr=subprocess.PIPE)
    try:
        until = time.monotonic() + LIMIT
        while not pid_file.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        process.send_signal(number)
        process.communicate(timeout=LIMIT)
        assert process.returncode != 0
        assert gone(int(pid_file.read_text()))
    finally:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)


FORK = """
fork = os.fork
def interrupted_fork():
    child = fork()
    if child:
        open({pid_file!r}, "w").write(str(child))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    return child
os.fork = interrupted_fork
"""


def test_an_interrupt_right_behind_the_fork_leaves_no_child(tmp_path):
    pid_file = str(tmp_path / "pid")
    program = HEAD + FORK.format(pid_file=pid_file) + MIDDLE + "side.started(); time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=LIMIT, check=False)
    assert done.returncode != 0
    with open(pid_file) as file:
        assert gone(int(file.read()))


def test_an_interrupt_after_the_child_has_started_changes_nothing():
    program = HEAD + MIDDLE.replace("print", "os.kill(os.getpid(), signal.SIGINT); print") + "side.started()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b" 0\n", b"")
