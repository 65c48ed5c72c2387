"""Series and heatmaps of one store, from rows and rollups together, and the making of rollups.

What both implementations do alike; each brings its queries. Names no engine.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.rollup_plan import (
    ROLLED_FROM_STEPS,
    Grid,
    Plan,
    Stretch,
    plan,
    stale_chunks,
)
from foreshock.api.rollups import BLOCK_STEPS, roll_scalars, roll_steps, roll_tensors
from foreshock.api.store import (
    CHUNK_STEPS,
    LAST_STEP,
    SMALLEST_IS_WORST,
    Heatmap,
    LayerNames,
    Series,
    SeriesKey,
    StaleChunk,
    Store,
    View,
)
from foreshock.api.store_answers import combine_buckets, combine_cells, grid, series, within
from foreshock.api.store_schema import NO_EXPERT

__all__ = ["RolledReads", "RowsToRoll", "stamped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsToRoll:
    """Which rows of an attempt are rolled up.

    Attributes:
        run_id: The run.
        attempt: Its attempt.
        first: First step.
        last: Last step, included.
        settled: Highest number of a batch that counts.
    """

    run_id: str
    attempt: int
    first: int
    last: int
    settled: int

    @property
    def parameters(self) -> dict[str, Any]:
        """Values for the placeholders run, attempt, first, last and settled."""
        values: dict[str, Any] = {"run": self.run_id, "attempt": self.attempt}
        return values | {"first": self.first, "last": self.last, "settled": self.settled}


@dataclass(frozen=True, slots=True)
class _Layout:
    view: View
    bounds: tuple[int, int]
    grid: Grid
    plan: Plan

    @property
    def parameters(self) -> dict[str, Any]:
        return {"origin": self.grid.origin, "width": self.grid.width}


_NO_TENSOR: Final[dict[str, Any]] = {"role": "", "layer": 0, "call": 0, "expert": NO_EXPERT}


class RolledReads(Store):
    """The part of a store that knows rollups.

    Args:
        layer_names: Names behind the stored ids.
        piece_rows: About how many tensor rows are rolled at a time.
        expires: Whether rows go after a while.
    """

    def __init__(self, layer_names: LayerNames, piece_rows: int, *, expires: bool) -> None:
        self._layer_names = layer_names
        self._piece_rows = piece_rows
        self._expires = expires
        self._rolling = threading.Lock()

    # What an implementation brings

    def _held_bounds(self, view: View) -> tuple[int, int] | None:
        """First and last step of a view whose rows are there, of every table."""
        return self.bounds(view)

    @abstractmethod
    def _rolled_bounds(self, view: View) -> tuple[int, int] | None:
        """First and last step of rollups that lie wholly in a view."""

    @abstractmethod
    def _blocks(self, view: View) -> tuple[pa.Table, pa.Table]:
        """What `rollup_plan` takes: of rollups, and of rows; the view is in whole blocks."""

    @abstractmethod
    def _scalar_buckets(self, view: View, values: Mapping[str, Any]) -> pa.Table:
        """`BUCKETS` from rows; values: name, origin, width."""

    @abstractmethod
    def _tensor_buckets(self, view: View, key: SeriesKey, values: Mapping[str, Any]) -> pa.Table:
        """`BUCKETS` from rows; values: of the key, origin, width."""

    @abstractmethod
    def _cells(self, view: View, statistic: str, values: Mapping[str, Any]) -> pa.Table:
        """`CELLS` from rows; values: role, format (or None), origin, width."""

    @abstractmethod
    def _rolled_buckets(
        self, run_id: str, stretches: Sequence[Stretch], values: Mapping[str, Any]
    ) -> pa.Table:
        """`BUCKETS` from rollups; values: name, role, layer, call, expert, [format], the grid."""

    @abstractmethod
    def _rolled_cells(
        self, run_id: str, stretches: Sequence[Stretch], values: Mapping[str, Any]
    ) -> pa.Table:
        """`CELLS` from rollups; values: name, role, format (or None), the grid."""

    @abstractmethod
    def _to_roll(self, table: str, rows: RowsToRoll, layers: tuple[int, int]) -> pa.Table:
        """Rows for `rollups.py`; table `layers`: rows per layer."""

    @abstractmethod
    def _rollups_there(self, rows: RowsToRoll) -> pa.Table:
        """Columns block and ver: every rollup that there is of these steps."""

    def _disown(self, rows: RowsToRoll, blocks: pa.Array, version: int) -> None:
        """Let nobody read the rollups of these blocks while their values are written anew."""

    @abstractmethod
    def _keep_rollups(self, table: str, rows: pa.Table) -> None:
        """Insert rows of a table of rollups."""

    # Reading

    def scalar_series(self, view: View, name: str, points: int) -> Series:
        """One scalar in at most `points` buckets of equal width in steps."""
        return self._series(
            view,
            points,
            {"name": name},
            lambda part, values: self._scalar_buckets(part, values),
            _NO_TENSOR,
        )

    def tensor_series(self, view: View, key: SeriesKey, points: int) -> Series:
        """One statistic of one tensor in at most `points` buckets of equal width in steps."""
        return self._series(
            view,
            points,
            key.parameters,
            lambda part, values: self._tensor_buckets(part, key, values),
            {"name": key.statistic},
        )

    def _series(
        self,
        view: View,
        points: int,
        values: Mapping[str, Any],
        rows_of: Callable[[View, Mapping[str, Any]], pa.Table],
        of_rollups: Mapping[str, Any],
    ) -> Series:
        layout = self._layout(view, points)
        if layout is None:
            return series(None)
        values = {**values, **layout.parameters}
        parts = [rows_of(part, values) for part in layout.plan.raw]
        if layout.plan.rolled:
            rolled = {**values, **of_rollups}
            parts.append(self._rolled_buckets(view.run_id, layout.plan.rolled, rolled))
        return series(combine_buckets(parts))

    def heatmap(
        self, view: View, role: str, statistic: str, points: int, number_format: str | None = None
    ) -> Heatmap:
        """The worst value per layer and bucket, over calls and experts; layers in stored order."""
        layout = self._layout(view, points)
        if layout is None:
            return Heatmap(steps=(), values={})
        values = {"role": role, "format": number_format, **layout.parameters}
        parts = [self._cells(part, statistic, values) for part in layout.plan.raw]
        if layout.plan.rolled:
            rolled = values | {"name": statistic}
            parts.append(self._rolled_cells(view.run_id, layout.plan.rolled, rolled))
        cells = combine_cells(parts, smallest=statistic in SMALLEST_IS_WORST)
        steps = tuple(range(layout.grid.origin, layout.bounds[1] + 1, layout.grid.width))
        return Heatmap(steps=steps, values=grid(cells, self._layer_names(view.run_id), len(steps)))

    def _layout(self, view: View, points: int) -> _Layout | None:
        """Buckets of a view, and what each is read from; None for a view without steps."""
        held, rolled = self._held_bounds(view), self._rolled_bounds(view)
        both = [bounds for bounds in (held, rolled) if bounds is not None]
        if not both:
            return None
        bounds = min(low for low, _ in both), max(high for _, high in both)
        view = within(view, bounds)
        plain = Grid.over(bounds, points, aligned=False)
        long = bounds[1] - bounds[0] >= ROLLED_FROM_STEPS and plain.width >= BLOCK_STEPS
        rows = Plan((), (view,))
        short = not long and bounds == held
        if short and (rolled is None or not self._expires):
            return _Layout(view, bounds, plain, rows)
        chosen = plan(view, *self._blocks(_whole_blocks(view)))
        if short and not chosen.expired:
            return _Layout(view, bounds, plain, rows)
        if not chosen.rolled and not chosen.raw:
            chosen = rows
        return _Layout(view, bounds, Grid.over(bounds, points, aligned=True), chosen)

    # Making rollups

    def stale_chunks(self, run_id: str) -> list[StaleChunk]:
        """Chunks whose rollups are missing or older than their rows; by attempt and chunk."""
        return stale_chunks(*self._blocks(View(run_id, None, 0, LAST_STEP)))

    def roll(self, run_id: str, attempt: int, chunk: int, settled: int) -> int:
        """Write the rollups of a chunk anew; see `Store.roll`.

        Raises:
            StoreError: It failed; reads go on as before.
        """
        first = chunk * CHUNK_STEPS
        rows = RowsToRoll(
            run_id=run_id,
            attempt=attempt,
            first=first,
            last=first + CHUNK_STEPS - 1,
            settled=settled,
        )
        with self._rolling:
            held = roll_steps(self._to_roll("steps", rows, _NO_LAYERS))
            if held.num_rows == 0:
                return 0
            version = time.time_ns()
            there = self._rollups_there(rows)
            if there.num_rows:
                # Also where the clock went back: the newest is what is read.
                version = max(version, int(pc.max(there["ver"]).as_py()) + 1)
                self._disown(rows, pc.unique(there["block"]), version)
                version += 1
            for values in self._rolled_values(rows):
                if values.num_rows:
                    self._keep_rollups("values_64", stamped(values, rows, version))
            # Last: only now are the others read.
            self._keep_rollups("steps_64", stamped(held, rows, version))
        return int(held.num_rows)

    def _rolled_values(self, rows: RowsToRoll) -> Iterator[pa.Table]:
        yield roll_scalars(self._to_roll("scalars", rows, _NO_LAYERS))
        counts = self._to_roll("layers", rows, _NO_LAYERS).to_pylist()
        low, waiting = 0, 0
        for place, row in enumerate(counts):
            waiting += row["n"]
            if waiting >= self._piece_rows or place == len(counts) - 1:
                yield roll_tensors(self._to_roll("tensor_stats", rows, (low, row["layer"])))
                low, waiting = row["layer"] + 1, 0


_NO_LAYERS: Final = (0, 0)


def _whole_blocks(view: View) -> View:
    first = view.first_step // BLOCK_STEPS * BLOCK_STEPS
    last = min(LAST_STEP, view.last_step // BLOCK_STEPS * BLOCK_STEPS + BLOCK_STEPS - 1)
    return replace(view, first_step=first, last_step=last)


def stamped(rows: pa.Table, of: RowsToRoll, version: int) -> pa.Table:
    """Rows of a table of rollups with whose they are, and their version."""
    count = rows.num_rows
    rows = rows.append_column("run_id", pa.repeat(pa.scalar(of.run_id), count))
    rows = rows.append_column("attempt", pa.repeat(pa.scalar(of.attempt, pa.uint32()), count))
    return rows.append_column("ver", pa.repeat(pa.scalar(version, pa.uint64()), count))
