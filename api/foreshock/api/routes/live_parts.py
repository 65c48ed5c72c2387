"""What the routes of the live half share: the parts they ask, and finding a run or saying 404.

Holds nothing; the parts are the application's.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from foreshock.api.live_service import LiveService
from foreshock.api.problems import Problem
from foreshock.api.registry import Run
from foreshock.api.routes.parameters import Project, RunName
from foreshock.api.schemas import Number
from foreshock.api.services import ServicesDep, find_run

__all__ = ["Live", "Number", "WantedRun"]


def _live(services: ServicesDep) -> LiveService:
    if not isinstance(services.live, LiveService):
        raise Problem(503, "this service only stores; it was started without live analysis")
    return services.live


Live = Annotated[LiveService, Depends(_live)]


def _wanted(
    services: ServicesDep,
    run: RunName,
    project: Project = "default",
) -> Run:
    return find_run(services, run, project)


WantedRun = Annotated[Run, Depends(_wanted)]
