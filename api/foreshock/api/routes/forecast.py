"""Records in, risks out: the same scorer as for live runs, with nothing kept.

For logs that are not in the service; `foreshock score` does the same without a service.
"""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Header, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from foreshock.api.access.scopes import READ
from foreshock.api.bodies import RECORDS_BODY
from foreshock.api.problems import Problem
from foreshock.api.risks import risk_document
from foreshock.api.routes.live_parts import Live
from foreshock.api.routes.parameters import ContentEncoding
from foreshock.api.routes.risk import RiskModel
from foreshock.api.scoring import Scorer
from foreshock.api.scoring_records import KnownLayout, scoring_records
from foreshock.api.services import ServicesDep
from foreshock.api.wire import (
    ARROW,
    JSON,
    BodyLimits,
    BodyTooLarge,
    UnknownEncoding,
    decode_body,
    read_batch,
)
from foreshock.monitor.record import HORIZONS, RecordError

__all__ = ["ForecastAnswer", "router"]

router = APIRouter(tags=["risk"])

MOST_RECORDS: Final = 20_000
_RECORDS_AT_ONCE: Final = 64


class ForecastAnswer(BaseModel):
    """One risk per record, in order; each from the records up to it only."""

    horizon_steps: list[int] = Field(default_factory=lambda: list(HORIZONS))
    risks: list[RiskModel]


@router.post("/forecast", openapi_extra=RECORDS_BODY, dependencies=[READ])
async def post_forecast(
    request: Request,
    live: Live,
    services: ServicesDep,
    content_type: Annotated[str, Header(include_in_schema=False)] = JSON,
    content_encoding: ContentEncoding = "identity",
) -> ForecastAnswer:
    """Score records of one run, with rising steps; at most 20,000 a call."""
    settings = services.settings
    body = await request.body()
    media_type = content_type.partition(";")[0].strip().lower()
    limits = BodyLimits(arrow=settings.max_decoded_bytes, json=settings.max_json_bytes)
    try:
        return await run_in_threadpool(
            _forecast, body, media_type, content_encoding, limits, live.new_scorer()
        )
    except RecordError as error:
        members = {} if error.index is None else {"record": error.index}
        raise Problem(422, str(error), members=members) from None
    except BodyTooLarge as error:
        raise Problem(413, str(error)) from None
    except UnknownEncoding as error:
        raise Problem(415, str(error)) from None


def _forecast(
    body: bytes, media_type: str, encoding: str, limits: BodyLimits, scorer: Scorer
) -> ForecastAnswer:
    if media_type not in (JSON, ARROW):
        raise Problem(415, f"Content-Type {media_type!r} is not read; allowed: {JSON}, {ARROW}")
    table = read_batch(decode_body(body, encoding, limits.arrow), media_type, limits)
    if table.num_rows > MOST_RECORDS:
        raise Problem(413, f"{table.num_rows} records; at most {MOST_RECORDS} a call")
    layout = KnownLayout()
    risks, last = [], -1
    for first in range(0, table.num_rows, _RECORDS_AT_ONCE):
        part = table.slice(first, _RECORDS_AT_ONCE)
        for index, record in enumerate(scoring_records(part, [layout] * part.num_rows), first):
            if record.step <= last:
                raise RecordError(f"step {record.step} follows {last}; steps must rise", index)
            last = record.step
            risks.append(RiskModel(**risk_document(scorer.score_record(record))))
    return ForecastAnswer(risks=risks)
