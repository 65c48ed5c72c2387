"""Take the pictures of the page in `docs/images`, from a running service.

    foreshock demo --keep                                # prints the address
    python -m docs.screenshot http://127.0.0.1:8420 --run demo-7 --other demo-7-twin

Shows what the service has; makes up nothing. Needs Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

from PIL import Image
from tests.browser import Browser, open_browser

__all__ = ["Picture", "pictures", "take"]

_SECONDS: Final = 60
_COLOURS: Final = 256
"""Of the palette: half of the bytes."""
_HIGHEST: Final = 2600
_HEIGHT: Final = (
    "return 20 + scrollY + document.querySelector('main').getBoundingClientRect().bottom"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture.

    Attributes:
        route: What follows the address of the service.
        drawn: Elements that are there once the view is complete.
        scheme: Light or dark.
        width: Of the window, in pixels.
        settled: Elements that are there once all of the view has been in sight.
        before: JavaScript that is run before the picture is taken.
    """

    route: str
    drawn: tuple[str, ...]
    scheme: str = "light"
    width: int = 1280
    settled: tuple[str, ...] = ()
    before: str = ""


def pictures(run: str, other: str, layer: str, step: int) -> Mapping[str, Picture]:
    """By name of the file.

    Args:
        run: A run with an alarm.
        other: A run to compare it with.
        layer: One of its layers.
        step: One of its steps.
    """
    of_run = f"#/run/default/{quote(run)}"
    whole_run = (
        "#loss .main-svg",
        "#risk .main-svg",
        "#heat .main-svg",
        "#causes li",
        "#whatif tr",
    )
    opened = "document.querySelectorAll('.alarm details')[0].open = true"
    compare = f"#/compare?a=default/{quote(other)}&b=default/{quote(run)}"
    return {
        "page": Picture(route=of_run, drawn=whole_run),
        "page-dark": Picture(route=f"{of_run}?step={step}", drawn=whole_run, scheme="dark"),
        "page-fleet": Picture(route="#/", drawn=("#runs .spark.risk path",)),
        "page-layer": Picture(
            route=f"{of_run}/layer/{quote(layer, safe='')}?step={step}",
            drawn=("#of-kurtosis .main-svg", "#formats tbody tr"),
            settled=("#of-rms .main-svg", "#not-recorded:not(:empty)"),
        ),
        "page-compare": Picture(
            route=compare, drawn=("#compare-loss .main-svg", "#compare-map .main-svg")
        ),
        "page-compare-dark": Picture(
            route=compare,
            drawn=("#compare-loss .main-svg", "#compare-map .main-svg"),
            scheme="dark",
        ),
        "page-alarms": Picture(route="#/alarms", drawn=("#alarms li",), before=opened),
        "page-forecaster": Picture(
            route="#/forecaster", drawn=("#calibration .main-svg",), scheme="dark"
        ),
    }


def take(browser: Browser, address: str, picture: Picture, out: Path) -> None:
    """Write a picture as PNG, as high as the view is.

    Raises:
        TimeoutException: The view was not complete within a minute.
    """
    browser.prefer(picture.scheme)
    browser.resize(picture.width, 1000)
    # Behind the # alone nothing would be loaded anew.
    browser.driver.get("about:blank")
    browser.driver.get(f"{address.rstrip('/')}/{picture.route}")
    _wait(browser, picture.drawn)
    if picture.before:
        browser.evaluate(picture.before)
    # The layout settles in two steps: what comes into view is drawn then.
    for _ in range(2):
        height = browser.evaluate(
            "return document.getElementById('main').getBoundingClientRect().bottom + scrollY + 20"
        )
        browser.resize(picture.width, min(_HIGHEST, int(height)))
        browser.evaluate("return new Promise(done => setTimeout(done, 2500))")
        _wait(browser, picture.settled)
    image = Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB")
    out.parent.mkdir(parents=True, exist_ok=True)
    # The method that keeps rare colours: a state's sign is small.
    small = image.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    small.save(out, optimize=True)


def _wait(browser: Browser, selectors: tuple[str, ...]) -> None:
    for selector in selectors:
        browser.wait(selector, lambda selector=selector: browser.all(selector), _SECONDS)  # type: ignore[misc]


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of the service, e.g. http://127.0.0.1:8420")
    parser.add_argument("--run", default="demo-7", help="a run with an alarm")
    parser.add_argument("--other", default="demo-7-twin", help="a run to compare it with")
    parser.add_argument("--layer", default="blocks.1.mlp.down", help="a layer of them")
    parser.add_argument("--step", type=int, default=340, help="a step to look at")
    parser.add_argument("--only", help="only the picture of this name")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    given = parser.parse_args()
    wanted = pictures(given.run, given.other, given.layer, given.step)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        open_browser(Path(profile)) as browser,
    ):
        for name, picture in wanted.items():
            if given.only in (None, name):
                take(browser, given.address, picture, given.out / f"{name}.png")


if __name__ == "__main__":
    main()
