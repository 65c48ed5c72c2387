"""Which runs a list shows, in which order, and where a page of it ends; in SQL, a page at a time.

What a page costs in memory does not grow with how many runs there are, nor with their
configurations, which are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import sqlalchemy as sa

from foreshock.api.paging import read_cursor, write_cursor
from foreshock.api.registry import Registry, Run, attempt_of, utc
from foreshock.api.registry_tables import attempts, run_ends, run_risks, runs
from foreshock.api.risk_notes import UNKNOWN, RiskNote, notes_of
from foreshock.api.silence import RunState

__all__ = ["LIVE_FOR", "ListedRun", "RunFilter", "RunOrder", "list_page"]

RunOrder = Literal["last_heard", "created", "name", "risk"]

LIVE_FOR: Final = timedelta(minutes=2)
"""A run that nobody watches is live for so long after it was heard of."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_KEYS: Final[Mapping[str, tuple[type | tuple[type, ...], ...]]] = {
    "last_heard": (int, str),
    "created": (int, str),
    "name": (str, str, str),
    "risk": ((int, float), str),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFilter:
    """Which runs are meant; None leaves a member out of it.

    Attributes:
        projects: Of these projects.
        status: Whether it is heard of.
        state: State of its alert.
        prefix: How its name begins.
    """

    projects: frozenset[str] | None = None
    status: str | None = None
    state: str | None = None
    prefix: str | None = None


@dataclass(frozen=True, slots=True)
class ListedRun:
    """A run of the list, without layers and configuration, and its newest risk."""

    run: Run
    risk: RiskNote | None


# One row per run: when it was heard of, and the highest attempt that holds records.
_heard: Final = (
    sa.select(
        attempts.c.run_id,
        sa.func.max(attempts.c.last_received).label("heard"),
        sa.func.max(sa.case((attempts.c.last_step.is_not(None), attempts.c.number))).label(
            "newest"
        ),
    )
    .group_by(attempts.c.run_id)
    .subquery("heard")
)
_current: Final = attempts.alias("current")
_ROWS: Final = (
    runs.join(_heard, _heard.c.run_id == runs.c.run_id, isouter=True)
    .join(
        _current,
        sa.and_(_current.c.run_id == runs.c.run_id, _current.c.number == _heard.c.newest),
        isouter=True,
    )
    .join(run_ends, run_ends.c.run_id == runs.c.run_id, isouter=True)
    .join(
        run_risks,
        sa.and_(run_risks.c.run_id == runs.c.run_id, run_risks.c.attempt == _heard.c.newest),
        isouter=True,
    )
)
_RECORDED: Final = _current.c.last_received.is_not(None)
_OVER: Final = sa.and_(
    _RECORDED,
    sa.or_(
        run_ends.c.attempt > _current.c.number,
        sa.and_(run_ends.c.attempt == _current.c.number, run_ends.c.step >= _current.c.last_step),
    ),
)
_LAST_HEARD: Final = sa.func.coalesce(_heard.c.heard, runs.c.created_at)
_WORST: Final = sa.func.coalesce(run_risks.c.worst, UNKNOWN)


def list_page(
    registry: Registry,
    wanted: RunFilter,
    order: RunOrder,
    limit: int,
    cursor: str | None,
    *,
    states: Mapping[str, RunState],
    now: datetime,
) -> tuple[list[ListedRun], str | None]:
    """A page of runs, and the cursor of the next one.

    Args:
        registry: Whose runs.
        wanted: Which of them.
        order: last_heard and created: newest first; name: by name; risk: highest first, unknown
            last. A run that moves up in last_heard or risk while pages are read is on a page
            before; created and name keep every run in its place.
        limit: Most runs of the page.
        cursor: Of the page before; None for the first.
        states: What the runs that are watched are doing.
        now: The time.

    Raises:
        Problem: 422, the cursor is none of this order's.
    """
    kind = f"runs-{order}"
    query = sa.select(
        runs.c.run_id,
        runs.c.project,
        runs.c.name,
        runs.c.created_at,
        run_ends.c.attempt.label("ended"),
        run_ends.c.step.label("ended_step"),
        sa.type_coerce(_LAST_HEARD, runs.c.created_at.type).label("last_heard"),
        _WORST.label("worst"),
    ).select_from(_ROWS)
    query = query.where(*_conditions(wanted, states, now)).order_by(*_ordering(order))
    if cursor is not None:
        query = query.where(_after(order, read_cursor(cursor, kind, *_KEYS[order])))
    with registry.engine.begin() as connection:
        rows = connection.execute(query.limit(limit + 1)).all()
        page = rows[:limit]
        listed = _listed(connection, page)
    more = write_cursor(kind, *_key(order, page[-1])) if len(rows) > limit else None
    return listed, more


