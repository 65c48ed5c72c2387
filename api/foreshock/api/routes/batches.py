"""Take batches of records: answered with 2xx only once they are durable."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Annotated, Final

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from foreshock.api.access.scopes import WRITE
from foreshock.api.arrowguard import BodyTooLarge
from foreshock.api.bodies import RECORDS_BODY
from foreshock.api.ingest import BatchConflict, Gone, Incoming, Receipt, Refused, Unavailable
from foreshock.api.ledger import BatchKey
from foreshock.api.openapi import errors
from foreshock.api.problems import Problem
from foreshock.api.registry import LaunchOwner
from foreshock.api.routes.parameters import ContentEncoding, RunName
from foreshock.api.schemas import BatchReceipt
from foreshock.api.services import Services, ServicesDep
from foreshock.api.wire import (
    ARROW,
    JSON,
    BodyLimits,
    UnknownEncoding,
    decode_body,
    digest,
    read_batch,
)
from foreshock.monitor.record import RecordError

__all__ = ["router"]

router = APIRouter(tags=["batches"])

_KEY: Final = re.compile(
    r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})-([0-9]{1,9})-([0-9]{1,18})"
)
_ARROW_TYPES: Final = (ARROW, "application/octet-stream", "")
_WAIT_SECONDS: Final = 60.0
_RETRY: Final = {"Retry-After": "1"}


@router.put(
    "/runs/{run}/batches/{batch}",
    status_code=201,
    responses=errors(409, also={200: {"model": BatchReceipt, "description": "Durable before"}}),
    openapi_extra=RECORDS_BODY,
    dependencies=[WRITE],
)
async def put_batch(
    run: RunName,
    batch: Annotated[str, Path(description="{launch_id}-{rank}-{sequence}")],
    request: Request,
    response: Response,
    services: ServicesDep,
    content_encoding: ContentEncoding = "identity",
    content_type: Annotated[str, Header(include_in_schema=False)] = "",
) -> BatchReceipt:
    """Store a batch of records exactly once, all or nothing.

    Same id and same contents again: 200 and `duplicate`. Other contents: 409. Unknown run or
    launch: 404, post it and retry. 503: retry the same batch later.
    """
    key = _parse_key(batch)
    media_type = content_type.split(";")[0].strip().lower()
    if media_type != JSON and media_type not in _ARROW_TYPES:
        raise Problem(415, f"Content-Type {media_type!r} is not read; allowed: {ARROW}, {JSON}")
    owner = await _owner(services, run, key)
    key = replace(key, launch_id=owner.key)
    body = await request.body()
    arrival = _Arrival(owner.run_id, key, body, content_encoding, media_type)
    answer = await to_thread.run_sync(_take, services, arrival, limiter=services.decoders)
    if isinstance(answer, Receipt):
        receipt = answer
    else:
        receipt = await _durable(answer)
    response.status_code = 200 if receipt.duplicate else 201
    return BatchReceipt(
        duplicate=receipt.duplicate, attempts=list(receipt.attempts), records=receipt.records
    )


@dataclass(frozen=True, slots=True)
class _Arrival:
    run_id: str
    key: BatchKey
    body: bytes
    encoding: str
    media_type: str


def _parse_key(batch: str) -> BatchKey:
    found = _KEY.fullmatch(batch.lower())
    if found is None:
        raise Problem(422, "a batch id is {launch_id}-{rank}-{sequence}, launch_id a UUID")
    return BatchKey(found[1], int(found[2]), int(found[3]))


async def _owner(services: Services, run: str, key: BatchKey) -> LaunchOwner:
    """The run of a batch's launch, which must be the one in the address."""

    def seen(owners: Sequence[LaunchOwner]) -> list[LaunchOwner]:
        return [owner for owner in owners if services.principal.sees(owner.project)]

    def meant(owners: Sequence[LaunchOwner]) -> LaunchOwner | None:
        return next((owner for owner in owners if run in (owner.run_id, owner.name)), None)

    registry = services.registry
    owners = seen(registry.remembered_owners(key.launch_id))
    if meant(owners) is None:
        # Another replica may have deleted the run, and announced another one.
        owners = seen(await run_in_threadpool(registry.launch_owners, key.launch_id))
    if not owners:
        raise Problem(404, f"launch {key.launch_id} is not known; POST /api/v1/runs, then retry")
    owner = meant(owners)
    if owner is None:
        raise Problem(404, f"launch {key.launch_id} does not belong to run {run!r}")
    return owner


def _take(services: Services, arrival: _Arrival) -> Receipt | Future[Receipt]:
    """Decode, check and hand over a batch; in a thread."""
    settings = services.settings
    limits = BodyLimits(arrow=settings.max_decoded_bytes, json=settings.max_json_bytes)
    largest = limits.json if arrival.media_type == JSON else limits.arrow
    try:
        body = decode_body(arrival.body, arrival.encoding, largest)
        fingerprint = digest(body)
        known = services.ingest.known(arrival.key, fingerprint)
        if known is not None:
            return known
        table = read_batch(body, arrival.media_type, limits)
        return services.ingest.submit(
            Incoming(run_id=arrival.run_id, key=arrival.key, digest=fingerprint, table=table)
        )
    except UnknownEncoding as error:
        raise Problem(415, str(error)) from None
    except BodyTooLarge as error:
        raise Problem(413, str(error)) from None
    except RecordError as error:
        members = {} if error.index is None else {"record": error.index}
        raise Problem(422, str(error), members=members) from None
    except BatchConflict as error:
        raise Problem(409, str(error)) from None
    except Unavailable as error:
        raise Problem(503, str(error), headers=_RETRY) from None


async def _durable(future: Future[Receipt]) -> Receipt:
    try:
        return await asyncio.wait_for(
            asyncio.shield(asyncio.wrap_future(future)), timeout=_WAIT_SECONDS
        )
    except BatchConflict as error:
        raise Problem(409, str(error)) from None
    except Gone as error:
        raise Problem(404, str(error)) from None
    except Refused as error:
        raise Problem(422, str(error)) from None
    except Unavailable as error:
        raise Problem(503, str(error), headers=_RETRY) from None
    except TimeoutError:
        raise Problem(503, "the store does not answer", headers=_RETRY) from None
