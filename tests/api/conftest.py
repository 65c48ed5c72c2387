"""One real service for the tests of routes; each test uses runs of its own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.api.service import Service
from tests.browser import Browser, open_browser


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("served"))
    made.start()
    yield made
    assert made.stop() == 0, made.log


@pytest.fixture
def client(served: Service) -> Iterator[httpx.Client]:
    with served.client() as made:
        yield made


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of the page; they leave its size and preferences as they were."""
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.resize(1280, 1600)
        yield browser
