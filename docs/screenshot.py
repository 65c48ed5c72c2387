"""Take the picture of the page that opens the README, from a running service.

    python -m docs.screenshot http://127.0.0.1:8420 --run demo-failing

Shows what the service has; makes up nothing. Needs Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from tests.browser import open_browser

_DRAWN = (
    "return ['loss', 'risk', 'heat'].every(id => document.querySelector(`#${id} .main-svg`))"
    " && document.getElementById('causes').children.length > 0"
)


def take(address: str, out: Path, *, run: str | None, width: int, scheme: str) -> None:
    """Write the page of a run as PNG, as high as the page is.

    Raises:
        TimeoutException: The page did not draw its charts and a diagnosis within 30 s.
    """
    tail = f"?{urlencode({'run': run})}" if run else ""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        open_browser(Path(profile)) as browser,
    ):
        browser.prefer(scheme)
        browser.resize(width, 1000)
        browser.driver.get(f"{address.rstrip('/')}/{tail}")
        browser.wait("the charts and the diagnosis", lambda: browser.evaluate(_DRAWN), 30)
        # The layout settles in two steps: the heatmap's height follows its rows.
        for _ in range(2):
            height = browser.evaluate("return document.documentElement.scrollHeight")
            browser.resize(width, height)
            browser.wait("layout", lambda: browser.evaluate("return document.readyState"))
        browser.evaluate("return new Promise(done => setTimeout(done, 1500))")
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(browser.driver.get_screenshot_as_png())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of the service, e.g. http://127.0.0.1:8420")
    parser.add_argument("--run", help="name of the run; default: the first in the list")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "page.png")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    given = parser.parse_args()
    take(given.address, given.out, run=given.run, width=given.width, scheme=given.scheme)


if __name__ == "__main__":
    main()
