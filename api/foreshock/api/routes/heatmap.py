"""Read one statistic of all layers over the steps."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import pyarrow as pa
from fastapi import APIRouter, Depends, Query, Response

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import TABLE_ANSWER
from foreshock.api.conditional import NOT_MODIFIED, TableQuestionDep
from foreshock.api.layer_rows import LayerChoice, LayerRows, layer_rows
from foreshock.api.openapi import errors
from foreshock.api.routes.parameters import SelectionDep, check_name
from foreshock.api.schemas import HeatmapBody, numbers
from foreshock.api.services import ServicesDep
from foreshock.api.store import SMALLEST_IS_WORST
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import ROLES, STATISTICS

__all__ = ["router"]

router = APIRouter(tags=["reading"])


class WantedRows:
    """Which layers, in how many rows; the parameters of the address."""

    def __init__(
        self,
        rows: Annotated[
            int | None, Query(ge=1, le=10_000, description="Most rows; default: one per layer.")
        ] = None,
        match: Annotated[
            str, Query(max_length=512, description="Only layers whose name contains it.")
        ] = "",
        start: Annotated[
            str, Query(max_length=512, description="Only from this layer on, by its whole name.")
        ] = "",
        span: Annotated[
            int | None, Query(ge=1, le=65_535, description="Only so many layers from there on.")
        ] = None,
    ) -> None:
        self.choice = LayerChoice(match=match, start=start, span=span, most=rows)


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
    wanted: Annotated[WantedRows, Depends()],
    statistic: Annotated[str, Query(description="A statistic, e.g. kurtosis.")],
    role: Annotated[str, Query(description=f"One of {', '.join(ROLES)}.")] = "input",
    format: Annotated[str | None, Query(description="Default: the one the run used.")] = None,
    points: Annotated[int, Query(ge=1, le=2000, description="Most buckets of steps.")] = 240,
) -> Response:
    """Layers in model order by buckets of steps: the worst value, over calls and experts.

    Where there are more layers than `rows`, equally many neighbours share a row, which has the
    name of the first; `counts` says how many. As a table: one line per row and bucket with a
    value.
    """
    check_name("role", role, ROLES)
    check_name("statistic", statistic, STATISTICS)
    if format is not None:
        check_name("format", format, tuple(FORMATS))
    headers = question.headers(chosen.run)
    heatmap = services.store.heatmap(chosen.view, role, statistic, points, format)
    smallest = statistic in SMALLEST_IS_WORST
    found = layer_rows(
        heatmap.values,
        services.registry.ordered_layers(chosen.run),
        wanted.choice,
        smallest=smallest,
    )
    body = HeatmapBody(
        layers=found.layers,
        counts=found.counts,
        steps=list(heatmap.steps),
        values=[numbers(row) for row in found.values],
        worst="min" if smallest else "max",
    )
    return question.answer(headers, body, partial(_table, found, heatmap.steps))


def _table(found: LayerRows, steps: tuple[int, ...]) -> pa.Table:
    cells = [
        (layer, step, value)
        for layer, row in zip(found.layers, found.values, strict=True)
        for step, value in zip(steps, row, strict=True)
        if value is not None
    ]
    return pa.table(
        {
            "layer": pa.array([cell[0] for cell in cells], pa.string()),
            "step": pa.array([cell[1] for cell in cells], pa.int64()),
            "value": pa.array([cell[2] for cell in cells], pa.float64()),
        }
    )
