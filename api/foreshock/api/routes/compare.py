"""Where two runs, or two attempts of one, part. Judges nothing itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, Field

from foreshock.api.access.scopes import READ
from foreshock.api.conditional import NOT_MODIFIED, QuestionDep
from foreshock.api.openapi import errors
from foreshock.api.problems import Problem
from foreshock.api.routes.parameters import SelectionDep, check_name
from foreshock.api.schemas import Number, number
from foreshock.api.services import ServicesDep, find_run, view_of
from foreshock.monitor.record import ROLES, STATISTICS

if TYPE_CHECKING:
    from foreshock.api.compare import Parting
    from foreshock.api.compare_stored import StoredComparison

__all__ = ["ComparisonAnswer", "PartingModel", "router"]

router = APIRouter(tags=["reading"])

_MOST: Final = 500


class PartingModel(BaseModel):
    """A series that goes its own way in the other run."""

    step: int = Field(description="First step of the stretch.")
    statistic: str = Field(description="Name of the statistic or scalar.")
    layer: str | None = Field(description="null for a scalar of the run.")
    role: str | None
    kind: Literal["nonfinite", "sustained"] = Field(
        description="One side is not finite, or the difference stays beyond the noise."
    )
    a: Number = Field(description="Value of this run at the step.")
    b: Number = Field(description="Value of the other one.")
    noise_units: Number = Field(description="The difference, at its smallest over the stretch.")
    largest_noise_units: Number
    asked_noise_units: Number = Field(description="Beyond which a difference counts.")


class ComparisonAnswer(BaseModel):
    """Where the other run parts from this one; first step first, then the largest effect."""

    first_step: int = Field(description="First common step.")
    last_step: int = Field(description="Last common step.")
    width: int = Field(description="Steps that one judged value of a scalar stands for.")
    layer_width: int = Field(description="The same of a layer's statistic.")
    layers: int = Field(description="Layers with the statistic in both.")
    judged_layers: int = Field(description="How many were judged: those that moved most.")
    series: int = Field(description="Series in both.")
    too_short: int = Field(description="Series with too few common values to be judged.")
    parted: bool
    partings: list[PartingModel]


class OtherRun:
    """The other run; the parameters of the address."""

    def __init__(
        self,
        services: ServicesDep,
        other: Annotated[str, Query(max_length=128, description="The other run; may be the same.")],
        other_project: Annotated[
            str, Query(max_length=128, description="Its project; not needed with an id.")
        ] = "default",
        other_attempt: Annotated[
            int | None, Query(ge=1, lt=2**31, description="Its attempt; default as for `attempt`.")
        ] = None,
    ) -> None:
        self.run = find_run(services, other, other_project)
        self.attempt = other_attempt


@router.get("/runs/{run}/compare", dependencies=[READ], responses=errors(404, also=NOT_MODIFIED))
def get_run_comparison(
    response: Response,
    question: QuestionDep,
    chosen: SelectionDep,
    services: ServicesDep,
    other: Annotated[OtherRun, Depends()],
    role: Annotated[str, Query(description=f"One of {', '.join(ROLES)}.")] = "input",
    statistic: Annotated[str, Query(description="A statistic, e.g. kurtosis.")] = "kurtosis",
) -> ComparisonAnswer:
    """Where another run parts from this one beyond their noise.

    Judged are all scalars, and one statistic of one role over the layers that both have: the 96
    that moved most. `foreshock compare` judges every tensor, from whole records.
    """
    # pandas and scipy, which a service that nobody asks this does without.
    from foreshock.api.compare import CompareError
    from foreshock.api.compare_stored import compare_stored

    check_name("role", role, ROLES)
    check_name("statistic", statistic, STATISTICS)
    state = [[a.number, a.last_step, str(a.last_received)] for a in other.run.attempts]
    response.headers.update(question.headers(chosen.run, other.run.run_id, state))
    first, last = chosen.view.first_step, chosen.view.last_step
    second = view_of(other.run, other.attempt, first, last)
    try:
        found = compare_stored(services.store, chosen.view, second, role=role, statistic=statistic)
    except CompareError as error:
        raise Problem(422, str(error)) from None
    return _answer(found)


def _answer(found: StoredComparison) -> ComparisonAnswer:
    return ComparisonAnswer(
        first_step=found.first_step,
        last_step=found.last_step,
        width=found.width,
        layer_width=found.layer_width,
        layers=found.layers,
        judged_layers=found.judged_layers,
        series=found.series,
        too_short=found.too_short,
        parted=bool(found.partings),
        partings=[_parting(parting) for parting in found.partings[:_MOST]],
    )


def _parting(parting: Parting) -> PartingModel:
    return PartingModel(
        step=parting.step,
        statistic=parting.key.statistic,
        layer=parting.key.layer or None,
        role=parting.key.role or None,
        kind=parting.kind,
        a=number(parting.a),
        b=number(parting.b),
        noise_units=number(parting.units),
        largest_noise_units=number(parting.largest_units),
        asked_noise_units=number(parting.asked),
    )
