"""Liveness and readiness; open to everybody, and without a word about the data."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Response

from foreshock.api.schemas import Health
from foreshock.api.services import Services, ServicesDep
from foreshock.api.store import StoreError, View

__all__ = ["router"]

router = APIRouter(tags=["health"])

_FAILING: Final[dict[int | str, dict[str, Any]]] = {
    503: {"model": Health, "description": "Failing, with the reasons"}
}


@router.get("/healthz", responses=_FAILING)
async def get_health(services: ServicesDep, response: Response) -> Health:
    """Whether the process does its work; 503 means: restart it."""
    # Runs in the event loop, so that it answers even if every worker thread hangs.
    return _answer(_faults(services), response)


@router.get("/readyz", responses=_FAILING)
def get_readiness(services: ServicesDep, response: Response) -> Health:
    """Whether requests will be served now: as health, and the store answers."""
    faults = _faults(services)
    if services.ingest.disk_full:
        faults.append("the disk is nearly full; batches are not taken")
    if not faults:
        try:
            services.store.bounds(View(run_id=""))
        except StoreError:
            faults.append("the store does not answer")
        if not services.registry.database.answers():
            faults.append("the database does not answer")
    return _answer(faults, response)


def _faults(services: Services) -> list[str]:
    faults = []
    if not services.ingest.alive:
        faults.append("the writer has stopped")
    if services.store.hung_seconds() > 0:
        faults.append("a query hangs")
    return faults


def _answer(faults: list[str], response: Response) -> Health:
    if faults:
        response.status_code = 503
    return Health(status="failing" if faults else "ok", reasons=faults)
