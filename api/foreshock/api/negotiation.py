"""Which media type an answer has: what `as=` names, else what Accept likes best of what there is.

Pure; knows no route.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from fastapi import Header, Query

from foreshock.api.bodies import CSV, PARQUET
from foreshock.api.problems import Problem
from foreshock.api.wire import ARROW, JSON

__all__ = ["TABULAR", "Accept", "As", "choose"]

TABULAR: Final = (JSON, CSV, ARROW, PARQUET)
"""What tables come as; the first where nothing is asked for."""

_SHORT: Final[Mapping[str, str]] = {"json": JSON, "csv": CSV, "arrow": ARROW, "parquet": PARQUET}

As = Annotated[
    Literal["json", "csv", "arrow", "parquet"] | None,
    Query(alias="as", description="What to answer with; goes before Accept."),
]
# OpenAPI has its own place for Accept and ignores it among the parameters.
Accept = Annotated[str, Header(include_in_schema=False)]


def choose(accept: str, wanted: str | None = None, offered: Sequence[str] = TABULAR) -> str:
    """The media type to answer with.

    Args:
        accept: The Accept header; empty accepts everything.
        wanted: A short name that goes before it: json, csv, arrow or parquet.
        offered: Media types that there are, the default first.

    Returns:
        The best liked of `offered`: by q, then by how precisely it is named, then as they stand.

    Raises:
        Problem: 406, none is accepted.
    """
    if wanted is not None and _SHORT[wanted] in offered:
        return _SHORT[wanted]
    ranges = [_range(part) for part in accept.split(",") if part.strip()] or [("*/*", 1.0)]
    best = max(offered, key=lambda name: _liking(name, ranges))
    if _liking(best, ranges)[0] <= 0:
        raise Problem(406, f"this comes as {', '.join(offered)}")
    return best


def _liking(name: str, ranges: Sequence[tuple[str, float]]) -> tuple[float, int, int]:
    """q, precision and place of the most precise range that covers a media type."""
    covering = [
        (precision, -place, q)
        for place, (pattern, q) in enumerate(ranges)
        if (precision := _precision(pattern, name)) >= 0
    ]
    precision, place, q = max(covering, default=(-1, 0, 0.0))
    return q, precision, place


def _precision(pattern: str, name: str) -> int:
    if pattern == name:
        return 2
    if pattern == name.partition("/")[0] + "/*":
        return 1
    return 0 if pattern == "*/*" else -1


def _range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    q = next((value for key, _, value in map(_pair, parameters) if key == "q"), "1")
    try:
        return name, min(max(float(q), 0.0), 1.0)
    except ValueError:
        return name, 0.0


def _pair(parameter: str) -> tuple[str, str, str]:
    key, equals, value = parameter.partition("=")
    return key.strip(), equals, value.strip()
