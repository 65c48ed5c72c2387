"""A real headless Chromium for the tests, the page benchmark and the screenshot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

__all__ = ["Browser", "installed", "open_browser"]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


def installed() -> bool:
    """Whether Debian's Chromium and its driver are here."""
    return shutil.which("chromium") is not None and shutil.which("chromedriver") is not None


class Browser:
    """A page in Chromium, with what it logged and asked for."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self._requests: list[str] = []

    def resize(self, width: int, height: int) -> None:
        self._command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, scheme: str, *, media: str = "") -> None:
        """Prefer a light or dark scheme; `media` print shows the page as on paper."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._command("Emulation.setEmulatedMedia", media=media, features=[feature])

    def press(self, *keys: str) -> None:
        """Press keys wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def accessibility(self) -> list[dict[str, Any]]:
        """The nodes of the browser's accessibility tree that are not ignored."""
        self.driver.execute_cdp_cmd("Accessibility.enable", {})
        tree = self.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
        self.driver.execute_cdp_cmd("Accessibility.disable", {})
        return [node for node in tree["nodes"] if not node["ignored"]]

    def offline(self, yes: bool) -> None:
        self._command(
            "Network.emulateNetworkConditions",
            offline=yes,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )

    def _command(self, name: str, **parameters: Any) -> None:
        self.driver.execute_cdp_cmd(name, parameters)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What a person sees there; nothing of what is hidden."""
        # One round trip, so that an element that is being replaced cannot go stale in between.
        script = (
            "return [...document.querySelectorAll(arguments[0])]"
            ".map(e => e.getClientRects().length ? e.innerText : '').join(' ')"
        )
        return str(self.driver.execute_script(script, selector))

    def visible(self, selector: str) -> bool:
        """Whether something there takes up room on the page."""
        script = (
            "return [...document.querySelectorAll(arguments[0])]"
            ".some(e => e.getClientRects().length > 0)"
        )
        return bool(self.driver.execute_script(script, selector))

    def evaluate(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, what: str, condition: Callable[[], object], seconds: float = 45) -> Any:
        """Wait until a condition holds.

        Raises:
            TimeoutException: It did not; the message says what was waited for.
        """
        wait = WebDriverWait(self.driver, seconds, poll_frequency=0.1)
        return wait.until(lambda _: condition(), f"waited {seconds} s for {what}")

    def requests(self) -> list[str]:
        """Every address the page has asked for so far."""
        for entry in self._log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self._requests.append(message["params"]["request"]["url"])
        return self._requests

    def origins(self, since: int = 0) -> set[str]:
        """Scheme and host of every request over a network, from the given number on."""
        parts = [urlsplit(url) for url in self.requests()[since:]]
        local = {"data", "blob", "about", "chrome"}
        return {f"{part.scheme}://{part.netloc}" for part in parts if part.scheme not in local}

    def errors(self) -> list[str]:
        """What the console has logged as an error since the last call."""
        return [e["message"] for e in self._log("browser") if e["level"] == "SEVERE"]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.driver.get_log(kind)  # type: ignore[no-untyped-call]
        return entries


@contextmanager
def open_browser(profile: Path) -> Generator[Browser]:
    """Start Chromium with a fresh profile, and end it."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(str(shutil.which("chromedriver")))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(30)
        yield Browser(driver)
    finally:
        driver.quit()
