"""How likely a run is to diverge: now, and over its life.

Reads what the live analysis found; scores nothing itself.
"""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Annotated

import pyarrow as pa
from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import TABLE_ANSWER
from foreshock.api.conditional import NOT_MODIFIED, TableQuestionDep
from foreshock.api.openapi import errors
from foreshock.api.registry import Run
from foreshock.api.risks import risk_document, risk_history, stored_risk
from foreshock.api.routes.live_parts import Live, Number, WantedRun
from foreshock.api.routes.parameters import AttemptNumber, FirstStep, LastStep
from foreshock.api.services import ServicesDep, view_of
from foreshock.api.store import LAST_STEP, Store
from foreshock.monitor.record import HORIZONS, AlertState, RiskKind

__all__ = ["DriverModel", "RiskAnswer", "RiskHistory", "RiskModel", "router"]

router = APIRouter(tags=["risk"])


class DriverModel(BaseModel):
    """A signal's part in the forecast, as a share of log-odds; positive raises the risk."""

    signal: str
    contribution: Number
    layer: str | None = None


class RiskModel(BaseModel):
    """The risk after one record. Keys of `probability`, `band` and `reasons` are horizons."""

    step: int | None
    probability: dict[str, Number] = Field(description="null where the model cannot say")
    band: dict[str, list[Number]] = Field(default_factory=dict, description="[low, high]")
    reasons: dict[str, str] = Field(default_factory=dict, description="For each null, why")
    expected_lead: Number = Field(
        default=None, description="Steps until the loss rises, given it does"
    )
    kind: RiskKind | None = None
    state: AlertState = "ok"
    drivers: list[DriverModel] = Field(default_factory=list)
    model_version: str = ""


class RiskAnswer(RiskModel):
    """The newest risk of a run."""

    run_id: str
    attempt: int | None = None
    time: datetime | None = None
    horizon_steps: list[int] = Field(default_factory=lambda: list(HORIZONS))
    steps_per_record: int | None = None
    hours_at_risk: float | None = Field(
        default=None,
        description="Hours of training since the last checkpoint (or the first record) seen",
    )


class RiskHistory(BaseModel):
    """Risks by step: lists of equal length, the numbers by horizon; null = cannot say."""

    step: list[int]
    probability: dict[str, list[Number]]
    low: dict[str, list[Number]]
    high: dict[str, list[Number]]
    state: list[AlertState]
    kind: list[RiskKind | None]


@router.get("/runs/{run}/risk", dependencies=[READ])
def get_run_risk(run: WantedRun, live: Live, services: ServicesDep) -> RiskAnswer:
    """The newest risk: per horizon, with drivers, lead and alert state."""
    latest = live.latest(run.run_id)
    if latest is None:
        return _from_store(run, services.store)
    return RiskAnswer(
        **risk_document(latest.risk),
        run_id=run.run_id,
        attempt=latest.subject.attempt,
        time=latest.time,
        steps_per_record=latest.steps_per_record,
        hours_at_risk=latest.hours_at_risk,
    )


def _from_store(run: Run, store: Store) -> RiskAnswer:
    """The last answer of a run that is not live any more; drivers are not kept."""
    attempt = None if run.current is None else run.current.number
    step = None if attempt is None else store.last_risk_step(run.run_id, attempt)
    if attempt is None or step is None:
        reason = _why_nothing(run, attempt, store)
        reasons = {str(horizon): reason for horizon in HORIZONS}
        nothing: dict[str, Number] = {str(horizon): None for horizon in HORIZONS}
        return RiskAnswer(
            step=None, probability=nothing, reasons=reasons, run_id=run.run_id, attempt=attempt
        )
    rows = store.risk_history(run.run_id, attempt, step, step).to_pylist()
    risk = stored_risk(step, rows)
    return RiskAnswer(
        **risk_document(risk), run_id=run.run_id, attempt=attempt, time=rows[0]["time"]
    )


def _why_nothing(run: Run, attempt: int | None, store: Store) -> str:
    for earlier in reversed(run.attempts):
        if attempt is None or earlier.last_step is None or earlier.number >= attempt:
            continue
        scored = store.last_risk_step(run.run_id, earlier.number)
        if scored is not None:
            return (
                f"no record of attempt {attempt} has been scored yet; attempt {earlier.number} was,"
                f" up to step {scored}: see risk/history?attempt={earlier.number}"
            )
    return "no record of this run has been scored yet"


@router.get(
    "/runs/{run}/risk/history",
    response_model=RiskHistory,
    responses=errors(406, also=NOT_MODIFIED | {200: {"content": TABLE_ANSWER}}),
    dependencies=[READ],
)
def get_run_risk_history(
    question: TableQuestionDep,
    run: WantedRun,
    services: ServicesDep,
    *,
    first_step: FirstStep = 0,
    last_step: LastStep = LAST_STEP,
    points: Annotated[int, Query(ge=2, le=10_000, description="At most so many steps")] = 1000,
    attempt: AttemptNumber = None,
) -> Response:
    """Risk by step, thinned so that peaks stay: of each stretch the step of the highest risk.

    As a table: one row per step, the numbers of each horizon in columns of their own. With as
    many `points` as steps in the range nothing is left out.
    """
    view = view_of(run, attempt, first_step, last_step)
    holding = [a.number for a in run.attempts if a.last_step is not None]
    # Risks are saved a little after the records that they answer, and only ever appended.
    scored = [services.store.last_risk_step(run.run_id, number) for number in holding]
    headers = question.headers(run, scored)
    rows = services.store.risk_history(view.run_id, view.attempt, first_step, last_step)
    body = RiskHistory(**risk_history(rows, points))
    return question.answer(headers, body, partial(_table, body))


def _table(body: RiskHistory) -> pa.Table:
    parts = (("probability", body.probability), ("low", body.low), ("high", body.high))
    numbers = {
        f"{name}_{horizon}": pa.array(values, pa.float64())
        for name, by_horizon in parts
        for horizon, values in by_horizon.items()
    }
    words = {"state": body.state, "kind": body.kind}
    return pa.table(
        {"step": pa.array(body.step, pa.int64())}
        | {name: pa.array(values, pa.string()) for name, values in words.items()}
        | numbers
    )
