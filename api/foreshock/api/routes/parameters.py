"""Parameters that several reading routes share: which records, and which tensor."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Path, Query

from foreshock.api.problems import Problem
from foreshock.api.registry import Run
from foreshock.api.services import Services, ServicesDep, find_run, view_of
from foreshock.api.store import LAST_STEP, SeriesKey
from foreshock.api.store_schema import NO_EXPERT
from foreshock.api.wire import ENCODINGS
from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import ROLES, STATISTICS

__all__ = [
    "AttemptNumber",
    "ContentEncoding",
    "FirstStep",
    "LastStep",
    "Project",
    "RunName",
    "Selection",
    "SelectionDep",
    "TensorQuery",
    "check_name",
]

RunName = Annotated[
    str, Path(max_length=128, description="run_id, or the name within the project.")
]
Project = Annotated[str, Query(max_length=128, description="Its project; not needed with an id.")]
FirstStep = Annotated[int, Query(ge=0, le=LAST_STEP, description="First step, included.")]
LastStep = Annotated[int, Query(ge=0, le=LAST_STEP, description="Last step, included.")]
AttemptNumber = Annotated[
    int | None,
    Query(ge=1, lt=2**31, description="Default: at each step the highest that holds it."),
]

ContentEncoding = Annotated[str, Header(description=f"One of {', '.join(ENCODINGS)}.")]


class Selection:
    """A run and the records of it that are meant.

    Attributes:
        run: The run.
        view: Its records.
    """

    def __init__(
        self,
        services: ServicesDep,
        run: RunName,
        project: Project = "default",
        attempt: AttemptNumber = None,
        first_step: FirstStep = 0,
        last_step: LastStep = LAST_STEP,
    ) -> None:
        self.run = find_run(services, run, project)
        self.view = view_of(self.run, attempt, first_step, last_step)


SelectionDep = Annotated[Selection, Depends()]


class TensorQuery:
    """Which statistic of which tensor; the parameters of the address."""

    def __init__(
        self,
        layer: Annotated[str | None, Query(description="A layer of the run.")] = None,
        role: Annotated[str, Query(description=f"One of {', '.join(ROLES)}.")] = "input",
        statistic: Annotated[str | None, Query(description="A statistic, e.g. kurtosis.")] = None,
        call_index: Annotated[
            int, Query(ge=0, lt=2**31, description="Call of the module within a step.")
        ] = 0,
        expert: Annotated[
            int | None, Query(ge=0, lt=2**31, description="Expert of a mixture of experts.")
        ] = None,
        format: Annotated[str | None, Query(description="Default: the one the run used.")] = None,
    ) -> None:
        self._layer = layer
        self._role = role
        self._statistic = statistic
        self._call_index = call_index
        self._expert = expert
        self._format = format

    def key(self, services: Services, run: Run) -> SeriesKey:
        """The series in the store.

        Raises:
            Problem: 422 for a name outside the vocabulary, 404 for an unknown layer.
        """
        if self._layer is None or self._statistic is None:
            raise Problem(422, "give name=, or layer=, role= and statistic=")
        check_name("role", self._role, ROLES)
        check_name("statistic", self._statistic, STATISTICS)
        names = services.registry.layer_names(run.run_id)
        if self._layer not in names:
            raise Problem(404, f"run {run.name!r} has no layer {self._layer!r}")
        if self._format is not None:
            check_name("format", self._format, tuple(FORMATS))
        return SeriesKey(
            layer=names.index(self._layer),
            role=self._role,
            statistic=self._statistic,
            call_index=self._call_index,
            expert=NO_EXPERT if self._expert is None else self._expert,
            format=self._format,
        )


def check_name(what: str, given: str, known: tuple[str, ...]) -> None:
    """Refuse a name outside a vocabulary.

    Raises:
        Problem: 422, lists the known names.
    """
    if given not in known:
        raise Problem(422, f"unknown {what} {given!r}; known: {', '.join(known)}")
