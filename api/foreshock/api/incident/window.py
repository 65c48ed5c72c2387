"""Reads the records of the window once: every one into the Parquet file, buckets of them to draw.

Memory is bounded by one chunk of records and the grids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from foreshock.api.incident.facts import FloatArray, Grid, Mark, WindowData
from foreshock.api.store import SMALLEST_IS_WORST
from foreshock.monitor.record import ROLES, STATISTICS

__all__ = ["BUCKETS", "WindowReader"]

BUCKETS: Final = 200
"""Columns of a grid, at most."""

# Numbers of channels and ranks are names, not sizes: the worst of them means nothing.
_DRAWN: Final = tuple(name for name in STATISTICS if name not in ("amax_rank", "top_channel"))


@dataclass(slots=True)
class _Sheet:
    """A grid as it grows: one line per layer."""

    lines: dict[str, FloatArray] = field(default_factory=dict)
    nonfinite: int = 0


class WindowReader:
    """Takes the records of a window, chunk by chunk.

    Args:
        first_step: Of the window.
        last_step: Of the window, included.
        layers: Of the run, in model order; others come last.
    """

    def __init__(self, first_step: int, last_step: int, layers: Sequence[str] = ()) -> None:
        self._order = {name: index for index, name in enumerate(layers)}
        self._first = first_step
        self._width = max(1, -(-(last_step - first_step + 1) // BUCKETS))
        self._buckets = -(-(last_step - first_step + 1) // self._width)
        self._steps: list[int] = []
        self._scalars: dict[str, dict[int, float]] = {}
        self._marks: list[Mark] = []
        self._sheets: dict[tuple[str, str], _Sheet] = {}
        self._tensor_rows = 0

    def through(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Pass tables on, having looked at them."""
        for table in tables:
            self._take(table)
            yield table

    def result(self) -> WindowData:
        """What was seen."""
        steps = np.array(self._steps, dtype=np.int64)
        place = {step: index for index, step in enumerate(self._steps)}
        scalars, nonfinite = {}, {}
        for name in sorted(self._scalars):
            values = np.full(len(steps), np.nan)
            for step, value in self._scalars[name].items():
                values[place[step]] = value
            odd = [s for s, v in self._scalars[name].items() if not np.isfinite(v)]
            scalars[name] = np.where(np.isfinite(values), values, np.nan)
            nonfinite[name] = tuple(odd)
        return WindowData(
            records=len(steps),
            tensor_rows=self._tensor_rows,
            first=int(steps[0]) if len(steps) else self._first,
            last=int(steps[-1]) if len(steps) else self._first,
            width=self._width,
            steps=steps,
            scalars=scalars,
            nonfinite=nonfinite,
            marks=tuple(self._marks),
            grids=tuple(self._grids()),
        )

    def _grids(self) -> Iterator[Grid]:
        order = {role: index for index, role in enumerate(ROLES)}
        rank = {name: index for index, name in enumerate(_DRAWN)}
        for role, name in sorted(self._sheets, key=lambda key: (rank[key[1]], order[key[0]])):
            sheet = self._sheets[role, name]
            names = sorted(sheet.lines, key=lambda layer: self._order.get(layer, len(self._order)))
            yield Grid(
                role=role,
                statistic=name,
                layers=tuple(names),
                values=np.array([sheet.lines[layer] for layer in names]),
                nonfinite=sheet.nonfinite,
            )

    def _take(self, table: pa.Table) -> None:
        steps = table["step"].to_pylist()
        self._steps += steps
        for step, scalars, events in zip(
            steps, table["scalars"].to_pylist(), table["events"].to_pylist(), strict=True
        ):
            for name, value in scalars:
                self._scalars.setdefault(name, {})[step] = value
            self._marks += [Mark(step, event["kind"], _told(event)) for event in events]
        tensors = table["tensors"].combine_chunks()
        if isinstance(tensors, pa.ChunkedArray):
            tensors = pa.concat_arrays(tensors.chunks)
        owner = pc.list_parent_indices(tensors).to_numpy()
        rows = pa.Table.from_struct_array(tensors.flatten())
        self._tensor_rows += rows.num_rows
        bucket = (np.asarray(steps, np.int64)[owner] - self._first) // self._width
        self._spread(rows, bucket)

    def _spread(self, rows: pa.Table, bucket: npt.NDArray[np.int64]) -> None:
        """Put the rows of what the run really used into the grids."""
        used = ~rows["what_if"].to_numpy()
        roles = np.asarray(rows["role"].to_pylist(), dtype=object)
        layers = np.asarray(rows["layer"].to_pylist(), dtype=object)
        for role in sorted(set(roles[used])):
            mine = np.flatnonzero(used & (roles == role))
            names, line = np.unique(layers[mine], return_inverse=True)
            for statistic in _DRAWN:
                values = rows[statistic].cast(pa.float64()).to_numpy()[mine]
                known = ~np.asarray(pc.is_null(rows[statistic]))[mine]
                if known.any():
                    self._add(role, statistic, names, (line, bucket[mine], values, known))

    def _add(self, role: str, statistic: str, names: Any, cells: tuple[Any, ...]) -> None:
        line, bucket, values, known = cells
        sheet = self._sheets.setdefault((role, statistic), _Sheet())
        finite = np.isfinite(values)
        sheet.nonfinite += int((known & ~finite).sum())
        grid = np.full((len(names), self._buckets), np.nan)
        worse = np.fmin if statistic in SMALLEST_IS_WORST else np.fmax
        worse.at(grid, (line[finite], bucket[finite]), values[finite])
        for index, name in enumerate(names):
            before = sheet.lines.get(name)
            sheet.lines[name] = grid[index] if before is None else worse(before, grid[index])


def _told(event: dict[str, Any]) -> str:
    parts = [f"{name} {event[name]}" for name in ("micro_batch", "rank") if event[name] is not None]
    parts += [str(event[name]) for name in ("layer", "role", "detail") if event[name]]
    return ", ".join(parts)
