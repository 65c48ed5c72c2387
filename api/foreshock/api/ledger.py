"""The batch ledger: which batches are acknowledged, and their place in their launch's stream.

Exactly-once rests on it: a batch is stored when its row here is committed, and the numbers of the
rows (`commit`) say which facts in the store are real. Holds no facts itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from foreshock.api.attempts import StreamPoint
from foreshock.api.registry import Registry
from foreshock.api.registry_tables import attempts, batches

__all__ = ["BatchKey", "Ledger", "LedgerEntry", "Span"]


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Identity of a batch: its launch, the rank that wrote it and its number in that stream."""

    launch_id: str
    rank: int
    sequence: int

    @property
    def stream(self) -> tuple[str, int]:
        """The stream it is part of."""
        return self.launch_id, self.rank


@dataclass(frozen=True, slots=True)
class Span:
    """The part of a batch that belongs to one attempt; `loss` is the newest in it, if any."""

    attempt: int
    first_step: int
    last_step: int
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One acknowledged batch; `commit` numbers them in the order they became durable."""

    run_id: str
    key: BatchKey
    digest: str
    commit: int
    point: StreamPoint
    attempts: tuple[int, ...]
    spans: tuple[Span, ...] = ()
    records: int
    received_at: datetime


class Ledger:
    """The ledger's queries. `tip` and `commit` are for the one writer thread."""

    def __init__(self, registry: Registry) -> None:
        """Read and write the ledger of a registry."""
        self._registry = registry
        self._tips: dict[tuple[str, int], StreamPoint | None] = {}

    def newest_commit(self) -> int:
        """Number of the newest acknowledged batch; 0 before any."""
        with self._registry.engine.begin() as connection:
            return int(connection.execute(sa.select(sa.func.max(batches.c.commit))).scalar() or 0)

    def count(self, run_id: str) -> int:
        """How many batches of a run are acknowledged."""
        query = sa.select(sa.func.count()).where(batches.c.run_id == run_id)
        with self._registry.engine.begin() as connection:
            return int(connection.execute(query).scalar_one())

    def newest_received(self, run_id: str, count: int) -> list[datetime]:
        """When the newest batches of a run came in, oldest first."""
        query = (
            sa.select(batches.c.received_at)
            .where(batches.c.run_id == run_id)
            .order_by(batches.c.commit.desc())
            .limit(count)
        )
        with self._registry.engine.begin() as connection:
            found = [row.received_at for row in connection.execute(query)]
        return [time.replace(tzinfo=UTC) for time in reversed(found)]

    def find(self, key: BatchKey) -> LedgerEntry | None:
        """The entry of a batch, or None if it is not acknowledged."""
        query = sa.select(batches).where(
            batches.c.launch_id == key.launch_id,
            batches.c.rank == key.rank,
            batches.c.sequence == key.sequence,
        )
        with self._registry.engine.begin() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _entry(row)

    def beyond(self, key: BatchKey) -> bool:
        """Whether a batch comes after all of its stream, as far as memory tells; asks nobody.

        For any thread. False is no answer; True may be outdated, so the writer looks again.
        """
        tip = self._tips.get(key.stream)
        return tip is not None and tip.sequence < key.sequence

    def tip(self, stream: tuple[str, int]) -> StreamPoint | None:
        """The batch with the highest sequence of a stream; kept in memory."""
        if stream not in self._tips:
            self._tips[stream] = self._nearest(stream, None, upward=False)
        return self._tips[stream]

    def forget(self, launches: Collection[str] | None = None) -> None:
        """Drop what is kept in memory: a failed commit or another replica leaves it in doubt.

        Args:
            launches: Only what belongs to these; None for everything.
        """
        if launches is None:
            self._tips.clear()
            return
        for stream in [stream for stream in self._tips if stream[0] in launches]:
            self._tips.pop(stream, None)

    def neighbours(self, key: BatchKey) -> tuple[StreamPoint | None, StreamPoint | None]:
        """The stored batches just before and just after a batch in its stream."""
        tip = self.tip(key.stream)
        if tip is None or tip.sequence < key.sequence:
            return tip, None
        before = self._nearest(key.stream, key.sequence, upward=False)
        return before, self._nearest(key.stream, key.sequence, upward=True)

    def commit(
        self,
        entries: Sequence[LedgerEntry],
        also: Callable[[sa.Connection], None] | None = None,
    ) -> None:
        """Acknowledge a group of batches in one transaction, synced to disk.

        Args:
            entries: The group.
            also: Done first in the same transaction; what it raises undoes all.
        """
        with self._registry.write() as connection:
            if also is not None:
                also(connection)
            connection.execute(batches.insert(), [_row(entry) for entry in entries])
            connection.execute(
                _TOUCH, [_touch(entry, span) for entry in entries for span in entry.spans]
            )
        for entry in entries:
            tip = self._tips.get(entry.key.stream)
            if tip is None or tip.sequence < entry.key.sequence:
                self._tips[entry.key.stream] = entry.point

    def _nearest(
        self, stream: tuple[str, int], sequence: int | None, *, upward: bool
    ) -> StreamPoint | None:
        column = batches.c.sequence
        query = sa.select(batches).where(
            batches.c.launch_id == stream[0], batches.c.rank == stream[1]
        )
        if sequence is not None:
            query = query.where(column > sequence if upward else column < sequence)
        query = query.order_by(column.asc() if upward else column.desc()).limit(1)
        with self._registry.engine.begin() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _entry(row).point


