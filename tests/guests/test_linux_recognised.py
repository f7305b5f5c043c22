"""Kernels of architectures whose page tables are not walked, booted to their panic: named, and refused."""

from __future__ import annotations

import json

import pytest
from commandline import cloudfs
from guests.kernels import MissingError
from guests.panics import PANICS, Panicked, panicked
from support import require


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "unread" in metafunc.fixturenames:
        names = list(PANICS) if metafunc.config.getoption("--all-guests") else []
        metafunc.parametrize("unread", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def unread(request) -> Panicked:
    try:
        return panicked(request.param)
    except MissingError as error:
        require(False, str(error))
        raise


def test_info_names_kernel_release_and_architecture(unread):
    done = cloudfs("info", "--json", str(unread.image))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["os"]
    assert (told["kind"], told["version"], told["architecture"]) == (
        "linux", unread.release, unread.panic.architecture
    )  # fmt: skip


@pytest.mark.parametrize("command", ["ps", "lsmod", "dmesg"])
def test_a_command_that_needs_more_ends_with_exit_code_1_and_one_sentence(unread, command):
    done = cloudfs(command, str(unread.image))
    assert (done.returncode, done.stdout) == (1, b"")
    assert len(done.stderr.decode().splitlines()) == 1


def test_ps_says_which_kernel_it_is(unread):
    said = cloudfs("ps", str(unread.image)).stderr.decode()
    assert f"Linux {unread.release} for {unread.panic.architecture} is recognised" in said
