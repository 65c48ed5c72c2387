"""Numbers for batches, and what keeps facts without a ledger row from staying in the store.

A fact carries the number of its batch; the ledger says which numbers are acknowledged.

`ExclusiveCommits`: this process alone writes to the store. Numbers rise by one, and whatever lies
above the ledger's newest is removed before anything else is written.

`SharedCommits`: replicas of the service write to one store at once. Before facts are written, their
numbers are claimed in the registry's database, and the claim goes away in the transaction that
writes the ledger. A claim whose group failed, or whose replica died, is fenced (its ledger rows can
no longer be written), its numbers are removed from the store, and once more later, in case an
INSERT was still under way. Launches are held while their batches are numbered and written, so for
any key of a fact the number of an unacknowledged one is lower than that of whatever replaces it.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from foreshock.api.ledger import Ledger, LedgerEntry
from foreshock.api.registry import Registry
from foreshock.api.registry_tables import batches, counters, replicas, writes
from foreshock.api.store import Store, StoreError, StoreUnreachable

__all__ = ["ClaimLost", "Commits", "ExclusiveCommits", "SharedCommits"]

_log = logging.getLogger(__name__)

ALIVE_SECONDS: Final = 30.0
"""A replica that was not heard of for so long counts as dead."""

_BEAT_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 600.0
"""No INSERT is under way for so long: an INSERT ends after the limit of a query."""

_COUNTER: Final = "commit"


class ClaimLost(StoreError):
    """The numbers were taken back meanwhile; nothing is acknowledged."""


class Commits(Protocol):
    """How a group of batches gets its numbers and becomes acknowledged."""

    @property
    def ledger(self) -> Ledger:
        """The ledger that is written."""
        ...

    def start(self) -> None:
        """Remove what was never acknowledged, as far as it is this process's to do.

        Raises:
            StoreError: The store does not work.
        """

    def stop(self) -> None:
        """Nothing more will be claimed."""

    @contextmanager
    def claim(self, launches: Collection[str], most: int) -> Iterator[int]:
        """Take numbers for a group; leave it once the group is acknowledged or has failed.

        Args:
            launches: Launches of its batches.
            most: Largest number of batches.

        Returns:
            The number before the first that may be used.

        Raises:
            StoreError: Numbers cannot be had now.
        """
        yield 0

    def commit(self, entries: Sequence[LedgerEntry]) -> None:
        """Acknowledge batches whose facts are durable, in one transaction.

        Raises:
            ClaimLost: Their numbers are no longer theirs.
        """


class ExclusiveCommits:
    """For a store that only this process writes to."""

    def __init__(self, ledger: Ledger, store: Store) -> None:
        self.ledger = ledger
        self._store = store
        self._newest = 0
        self._clean = False

    def start(self) -> None:
        """Remove what was never acknowledged.

        Raises:
            StoreError: The store does not work.
        """
        self.ledger.forget()
        self._newest = self.ledger.newest_commit()
        removed = self._store.discard_after(self._newest)
        if removed:
            _log.warning("removed %d rows of batches that were never acknowledged", removed)
        self._clean = True

    def stop(self) -> None:
        """Do nothing."""

    @contextmanager
    def claim(self, launches: Collection[str], most: int) -> Iterator[int]:
        """See `Commits.claim`."""
        if not self._clean:
            self.start()
        self._clean = False
        yield self._newest
        self._clean = True

    def commit(self, entries: Sequence[LedgerEntry]) -> None:
        """See `Commits.commit`."""
        self.ledger.commit(entries)
        self._newest += len(entries)


@dataclass(slots=True)
class _Claim:
    first: int
    committed: bool = False


class SharedCommits:
    """For a store that several replicas write to.

    Args:
        registry: Its database holds claims and replicas.
        ledger: Of the same registry.
        store: The store.
        beat_seconds: How often this replica says that it lives and looks for dead ones.
        alive_seconds: After what silence a replica counts as dead.
    """

    def __init__(
        self,
        registry: Registry,
        ledger: Ledger,
        store: Store,
        *,
        beat_seconds: float = _BEAT_SECONDS,
        alive_seconds: float = ALIVE_SECONDS,
    ) -> None:
        self.replica = uuid.uuid4().hex
        self._registry = registry
        self.ledger = ledger
        self._store = store
        self._beat_seconds = beat_seconds
        self._alive_seconds = alive_seconds
        self._claim: _Claim | None = None
        self._failed: set[int] = set()
        self._stop = threading.Event()
        # Two threads: a store that hangs must not make the others take this replica for dead.
        self._threads = tuple(
            threading.Thread(target=self._repeat, args=(what,), name=name, daemon=True)
            for what, name in (
                (self._beat, "foreshock-heartbeat"),
                (self.sweep, "foreshock-commits"),
            )
        )

    def start(self) -> None:
        """Say that this replica lives, and begin to look for claims that nobody will keep.

        Raises:
            SQLAlchemyError: The database does not answer.
        """
        if not self._registry.database.shared:
            # Nobody else can have the data folder, so whoever was there is dead.
            with self._registry.write() as connection:
                connection.execute(replicas.delete())
        self._beat()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Leave: what is still claimed is anybody's to clean up."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(30)
        try:
            with self._registry.write() as connection:
                connection.execute(replicas.delete().where(replicas.c.replica == self.replica))
        except SQLAlchemyError as error:
            _log.warning("could not sign off: %s", type(error).__name__)

    @contextmanager
    def claim(self, launches: Collection[str], most: int) -> Iterator[int]:
        """See `Commits.claim`."""
        with self._registry.database.holding(f"launch {launch}" for launch in launches):
            # Another replica may have stored batches of theirs meanwhile.
            self.ledger.forget(launches)
            claim = self._claim = self._reserve(most)
            try:
                yield claim.first - 1
            except StoreUnreachable:
                self._release(claim.first)
                raise
            except BaseException:
                self._failed.add(claim.first)
                self.ledger.forget()
                raise
            if not claim.committed:
                self._release(claim.first)

    def _reserve(self, most: int) -> _Claim:
        with self._registry.write() as connection:
            query = sa.select(counters.c.value).where(counters.c.name == _COUNTER)
            counted = connection.execute(query).scalar_one_or_none()
            if counted is None:
                stored = connection.execute(sa.select(sa.func.max(batches.c.commit))).scalar()
                counted = int(stored or 0)
                connection.execute(counters.insert().values(name=_COUNTER, value=counted))
            connection.execute(
                counters.update().where(counters.c.name == _COUNTER).values(value=counted + most)
            )
            row = {"first": counted + 1, "last": counted + most, "replica": self.replica}
            connection.execute(writes.insert().values(**row, fenced=False))
        return _Claim(counted + 1)

    def _release(self, first: int) -> None:
        with self._registry.write() as connection:
            connection.execute(writes.delete().where(writes.c.first == first))

    def commit(self, entries: Sequence[LedgerEntry]) -> None:
        """See `Commits.commit`."""
        claim = self._claim
        if claim is None:
            raise ClaimLost("nothing is claimed")

        def keep(connection: sa.Connection) -> None:
            mine = sa.and_(writes.c.first == claim.first, sa.not_(writes.c.fenced))
            if connection.execute(writes.delete().where(mine)).rowcount != 1:
                raise ClaimLost("this replica was taken for dead; the batches are sent again")

        self.ledger.commit(entries, also=keep)
        claim.committed = True

    # The threads

    def _repeat(self, what: Callable[[], object]) -> None:
        while not self._stop.is_set():
            try:
                what()
            except (SQLAlchemyError, StoreError) as error:
                _log.warning("claims were not looked after: %s", type(error).__name__)
            except Exception:  # noqa: BLE001 the worker's one guard: the next round may succeed
                _log.exception("claims were not looked after, in an unforeseen way")
            self._stop.wait(self._beat_seconds)

    def _beat(self) -> None:
        until = self._registry.database.now() + self._alive_seconds
        with self._registry.write() as connection:
            mine = replicas.c.replica == self.replica
            if not connection.execute(replicas.update().where(mine).values(until=until)).rowcount:
                connection.execute(replicas.insert().values(replica=self.replica, until=until))

    def sweep(self) -> int:
        """Remove facts of claims that nobody will keep.

        Returns:
            How many rows were removed.

        Raises:
            StoreError: The store does not answer; the rest is for the next time.
        """
        removed = 0
        for row in self._abandoned():
            # Only now: from here on nobody can acknowledge these numbers.
            removed += self._store.discard_between(row.first, row.last)
            self._swept(row)
        if removed:
            _log.warning("removed %d rows of batches that were never acknowledged", removed)
        return removed

    def _abandoned(self) -> list[Any]:
        """Claims to clean up, fenced."""
        now = self._registry.database.now()
        # A connection that broke may have hidden that the ledger was written: then there is no row.
        failed, self._failed = self._failed, set()
        with self._registry.write() as connection:
            living = sa.select(replicas.c.replica).where(replicas.c.until > now)
            dead = writes.c.replica.not_in(living)
            lost = sa.and_(sa.not_(writes.c.fenced), sa.or_(dead, writes.c.first.in_(failed)))
            connection.execute(writes.update().where(lost).values(fenced=True))
            due = sa.or_(writes.c.swept.is_(None), writes.c.swept < now - _AGAIN_SECONDS)
            query = sa.select(writes).where(writes.c.fenced, due).order_by(writes.c.first)
            return list(connection.execute(query.limit(_AT_ONCE)))

    def _swept(self, row: Any) -> None:
        mine = writes.c.first == row.first
        with self._registry.write() as connection:
            if row.swept is None:
                now = self._registry.database.now()
                connection.execute(writes.update().where(mine).values(swept=now))
            else:
                connection.execute(writes.delete().where(mine))


_AT_ONCE: Final = 200