_SEEN: Final = attempts.c.last_step
_TOUCH: Final = (
    attempts.update()
    .where(
        attempts.c.run_id == sa.bindparam("of_run"), attempts.c.number == sa.bindparam("of_number")
    )
    .values(
        first_step=sa.case(
            (
                sa.or_(_SEEN.is_(None), attempts.c.first_step > sa.bindparam("low")),
                sa.bindparam("low"),
            ),
            else_=attempts.c.first_step,
        ),
        last_loss=sa.case(
            (
                sa.and_(
                    sa.bindparam("loss", type_=sa.String).is_not(None),
                    sa.or_(_SEEN.is_(None), sa.bindparam("high") >= _SEEN),
                ),
                sa.bindparam("loss", type_=sa.String),
            ),
            else_=attempts.c.last_loss,
        ),
        last_step=sa.case(
            (sa.or_(_SEEN.is_(None), sa.bindparam("high") > _SEEN), sa.bindparam("high")),
            else_=_SEEN,
        ),
        last_received=sa.bindparam("received", type_=sa.DateTime(timezone=True)),
    )
)


def _touch(entry: LedgerEntry, span: Span) -> dict[str, Any]:
    return {
        "of_run": entry.run_id,
        "of_number": span.attempt,
        "low": span.first_step,
        "high": span.last_step,
        "loss": None if span.loss is None else repr(span.loss),
        "received": entry.received_at,
    }


def _row(entry: LedgerEntry) -> dict[str, Any]:
    return {
        "launch_id": entry.key.launch_id,
        "rank": entry.key.rank,
        "sequence": entry.key.sequence,
        "run_id": entry.run_id,
        "digest": entry.digest,
        "commit": entry.commit,
        "first_epoch": entry.point.first_epoch,
        "last_epoch": entry.point.last_epoch,
        "last_step": entry.point.last_step,
        "attempts": json.dumps(entry.attempts),
        "records": entry.records,
        "received_at": entry.received_at,
    }


def _entry(row: Any) -> LedgerEntry:
    return LedgerEntry(
        run_id=row.run_id,
        key=BatchKey(row.launch_id, row.rank, row.sequence),
        digest=row.digest,
        commit=row.commit,
        point=StreamPoint(row.sequence, row.first_epoch, row.last_epoch, row.last_step),
        attempts=tuple(json.loads(row.attempts)),
        records=row.records,
        received_at=row.received_at,
    )
