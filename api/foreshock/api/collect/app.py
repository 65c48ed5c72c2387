"""The door of a relay: the calls of the service that a training job makes, and one for reports."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Final
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from foreshock.api import problems
from foreshock.api.access.admission import Access, check_reach
from foreshock.api.access.scopes import DECLARED, READ, WRITE, principal_of
from foreshock.api.arrowguard import BodyTooLarge
from foreshock.api.collect.depot import BatchName, DepotFull, Taken
from foreshock.api.collect.relay import Relay
from foreshock.api.collect.settings import CollectSettings
from foreshock.api.guard import Guard
from foreshock.api.problems import Problem
from foreshock.api.registry import Registry
from foreshock.api.schemas import BatchReceipt, Health, LaunchBody, Name
from foreshock.api.wire import (
    ARROW,
    JSON,
    BodyLimits,
    UnknownEncoding,
    decode_body,
    digest,
    read_batch,
)
from foreshock.monitor.record import RecordError, ReportError, decode_reports

__all__ = ["create_collect_app"]

_KEY: Final = re.compile(
    r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})-([0-9]{1,9})-([0-9]{1,18})"
)
_ARROW_TYPES: Final = (ARROW, "application/octet-stream", "")
_RETRY: Final = {"Retry-After": "2"}


class Announced(BaseModel):
    """A launch is on disk here; the service numbers its attempt when it hears of it."""

    launch_id: UUID
    run: str


class ReportReceipt(BaseModel):
    """Reports were taken."""

    reports: int


def create_collect_app(settings: CollectSettings) -> FastAPI:
    """The application of a relay."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            app.state.services = await run_in_threadpool(_open, settings, stack)
            yield
            await run_in_threadpool(stack.close)

    app = FastAPI(
        title="foreshock collect",
        description="Relays records and reports of ranks.",
        version="1",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    api = APIRouter(prefix="/api/v1", dependencies=[DECLARED])
    api.post("/runs", status_code=202, dependencies=[WRITE])(announce)
    api.put("/runs/{run}/batches/{batch}", status_code=201, dependencies=[WRITE])(put_batch)
    api.put("/runs/{run}/reports/{launch_id}", status_code=202, dependencies=[WRITE])(put_reports)
    app.include_router(api)
    app.get("/healthz")(healthz)
    app.get("/readyz")(readyz)
    app.get("/metrics", response_class=Response, dependencies=[READ])(metrics)
    problems.install(app)
    app.add_exception_handler(sqlite3.Error, _on_disk_error)
    app.add_middleware(Guard, settings=settings.door)
    return app


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the door (`access`) and the routes need."""

    relay: Relay
    access: Access


def _open(settings: CollectSettings, stack: ExitStack) -> _Parts:
    settings.folder.mkdir(parents=True, exist_ok=True)
    registry = Registry(settings.folder / "registry.sqlite")
    stack.callback(registry.close)
    access = Access(registry, settings.door)
    stack.callback(access.close)
    check_reach(settings.door, access)
    relay = Relay(settings)
    relay.start()
    stack.callback(relay.stop)
    return _Parts(relay, access)


def _relay(request: Request) -> Relay:
    parts = request.app.state.services
    assert isinstance(parts, _Parts)
    return parts.relay


RelayDep = Annotated[Relay, Depends(_relay)]


def announce(body: LaunchBody, relay: RelayDep, request: Request) -> Announced:
    """Keep a launch, to be announced to the service before its first batch."""
    principal = principal_of(request)
    project = principal.home(body.project)
    if not principal.sees(project):
        raise Problem(403, f"this token is not for the project {project!r}")
    launch_id = str(body.launch_id)
    plain = body.model_dump(mode="json") | {"project": project}
    if not relay.depot.announce(launch_id, body.run, plain):
        raise Problem(409, f"launch {launch_id} belongs to another run; give each launch its own")
    return Announced(launch_id=body.launch_id, run=body.run)


async def put_batch(
    run: Name,
    batch: Annotated[str, Path(description="{launch_id}-{rank}-{sequence}")],
    request: Request,
    response: Response,
    relay: RelayDep,
    content_encoding: Annotated[str, Header()] = "identity",
    content_type: Annotated[str, Header()] = "",
) -> BatchReceipt:
    """Take a batch of records; on disk when answered, passed on afterwards.

    Same id and same contents again: 200 and `duplicate`. Other contents: 409. Unknown launch: 404,
    post it and retry. 503: no room, retry the same batch later.
    """
    name = _parse_name(batch)
    media_type = content_type.split(";")[0].strip().lower()
    if media_type != JSON and media_type not in _ARROW_TYPES:
        raise Problem(415, f"Content-Type {media_type!r} is not read; allowed: {ARROW}, {JSON}")
    media_type = JSON if media_type == JSON else ARROW
    body = await request.body()
    await run_in_threadpool(_owned, relay, request, run, name.launch_id)
    receipt = await run_in_threadpool(_take_batch, relay, name, body, content_encoding, media_type)
    response.status_code = 200 if receipt.duplicate else 201
    return receipt


def _parse_name(batch: str) -> BatchName:
    found = _KEY.fullmatch(batch.lower())
    if found is None:
        raise Problem(422, "a batch id is {launch_id}-{rank}-{sequence}, launch_id a UUID")
    return BatchName(found[1], int(found[2]), int(found[3]))


def _owned(relay: Relay, request: Request, run: str, launch_id: str) -> None:
    """Check that a launch is known, of that run, and of a project of the caller's."""
    launch = relay.depot.launch(launch_id)
    mine = launch is not None and principal_of(request).sees(launch.project)
    if launch is None or launch.run != run or not mine:
        raise Problem(404, f"launch {launch_id} is not known; POST /api/v1/runs, then retry")


def _take_batch(
    relay: Relay, name: BatchName, body: bytes, encoding: str, media_type: str
) -> BatchReceipt:
    door = relay.settings.door
    limits = BodyLimits(arrow=door.max_decoded_bytes, json=door.max_json_bytes)
    try:
        plain = decode_body(body, encoding, limits.json if media_type == JSON else limits.arrow)
        records = read_batch(plain, media_type, limits).num_rows
        taken = relay.take_batch(name, digest=digest(plain), media_type=media_type, body=plain)
    except UnknownEncoding as error:
        raise Problem(415, str(error)) from None
    except BodyTooLarge as error:
        raise Problem(413, str(error)) from None
    except RecordError as error:
        members = {} if error.index is None else {"record": error.index}
        raise Problem(422, str(error), members=members) from None
    except DepotFull as error:
        raise Problem(503, f"the relay is full: {error}", headers=_RETRY) from None
    if taken is Taken.CONFLICT:
        raise Problem(409, f"batch {name} has come with other contents before")
    return BatchReceipt(duplicate=taken is Taken.AGAIN, attempts=[], records=records)


async def put_reports(
    run: Name,
    launch_id: UUID,
    request: Request,
    relay: RelayDep,
    content_encoding: Annotated[str, Header()] = "identity",
) -> ReportReceipt:
    """Take reports of ranks about their steps; what comes again changes nothing.

    The form of the body: `foreshock.monitor.record.reports`.
    """
    body = await request.body()

    def take() -> int:
        # Of other nodes' launches a relay knows no more than the address says.
        if relay.depot.launch(str(launch_id)) is not None:
            _owned(relay, request, run, str(launch_id))
        try:
            plain = decode_body(body, content_encoding, relay.settings.door.max_json_bytes)
            reports = decode_reports(plain)
        except UnknownEncoding as error:
            raise Problem(415, str(error)) from None
        except BodyTooLarge as error:
            raise Problem(413, str(error)) from None
        except (RecordError, ReportError) as error:
            raise Problem(422, str(error)) from None
        relay.counts.bundle_bytes += len(body)
        relay.take_reports(run, str(launch_id), reports)
        return len(reports)

    return ReportReceipt(reports=await run_in_threadpool(take))


async def healthz(relay: RelayDep, response: Response) -> Health:
    """Whether the process does its work; 503 means: restart it."""
    return _health(relay, [], response)


def readyz(relay: RelayDep, response: Response) -> Health:
    """Whether batches are taken now."""
    full = relay.depot.size >= relay.settings.max_bytes
    return _health(relay, ["no room for batches"] if full else [], response)


def _health(relay: Relay, faults: list[str], response: Response) -> Health:
    if not relay.alive:
        faults = [*faults, "a thread has stopped"]
    if faults:
        response.status_code = 503
    return Health(status="failing" if faults else "ok", reasons=faults)


def metrics(relay: RelayDep, accept: Annotated[str, Header()] = "") -> Response:
    """The relay itself, for Prometheus."""
    registry = CollectorRegistry()
    registry.register(_Metrics(relay))
    encoder, content_type = choose_encoder(accept)
    return Response(encoder(registry), media_type=None, headers={"Content-Type": content_type})


def _on_disk_error(_: Request, error: Exception) -> Response:
    # The message of the engine names a full or failing disk, and no data.
    problem = Problem(503, f"the relay's disk fails: {error}", headers=_RETRY)
    return problems.problem_response(problem)


class _Metrics(Collector):
    """Numbers of a relay at one moment."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def collect(self) -> Iterable[Metric]:
        """Yield every metric."""
        counts, depot, forwarder = self._relay.counts, self._relay.depot, self._relay.forwarder
        counters = (
            ("batches", "Batches taken", counts.batches),
            ("batches_again", "Batches that came again", counts.batches_again),
            ("batch_bytes", "Bytes of batches that came", counts.batch_bytes),
            ("bundles", "Bundles of reports that came", counts.bundles),
            ("bundle_bytes", "Bytes of bundles that came", counts.bundle_bytes),
            ("rank_steps", "Reports that came, one for each rank and step", counts.rank_steps),
            ("late_rank_steps", "Reports that came after their record had gone on", counts.late),
            ("dropped_rank_steps", "Reports given up", counts.dropped),
            ("lost_events", "Late events given up for want of room", counts.events_lost),
            ("merged_records", "Records that went on with reports", counts.records_merged),
            ("forwarded_batches", "Batches that the upstream took", forwarder.forwarded),
            ("refused_batches", "Batches that the upstream refused", forwarder.refused),
            ("given_up", "Refused batches and kept reports removed for room", depot.given_up),
            ("upstream_failures", "Tries without success", forwarder.failures),
            ("sent_bytes", "Bytes sent upstream", forwarder.sent_bytes),
        )
        for name, meaning, value in counters:
            yield CounterMetricFamily(f"foreshock_collect_{name}", meaning, value=value)
        gauges = (
            ("waiting_batches", "Batches that have not gone on", depot.count_waiting()),
            ("spool_bytes", "Bytes of batches on disk", depot.size),
            ("pending_steps", "Steps for which reports wait", self._relay.pending_steps),
        )
        for name, meaning, value in gauges:
            yield GaugeMetricFamily(f"foreshock_collect_{name}", meaning, value=value)
