"""The parts of one running service, as routes see them.

Made in `app.py`, kept in the application's state; knows no route.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Protocol

from anyio import CapacityLimiter
from fastapi import Depends, Request

from foreshock.api.access.admission import Access
from foreshock.api.access.audit import Action, Detail
from foreshock.api.access.principal import NOBODY, Principal
from foreshock.api.access.scopes import principal_of
from foreshock.api.ingest import CommitListener, Ingest
from foreshock.api.ledger import Ledger
from foreshock.api.problems import Problem
from foreshock.api.registry import Registry, Run
from foreshock.api.settings import Settings
from foreshock.api.silence import RunState
from foreshock.api.store import Store, View
from foreshock.monitor.record import Risk

__all__ = ["Latest", "Live", "Services", "ServicesDep", "find_run", "view_of"]


class Latest(Protocol):
    """The newest answer about a run."""

    @property
    def risk(self) -> Risk:
        """The risk at its newest step."""
        ...


class Live(CommitListener, Protocol):
    """Live analysis, as the service runs it."""

    def start(self) -> None:
        """Start its worker."""

    def stop(self) -> None:
        """Finish and end its worker."""

    def latest(self, run_id: str) -> Latest | None:
        """The newest answer about a run, or None."""

    def state(self, run_id: str) -> RunState | None:
        """What a run is doing, or None."""

    def states(self) -> Mapping[str, RunState]:
        """What the runs that are watched are doing."""

    def ended(self, run_id: str) -> None:
        """Somebody says that a run is over."""

    def delete(self, run_id: str) -> None:
        """Forget a run that the registry does not know any more."""

    def clock_skew(self, run_id: str) -> float | None:
        """Seconds that a run's clock seems to be behind, or None."""


def _decoders() -> CapacityLimiter:
    return CapacityLimiter(max(2, os.cpu_count() or 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything a route may need.

    Attributes:
        decoders: Bounds the threads that take bodies apart: more than there are cores would only
            wait for each other, and reads of the store, which have threads of their own, never
            hold up ingest.
        principal: Who asks; routes get it from the request. Runs of projects that it does not see
            do not exist for it: find runs with `find_run`, and filter whatever spans several.
    """

    settings: Settings
    registry: Registry
    ledger: Ledger
    store: Store
    ingest: Ingest
    live: Live
    access: Access
    decoders: CapacityLimiter = field(default_factory=_decoders)
    principal: Principal = NOBODY

    def note(
        self,
        action: Action,
        *,
        project: str | None = None,
        subject: str | None = None,
        **detail: Detail,
    ) -> None:
        """Add to the audit log what the caller did; waits for the database."""
        self.access.audit.add(
            action, self.principal, project=project, subject=subject, detail=detail
        )


def _services(request: Request) -> Services:
    services = request.app.state.services
    if not isinstance(services, Services):
        raise TypeError("the application has not been started")
    return replace(services, principal=principal_of(request))


ServicesDep = Annotated[Services, Depends(_services)]


def find_run(services: Services, run: str, project: str = "default") -> Run:
    """A run by id, or by name within a project, that the caller may see.

    Raises:
        Problem: 404, there is none for this caller.
    """
    project = services.principal.home(project)
    run_id = services.registry.run_id(run, project)
    found = services.registry.run(run_id) if run_id is not None else None
    if found is None or not services.principal.sees(found.project):
        raise Problem(
            404, f"there is no run {run!r} in project {project!r}; POST /api/v1/runs first"
        )
    return found


def view_of(run: Run, attempt: int | None, first_step: int, last_step: int) -> View:
    """The records of a run that a request means.

    Raises:
        Problem: 404, the run has no such attempt.
    """
    if attempt is not None and all(a.number != attempt for a in run.attempts):
        raise Problem(404, f"run {run.name!r} has no attempt {attempt}")
    holding = [a.number for a in run.attempts if a.last_step is not None]
    if attempt is None and len(holding) == 1:
        # One attempt holds every step, so the search for the highest can be left out.
        attempt = holding[0]
    return View(run.run_id, attempt, first_step, last_step)
