"""The program that these tests look into, and the layer."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

import pytest
from native_program import KERNELS, SOURCE, Target, without
from support import require

from engine.oslayer import Base
from engine.oslayers.native import NativeLayer


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """The program, compiled."""
    require(shutil.which("gcc"), "there is no gcc")
    binary = tmp_path_factory.mktemp("target") / "target"
    subprocess.run(["gcc", "-O1", "-pthread", "-o", binary, SOURCE], check=True, timeout=60)
    return binary


@pytest.fixture
def start(program):
    """Starts the program as often as it is called; all end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(*arguments: str) -> Target:
            target = Target(program, *arguments)
            stack.callback(target.end)
            return target

        yield begin


@pytest.fixture(scope="module")
def target(program):
    """The program, for tests that only read."""
    running = Target(program)
    yield running
    running.end()


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """This kernel, and poorer ones."""
    without(monkeypatch, request.param)
    return request.param


@pytest.fixture
def layer():
    """The layer, read-only."""
    return NativeLayer.open(Base(live=True), {})


@pytest.fixture
def writable_layer():
    """The layer, for writing."""
    return NativeLayer.open(Base(live=True, writable=True), {})
