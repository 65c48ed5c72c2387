"""The page's colours in both themes: contrasts of WCAG 2.1 AA, and eyes without a kind of cone."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from plotly.colors import sequential

STATIC = files("foreshock.api.page") / "static"
SHEET = (STATIC / "colours.css").read_text(encoding="utf-8")
SCALES = (STATIC / "scales.js").read_text(encoding="utf-8")
PAIR = re.compile(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);")
THEMES = {
    theme: {found[1]: found[at] for found in PAIR.finditer(SHEET)}
    for theme, at in (("light", 2), ("dark", 3))
}
STATES = ("ok", "pending", "firing", "resolved")
LINES = ("near", "middle", "far", "fourth", "fifth")

# Words on their ground, 4.5 : 1.
WORDS = (
    *((word, ground) for word in ("text", "muted", "accent") for ground in ("ground", "surface")),
    *((word, "sunk") for word in ("text", "muted", "accent")),
    *((state, f"{state}-soft") for state in STATES),
    ("firing", "surface"),
    ("pending", "surface"),
    ("pending", "sunk"),
    ("surface", "text"),
    ("surface", "near"),
    ("surface", "middle"),
)
# Lines, bars and edges of controls on theirs, 3 : 1.
SIGNS = (
    *((line, "surface") for line in (*LINES, "loss")),
    *((state, "sunk") for state in STATES),
    *((bar, "sunk") for bar in ("near", "middle")),
    ("edge", "surface"),
    ("edge", "ground"),
    ("accent", "surface"),
)

Floats = npt.NDArray[np.float64]

# Machado, Oliveira, Fernandes 2009 (doi:10.1109/TVCG.2009.113), severity 1, on linear RGB.
BLIND = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(colour: str) -> Floats:
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def luminance(rgb: Floats) -> float:
    """Relative luminance of linear RGB (WCAG 2.1)."""
    return float(rgb @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    """From 1 to 21 (WCAG 2.1)."""
    low, high = sorted((luminance(linear(one)), luminance(linear(other))))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: Floats) -> Floats:
    """CIE L*a*b* (D65) of linear RGB; distances of 2.3 are just noticed."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = np.cbrt(np.maximum(to_xyz @ rgb / np.array([0.9505, 1.0, 1.089]), 0.0089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def seen(colour: str, eyes: str) -> Floats:
    """Linear RGB as such eyes see it."""
    rgb = linear(colour)
    return rgb if eyes == "all cones" else np.clip(np.array(BLIND[eyes]) @ rgb, 0, 1)


def scale(name: str) -> list[str]:
    found = re.search(rf"{name} = \[(.*?)\]", SCALES, re.DOTALL)
    assert found
    return re.findall(r"#[0-9a-f]{6}", found[1])


def test_every_colour_has_both_themes() -> None:
    declared = set(re.findall(r"--([\w-]+):", SHEET))
    assert declared == set(THEMES["light"]) == set(THEMES["dark"])
    for name in ("page.css", "views.css"):
        text = (STATIC / name).read_text(encoding="utf-8")
        screen = text[: text.find("@media print")] if "@media print" in text else text
        assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= declared | {"round"}
        assert not re.findall(r"#[0-9a-f]{3,6}\b", re.sub(r"#[\w-]+(?=[\s.,{:\[>])", "", screen))


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(("word", "ground"), WORDS)
def test_words_can_be_read(theme: str, word: str, ground: str) -> None:
    assert contrast(THEMES[theme][word], THEMES[theme][ground]) >= 4.5


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize(("sign", "ground"), SIGNS)
def test_lines_and_edges_can_be_seen(theme: str, sign: str, ground: str) -> None:
    assert contrast(THEMES[theme][sign], THEMES[theme][ground]) >= 3


@pytest.mark.parametrize("eyes", ["all cones", *BLIND])
@pytest.mark.parametrize("theme", THEMES)
def test_lines_differ_for_all_eyes(theme: str, eyes: str) -> None:
    """Each has a dash of its own too; the first three are those that stand beside each other."""
    shown = {name: lab(seen(THEMES[theme][name], eyes)) for name in LINES}
    apart = {
        pair: float(np.linalg.norm(shown[pair[0]] - shown[pair[1]]))
        for pair in combinations(LINES, 2)
    }
    assert min(apart.values()) >= 15, apart
    assert min(apart[pair] for pair in combinations(LINES[:3], 2)) >= 20, apart


@pytest.mark.parametrize("eyes", ["all cones", *BLIND])
def test_the_scale_of_maps_grows_lighter_all_along(eyes: str) -> None:
    steps = np.diff([lab(seen(colour, eyes))[0] for colour in scale("SEQUENTIAL")])
    assert len(steps) == 16
    assert steps.min() > 1.5, "every sixteenth of the scale is a visible step"


def test_the_scale_of_maps_is_the_published_one() -> None:
    published = np.array([lab(linear(colour)) for colour in sequential.Cividis])
    ours = np.array([lab(linear(colour)) for colour in scale("SEQUENTIAL")])
    at = np.minimum(16 * np.arange(len(ours)), 255) / 255
    for part in range(3):
        shown = np.interp(np.linspace(0, 1, len(published)), at, ours[:, part])
        assert np.abs(shown - published[:, part]).max() < 2.3, "no difference that is noticed"


@pytest.mark.parametrize("eyes", ["all cones", *BLIND])
@pytest.mark.parametrize(
    ("name", "theme", "sign"),
    [("DIVERGING_ON_LIGHT", "light", -1), ("DIVERGING_ON_DARK", "dark", 1)],
)
def test_differences_stand_out_to_both_sides(name: str, theme: str, sign: int, eyes: str) -> None:
    colours = scale(name)
    lightness = np.array([lab(seen(colour, eyes))[0] for colour in colours])
    middle = len(colours) // 2
    assert (sign * np.diff(lightness[middle:]) > 3).all()
    assert (sign * np.diff(lightness[: middle + 1]) < -3).all()
    assert contrast(colours[middle], THEMES[theme]["surface"]) < 1.2, "alike recedes into the page"
    for end in (colours[0], colours[-1]):
        assert contrast(end, THEMES[theme]["surface"]) >= 4.5
    ends = [lab(seen(colour, eyes)) for colour in (colours[1], colours[-2])]
    assert np.linalg.norm(ends[0] - ends[1]) >= 20, "the two sides are told apart"
