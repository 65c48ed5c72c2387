"""What the parts of a run's configuration are checked with, and fields that came later."""

from __future__ import annotations

from dataclasses import field
from typing import Final, TypeVar

__all__ = ["LATER", "later", "one_of", "require"]

T = TypeVar("T")
LATER: Final = "later"
"""Key of a field's metadata: see `later`."""


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError that says what is allowed, unless the value is."""
    require(value in allowed, f"{name} is {value!r}; allowed: {', '.join(allowed)}")


def later(default: T) -> T:
    """A field that came after the first runs: left out of fingerprints while at its default.

    So runs keep the fingerprint under which a forecaster was fitted and checkpoints were written.
    """
    made: T = field(default=default, metadata={LATER: True})
    return made
