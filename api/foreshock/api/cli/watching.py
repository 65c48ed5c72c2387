"""What `foreshock watch` knows of a run at one moment, asked of the service through its client.

Draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from foreshock.monitor.client import Alert, Client, Heatmap, RunDetail, RunRisk

__all__ = ["RunView", "WorstLayer", "look"]

_LOSS_POINTS: Final = 240
_WORST_STEPS: Final = 64
_STATISTICS: Final = ("headroom_log2", "overflow_ratio", "underflow_ratio", "kurtosis")
_ROLES: Final = ("input", "weight", "grad_output")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstLayer:
    """The layer in which a statistic is worst of late.

    Attributes:
        statistic: Its name.
        role, layer: Of the tensor.
        value: The worst of the last 64 steps.
    """

    statistic: str
    role: str
    layer: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """A run as it stands.

    Attributes:
        detail: The run itself.
        risk: The newest.
        losses: Over the whole run, downsampled; not finite where a bucket holds such a value, None
            where nothing was measured.
        worst: One per statistic that the run records.
        alert: The newest, if there ever was one.
    """

    detail: RunDetail
    risk: RunRisk
    losses: tuple[float | None, ...]
    worst: tuple[WorstLayer, ...]
    alert: Alert | None

    @property
    def over(self) -> bool:
        """Whether the run has said that it ended."""
        return self.detail.status == "finished"


def look(client: Client, run: str, before: RunView | None = None) -> RunView:
    """Ask for everything; what cannot have changed since `before` is taken from it.

    Raises:
        ClientError: The service does not answer, or says no.
    """
    detail = client.run(run)
    risk = client.risk(run)
    alert = next(iter(client.alerts(run, limit=1)), None)
    if before is not None and _where(before.detail) == _where(detail):
        losses, worst = before.losses, before.worst
    else:
        losses, worst = _losses(client, run, detail), _worst(client, run, detail)
    return RunView(detail=detail, risk=risk, losses=losses, worst=worst, alert=alert)


def _where(detail: RunDetail) -> tuple[str, int, int | None, int | None]:
    return detail.run_id, detail.attempts, detail.attempt, detail.last_step


def _losses(client: Client, run: str, detail: RunDetail) -> tuple[float | None, ...]:
    if "loss" not in detail.scalars:
        return ()
    table = client.series_table(run, "loss", points=_LOSS_POINTS)
    means = table.column("mean").to_pylist()
    lost = table.column("nonfinite").to_pylist()
    return tuple(math.nan if bad else mean for mean, bad in zip(means, lost, strict=True))


def _worst(client: Client, run: str, detail: RunDetail) -> tuple[WorstLayer, ...]:
    if detail.last_step is None:
        return ()
    first = max(detail.first_step or 0, detail.last_step - _WORST_STEPS + 1)
    found: list[WorstLayer] = []
    for statistic in (name for name in _STATISTICS if name in detail.statistics):
        maps: dict[str, Heatmap] = {
            role: client.heatmap(run, statistic, role, first_step=first, points=1)
            for role in _ROLES
            if role in detail.roles
        }
        found += _worst_of(statistic, maps)
    return tuple(found)


def _worst_of(statistic: str, maps: dict[str, Heatmap]) -> Sequence[WorstLayer]:
    """The worst tensor over all roles; none, if nothing was measured."""
    known = [
        WorstLayer(statistic=statistic, role=role, layer=layer, value=float(value))
        for role, heat in maps.items()
        for layer, row in zip(heat.layers, heat.values, strict=True)
        for value in row
        if not math.isnan(value)
    ]
    if not known:
        return ()
    sign = -1.0 if next(iter(maps.values())).worst == "min" else 1.0
    return (max(known, key=lambda tensor: sign * tensor.value),)
