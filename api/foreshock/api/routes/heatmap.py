"""Read one statistic of all layers over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import pyarrow as pa
from fastapi import APIRouter, Query, Response

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import TABLE_ANSWER
from foreshock.api.conditional import NOT_MODIFIED, TableQuestionDep
from foreshock.api.openapi import errors
from foreshock.api.routes.parameters import SelectionDep, check_name
from foreshock.api.schemas import HeatmapBody, numbers
from foreshock.api.services import ServicesDep
from foreshock.api.store import SMALLEST_IS_WORST, Heatmap
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import ROLES, STATISTICS

__all__ = ["router"]

router = APIRouter(tags=["reading"])


@router.get(
    "/runs/{run}/heatmap",
    response_model=HeatmapBody,
    responses=errors(406, also=NOT_MODIFIED | {200: {"content": TABLE_ANSWER}}),
    dependencies=[READ],
)
def get_run_heatmap(
    question: TableQuestionDep,
    chosen: SelectionDep,
    services: ServicesDep,
    statistic: Annotated[str, Query(description="A statistic, e.g. kurtosis.")],
    role: Annotated[str, Query(description=f"One of {', '.join(ROLES)}.")] = "input",
    format: Annotated[str | None, Query(description="Default: the one the run used.")] = None,
    points: Annotated[int, Query(ge=1, le=2000, description="Most buckets of steps.")] = 240,
) -> Response:
    """Layers in model order by buckets of steps: the worst value, over calls and experts.

    As a table: one row per layer and bucket with a value.
    """
    check_name("role", role, ROLES)
    check_name("statistic", statistic, STATISTICS)
    if format is not None:
        check_name("format", format, tuple(FORMATS))
    headers = question.headers(chosen.run)
    heatmap = services.store.heatmap(chosen.view, role, statistic, points, format)
    layers = [n for n in services.registry.ordered_layers(chosen.run) if n in heatmap.values]
    body = HeatmapBody(
        layers=layers,
        steps=list(heatmap.steps),
        values=[numbers(heatmap.values[name]) for name in layers],
        worst="min" if statistic in SMALLEST_IS_WORST else "max",
    )
    return question.answer(headers, body, partial(_table, heatmap, layers))


def _table(heatmap: Heatmap, layers: Sequence[str]) -> pa.Table:
    cells = [
        (layer, step, value)
        for layer in layers
        for step, value in zip(heatmap.steps, heatmap.values[layer], strict=True)
        if value is not None
    ]
    return pa.table(
        {
            "layer": pa.array([cell[0] for cell in cells], pa.string()),
            "step": pa.array([cell[1] for cell in cells], pa.int64()),
            "value": pa.array([cell[2] for cell in cells], pa.float64()),
        }
    )
