"""How often a scorer cries wolf on other people's logs, and what it catches there.

Loss and gradient norm only; one log is one run. It fits and tunes nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.api.artifact import Artifact
from foreshock.api.scorer import LocalScorer

__all__ = ["LogsError", "quietness"]

_LATE: Final = 8
_COLUMNS: Final = ("run_id", "step", "loss", "loss_logged", "grad_norm", "grad_norm_logged")


class LogsError(ValueError):
    """The logs or their index cannot be read."""


def quietness(
    logs: Path, index: Path, artifact: Artifact | None
) -> list[dict[str, float | int | str | None]]:
    """Alarms on labelled logs, by label and kind of model.

    Args:
        logs: Parquet with `run_id`, `step`, `loss`, `grad_norm` and `*_logged` columns.
        index: CSV with `run_id`, `label`, `onset_step`, `usable`, `domain`.
        artifact: What scores; None detects only.

    Returns:
        One row per (domain, label): runs, rows, share of runs with a forecast or detection alarm,
        alarms per 10,000 rows, and for onsets the share with an alarm before them and by 8 rows
        after.

    Raises:
        LogsError: A file or column is missing.
    """
    wanted = _read_index(index)
    totals: dict[tuple[str, str], _Tally] = {}
    for name, steps, scalars in _runs(logs):
        entry = wanted.get(name)
        if entry is not None:
            tally = totals.setdefault((entry["domain"], entry["label"]), _Tally())
            tally.add(steps, scalars, entry["onset_step"], LocalScorer(artifact))
    rows = []
    for domain, label in sorted(totals):
        row: dict[str, float | int | str | None] = {"domain": domain, "label": label}
        rows.append(row | totals[domain, label].as_row())
    return rows


class _Tally:
    """Counts over the runs of one kind."""

    def __init__(self) -> None:
        self.runs = self.rows = self.onsets = self.before = self.by_late = 0
        self.alarms = {"forecast": 0, "detection": 0}
        self.alarmed = {"forecast": 0, "detection": 0}

    def add(
        self,
        steps: list[int],
        scalars: list[dict[str, float]],
        onset: str,
        scorer: LocalScorer,
    ) -> None:
        starts: list[tuple[int, str]] = []
        before = "ok"
        for step, values in zip(steps, scalars, strict=True):
            risk = scorer.score(step=step, scalars=values)
            if risk.state == "firing" and before != "firing":
                starts.append((step, risk.kind or "detection"))
            before = risk.state
        self.runs += 1
        self.rows += len(steps)
        for kind in self.alarms:
            count = sum(k == kind for _, k in starts)
            self.alarms[kind] += count
            self.alarmed[kind] += count > 0
        if onset:
            self._judge(steps, starts, int(float(onset)))

    def _judge(self, steps: list[int], starts: list[tuple[int, str]], onset: int) -> None:
        place = int(np.searchsorted(steps, onset))
        late = steps[min(place + _LATE, len(steps) - 1)]
        self.onsets += 1
        self.before += any(step < onset for step, _ in starts)
        self.by_late += any(step <= late for step, _ in starts)

    def as_row(self) -> dict[str, float | int | str | None]:
        row: dict[str, float | int | str | None] = {"runs": self.runs, "rows": self.rows}
        for kind, count in self.alarms.items():
            row[f"runs_with_{kind}"] = self.alarmed[kind] / self.runs
            row[f"{kind}_per_10000"] = 1e4 * count / max(self.rows, 1)
        row["onsets"] = self.onsets
        row["alarm_before_onset"] = self.before / self.onsets if self.onsets else None
        row["alarm_by_8_rows_after"] = self.by_late / self.onsets if self.onsets else None
        return row


def _read_index(path: Path) -> dict[str, dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LogsError(f"cannot read {path}: {error}") from None
    missing = {"run_id", "label", "onset_step", "usable", "domain"} - set(rows[0] if rows else {})
    if missing:
        raise LogsError(f"{path} lacks the columns {', '.join(sorted(missing))}")
    return {row["run_id"]: row for row in rows if row["usable"] == "1"}


def _runs(path: Path) -> Iterator[tuple[str, list[int], list[dict[str, float]]]]:
    """Each run's name, steps and scalars; a logged null is a NaN."""
    try:
        table = pq.read_table(path, columns=list(_COLUMNS))
    except (pa.ArrowInvalid, OSError) as error:
        raise LogsError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in _COLUMNS[1:]}
    names = table["run_id"].cast(pa.string()).to_numpy(zero_copy_only=False)
    unique, place = np.unique(names.astype(str), return_inverse=True)
    order = np.argsort(place, kind="stable")
    edges = np.searchsorted(place[order], np.arange(len(unique) + 1))
    for number, name in enumerate(unique):
        rows = order[edges[number] : edges[number + 1]]
        scalars: list[dict[str, float]] = [{} for _ in rows]
        for signal in ("loss", "grad_norm"):
            values = columns[signal][rows].astype(np.float64)
            logged = columns[f"{signal}_logged"][rows].astype(bool)
            for at in np.flatnonzero(logged):
                scalars[at][signal] = float(values[at])
        yield str(name), [int(s) for s in columns["step"][rows]], scalars
