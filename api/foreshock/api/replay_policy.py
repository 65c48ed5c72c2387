"""What a replay tries: when an alert pages, as a file that people write by hand."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from foreshock.api.alerts import AlertSettings

__all__ = ["PolicyError", "ReplayPolicy", "read_policy"]

_KINDS: Final = ("forecast", "detection")
_HYSTERESIS: Final = tuple(f.name for f in fields(AlertSettings))


class PolicyError(ValueError):
    """The policy cannot be used; the message is one line for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPolicy:
    """When to page.

    Attributes:
        threshold_factor: Of the model's own alarm threshold; above 1 pages less often.
        vain_pages_per_week: Choose the factor instead: the smallest with which forecasts page so
            often in vain, per week of training of the runs replayed.
        page_on: forecast, detection or both.
        quiet_steps: No page before this step.
        seconds_per_step: Where records tell no time.
        prior: Onsets of divergence per step that you expect; None keeps the model's.
        alerts: Hysteresis.

    Raises:
        PolicyError: A value is out of range.
    """

    threshold_factor: float = 1.0
    vain_pages_per_week: float | None = None
    page_on: tuple[str, ...] = _KINDS
    quiet_steps: int = 0
    seconds_per_step: float | None = None
    prior: float | None = None
    alerts: AlertSettings = field(default_factory=AlertSettings)

    def __post_init__(self) -> None:
        _require(self.threshold_factor > 0, "threshold_factor", self.threshold_factor, "above 0")
        budget = self.vain_pages_per_week
        _require(budget is None or budget >= 0, "vain_pages_per_week", budget, "0 or more")
        if budget is not None and self.threshold_factor != 1.0:
            raise PolicyError("give threshold_factor or vain_pages_per_week, not both")
        chosen = bool(self.page_on) and set(self.page_on) <= set(_KINDS)
        _require(chosen, "page_on", list(self.page_on), "forecast, detection or both")
        _require(self.quiet_steps >= 0, "quiet_steps", self.quiet_steps, "0 or more")
        seconds = self.seconds_per_step
        _require(seconds is None or seconds > 0, "seconds_per_step", seconds, "above 0")
        _require(self.prior is None or 0 < self.prior < 1, "prior", self.prior, "between 0 and 1")
        if self.alerts.calm < self.alerts.of:
            raise PolicyError(f"calm is {self.alerts.calm}; allowed: of ({self.alerts.of}) or more")


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise PolicyError(f"{name} is {value}; allowed: {allowed}")


def read_policy(path: Path) -> ReplayPolicy:
    """Read a policy in YAML: the attributes of `ReplayPolicy`, with those of `AlertSettings`.

    Raises:
        PolicyError: Not YAML, a name that there is not, or a value out of range.
    """
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PolicyError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(found, Mapping):
        raise PolicyError(f"{path} holds no names with values, such as vain_pages_per_week: 1")
    try:
        return _policy(found)
    except PolicyError as error:
        raise PolicyError(f"{path}: {error}") from None


def _policy(found: Mapping[Any, Any]) -> ReplayPolicy:
    own = [f.name for f in fields(ReplayPolicy) if f.name != "alerts"]
    for name in found:
        if name not in (*own, *_HYSTERESIS):
            near = difflib.get_close_matches(str(name), [*own, *_HYSTERESIS], 1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(own)}"
            raise PolicyError(f"there is no {name!r}; {hint}")
    given: dict[str, Any] = {}
    hysteresis: dict[str, Any] = {}
    for name, value in found.items():
        place = hysteresis if name in _HYSTERESIS else given
        place[name] = _kinds(value) if name == "page_on" else _number(name, value)
    try:
        return ReplayPolicy(**given, alerts=AlertSettings(**hysteresis))
    except PolicyError:
        raise
    except ValueError as error:
        raise PolicyError(str(error)) from None


_WHOLE: Final = ("quiet_steps", "need", "of", "calm")


def _number(name: str, value: object) -> float | int | None:
    if value is None and name not in (*_WHOLE, "threshold_factor", "release"):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PolicyError(f"{name} is {value!r}; allowed: a number")
    if name in _WHOLE and not isinstance(value, int):
        raise PolicyError(f"{name} is {value!r}; allowed: a whole number")
    return value


def _kinds(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    raise PolicyError(f"page_on is {value!r}; allowed: forecast, detection or both")
