"""The API reference in a real browser: laid out, and asking nobody but this service."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.api.service import Service
from tests.browser import installed, open_browser

pytestmark = [
    pytest.mark.debian,
    pytest.mark.skipif(not installed(), reason="needs Debian's chromium and chromium-driver"),
]


def test_the_reference_needs_nobody_else(served: Service, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as browser:
        browser.resize(1200, 1000)
        browser.driver.get(f"{served.url}/docs")
        browser.wait("the operations", lambda: len(browser.all(".opblock")) >= 18, 30)
        for words in ("/api/v1/runs/{run}/series", "/api/v1/runs/{run}/incident", "/healthz"):
            assert words in browser.text(".opblock-summary-path").replace("\u200b", "")
        browser.one(".opblock-summary-control").click()
        browser.wait("an operation", lambda: browser.visible(".opblock.is-open .responses-wrapper"))
        assert browser.origins() == {served.url}
        assert browser.errors() == []
        browser.driver.save_screenshot(str(tmp_path / "docs.png"))


def test_without_a_token_it_says_where_to_sign_in(tmp_path: Path) -> None:
    service = Service(tmp_path, environment={"FORESHOCK_TOKEN": "a-token-of-some-length"})
    service.start()
    try:
        with open_browser(tmp_path / "profile") as browser:
            browser.driver.get(f"{service.url}/docs")
            browser.wait("the hint", lambda: "sign in" in browser.text("#docs-message"))
            assert browser.origins() == {service.url}
    finally:
        assert service.stop() == 0, service.log
