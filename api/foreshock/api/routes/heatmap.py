"""Read one statistic of all layers over the steps."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from foreshock.api.access.scopes import READ
from foreshock.api.routes.parameters import SelectionDep, check_name
from foreshock.api.schemas import HeatmapBody, numbers
from foreshock.api.services import ServicesDep
from foreshock.api.store import SMALLEST_IS_WORST
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import ROLES, STATISTICS

__all__ = ["router"]

router = APIRouter(tags=["reading"])


@router.get("/runs/{run}/heatmap", dependencies=[READ])
def get_run_heatmap(
    chosen: SelectionDep,
    services: ServicesDep,
    statistic: Annotated[str, Query(description="A statistic, e.g. kurtosis.")],
    role: Annotated[str, Query(description=f"One of {', '.join(ROLES)}.")] = "input",
    format: Annotated[str | None, Query(description="Default: the one the run used.")] = None,
    points: Annotated[int, Query(ge=1, le=2000, description="Most buckets of steps.")] = 240,
) -> HeatmapBody:
    """Layers in model order by buckets of steps: the worst value, over calls and experts."""
    check_name("role", role, ROLES)
    check_name("statistic", statistic, STATISTICS)
    if format is not None:
        check_name("format", format, tuple(FORMATS))
    heatmap = services.store.heatmap(chosen.view, role, statistic, points, format)
    layers = [n for n in services.registry.ordered_layers(chosen.run) if n in heatmap.values]
    return HeatmapBody(
        layers=layers,
        steps=list(heatmap.steps),
        values=[numbers(heatmap.values[name]) for name in layers],
        worst="min" if statistic in SMALLEST_IS_WORST else "max",
    )
