"""The store of statistics as the service sees it: facts go in, exact reads come out.

Reads are exact at any time: where two rows have one key, the newest batch's wins. `store_open.py`
chooses the implementation. Names no engine and knows no HTTP and no ledger; ingest decides what is
acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa

from foreshock.api.store_rows import assemble_records, widen

__all__ = [
    "CHUNK_STEPS",
    "LAST_STEP",
    "SMALLEST_IS_WORST",
    "Heatmap",
    "LayerNames",
    "Limits",
    "Series",
    "SeriesKey",
    "StaleChunk",
    "Store",
    "StoreBusy",
    "StoreError",
    "StoreUnreachable",
    "TensorKinds",
    "View",
]

LayerNames = Callable[[str], Sequence[str]]
"""From run_id to layer names, the position being the stored id."""

CHUNK_STEPS: Final = 1024
"""Steps that lie together on disk, and that windows over whole runs are cut into."""

LAST_STEP: Final = 2**63 - 1

SMALLEST_IS_WORST: Final = ("headroom_log2", "sqnr_db", "min_nonzero")
"""Statistics where the small value is the bad one; for the others it is the large one."""


class StoreError(Exception):
    """The engine refused or failed; nothing may be acknowledged on its account."""


class StoreUnreachable(StoreError):
    """There was no connection: nothing was asked, nothing written."""


class StoreBusy(StoreError):
    """Every client has been in use for too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one query may cost.

    Attributes:
        seconds: Run time after which the engine ends it.
        memory_bytes: Memory after which the engine ends it.
        clients: Queries at the same time; more wait for their turn.
    """

    seconds: int = 30
    memory_bytes: int = 2 * 1024**3
    clients: int = 4


@dataclass(frozen=True, slots=True)
class View:
    """Which records of a run are meant.

    Attributes:
        run_id: The run.
        attempt: One attempt, or None: at each step the highest attempt that holds it.
        first_step: First step.
        last_step: Last step, included.
    """

    run_id: str
    attempt: int | None = None
    first_step: int = 0
    last_step: int = LAST_STEP

    @property
    def parameters(self) -> dict[str, Any]:
        """Values for the placeholders run, first, last and, with an attempt, attempt."""
        values: dict[str, Any] = {"run": self.run_id}
        values |= {"first": self.first_step, "last": self.last_step}
        return values if self.attempt is None else values | {"attempt": self.attempt}


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesKey:
    """Which series of a tensor is meant.

    Attributes:
        layer: Id of the layer.
        role: Role of the tensor.
        statistic: One of `STATISTICS`.
        call_index: Call of the module.
        expert: Expert, -1 outside mixtures of experts.
        format: None = the format the run used, else that one, what-if rows included.
    """

    layer: int
    role: str
    statistic: str
    call_index: int = 0
    expert: int = -1
    format: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """Values for the placeholders layer, role, call, expert and, with a format, format."""
        values: dict[str, Any] = {"layer": self.layer, "role": self.role}
        values |= {"call": self.call_index, "expert": self.expert}
        return values if self.format is None else values | {"format": self.format}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One series, downsampled.

    Attributes (equal lengths, one entry per bucket that holds a value):
        step: First step in the bucket that holds a value.
        low, mean, high: Over the finite values; where none is finite, one of the others.
        nonfinite: How many values were NaN or infinite.
    """

    step: tuple[int, ...]
    low: tuple[float, ...]
    mean: tuple[float, ...]
    high: tuple[float, ...]
    nonfinite: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """The worst value of a statistic per layer and bucket of steps.

    Attributes:
        steps: First step of each bucket.
        values: Layer name to one value per bucket; None where nothing was measured.
    """

    steps: tuple[int, ...]
    values: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True, slots=True)
class TensorKinds:
    """What tensors a run has; roles in the order of `ROLES`."""

    roles: list[str]
    formats: list[str]


