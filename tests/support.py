"""What tests share. Import it with `from support import require` (tests/ is on the path, see pyproject)."""

from __future__ import annotations

import os

import pytest


def require(condition: object, reason: str) -> None:
    """Skip the test where this machine lacks something; fail instead under CLOUDFS_TEST_REQUIRE=all."""
    if condition:
        return
    if os.environ.get("CLOUDFS_TEST_REQUIRE") == "all":
        pytest.fail(f"CLOUDFS_TEST_REQUIRE=all, but {reason}")
    pytest.skip(reason)
