"""Shared by all tests: on CI a skipped test is a failed one, unless it needs a GPU."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

# Before torch is there, and for processes that tests start: several tests run at once, and a
# second thread of each would only wait for the first ones' cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Test machines are shared and noisy: a slow example says nothing about the code.
settings.register_profile("foreshock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("foreshock")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    forbidden = bool(os.environ.get("FORESHOCK_NO_SKIP")) and not hasattr(report, "wasxfail")
    if report.skipped and forbidden and item.get_closest_marker("gpu") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped on CI, where nothing may be missing: {report.longrepr}"
    return report
