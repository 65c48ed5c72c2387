"""Read the tensors of a run as they were measured last, worst first."""

from __future__ import annotations

from typing import Annotated, Final

import pyarrow as pa
from fastapi import APIRouter, Depends, Query, Response

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import TABLE_ANSWER
from foreshock.api.conditional import NOT_MODIFIED, TableQuestionDep
from foreshock.api.measured import TensorChoice, worst_tensors
from foreshock.api.openapi import errors
from foreshock.api.routes.parameters import SelectionDep, check_name
from foreshock.api.schemas import TensorsBody, number
from foreshock.api.services import ServicesDep
from foreshock.api.store import SMALLEST_IS_WORST
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import ROLES, STATISTICS

__all__ = ["router"]

router = APIRouter(tags=["reading"])

_MOST: Final = 20_000


class TensorQuestion:
    """Which tensors; the parameters of the address."""

    def __init__(
        self,
        statistic: Annotated[str, Query(description="What they are ordered by, e.g. kurtosis.")],
        role: Annotated[str, Query(description=f"One of {', '.join(ROLES)}.")] = "input",
        format: Annotated[
            str | None, Query(description="Default: every one, what-if formats too.")
        ] = None,
    ) -> None:
        check_name("role", role, ROLES)
        check_name("statistic", statistic, STATISTICS)
        if format is not None:
            check_name("format", format, tuple(FORMATS))
        self.choice = TensorChoice(role=role, statistic=statistic, format=format)


@router.get(
    "/runs/{run}/tensors",
    response_model=TensorsBody,
    responses=errors(406, also=NOT_MODIFIED | {200: {"content": TABLE_ANSWER}}),
    dependencies=[READ],
)
def get_run_tensors(
    question: TableQuestionDep,
    chosen: SelectionDep,
    services: ServicesDep,
    wanted: Annotated[TensorQuestion, Depends()],
    limit: Annotated[int, Query(ge=1, le=_MOST, description="Most tensors.")] = 100,
) -> Response:
    """Tensors at the newest step (up to `last_step`) that measured the statistic, worst first.

    With every statistic of each. Steps that only expired records held are not found.
    """
    headers = question.headers(chosen.run)
    rows = worst_tensors(services.store, chosen.view, wanted.choice, limit)
    return question.answer(headers, _body(rows, wanted.choice.statistic), lambda: rows)


def _body(rows: pa.Table, statistic: str) -> TensorsBody:
    tensors = rows.drop_columns(["step"]).to_pylist()
    return TensorsBody(
        step=rows["step"][0].as_py() if rows.num_rows else None,
        worst="min" if statistic in SMALLEST_IS_WORST else "max",
        tensors=[
            {k: number(v) if isinstance(v, float) else v for k, v in tensor.items()}
            for tensor in tensors
        ],
    )
