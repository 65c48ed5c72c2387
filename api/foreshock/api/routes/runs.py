"""Announce a launch; list runs and look at one."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Query, Response

from foreshock.api.access.scopes import ADMIN, READ, WRITE
from foreshock.api.openapi import errors
from foreshock.api.paging import PageDep
from foreshock.api.problems import Problem
from foreshock.api.registry import Attempt, LaunchConflict, LaunchRequest, Run
from foreshock.api.risk_notes import notes_of
from foreshock.api.routes.parameters import Project, RunName
from foreshock.api.run_list import LIVE_FOR, ListedRun, RunFilter, RunOrder, list_page
from foreshock.api.schemas import (
    AttemptBody,
    LaunchAnswer,
    LaunchBody,
    RunBody,
    RunDetail,
    RunList,
    number,
)
from foreshock.api.services import Services, ServicesDep, find_run
from foreshock.monitor.record import HORIZONS, STATISTICS, AlertState, RiskKind

__all__ = ["router"]

router = APIRouter(tags=["runs"])

_ID_LENGTH: Final = 32


@router.post(
    "/runs",
    status_code=201,
    dependencies=[WRITE],
    responses=errors(409, also={200: {"model": LaunchAnswer, "description": "Known already"}}),
)
def announce_launch(body: LaunchBody, services: ServicesDep, response: Response) -> LaunchAnswer:
    """Start an attempt of a run. The same launch_id gives the same answer (200)."""
    if len(body.run) == _ID_LENGTH and all(c in "0123456789abcdef" for c in body.run):
        raise Problem(422, "a run's name must not look like a run_id (32 hex digits)")
    project = services.principal.home(body.project)
    if not services.principal.sees(project):
        raise Problem(403, f"this token has no access to project {project!r}")
    launch_id = str(body.launch_id)
    request = LaunchRequest(
        project=project,
        run=body.run,
        launch_id=launch_id,
        first_step=body.first_step,
        parent_launch=str(body.parent_launch) if body.parent_launch else None,
        config=body.config,
        layers=tuple(dict.fromkeys(body.layers)),
        tokens_per_step=body.tokens_per_step,
        world_size=body.world_size,
    )
    try:
        run_id, attempt, new = services.registry.launch(request)
    except LaunchConflict as error:
        raise Problem(409, str(error)) from None
    except ValueError as error:
        raise Problem(422, str(error)) from None
    if not new:
        response.status_code = 200
    else:
        services.note("launch.announce", project=project, subject=body.run, launch=launch_id)
    return LaunchAnswer(run_id=run_id, attempt=attempt)


class RunQuery:
    """Filters and order of the list."""

    def __init__(
        self,
        status: Annotated[
            Literal["new", "live", "stale", "finished"] | None, Query(description="Only those.")
        ] = None,
        state: Annotated[
            Literal["ok", "pending", "firing", "resolved"] | None,
            Query(description="Only runs whose alert is in this state."),
        ] = None,
        name: Annotated[
            str | None, Query(max_length=128, description="Only names that begin so.")
        ] = None,
        order: Annotated[
            RunOrder, Query(description="Newest, A to Z or riskiest first.")
        ] = "last_heard",
    ) -> None:
        self._filter = RunFilter(status=status, state=state, prefix=name)
        self.order = order

    def within(self, projects: frozenset[str] | None) -> RunFilter:
        """The filter, kept to these projects; None = all."""
        return replace(self._filter, projects=projects)


@router.get("/runs", dependencies=[READ])
def list_runs(
    services: ServicesDep,
    page: PageDep,
    wanted: Annotated[RunQuery, Depends()],
    project: Annotated[
        str | None, Query(max_length=128, description="Only this project's; default: all.")
    ] = None,
) -> RunList:
    """Runs, a page at a time.

    A page after the first starts after the last run of the page before. With `order` created or
    name nothing is shown twice or missed, whatever comes in meanwhile; last_heard and risk are
    rankings that change while they are read.
    """
    projects = services.principal.projects
    if project is not None:
        projects = frozenset({project} if services.principal.sees(project) else ())
    listed, more = list_page(
        services.registry,
        wanted.within(projects),
        wanted.order,
        page.limit,
        page.cursor,
        states=services.live.states(),
        now=datetime.now(UTC),
    )
    shown = [RunBody(**_summary(services, each)) for each in listed]
    return RunList(runs=shown, next=page.more(more))


@router.get("/runs/{run}", dependencies=[READ])
def get_run(run: RunName, services: ServicesDep, project: Project = "default") -> RunDetail:
    """One run, by run_id, or by name within a project."""
    found = find_run(services, run, project)
    kinds = services.store.tensor_kinds(found.run_id)
    with services.registry.engine.begin() as connection:
        note = notes_of(connection, [found.run_id]).get(found.run_id)
    return RunDetail(
        **_summary(services, ListedRun(found, note)),
        tokens_per_step=found.tokens_per_step,
        world_size=found.world_size,
        config=dict(found.config),
        layers=services.registry.ordered_layers(found),
        scalars=services.store.scalar_names(found.run_id),
        roles=kinds.roles,
        formats=kinds.formats,
        statistics=list(STATISTICS),
        history=[_attempt(item) for item in found.attempts],
    )


def _summary(services: Services, listed: ListedRun) -> dict[str, Any]:
    run, current = listed.run, listed.run.current
    received = current.last_received if current else None
    return {
        "run_id": run.run_id,
        "project": run.project,
        "run": run.name,
        "status": _status(services, run),
        "clock_skew_seconds": services.live.clock_skew(run.run_id),
        "attempts": len(run.attempts),
        "attempt": current.number if current else None,
        "first_step": run.first_step,
        "last_step": current.last_step if current else None,
        "created_at": run.created_at,
        "last_received": received,
        "loss": number(current.last_loss) if current else None,
        **_risk(services, listed),
    }


def _risk(services: Services, listed: ListedRun) -> dict[str, Any]:
    """The newest risk: from memory, or as another replica or an earlier process noted it."""
    latest = services.live.latest(listed.run.run_id)
    note, current = listed.risk, listed.run.current
    if latest is not None:
        risk = latest.risk
        state: AlertState | None = risk.state
        kind: RiskKind | None = risk.kind
        probability = {str(horizon): p for horizon, p in risk.probability.items()}
    elif note is not None and current is not None and note.attempt == current.number:
        state, kind, probability = note.state, note.kind, dict(note.probability)
    else:
        return {"state": None, "kind": None, "risk": None}
    shown = {str(horizon): number(probability.get(str(horizon))) for horizon in HORIZONS}
    return {"state": state, "kind": kind, "risk": shown}


def _status(services: Services, run: Run) -> str:
    received = run.current.last_received if run.current else None
    if received is None:
        return "new"
    if run.finished:
        return "finished"
    # Not watched: it was silent for hours, or this service only stores.
    lately = datetime.now(UTC) - received < LIVE_FOR
    return services.live.state(run.run_id) or ("live" if lately else "stale")


def _attempt(attempt: Attempt) -> AttemptBody:
    return AttemptBody(
        number=attempt.number,
        launch_id=attempt.launch_id,
        parent_launch=attempt.parent_launch,
        first_step=attempt.first_step,
        last_step=attempt.last_step,
        started_at=attempt.started_at,
        last_received=attempt.last_received,
    )


@router.post("/runs/{run}/end", status_code=204, dependencies=[WRITE], responses=errors(404))
def end_run(run: RunName, services: ServicesDep, project: Project = "default") -> None:
    """Say that a run is over, so that its silence alarms nobody; a later record takes it back."""
    found = find_run(services, run, project)
    current = found.current
    if current is None:
        return
    services.registry.end_run(found.run_id, current.number, current.last_step or 0)
    services.live.ended(found.run_id)
    services.note("run.end", project=found.project, subject=found.name)


@router.delete("/runs/{run}", status_code=204, dependencies=[ADMIN], responses=errors(404))
def delete_run(run: RunName, services: ServicesDep, project: Project = "default") -> None:
    """Delete a run and all that is known of it: records, risks, alerts, layers, ledger.

    Batches of it get 404 from then on, so nothing comes back by itself; a job that still runs
    announces itself anew, as another run of the same name.
    """
    found = find_run(services, run, project)
    services.ingest.delete(found.run_id)
    services.live.delete(found.run_id)
    services.note("run.delete", project=found.project, subject=found.name, run_id=found.run_id)
