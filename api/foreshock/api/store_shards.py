"""Several stores as one: each run lies on one of them, and a lost one stops only its own runs.

Which one follows from the run's id and the names of the shards (rendezvous hashing), so every
replica of the service finds it alone, and a further shard moves only its own share of the runs.
Moves no data.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pyarrow as pa

from foreshock.api.store import (
    Heatmap,
    Series,
    SeriesKey,
    StaleChunk,
    Store,
    StoreError,
    StoreUnreachable,
    TensorKinds,
    View,
)

__all__ = ["ShardedStore", "shard_of"]

_Group = Mapping[str, pa.Table]
_RETRY_SECONDS: Final = 1.0


def shard_of(run_id: str, names: Iterable[str]) -> str:
    """The shard that a run lies on: the one whose name and the run's id hash highest."""
    return max(names, key=lambda name: hashlib.sha256(f"{name} {run_id}".encode()).digest())


class _Shard:
    """A store that is opened when it is first needed, and again after it could not be."""

    def __init__(self, name: str, opened: Callable[[], Store]) -> None:
        self.name = name
        self.failed_at = 0.0
        self._opened = opened
        self._store: Store | None = None
        self._lock = threading.Lock()
        self._tried_at = -_RETRY_SECONDS

    def store(self) -> Store:
        with self._lock:
            if self._store is None:
                if time.monotonic() - self._tried_at < _RETRY_SECONDS:
                    raise StoreUnreachable(f"shard {self.name} does not answer")
                try:
                    self._store = self._opened()
                finally:
                    self._tried_at = time.monotonic()
            return self._store

    def append(self, groups: Sequence[_Group]) -> None:
        try:
            self.store().append(groups)
        except StoreError:
            self.failed_at = time.monotonic()
            raise
        self.failed_at = 0.0

    def opened(self) -> Store | None:
        with self._lock:
            return self._store