@dataclass(frozen=True, slots=True)
class StaleChunk:
    """A chunk of an attempt whose rollups do not say what its rows say.

    Attributes:
        attempt: The attempt.
        chunk: Which `CHUNK_STEPS` steps.
        newest: Highest number of a batch with records in it.
    """

    attempt: int
    chunk: int
    newest: int


class Store(Protocol):
    """What a store has to do; methods with a body follow from the others.

    Every method may be called from any thread, except that one thread at a time appends and
    discards. All raise `StoreError` when the engine refuses or fails.
    """

    def close(self) -> None:
        """Close the engine; nothing may be running."""
        ...

    def hung_seconds(self) -> float:
        """Above 0 when a query outlived its limit by more than ten seconds: restart the service."""
        ...

    def free_bytes(self) -> int | None:
        """Free space on the disk of the store; None where that is for its servers to watch."""
        ...

    def append(self, groups: Sequence[Mapping[str, pa.Table]]) -> None:
        """Insert the rows of several batches (`store_rows.place`); returns once they are durable.

        Raises:
            StoreError: It failed, and some rows may be in: call `discard_after`.
        """
        ...

    def discard_after(self, commit: int) -> int:
        """Remove facts of batches that were never acknowledged.

        Args:
            commit: Number of the newest acknowledged batch.

        Returns:
            How many rows were removed.

        Raises:
            StoreError: It failed; call again before anything is appended.
        """
        ...

    def discard_between(self, first: int, last: int) -> int:
        """`discard_after` for the batches of these numbers, ends included; others may append."""
        ...

    def delete_run(self, run_id: str) -> None:
        """Remove everything of a run, from any thread; on return it is gone from the disk."""
        ...

    def backup(self, folder: Path) -> None:
        """Write a copy of everything into a new folder, while others read and write.

        Raises:
            StoreError: It failed, or this kind of store has backups of its own.
        """
        ...

    def drop_risks_after(self, version: int) -> None:
        """Remove risk rows that were added later than this, nanoseconds since 1970."""
        ...

    def stale_chunks(self, run_id: str) -> list[StaleChunk]:
        """Chunks whose rollups are missing or older than their rows; by attempt and chunk."""
        ...

    def roll(self, run_id: str, attempt: int, chunk: int, settled: int) -> int:
        """Write the rollups of a chunk anew, from any thread; reads take the newest.

        Args:
            run_id: The run.
            attempt: Its attempt.
            chunk: Which `CHUNK_STEPS` steps.
            settled: Batches up to this number are acknowledged or removed; later ones are left out.

        Returns:
            How many blocks of 64 steps were written.
        """
        ...

    def append_risks(self, groups: Sequence[tuple[str, int, pa.Table]]) -> None:
        """Add risk rows (`RISK_SCHEMA`) of several (run_id, attempt), all or none.

        The newest row of a step and horizon wins.
        """
        ...

    def risk_history(
        self, run_id: str, attempt: int | None, first_step: int, last_step: int
    ) -> pa.Table:
        """Risk rows (`RISK_SCHEMA`), by step and horizon; attempt None is the default view."""
        ...

    def last_risk_step(self, run_id: str, attempt: int) -> int | None:
        """The newest step of an attempt with a risk row, or None."""
        ...

    def bounds(self, view: View) -> tuple[int, int] | None:
        """First and last step of a view, or None if it holds no record."""
        ...

    def chunks(self, view: View) -> list[int]:
        """Which chunks of `CHUNK_STEPS` steps hold records of a view, rising."""
        ...

    def step_window(self, view: View) -> pa.Table:
        """step, time and attempt of the records of a view, by step."""
        ...

    def scalar_rows(self, view: View) -> pa.Table:
        """step, name and value of the scalars of a view, by step."""
        ...

    def event_rows(self, view: View) -> pa.Table:
        """`step` and the columns of an event, by step and position."""
        ...

    def event_page(
        self, view: View, kind: str | None, after: tuple[int, int], limit: int
    ) -> pa.Table:
        """The first `limit` events of a view behind a step and position, in their order.

        Args:
            view: The records.
            kind: Only events of this kind; None for all.
            after: Step and position in the step; (-1, 0) for the beginning.
            limit: Most events.

        Returns:
            step, position and the columns of an event.
        """
        ...

    def tensor_rows(self, view: View) -> pa.Table:
        """`step` and `STORED_TENSOR_FIELDS`, by step and layer in stored order."""
        ...

    def scalar_names(self, run_id: str) -> list[str]:
        """Names of the scalars that a run ever recorded, sorted."""
        ...

    def tensor_kinds(self, run_id: str) -> TensorKinds:
        """Roles and formats of a run's tensors."""
        ...

    def counts(self, run_id: str, *, exact: bool = True) -> dict[str, int]:
        """Rows per table of facts: distinct keys, or raw rows as they lie on disk."""
        ...

    def scalar_series(self, view: View, name: str, points: int) -> Series:
        """One scalar in at most `points` buckets of equal width in steps.

        Long ranges and rows that have expired are read from rollups; buckets then consist of whole
        blocks of 64 steps.
        """
        ...

    def tensor_series(self, view: View, key: SeriesKey, points: int) -> Series:
        """One statistic of one tensor; buckets as in `scalar_series`."""
        ...

    def heatmap(
        self, view: View, role: str, statistic: str, points: int, number_format: str | None = None
    ) -> Heatmap:
        """The worst value per layer and bucket, over calls and experts; layers in stored order.

        Buckets as in `scalar_series`.
        """
        ...

    # What follows from the above

    def append_risk(self, run_id: str, attempt: int, table: pa.Table) -> None:
        """`append_risks` for one attempt."""
        self.append_risks([(run_id, attempt, table)])

    def tensor_window(
        self, run_id: str, attempt: int | None, first_step: int, last_step: int
    ) -> pa.Table:
        """`tensor_rows` of a range of steps, ends included."""
        return self.tensor_rows(View(run_id, attempt, first_step, last_step))

    def scalar_window(
        self, run_id: str, attempt: int | None, first_step: int, last_step: int
    ) -> pa.Table:
        """step, time and one column per scalar, null where it was not measured; by step."""
        view = View(run_id, attempt, first_step, last_step)
        rows = self.scalar_rows(view)
        names = sorted(set(rows["name"].to_pylist()))
        return widen(self.step_window(view), rows, names)

    def record_window(
        self, run_id: str, attempt: int | None, first_step: int, last_step: int
    ) -> pa.Table:
        """Whole records (`record.SCHEMA`) of a range of steps, ends included; by step."""
        view = View(run_id, attempt, first_step, last_step)
        return assemble_records(
            self.step_window(view),
            self.scalar_rows(view),
            self.event_rows(view),
            self.tensor_rows(view),
        )

    def record_chunks(self, view: View) -> Iterator[pa.Table]:
        """Whole records of a view in pieces of bounded size, by step."""
        for piece in self._pieces(view):
            table = self.record_window(view.run_id, view.attempt, piece.first_step, piece.last_step)
            if table.num_rows:
                yield table

    def scalar_chunks(self, view: View) -> Iterator[tuple[pa.Table, pa.Table]]:
        """`step_window` and `scalar_rows` of a view in pieces of bounded size, by step."""
        for piece in self._pieces(view):
            steps = self.step_window(piece)
            if steps.num_rows:
                yield steps, self.scalar_rows(piece)

    def _pieces(self, view: View) -> Iterator[View]:
        # By the chunks that exist: steps may lie far apart.
        for chunk in self.chunks(view):
            first = chunk * CHUNK_STEPS
            last = min(view.last_step, first + CHUNK_STEPS - 1)
            yield replace(view, first_step=max(view.first_step, first), last_step=last)
