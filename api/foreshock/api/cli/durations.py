"""Lengths of time as people write them on the command line: 90d, 12h, 30m, 45s."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["seconds"]

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_DURATION: Final = re.compile(r"(\d{1,9})([smhd])")


def seconds(text: str) -> int:
    """Seconds of such a length.

    Raises:
        ValueError: It is none.
    """
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError(
            f"a duration is {text!r}; allowed: a number and s, m, h or d, e.g. 90d, 2h"
        )
    return int(found[1]) * _UNITS[found[2]]
