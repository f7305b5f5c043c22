"""What is advised where this host does not let one look: nobody who is root already is told to become root."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support import as_nobody, require

from engine.oslayers.native import procfs

CAP_SYS_PTRACE = 19
PR_CAPBSET_DROP = 24


def without_the_capability(code: str, *arguments: object) -> str:
    """What a program prints that runs as root without CAP_SYS_PTRACE, as in most containers."""
    drop = (
        "import ctypes, os, sys\n"
        f"assert ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_SYS_PTRACE}, 0, 0, 0) == 0\n"
        "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", drop, textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


ASK = """
import sys
from engine import Machine
from engine.errors import AccessDeniedError
with Machine() as machine:
    process = machine.open("oslayer", "native").process(int(sys.argv[1]))
    for act in (lambda: process.memory.read(0x10000, 1), lambda: list(process.regions())):
        try:
            act()
        except AccessDeniedError as error:
            print(error)
"""


def test_root_without_the_capability_is_told_that_it_lacks_it():
    require(os.geteuid() == 0, "only root has capabilities to lose")
    said = without_the_capability(ASK, os.getpid()).splitlines()
    assert said, "a process with more capabilities than one's own cannot be looked into"
    for sentence in said:
        assert "root lacks CAP_SYS_PTRACE here" in sentence
        assert "run as root" not in sentence


def test_a_user_is_told_who_may():
    pid = os.getpid() if os.geteuid() == 0 else 1
    said = as_nobody(ASK, str(pid)).splitlines()
    assert said
    for sentence in said:
        assert "run as root, or as" in sentence


@pytest.mark.parametrize(
    ("scope", "status", "words"),
    [
        (b"3\n", b"CapEff:\t000001ffffffffff\n", "nobody may look into processes"),
        (b"1\n", b"CapEff:\t00000000a80425fb\n", "lacks CAP_SYS_PTRACE"),
        (b"1\n", b"CapEff:\t000001ffffffffff\n", "protected from root too"),
        (None, b"", "protected from root too"),
    ],
)
def test_root_is_told_what_refuses(monkeypatch, scope, status, words):
    def read_start(path):
        if path == procfs.YAMA and scope is None:
            raise FileNotFoundError
        return {procfs.YAMA: scope, "/proc/self/status": status}[path]

    monkeypatch.setattr(procfs, "read_start", read_start)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert words in procfs.advice()


def test_a_kernel_thread_is_said_to_be_one():
    name = Path("/proc/2/comm")
    require(name.exists() and name.read_text() == "kthreadd\n", "no kernel thread is seen here")
    done = subprocess.run(
        [sys.executable, "-m", "cloudfs", "read", "2", "0x10000", "16"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert "is a kernel thread" in done.stderr
