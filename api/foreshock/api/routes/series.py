"""Read one series of a run."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import pyarrow as pa
from fastapi import APIRouter, Depends, Query, Response

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import TABLE_ANSWER
from foreshock.api.conditional import NOT_MODIFIED, TableQuestionDep
from foreshock.api.openapi import errors
from foreshock.api.routes.parameters import SelectionDep, TensorQuery
from foreshock.api.schemas import SeriesBody, numbers
from foreshock.api.services import ServicesDep
from foreshock.api.store import Series

__all__ = ["router"]

router = APIRouter(tags=["reading"])


def _body(series: Series) -> SeriesBody:
    return SeriesBody(
        step=list(series.step),
        min=numbers(series.low),
        mean=numbers(series.mean),
        max=numbers(series.high),
        nonfinite=list(series.nonfinite),
    )


def _table(series: Series) -> pa.Table:
    return pa.table(
        {
            "step": pa.array(series.step, pa.int64()),
            "min": pa.array(series.low, pa.float64()),
            "mean": pa.array(series.mean, pa.float64()),
            "max": pa.array(series.high, pa.float64()),
            "nonfinite": pa.array(series.nonfinite, pa.int64()),
        }
    )


@router.get(
    "/runs/{run}/series",
    response_model=SeriesBody,
    responses=errors(406, also=NOT_MODIFIED | {200: {"content": TABLE_ANSWER}}),
    dependencies=[READ],
)
def get_run_series(
    question: TableQuestionDep,
    chosen: SelectionDep,
    services: ServicesDep,
    tensor: Annotated[TensorQuery, Depends()],
    name: Annotated[str | None, Query(description="A scalar, e.g. loss.")] = None,
    points: Annotated[int, Query(ge=1, le=20_000, description="Most buckets.")] = 1000,
) -> Response:
    """One series: a scalar by `name`, or a statistic by `layer`, `role` and `statistic`.

    Without `attempt` each step shows the highest attempt that holds it.
    """
    key = None if name is not None else tensor.key(services, chosen.run)
    headers = question.headers(chosen.run)
    if key is None:
        series = services.store.scalar_series(chosen.view, name or "", points)
    else:
        series = services.store.tensor_series(chosen.view, key, points)
    return question.answer(headers, _body(series), partial(_table, series))
