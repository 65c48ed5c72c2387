"""Puts the service together: store, registry, ingest, live analysis and routes.

The store opens in the process that serves (its engine does not survive a fork). Starts no server.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager

import pyarrow as pa
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from foreshock.api import conditional, openapi, problems
from foreshock.api.access.admission import Access, check_reach
from foreshock.api.access.scopes import DECLARED
from foreshock.api.commits import Commits, ExclusiveCommits, SharedCommits
from foreshock.api.database import DATABASE_LOST
from foreshock.api.guard import Guard
from foreshock.api.ingest import Ingest, IngestLimits
from foreshock.api.intake import Intake, IntakeLimits
from foreshock.api.ledger import Ledger
from foreshock.api.registry import Registry
from foreshock.api.routes import (
    alerts,
    audit,
    backups,
    batches,
    compare,
    diagnosis,
    events,
    forecast,
    forecaster,
    health,
    heatmap,
    incident,
    metrics,
    page,
    recorded,
    records,
    risk,
    runs,
    series,
    tensors,
    tokens,
)
from foreshock.api.services import Latest, Live, Services
from foreshock.api.settings import Settings
from foreshock.api.silence import RunState
from foreshock.api.store import Limits, Store, StoreBusy, StoreError
from foreshock.api.store_open import open_store
from foreshock.api.store_url import ServersPlace

__all__ = ["LiveFactory", "NoLive", "create_app"]

_log = logging.getLogger(__name__)

LiveFactory = Callable[[Settings, Registry, Store], Live]

_DESCRIPTION = "Store, analyse and forecast low-precision training runs."


class NoLive:
    """A service that only stores."""

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def committed(self, run_id: str, attempt: int, table: pa.Table) -> None:
        """Do nothing."""

    def latest(self, run_id: str) -> Latest | None:
        """Know nothing."""
        return None

    def state(self, run_id: str) -> RunState | None:
        """Know nothing."""
        return None

    def states(self) -> Mapping[str, RunState]:
        """Know nothing."""
        return {}

    def ended(self, run_id: str) -> None:
        """Do nothing."""

    def delete(self, run_id: str) -> None:
        """Do nothing."""

    def clock_skew(self, run_id: str) -> float | None:
        """Know nothing."""
        return None


def create_app(settings: Settings, *, live: LiveFactory | None = None) -> FastAPI:
    """The application.

    Args:
        settings: What it is told.
        live: Makes the live analysis; None stores without analysing.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            services = await run_in_threadpool(_open, settings, live, stack)
            app.state.services = services
            app.state.live = services.live
            yield
            await run_in_threadpool(stack.close)

    app = FastAPI(
        title="foreshock",
        description=_DESCRIPTION,
        version="1",
        openapi_url="/api/v1/openapi.json",
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        generate_unique_id_function=openapi.operation_name,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.include_router(_api_router())
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(page.router)
    problems.install(app)
    conditional.install(app)
    openapi.install(app)
    app.add_exception_handler(StoreError, _on_store_error)
    for lost in DATABASE_LOST:
        app.add_exception_handler(lost, _on_database_error)
    intake = IntakeLimits(
        seconds=settings.body_seconds,
        bytes_per_second=settings.body_bytes_rate,
        held_bytes=settings.receiving_bytes,
    )
    app.add_middleware(Intake, limits=intake)
    app.add_middleware(Guard, settings=settings)
    return app


def _on_store_error(_: Request, error: Exception) -> Response:
    _log.error("the store failed: %s", error)
    busy = isinstance(error, StoreBusy)
    detail = "the store is busy" if busy else "the store could not answer; ask for less, or again"
    return problems.problem_response(problems.Problem(503, detail, headers={"Retry-After": "1"}))


def _on_database_error(_: Request, error: Exception) -> Response:
    return problems.problem_response(problems.database_lost(error))


def _api_router() -> APIRouter:
    router = APIRouter(prefix="/api/v1", dependencies=[DECLARED])
    stored = (runs, batches, series, heatmap, tensors, records)
    for module in (
        *stored,
        risk,
        diagnosis,
        alerts,
        events,
        recorded,
        forecast,
        forecaster,
        compare,
        incident,
        tokens,
        audit,
        backups,
    ):
        router.include_router(module.router)
    return router


def _open(settings: Settings, live: LiveFactory | None, stack: ExitStack) -> Services:
    """Open the parts in order; closing the stack ends them in the opposite one."""
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    registry = Registry(settings.database_place)
    stack.callback(registry.close)
    access = Access(registry, settings)
    stack.callback(access.close)
    check_reach(settings, access)
    limits = Limits(
        seconds=settings.query_seconds,
        memory_bytes=settings.query_bytes,
        clients=settings.query_clients,
    )
    store = open_store(
        settings.store_place,
        registry.layer_names,
        limits=limits,
        fsync=settings.fsync,
        retention_days=settings.retention_days,
        rollup_retention_days=settings.rollup_retention_days,
    )
    stack.callback(store.close)
    analysis = live(settings, registry, store) if live is not None else NoLive()
    ingest = Ingest(
        registry,
        store,
        analysis,
        _commits(settings, registry, store),
        IngestLimits(
            group_batches=settings.group_batches,
            group_seconds=settings.group_milliseconds / 1000,
            queue_batches=settings.queue_batches,
            queue_bytes=settings.queue_bytes,
            min_free_bytes=settings.min_free_bytes,
        ),
    )
    ingest.start()
    analysis.start()
    stack.callback(analysis.stop)
    stack.callback(ingest.stop)
    return Services(
        settings=settings,
        registry=registry,
        ledger=Ledger(registry),
        store=store,
        ingest=ingest,
        live=analysis,
        access=access,
    )


def _commits(settings: Settings, registry: Registry, store: Store) -> Commits:
    ledger = Ledger(registry)
    if isinstance(settings.store_place, ServersPlace):
        return SharedCommits(registry, ledger, store)
    if not registry.database.reserve("embedded store"):
        raise StoreError(
            "another foreshock uses this database with a store of its own; replicas need one store "
            "for all: FORESHOCK_STORE=clickhouse://..."
        )
    return ExclusiveCommits(ledger, store)
