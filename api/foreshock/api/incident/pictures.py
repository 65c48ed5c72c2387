"""Pictures without scripts: lines as SVG, grids as PNG. Knows numbers, no run."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from foreshock.api.incident.facts import FloatArray

__all__ = ["COLOURS", "heat_image", "line_chart"]

COLOURS: Final = ("#1f5fbf", "#c2410c", "#15803d")

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 880, 190, 80, 26, 22
_POINTS: Final = 430
_TALL: Final = 3000
# Dark blue over teal to yellow: light is large; readable in grey and for the colour-blind.
_ANCHORS: Final = ((24, 28, 80), (38, 84, 140), (33, 144, 141), (122, 200, 90), (250, 230, 40))
_NOTHING: Final = (225, 225, 225)


def line_chart(
    steps: FloatArray,
    lines: Mapping[str, FloatArray],
    *,
    span: tuple[int, int],
    marks: Sequence[tuple[int, str]] = (),
    lost: Sequence[int] = (),
    unit: bool = False,
) -> str:
    """Lines over steps as SVG; each bucket a band from its smallest to its largest value.

    Args:
        steps: (T,).
        lines: Name to (T,), NaN for gaps; the order gives `COLOURS`.
        span: First and last step of the axis.
        marks: Steps with a vertical line, and its CSS class.
        lost: Steps with a tick on top: a value there was not finite.
        unit: Whether the axis goes from 0 to 1.
    """
    finite = [values[np.isfinite(values)] for values in lines.values()]
    known = np.concatenate(finite) if finite else np.array([])
    log = bool(len(known) and not unit and known.min() > 0 and known.max() / known.min() > 1000)
    low, high = (0.0, 1.0) if unit else _range(np.log10(known) if log else known)
    x = _scale(span[0], max(span[1], span[0] + 1), _LEFT, _WIDTH - _RIGHT)
    y = _scale(low, high, _HEIGHT - _BOTTOM, 8)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for value in np.linspace(low, high, 4):
        shown = f"{10**value if log else value:.4g}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {_level(y(value))}/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" class="end">{shown}</text>')
    for value in np.linspace(*span, 6):
        parts.append(f'<text x="{x(value):.1f}" y="{_HEIGHT - 5}" class="mid">{value:.0f}</text>')
    for step, kind in marks:
        at = f"{x(step):.1f}"
        parts.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="8" y2="{_HEIGHT - _BOTTOM}"/>')
    for step in list(lost)[:_POINTS]:
        parts.append(f'<path class="lost" d="M{x(step):.1f} 2v9"/>')
    for colour, values in zip(COLOURS, lines.values(), strict=False):
        drawn = np.log10(values) if log else values
        parts.append(_line(x(steps), y(drawn), colour))
    return "".join([*parts, "</svg>"])


class _scale:
    """From numbers to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self._low, self._start = low, start
        self._factor = (end - start) / ((high - low) or 1.0)

    def __call__(self, value: FloatArray | float) -> FloatArray:
        return np.asarray(self._start + (np.asarray(value, float) - self._low) * self._factor)


def _level(y: FloatArray) -> str:
    return f'y1="{y:.1f}" y2="{y:.1f}"'


def _range(known: FloatArray) -> tuple[float, float]:
    if not len(known):
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _line(x: FloatArray, y: FloatArray, colour: str) -> str:
    good = np.isfinite(y)
    x, y = x[good], y[good]
    if not len(x):
        return ""
    groups = np.array_split(np.arange(len(x)), min(len(x), _POINTS))
    middle = " ".join(f"{x[g].mean():.1f},{y[g].mean():.1f}" for g in groups)
    line = f'<polyline points="{middle}" fill="none" stroke="{colour}" stroke-width="1.4"/>'
    if len(groups) == len(x):
        dots = len(x) == 1
        return f'<circle cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="3" fill="{colour}"/>' if dots else line
    upper = [f"{x[g].mean():.1f},{y[g].min():.1f}" for g in groups]
    lower = [f"{x[g].mean():.1f},{y[g].max():.1f}" for g in reversed(groups)]
    band = f'<polygon points="{" ".join(upper + lower)}" fill="{colour}" opacity="0.25"/>'
    return band + line


def heat_image(values: FloatArray) -> tuple[str, float, float, bool]:
    """A grid as the address of a PNG in itself: rows are layers, columns buckets.

    Returns:
        The data: address; the values of the darkest and the lightest colour; whether the colours
        are logarithmic.
    """
    known = values[np.isfinite(values)]
    positive = bool(len(known) and known.min() > 0 and known.max() / known.min() > 100)
    scaled = np.log10(values) if positive else values
    inner = np.log10(known) if positive else known
    low, high = (float(q) for q in np.percentile(inner, (1, 99))) if len(inner) else (0.0, 1.0)
    share = np.clip((scaled - low) / ((high - low) or 1.0), 0, 1)
    index = np.where(np.isfinite(share), 1 + np.nan_to_num(share) * 254, 0).astype(np.uint8)
    tall = max(1, min(12, _TALL // max(1, len(index))))
    pixels = np.repeat(np.repeat(index, tall, axis=0), 4, axis=1)
    ends = (10**low, 10**high) if positive else (low, high)
    return f"data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}", *ends, positive


def _palette() -> bytes:
    place = np.linspace(0, len(_ANCHORS) - 1, 255)
    parts = [np.interp(place, range(len(_ANCHORS)), [a[c] for a in _ANCHORS]) for c in range(3)]
    colours = np.stack(parts, axis=1).round().astype(np.uint8)
    return bytes(_NOTHING) + colours.tobytes()


def _png(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    height, width = pixels.shape
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"PLTE", _palette()), (b"IDAT", zlib.compress(lines, 9))]
    body = b"".join(_chunk(kind, data) for kind, data in [*chunks, (b"IEND", b"")])
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
