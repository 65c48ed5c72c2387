"""Read one series of a run."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from foreshock.api.access.scopes import READ
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


@router.get("/runs/{run}/series", dependencies=[READ])
def get_run_series(
    chosen: SelectionDep,
    services: ServicesDep,
    tensor: Annotated[TensorQuery, Depends()],
    name: Annotated[str | None, Query(description="A scalar, e.g. loss.")] = None,
    points: Annotated[int, Query(ge=1, le=20_000, description="Most buckets.")] = 1000,
) -> SeriesBody:
    """One series: a scalar by `name`, or a statistic by `layer`, `role` and `statistic`.

    Without `attempt` each step shows the highest attempt that holds it.
    """
    if name is not None:
        return _body(services.store.scalar_series(chosen.view, name, points))
    key = tensor.key(services, chosen.run)
    return _body(services.store.tensor_series(chosen.view, key, points))
