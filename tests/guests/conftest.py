"""Recorded guests as fixtures: `guest(name)` gives one, `recording` goes through all of this run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guests import recorder
from guests.catalogue import BTF, GUESTS, selected
from guests.kernels import GuestError, MissingError, provide
from guests.living import Living, qemu
from guests.recording import Recording
from support import require

from engine.connectors.qemu import QemuConnector
from engine.oslayer import Base
from engine.oslayers.native import NativeLayer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "recording" in metafunc.fixturenames:
        names = selected(metafunc.config.getoption("--all-guests"))
        metafunc.parametrize("recording", names, indirect=True, scope="session")
    if "typed" in metafunc.fixturenames:
        names = [name for name in selected(metafunc.config.getoption("--all-guests"))
                 if GUESTS[name].architecture in BTF]  # fmt: skip
        metafunc.parametrize("typed", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def guest(request: pytest.FixtureRequest) -> Callable[[str], Recording]:
    """The recording of a guest by its name in the catalogue: `guest("amd64-6.1-4level")`.

    It is made on first use, which takes some ten seconds, and kept outside of the repository.
    """
    with contextlib.suppress(GuestError):  # all kernels in one call of apt-get; what fails is told per guest below
        provide(GUESTS[name].kernel for name in selected(request.config.getoption("--all-guests")))
    known: dict[str, Recording | str] = {}

    def get(name: str) -> Recording:
        if name not in known:
            try:
                known[name] = recorder.recorded(name)
            except MissingError as error:
                known[name] = str(error)
        found = known[name]
        require(isinstance(found, Recording), str(found))
        assert isinstance(found, Recording)
        return found

    return get


@pytest.fixture(scope="session")
def recording(request: pytest.FixtureRequest, guest: Callable[[str], Recording]) -> Recording:
    """Each guest of this run in turn."""
    return guest(request.param)


@pytest.fixture(scope="session")
def typed(request: pytest.FixtureRequest, guest: Callable[[str], Recording]) -> Recording:
    """Each guest of this run whose kernel carries its types, in turn."""
    return guest(request.param)


@pytest.fixture
def start() -> Iterator[Callable[..., Living]]:
    """Starts QEMUs as `guests.living.qemu` does; they end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(*words: str, **more: Any) -> Living:
            try:
                return stack.enter_context(qemu(*words, **more))
            except MissingError as error:
                require(False, str(error))
                raise

        yield begin


@pytest.fixture
def opened() -> Iterator[Callable[..., QemuConnector]]:
    """Opens guests of this host: `opened(living, qmp="no", writable=True)`."""
    with contextlib.ExitStack() as stack:

        def open_one(target: Living | str, *, writable: bool = False, **options: str) -> QemuConnector:
            host = NativeLayer.open(Base(live=True, writable=writable), {})
            name = target.name if isinstance(target, Living) else target
            found = QemuConnector.open(name, options, parent=host, writable=writable)
            stack.callback(found.close)
            return found

        yield open_one
