"""What the routes of the live half share: the parts they ask, and finding a run or saying 404.

Holds nothing; the parts are the application's.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Query

from foreshock.api.live_service import LiveService
from foreshock.api.problems import Problem
from foreshock.api.registry import Run
from foreshock.api.services import ServicesDep, find_run

__all__ = ["Live", "Number", "WantedRun"]

Number = float | str | None
"""A number in JSON: non-finite ones are the words NaN, Infinity and -Infinity."""


def _live(services: ServicesDep) -> LiveService:
    if not isinstance(services.live, LiveService):
        raise Problem(503, "this service only stores; it was started without live analysis")
    return services.live


Live = Annotated[LiveService, Depends(_live)]


def _wanted(
    services: ServicesDep,
    run: Annotated[str, Path(description="Name or id of the run", max_length=128)],
    project: Annotated[str, Query(description="Its project; not needed with an id")] = "default",
) -> Run:
    return find_run(services, run, project)


WantedRun = Annotated[Run, Depends(_wanted)]
