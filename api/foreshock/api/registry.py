"""Runs, launches, attempts, layers and the batch ledger, in SQL through SQLAlchemy.

The truth about what was acknowledged: a batch counts once its ledger row is committed. Holds no
statistics; those are the store's.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from foreshock.api.database import Database
from foreshock.api.launch_keys import announced, key_for, keys_of
from foreshock.api.registry_tables import (
    attempts,
    batches,
    deleted_runs,
    launches,
    layers,
    metadata,
    run_ends,
    run_risks,
    runs,
)

__all__ = [
    "Attempt",
    "LaunchConflict",
    "LaunchOwner",
    "LaunchRequest",
    "Registry",
    "Run",
    "attempt_of",
    "metadata",
    "utc",
]

_RUN_ID: Final = re.compile(r"[0-9a-f]{32}")
MAX_LAYERS: Final = 65_535


class LaunchConflict(ValueError):
    """A launch_id is already known under another run of its project."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """One start of a training job, as its client announces it."""

    project: str
    run: str
    launch_id: str
    first_step: int = 0
    parent_launch: str | None = None
    config: Mapping[str, Any] | None = None
    layers: Sequence[str] = ()
    tokens_per_step: int | None = None
    world_size: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One stretch of a run without going back.

    Attributes:
        number: Counts from 1 within the run.
        launch_id: The launch it belongs to.
        epoch: 0 for the launch's own start, one more for each rollback inside it.
        first_step: Lowest step seen, before any record the step announced.
        last_step: Highest step seen; None before any record.
        last_received: When a batch of it was last acknowledged.
        last_loss: The newest loss.
    """

    number: int
    launch_id: str
    epoch: int
    first_step: int
    last_step: int | None
    started_at: datetime
    parent_launch: str | None
    last_received: datetime | None
    last_loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as the registry knows it; `layers` in model order.

    `ended` is the attempt and step at which it said that it is over, if it did.
    """

    run_id: str
    project: str
    name: str
    created_at: datetime
    layers: tuple[str, ...]
    config: Mapping[str, Any]
    tokens_per_step: int | None
    world_size: int | None
    attempts: tuple[Attempt, ...]
    ended: tuple[int, int] | None = None

    @property
    def finished(self) -> bool:
        """Whether the newest record said that the run is over."""
        current = self.current
        if self.ended is None or current is None:
            return False
        return self.ended >= (current.number, current.last_step or 0)

    @property
    def current(self) -> Attempt | None:
        """The highest attempt that holds records."""
        return next((a for a in reversed(self.attempts) if a.last_step is not None), None)

    @property
    def first_step(self) -> int | None:
        """The lowest step of any attempt; None before any record."""
        return min((a.first_step for a in self.attempts if a.last_step is not None), default=None)

    @property
    def highest_step(self) -> int | None:
        """The highest step of any attempt; None before any record."""
        return max((a.last_step for a in self.attempts if a.last_step is not None), default=None)


@dataclass(frozen=True, slots=True)
class LaunchOwner:
    """The run that a launch belongs to, in what never changes about it.

    `key` is what ledger and attempts call the launch: its id, and more where another project had
    a launch of that id before.
    """

    key: str
    run_id: str
    project: str
    name: str


class Registry:
    """Access to the registry's database; safe to use from any thread."""

    def __init__(self, place: Path | sa.URL) -> None:
        """Open the database, making its tables if they are not there.

        Args:
            place: A file of SQLite, or the address of a database.
        """
        if isinstance(place, Path):
            place = sa.URL.create("sqlite", database=str(place))
        self.database = Database(place)
        self.engine = self.database.engine
        self._lock = threading.RLock()
        self._layer_ids: dict[str, dict[str, int]] = {}
        self._owners: dict[str, tuple[LaunchOwner, ...]] = {}
        self._numbers: dict[tuple[str, int], int] = {}
        with self.write() as connection:
            metadata.create_all(connection)

    def close(self) -> None:
        """Give the connections back."""
        self.database.close()

    def write(self) -> AbstractContextManager[sa.Connection]:
        """A write transaction; one at a time, committed with a disk sync on leaving."""
        return self.database.write()

    def launch(self, request: LaunchRequest) -> tuple[str, int, bool]:
        """Announce a launch; the same launch gives the same answer.

        Returns:
            run_id, attempt number, whether the launch is new.

        Raises:
            LaunchConflict: The launch_id belongs to another run of the project.
        """
        now = datetime.now(UTC)
        with self.write() as connection:
            run_id = self._upsert_run(connection, request, now)
            key = key_for(connection, request.project, request.launch_id)
            known = connection.execute(
                sa.select(launches.c.run_id, launches.c.attempt).where(launches.c.launch_id == key)
            ).one_or_none()
            if known is not None and known.run_id != run_id:
                raise LaunchConflict(
                    f"launch {request.launch_id} belongs to another run; make a new launch_id"
                )
            if known is not None:
                return run_id, known.attempt, False
            number = _next_attempt(connection, run_id)
            connection.execute(
                launches.insert().values(
                    launch_id=key, run_id=run_id, attempt=number, started_at=now
                )
            )
            row = {"run_id": run_id, "number": number, "launch_id": key, "epoch": 0}
            row |= {"first_step": request.first_step, "parent_launch": request.parent_launch}
            connection.execute(attempts.insert().values(**row, started_at=now))
        if request.layers:
            self.layer_ids(run_id, request.layers)
        return run_id, number, True

    def attempt(self, run_id: str, launch_id: str, epoch: int, first_step: int) -> int:
        """The number of an epoch's attempt; made when a rollback starts a new epoch."""
        known = self._numbers.get((launch_id, epoch))
        if known is not None:
            return known
        with self.engine.begin() as connection:
            number = connection.execute(_epoch(launch_id, epoch)).scalar_one_or_none()
        if number is None:
            number = self._new_attempt(run_id, launch_id, epoch, first_step)
        self._numbers[launch_id, epoch] = int(number)
        return int(number)

    def _new_attempt(self, run_id: str, launch_id: str, epoch: int, first_step: int) -> int:
        with self.write() as connection:
            made = connection.execute(_epoch(launch_id, epoch)).scalar_one_or_none()
            if made is not None:
                return int(made)
            number = _next_attempt(connection, run_id)
            row = {"run_id": run_id, "number": number, "launch_id": launch_id, "epoch": epoch}
            now = datetime.now(UTC)
            connection.execute(
                attempts.insert().values(**row, first_step=first_step, started_at=now)
            )
        return number

    def _upsert_run(self, connection: sa.Connection, request: LaunchRequest, now: datetime) -> str:
        found = connection.execute(
            sa.select(runs.c.run_id).where(
                runs.c.project == request.project, runs.c.name == request.run
            )
        ).scalar_one_or_none()
        given: dict[str, Any] = {}
        if request.config is not None:
            given["config"] = json.dumps(dict(request.config))
        if request.layers:
            given["layers"] = json.dumps(list(request.layers))
        if request.tokens_per_step is not None:
            given["tokens_per_step"] = request.tokens_per_step
        if request.world_size is not None:
            given["world_size"] = request.world_size
        if found is None:
            run_id = uuid.uuid4().hex
            row = {"run_id": run_id, "project": request.project, "name": request.run}
            connection.execute(runs.insert().values(**row, created_at=now, **given))
            return run_id
        if given:
            connection.execute(runs.update().where(runs.c.run_id == found).values(**given))
        return str(found)

    def run_id(self, run: str, project: str = "default") -> str | None:
        """The id of a run, from its id or its name within a project."""
        query = sa.select(runs.c.run_id)
        if _RUN_ID.fullmatch(run):
            query = query.where(runs.c.run_id == run)
        else:
            query = query.where(runs.c.project == project, runs.c.name == run)
        with self.engine.begin() as connection:
            return connection.execute(query).scalar_one_or_none()

    def remembered_owners(self, launch_id: str) -> Sequence[LaunchOwner]:
        """As `launch_owners`, from memory alone: may be outdated, or empty without a reason."""
        return self._owners.get(launch_id, ())

    def launch_owners(self, launch_id: str) -> Sequence[LaunchOwner]:
        """The runs, of different projects, that have a launch of this id; read anew."""
        named = launches.c.launch_id
        query = (
            sa.select(named, runs.c.run_id, runs.c.project, runs.c.name)
            .join(launches, runs.c.run_id == launches.c.run_id)
            .where(keys_of(launch_id))
        )
        with self.engine.begin() as connection:
            found = tuple(LaunchOwner(*row) for row in connection.execute(query.order_by(named)))
        with self._lock:
            for gone in set(self._owners.get(launch_id, ())) - set(found):
                # It went by another replica, and the launch may have been announced anew.
                self._forget_numbers(gone.key)
            if found:
                self._owners[launch_id] = found
            else:
                self._owners.pop(launch_id, None)
        return found

    def launch_owner(self, key: str) -> LaunchOwner | None:
        """The run that a launch of this key belongs to, or None."""
        launch_id = announced(key)
        for owners in (self.remembered_owners(launch_id), None):
            found = self.launch_owners(launch_id) if owners is None else owners
            for owner in found:
                if owner.key == key:
                    return owner
        return None

    def runs(self, project: str | None = None) -> list[Run]:
        """All runs, latest first heard last."""
        query = sa.select(runs).order_by(runs.c.created_at, runs.c.run_id)
        if project is not None:
            query = query.where(runs.c.project == project)
        with self.engine.begin() as connection:
            rows = connection.execute(query).all()
            found: dict[str, list[Attempt]] = {}
            for row in connection.execute(sa.select(attempts).order_by(attempts.c.number)):
                found.setdefault(row.run_id, []).append(attempt_of(row))
            ends = {row.run_id: row for row in connection.execute(sa.select(run_ends))}
        return [_run(row, found.get(row.run_id, ()), ends.get(row.run_id)) for row in rows]

    def run(self, run_id: str) -> Run | None:
        """One run, or None."""
        with self.engine.begin() as connection:
            row = connection.execute(sa.select(runs).where(runs.c.run_id == run_id)).one_or_none()
            if row is None:
                return None
            query = sa.select(attempts).where(attempts.c.run_id == run_id)
            found = connection.execute(query.order_by(attempts.c.number)).all()
            ends = sa.select(run_ends).where(run_ends.c.run_id == run_id)
            end = connection.execute(ends).one_or_none()
        return _run(row, [attempt_of(item) for item in found], end)

    def end_run(self, run_id: str, attempt: int, step: int) -> None:
        """Note that a run said it is over; a later record takes it back."""
        row = {"attempt": attempt, "step": step, "ended_at": datetime.now(UTC)}
        with self.write() as connection:
            mine = run_ends.c.run_id == run_id
            if not connection.execute(run_ends.update().where(mine).values(**row)).rowcount:
                connection.execute(run_ends.insert().values(run_id=run_id, **row))

    def delete(self, run_id: str) -> None:
        """Forget a run: its launches, attempts, layers and ledger rows, all or none.

        Its facts become unreachable with it; `deleted` names them until they are removed.
        """
        with self.write() as connection:
            for table in (batches, layers, attempts, launches, run_ends, run_risks, runs):
                connection.execute(table.delete().where(table.c.run_id == run_id))
            connection.execute(deleted_runs.delete().where(deleted_runs.c.run_id == run_id))
            row = {"run_id": run_id, "deleted_at": datetime.now(UTC)}
            connection.execute(deleted_runs.insert().values(**row))
        self.forget_run(run_id)

    def forget_run(self, run_id: str) -> None:
        """Drop what is kept in memory of a run that is deleted."""
        with self._lock:
            for launch_id, owners in list(self._owners.items()):
                for owner in owners:
                    if owner.run_id == run_id:
                        self._owners.pop(launch_id, None)
                        self._forget_numbers(owner.key)
            self._layer_ids.pop(run_id, None)

    def _forget_numbers(self, key: str) -> None:
        for number in [number for number in self._numbers if number[0] == key]:
            self._numbers.pop(number, None)

    def forget(self) -> None:
        """Drop what is kept in memory; it is read again."""
        with self._lock:
            self._owners.clear()
            self._numbers.clear()
            self._layer_ids.clear()

    def deleted(self) -> dict[str, datetime]:
        """Deleted runs of which something may still be in the store, and when they were deleted."""
        with self.engine.begin() as connection:
            rows = connection.execute(sa.select(deleted_runs)).all()
        return {row.run_id: utc(row.deleted_at) for row in rows}

    def facts_removed(self, run_id: str) -> None:
        """Nothing of a deleted run is left."""
        with self.write() as connection:
            connection.execute(deleted_runs.delete().where(deleted_runs.c.run_id == run_id))

    def layer_ids(self, run_id: str, names: Sequence[str]) -> dict[str, int]:
        """Ids of a run's layers, new ones made.

        Raises:
            ValueError: The run would have more than `MAX_LAYERS` layers.
        """
        known = self._known_layers(run_id)
        if all(name in known for name in names):
            return known
        with self._lock, self.write() as connection:
            # Read anew: another replica may have made some.
            known = _stored_layers(connection, run_id)
            fresh = [name for name in dict.fromkeys(names) if name not in known]
            if len(known) + len(fresh) > MAX_LAYERS:
                raise ValueError(f"a run may have {MAX_LAYERS} layers; this one would have more")
            made = {name: len(known) + index for index, name in enumerate(fresh)}
            rows = [
                {"run_id": run_id, "layer_id": number, "name": name}
                for name, number in made.items()
            ]
            if rows:
                connection.execute(layers.insert(), rows)
        self._layer_ids[run_id] = known | made
        return self._layer_ids[run_id]

    def layer_names(self, run_id: str) -> list[str]:
        """A run's layer names; the position is the id."""
        if self.database.shared:
            # Another replica may have made some since.
            self._layer_ids.pop(run_id, None)
        return list(self._known_layers(run_id))

    def ordered_layers(self, run: Run) -> list[str]:
        """A run's layers in model order; those that were never announced come last."""
        return list(dict.fromkeys([*run.layers, *self.layer_names(run.run_id)]))

    def _known_layers(self, run_id: str) -> dict[str, int]:
        known = self._layer_ids.get(run_id)
        if known is None:
            with self._lock, self.engine.begin() as connection:
                known = self._layer_ids[run_id] = _stored_layers(connection, run_id)
        return known


