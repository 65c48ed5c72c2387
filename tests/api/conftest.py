"""One real service for the tests of routes; each test uses runs of its own."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.api.service import Service


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
