"""What holds for all tests."""

from __future__ import annotations

import os
import signal
from types import FrameType

import pytest
from hypothesis import HealthCheck, settings

# No test has a time in it. The first text that Hypothesis makes in a fresh clone takes seconds: it writes tables of
# Unicode then, which its health check takes for a slow strategy.
settings.register_profile("cloudfs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cloudfs")

# What a test reads it reads anew, and it leaves nothing in the user's cache; tests of the cache turn it on.
os.environ["CLOUDFS_NO_CACHE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the test command; they must stand here to be known whatever is run."""
    parser.addoption("--all-guests", action="store_true", help="boot every guest of tests/guests, not only those of CI")


def pytest_configure() -> None:
    """SIGTERM ends the tests as Ctrl-C does: what they have mounted or started is taken away.

    A shell has its background jobs ignore Ctrl-C, which all that they start inherits; commands under test must not.
    """
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
