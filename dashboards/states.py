"""The alert state of runs: as a number, as words, as a band over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dashboards.parts import PROMETHEUS, Scope, Target, query, series
from grafana_foundation_sdk.builders import statetimeline
from grafana_foundation_sdk.models import dashboard as models

from foreshock.monitor.record import AlertState

__all__ = ["STATE_MAP", "state_number", "state_timeline"]

_STATES: Final[Mapping[AlertState, tuple[int, str]]] = {
    "ok": (0, "green"),
    "pending": (1, "yellow"),
    "firing": (2, "red"),
    "resolved": (3, "blue"),
}

STATE_MAP: Final = models.ValueMap(
    options={
        str(number): models.ValueMappingResult(text=state, color=colour, index=number)
        for state, (number, colour) in _STATES.items()
    }
)
"""Words and colours for `state_number`."""


def state_number(scope: Scope) -> str:
    """0 to 3 per run: ok, pending, firing, resolved."""
    name = "foreshock_alert_state"
    terms = []
    for state, (number, _) in _STATES.items():
        matcher = f'state="{state}"'
        if number:
            terms.append(f"{number} * max by (project, run) ({series(name, scope, more=matcher)})")
    return " + ".join(terms)


def state_timeline(scope: Scope) -> statetimeline.Panel:
    """The state of each run as a band."""
    return (
        statetimeline.Panel()
        .title("Alert state")
        .description("State of the service's own alert, per run.")
        .datasource(PROMETHEUS)
        .unit("none")
        .height(6)
        .span(24)
        .mappings([STATE_MAP])
        .targets([query(0, Target(state_number(scope), "{{run}}"))])
    )