def _stored_layers(connection: sa.Connection, run_id: str) -> dict[str, int]:
    query = sa.select(layers.c.name, layers.c.layer_id).where(layers.c.run_id == run_id)
    rows = connection.execute(query.order_by(layers.c.layer_id)).all()
    return {row.name: row.layer_id for row in rows}


def _epoch(launch_id: str, epoch: int) -> sa.Select[int]:
    return sa.select(attempts.c.number).where(
        attempts.c.launch_id == launch_id, attempts.c.epoch == epoch
    )


def _next_attempt(connection: sa.Connection, run_id: str) -> int:
    query = sa.select(sa.func.max(attempts.c.number)).where(attempts.c.run_id == run_id)
    return int(connection.execute(query).scalar() or 0) + 1


def utc(value: datetime) -> datetime:
    """A time of the database, which may have lost its zone."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value


def attempt_of(row: Any) -> Attempt:
    """An attempt from its row."""
    return Attempt(
        number=row.number,
        launch_id=announced(row.launch_id),
        epoch=row.epoch,
        first_step=row.first_step,
        last_step=row.last_step,
        started_at=utc(row.started_at),
        parent_launch=row.parent_launch,
        last_received=utc(row.last_received) if row.last_received else None,
        last_loss=None if row.last_loss is None else float(row.last_loss),
    )


def _run(row: Any, found: Sequence[Attempt], end: Any = None) -> Run:
    return Run(
        run_id=row.run_id,
        project=row.project,
        name=row.name,
        created_at=utc(row.created_at),
        layers=tuple(json.loads(row.layers)),
        config=json.loads(row.config),
        tokens_per_step=row.tokens_per_step,
        world_size=row.world_size,
        attempts=tuple(found),
        ended=None if end is None else (end.attempt, end.step),
    )
