"""A watch that keeps its records in the test, as in the monitor's own tests."""

from __future__ import annotations

from tests.monitor.conftest import recorder, start

__all__ = ["recorder", "start"]
