"""What holds for all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No test has a time in it. The first text that Hypothesis makes in a fresh clone takes seconds: it writes tables of
# Unicode then, which its health check takes for a slow strategy.
settings.register_profile("cloudfs", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cloudfs")