def _conditions(
    wanted: RunFilter, states: Mapping[str, RunState], now: datetime
) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if wanted.projects is not None:
        found.append(runs.c.project.in_(sorted(wanted.projects)))
    if wanted.prefix:
        # Not LIKE, which takes no notice of case in one database and does in the other.
        found.append(sa.func.substr(runs.c.name, 1, len(wanted.prefix)) == wanted.prefix)
    if wanted.state is not None:
        found.append(run_risks.c.state == wanted.state)
    if wanted.status is not None:
        found.append(_of_status(wanted.status, states, now))
    return found


def _of_status(
    status: str, states: Mapping[str, RunState], now: datetime
) -> sa.ColumnElement[bool]:
    if status == "new":
        return sa.not_(_RECORDED)
    watched = runs.c.run_id.in_(sorted(states))
    so = runs.c.run_id.in_(sorted(run_id for run_id, state in states.items() if state == status))
    if status == "finished":
        return sa.and_(_RECORDED, sa.or_(sa.func.coalesce(_OVER, sa.false()), so))
    lately = _current.c.last_received > now - LIVE_FOR
    alone = lately if status == "live" else sa.not_(lately)
    going = sa.and_(_RECORDED, sa.not_(sa.func.coalesce(_OVER, sa.false())))
    return sa.and_(going, sa.or_(so, sa.and_(sa.not_(watched), alone)))


def _ordering(order: RunOrder) -> Sequence[sa.ColumnElement[Any]]:
    if order == "name":
        return runs.c.name, runs.c.project, runs.c.run_id
    return _falling(order).desc(), runs.c.run_id


def _falling(order: RunOrder) -> sa.ColumnElement[Any]:
    if order == "risk":
        return _WORST
    return runs.c.created_at if order == "created" else _LAST_HEARD


def _after(order: RunOrder, key: tuple[Any, ...]) -> sa.ColumnElement[bool]:
    if order == "name":
        return sa.tuple_(runs.c.name, runs.c.project, runs.c.run_id) > sa.tuple_(
            *(sa.literal(part) for part in key)
        )
    value: Any = -key[0]
    if order == "risk":
        value = max(-2.0, min(2.0, value))
    else:
        value = sa.literal(_EPOCH + timedelta(microseconds=_bounded(value)), runs.c.created_at.type)
    column = _falling(order)
    return sa.or_(column < value, sa.and_(column == value, runs.c.run_id > key[1]))


def _bounded(microseconds: int) -> int:
    """Within what a time can be: a cursor may be anybody's."""
    return max(0, min(microseconds, 250_000_000_000_000_000))


def _key(order: RunOrder, row: Any) -> tuple[Any, ...]:
    if order == "name":
        return row.name, row.project, row.run_id
    if order == "risk":
        return -row.worst, row.run_id
    time = utc(row.created_at if order == "created" else row.last_heard)
    return -((time - _EPOCH) // timedelta(microseconds=1)), row.run_id


def _listed(connection: sa.Connection, rows: Sequence[Any]) -> list[ListedRun]:
    run_ids = [row.run_id for row in rows]
    query = sa.select(attempts).where(attempts.c.run_id.in_(run_ids)).order_by(attempts.c.number)
    of_run: dict[str, list[Any]] = {run_id: [] for run_id in run_ids}
    for row in connection.execute(query):
        of_run[row.run_id].append(attempt_of(row))
    notes = notes_of(connection, run_ids)
    return [
        ListedRun(
            Run(
                run_id=row.run_id,
                project=row.project,
                name=row.name,
                created_at=utc(row.created_at),
                layers=(),
                config={},
                tokens_per_step=None,
                world_size=None,
                attempts=tuple(of_run[row.run_id]),
                ended=None if row.ended is None else (row.ended, row.ended_step),
            ),
            notes.get(row.run_id),
        )
        for row in rows
    ]