class ShardedStore(Store):
    """Stores side by side.

    Args:
        shards: Name to what opens the store; names decide where runs lie and must stay.
    """

    def __init__(self, shards: Mapping[str, Callable[[], Store]]) -> None:
        self._shards = {name: _Shard(name, opened) for name, opened in shards.items()}
        self._pool = ThreadPoolExecutor(len(shards), "foreshock-shard")

    def _of(self, run_id: str) -> Store:
        return self._shards[shard_of(run_id, self._shards)].store()

    def close(self) -> None:
        """Close all that are open."""
        self._pool.shutdown()
        for shard in self._shards.values():
            store = shard.opened()
            if store is not None:
                store.close()

    def hung_seconds(self) -> float:
        """The worst of all."""
        stores = [shard.opened() for shard in self._shards.values()]
        return max((store.hung_seconds() for store in stores if store is not None), default=0.0)

    def free_bytes(self) -> int | None:
        """None: the servers watch their own disks."""
        return None

    # Writing

    def append(self, groups: Sequence[Mapping[str, pa.Table]]) -> None:
        """Insert the rows of several batches, all shards at once.

        Raises:
            StoreUnreachable: A shard does not answer, and nothing is in.
            StoreError: It failed, and some rows may be in.
        """
        parts: dict[str, list[_Group]] = {}
        for group in groups:
            run_id = next(iter(group.values()))["run_id"][0].as_py()
            parts.setdefault(shard_of(run_id, self._shards), []).append(group)
        # Those that failed before come first, so that nothing is written elsewhere in vain.
        doubtful = [name for name in parts if self._shards[name].failed_at]
        for place, name in enumerate(doubtful if len(parts) > 1 else parts):
            try:
                self._shards[name].append(parts[name])
            except StoreUnreachable as error:
                raise StoreError(str(error)) if place else error from error
        rest = [name for name in parts if name not in doubtful] if len(parts) > 1 else []
        jobs = [self._pool.submit(self._shards[name].append, parts[name]) for name in rest]
        failures = [error for error in (job.exception() for job in jobs) if error is not None]
        if failures:
            # Other shards may have their part.
            raise StoreError(str(failures[0])) from failures[0]

    def discard_after(self, commit: int) -> int:
        """Remove from every shard what was never acknowledged."""
        return sum(shard.store().discard_after(commit) for shard in self._shards.values())

    def discard_between(self, first: int, last: int) -> int:
        """Remove from every shard the facts of batches of these numbers."""
        return sum(shard.store().discard_between(first, last) for shard in self._shards.values())

    def backup(self, folder: Path) -> None:
        """Refuse.

        Raises:
            StoreError: Always: servers have backups of their own.
        """
        raise StoreError("ClickHouse servers have backups of their own: BACKUP DATABASE foreshock")

    def drop_risks_after(self, version: int) -> None:
        """Remove risk rows that were added later than this from every shard."""
        for shard in self._shards.values():
            shard.store().drop_risks_after(version)

    def delete_run(self, run_id: str) -> None:
        """See `Store`."""
        self._of(run_id).delete_run(run_id)

    def stale_chunks(self, run_id: str) -> list[StaleChunk]:
        """See `Store`."""
        return self._of(run_id).stale_chunks(run_id)

    def roll(self, run_id: str, attempt: int, chunk: int, settled: int) -> int:
        """See `Store`."""
        return self._of(run_id).roll(run_id, attempt, chunk, settled)

    def append_risks(self, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
        """Add risk rows; those of a shard are in before another shard's fail."""
        parts: dict[str, list[tuple[str, int, pa.Table]]] = {}
        for group in groups:
            parts.setdefault(shard_of(group[0], self._shards), []).append(group)
        failed: StoreError | None = None
        for name, part in parts.items():
            try:
                self._shards[name].store().append_risks(part)
            except StoreError as error:
                failed = error
        if failed is not None:
            raise failed

    # Reading: each run from its own shard

    def risk_history(
        self, run_id: str, attempt: int | None, first_step: int, last_step: int
    ) -> pa.Table:
        """See `Store`."""
        return self._of(run_id).risk_history(run_id, attempt, first_step, last_step)

    def last_risk_step(self, run_id: str, attempt: int) -> int | None:
        """See `Store`."""
        return self._of(run_id).last_risk_step(run_id, attempt)

    def bounds(self, view: View) -> tuple[int, int] | None:
        """See `Store`."""
        return self._of(view.run_id).bounds(view)

    def chunks(self, view: View) -> list[int]:
        """See `Store`."""
        return self._of(view.run_id).chunks(view)

    def step_window(self, view: View) -> pa.Table:
        """See `Store`."""
        return self._of(view.run_id).step_window(view)

    def scalar_rows(self, view: View) -> pa.Table:
        """See `Store`."""
        return self._of(view.run_id).scalar_rows(view)

    def event_rows(self, view: View) -> pa.Table:
        """See `Store`."""
        return self._of(view.run_id).event_rows(view)

    def event_page(
        self, view: View, kind: str | None, after: tuple[int, int], limit: int
    ) -> pa.Table:
        """See `Store`."""
        return self._of(view.run_id).event_page(view, kind, after, limit)

    def tensor_rows(self, view: View) -> pa.Table:
        """See `Store`."""
        return self._of(view.run_id).tensor_rows(view)

    def scalar_names(self, run_id: str) -> list[str]:
        """See `Store`."""
        return self._of(run_id).scalar_names(run_id)

    def tensor_kinds(self, run_id: str) -> TensorKinds:
        """See `Store`."""
        return self._of(run_id).tensor_kinds(run_id)

    def counts(self, run_id: str, *, exact: bool = True) -> dict[str, int]:
        """See `Store`."""
        return self._of(run_id).counts(run_id, exact=exact)

    def scalar_series(self, view: View, name: str, points: int) -> Series:
        """See `Store`."""
        return self._of(view.run_id).scalar_series(view, name, points)

    def tensor_series(self, view: View, key: SeriesKey, points: int) -> Series:
        """See `Store`."""
        return self._of(view.run_id).tensor_series(view, key, points)

    def heatmap(
        self, view: View, role: str, statistic: str, points: int, number_format: str | None = None
    ) -> Heatmap:
        """See `Store`."""
        return self._of(view.run_id).heatmap(view, role, statistic, points, number_format)
