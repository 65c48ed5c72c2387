"""Which replica analyses a run: a row with an end in the registry's database.

Any replica takes any batch; one at a time scores a run and follows its alerts. It renews its leases
while it lives; a lost replica's end by themselves, and the next replica that hears of the run takes
it over, from the last risk in the store. Times are the database's; what is held is counted from
before it was asked, by this machine's own clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Final, Protocol

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from foreshock.api.registry import Registry
from foreshock.api.registry_tables import leases

__all__ = ["HOUSEKEEPING", "Leases", "RunLeases", "SoleReplica"]

HOUSEKEEPING: Final = "housekeeping"
"""What one replica does for all: sending alerts, ending those of silent runs."""

LEASE_SECONDS: Final = 20.0
_OTHERS_SECONDS: Final = 2.0


class Leases(Protocol):
    """What a replica may work on."""

    def mine(self, names: Collection[str]) -> set[str]:
        """Those that are this replica's; free ones are taken. Never raises."""

    def holds(self, name: str) -> bool:
        """Whether one is this replica's, as far as it knows."""


class SoleReplica:
    """Everything is this replica's: there is no other."""

    def mine(self, names: Collection[str]) -> set[str]:
        """All."""
        return set(names)

    def holds(self, name: str) -> bool:
        """True."""
        return True


class RunLeases:
    """Leases in the database; safe to use from any thread.

    Args:
        registry: Its database holds them.
        replica: Who this is.
        taken: Called after something new became this replica's.
        seconds: How long a lease lasts that is not renewed.
    """

    def __init__(
        self,
        registry: Registry,
        replica: str,
        taken: Callable[[], None],
        seconds: float = LEASE_SECONDS,
    ) -> None:
        self._registry = registry
        self._replica = replica
        self._taken = taken
        self._seconds = seconds
        self._lock = threading.RLock()
        self._held: dict[str, float] = {}
        self._others: dict[str, float] = {}

    def holds(self, name: str) -> bool:
        """See `Leases.holds`."""
        return self._held.get(name, 0.0) > time.monotonic()

    def mine(self, names: Collection[str]) -> set[str]:
        """See `Leases.mine`; while the database is away only what is held already."""
        now = time.monotonic()
        with self._lock:
            held = {name for name in names if self.holds(name)}
            doubtful = {n for n in names if n not in held and self._others.get(n, 0.0) <= now}
            if not doubtful:
                return held
            try:
                fresh = self._take(doubtful)
                if fresh:
                    self._taken()
            except SQLAlchemyError:
                return held
            self._held |= dict.fromkeys(fresh, now + self._seconds)
            self._others |= dict.fromkeys(doubtful - fresh, now + _OTHERS_SECONDS)
            return held | fresh

    def _take(self, names: Collection[str]) -> set[str]:
        now = self._registry.database.now()
        with self._registry.write() as connection:
            rows = connection.execute(sa.select(leases).where(leases.c.name.in_(names))).all()
            kept = {row.name for row in rows if row.replica != self._replica and row.until > now}
            fresh = set(names) - kept
            if fresh:
                connection.execute(leases.delete().where(leases.c.name.in_(fresh)))
                until = now + self._seconds
                connection.execute(
                    leases.insert(),
                    [{"name": n, "replica": self._replica, "until": until} for n in fresh],
                )
        return fresh

    def keep(self, names: Collection[str]) -> None:
        """Renew what is held of these; the rest is given up.

        Raises:
            SQLAlchemyError: The database does not answer; leases run on to their end.
        """
        with self._lock:
            started = time.monotonic()
            now = self._registry.database.now()
            mine = sa.and_(leases.c.replica == self._replica, leases.c.until > now)
            with self._registry.write() as connection:
                found = connection.execute(sa.select(leases.c.name).where(mine)).scalars().all()
                kept = set(found) & set(names)
                connection.execute(
                    leases.update()
                    .where(mine, leases.c.name.in_(kept))
                    .values(until=now + self._seconds)
                )
                connection.execute(
                    leases.delete().where(
                        leases.c.replica == self._replica, leases.c.name.not_in(kept)
                    )
                )
            self._held = dict.fromkeys(kept, started + self._seconds)

    def leave(self) -> None:
        """Give up everything, so that another replica need not wait."""
        with self._lock:
            self._held.clear()
            try:
                with self._registry.write() as connection:
                    connection.execute(leases.delete().where(leases.c.replica == self._replica))
            except SQLAlchemyError:
                # They end by themselves.
                return
