"""Why a run is at risk: likely causes with evidence and remedy.

Looks at the stored statistics of the newest records; knows no configuration of the run.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field

from foreshock.api.access.scopes import READ
from foreshock.api.conditional import NOT_MODIFIED, QuestionDep
from foreshock.api.diagnosis import CAUSES
from foreshock.api.precision_advice import abstains, precision_advice
from foreshock.api.routes.live_parts import Live, Number, WantedRun
from foreshock.api.routes.parameters import AttemptNumber
from foreshock.api.schemas import number
from foreshock.api.services import view_of
from foreshock.api.store import LAST_STEP

__all__ = ["CauseModel", "DiagnosisAnswer", "PrecisionModel", "router"]

router = APIRouter(tags=["risk"])


class CauseModel(BaseModel):
    """One likely cause."""

    name: str = Field(description=f"{', '.join(CAUSES[:-1])} or {CAUSES[-1]}")
    probability: Number
    layers: list[str] = Field(description="Most affected first")
    role: str | None
    statistic: str | None
    since_step: int | None
    evidence: str
    remedy: str
    source: str


class PrecisionModel(BaseModel):
    """Precision for the layers that the likeliest cause names, as text to use as it stands."""

    cause: str
    layers: list[str]
    why: str
    transformer_engine_recipe: str = Field(description="Python that makes a recipe")
    transformer_engine_debug: str = Field(description="YAML for nvdlfw_inspect")
    torchao_filter: str = Field(description="Python with a module_filter_fn")


class DiagnosisAnswer(BaseModel):
    """Causes, most likely first."""

    step: int | None = Field(description="As of this step; null before the first record")
    causes: list[CauseModel]
    abstains: bool = Field(default=True, description="No cause stands out, or none is known")
    precision: PrecisionModel | None = Field(
        default=None, description="null where the cause is no matter of precision"
    )


@router.get("/runs/{run}/diagnosis", dependencies=[READ], responses=NOT_MODIFIED)
def get_run_diagnosis(
    response: Response,
    question: QuestionDep,
    run: WantedRun,
    live: Live,
    step: Annotated[
        int | None, Query(ge=0, le=LAST_STEP, description="As of this step; default: the newest.")
    ] = None,
    attempt: AttemptNumber = None,
) -> DiagnosisAnswer:
    """Likely causes as of a step, from the records up to it."""
    if run.current is None:
        return DiagnosisAnswer(step=None, causes=[])
    chosen = view_of(run, attempt, 0, 0).attempt or run.current.number
    newest = max(a.last_step or 0 for a in run.attempts if a.number == chosen)
    as_of = newest if step is None else step
    response.headers.update(question.headers(run))
    found = live.diagnose(run.run_id, chosen, as_of)
    causes = [
        CauseModel(
            name=cause.name,
            probability=number(cause.probability),
            layers=list(cause.layers),
            role=cause.role,
            statistic=cause.statistic,
            since_step=cause.since_step,
            evidence=cause.evidence,
            remedy=cause.remedy,
            source=cause.source,
        )
        for cause in found
    ]
    advice = precision_advice(found)
    return DiagnosisAnswer(
        step=as_of,
        causes=causes,
        abstains=abstains(found),
        precision=None if advice is None else PrecisionModel(**asdict(advice)),
    )
