"""A corpus of runs as `foreshock sweep` writes it, ready for fitting and evaluation.

Truth about faults serves two things only: a run is censored where somebody interferes with it, and
results are broken down by family. It never becomes a feature.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from foreshock.api.alerts import PLANNED_EVENTS
from foreshock.api.detection import LossDetector
from foreshock.api.features import FeatureSettings, extract_run
from foreshock.api.labels import RunLabel, label_drift, label_run
from foreshock.api.signals import SIGNALS

__all__ = ["CorpusError", "CorpusRun", "TrainingRows", "load_corpus", "training_rows"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_GAP: Final = 1


class CorpusError(ValueError):
    """The folder is not a corpus; says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusRun:
    """One run.

    Attributes:
        name: Its name.
        fingerprint: Of its configuration.
        group: Runs of one group are never split.
        architecture: Block of the model.
        family: natural, healthy, or the kind of the fault.
        fault_start: First step of the interference, None without one.
        steps: (T,).
        signals: (T, len(SIGNALS)).
        loss: (T,) as logged, non-finite values included.
        features: (T, len(FEATURES)).
        detected: (T,) whether the loss detector is active.
        label: From the loss alone, or against its twin.
        recipe: Of the precision.
        kind: What the plan meant the run to be; empty where it says nothing.
        twin: The run that differs in the fault or recipe only.
        split: `fit`, or what the run is held back for.
    """

    name: str
    fingerprint: str
    group: str
    architecture: str
    family: str
    fault_start: int | None
    steps: npt.NDArray[np.int64]
    signals: FloatArray
    loss: FloatArray
    features: npt.NDArray[np.float32]
    detected: BoolArray
    label: RunLabel
    recipe: str = "unknown"
    kind: str = ""
    twin: str | None = None
    split: str = "fit"

    @property
    def event_class(self) -> str:
        """Explosion, spike (malignant) or drift; empty without an event."""
        if not self.label.diverges:
            return ""
        if self.label.kind == "spike":
            return "spike"
        return "drift" if self.label.kind == "drift" or self.label.note == "drift" else "explosion"

    @property
    def judged(self) -> BoolArray:
        """(T,) rows with features and before the onset: those a forecast is scored on."""
        ready = np.isfinite(self.features).any(axis=1)
        if self.label.onset is None:
            return np.asarray(ready)
        return np.asarray(ready & (self.steps < self.label.onset - _GAP))

    @property
    def healthy(self) -> BoolArray:
        """(T,) judged rows on which an alarm is false: no divergence ahead, or not yet caused."""
        if self.label.onset is None:
            return self.judged
        if self.fault_start is None or self.label.onset <= self.fault_start:
            return np.zeros(len(self.steps), dtype=np.bool_)
        return np.asarray(self.judged & (self.steps < self.fault_start))

    def times(self) -> tuple[FloatArray, FloatArray]:
        """(T,) steps to the onset (inf = not seen) and steps for which the run was observed.

        Rows before an interference are censored at it: what somebody will do is nobody's to know.
        """
        observed = (self.steps[-1] - self.steps).astype(np.float64)
        time = np.full(len(self.steps), np.inf)
        if self.label.onset is not None:
            time = (self.label.onset - self.steps).astype(np.float64)
        start = self.fault_start
        if start is not None and (self.label.onset is None or self.label.onset > start):
            before = self.steps < start
            time[before] = np.inf
            observed[before] = start - self.steps[before]
        return time, observed


def load_corpus(
    folder: Path, settings: FeatureSettings | None = None, *, processes: int = 1
) -> list[CorpusRun]:
    """Read, label and extract features of every run.

    Args:
        folder: With `runs.jsonl` and `shards/*.parquet`.
        settings: Of the features.
        processes: That share the shards.

    Raises:
        CorpusError: Files or columns are missing, or a run stands in only one of them.
    """
    index = _read_index(folder)
    shards = sorted((folder / "shards").glob("*.parquet"))
    if not shards:
        raise CorpusError(f"{folder / 'shards'} has no .parquet files; run `foreshock sweep` first")
    jobs = [(shard, index, settings) for shard in shards]
    if processes > 1 and len(shards) > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(shards)), mp_context=context) as pool:
            parts = list(pool.map(_read_shard, *zip(*jobs, strict=True)))
    else:
        parts = [_read_shard(*job) for job in jobs]
    runs = [run for part in parts for run in part]
    if not runs:
        raise CorpusError(f"no run of {folder / 'runs.jsonl'} stands in the shards")
    by_name = {run.name: run for run in runs}
    return [_against_twin(run, by_name) for run in runs]


def _against_twin(run: CorpusRun, by_name: Mapping[str, CorpusRun]) -> CorpusRun:
    """The run with a label of drift where only its twin shows one."""
    twin = by_name.get(run.twin or "")
    if twin is None or run.label.kind != "healthy" or twin.label.kind != "healthy":
        return run
    # A healthy run that was planned to differ (another schedule, a restart) may end elsewhere.
    if run.fault_start is None and run.kind != "natural":
        return run
    steps, own, other = np.intersect1d(run.steps, twin.steps, return_indices=True)
    loss, reference = run.loss[own], twin.loss[other]
    finite = np.isfinite(loss) & np.isfinite(reference)
    label = label_drift(steps[finite], loss[finite], reference[finite])
    if label is None:
        return run
    return replace(run, label=label, family="natural" if run.family == "healthy" else run.family)


def _read_index(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "runs.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}") from None
    index = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            index[str(entry["run"])] = entry
        except (ValueError, KeyError, TypeError):
            raise CorpusError(f"{path}: line {number} is not a run") from None
    return index


def _read_shard(
    shard: Path, index: Mapping[str, dict[str, Any]], settings: FeatureSettings | None
) -> list[CorpusRun]:
    try:
        table = pq.read_table(shard)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{shard} is not a whole Parquet file: {error}") from None
    missing = [name for name in ("run", "step", *SIGNALS) if name not in table.column_names]
    if missing:
        raise CorpusError(f"{shard} lacks the columns {', '.join(missing[:5])}: sweep again")
    table = table.set_column(table.column_names.index("run"), "run", table["run"].cast(pa.string()))
    runs = []
    for name in pc.unique(table["run"]).to_pylist():
        if name not in index:
            raise CorpusError(f"{shard}: run {name!r} is not in runs.jsonl")
        part = table.filter(pc.equal(table["run"], name)).sort_by("step")
        runs.append(_make_run(part, index[name], settings))
    return runs


def _make_run(
    table: pa.Table, entry: Mapping[str, Any], settings: FeatureSettings | None
) -> CorpusRun:
    steps = table["step"].to_numpy().astype(np.int64)
    signals = np.stack([table[name].to_numpy().astype(np.float64) for name in SIGNALS], axis=1)
    planned = [
        int(event["step"])
        for event in entry.get("planned_events") or ()
        if event["kind"] in PLANNED_EVENTS
    ]
    column = "raw_loss" if "raw_loss" in table.column_names else "loss"
    loss = table[column].to_numpy().astype(np.float64)
    label = label_run(steps, loss)
    return CorpusRun(
        name=str(entry["run"]),
        fingerprint=str(entry["fingerprint"]),
        group=str(entry["group"]),
        architecture=_architecture(entry),
        family=_family(entry, label),
        fault_start=_fault_start(entry),
        steps=steps,
        signals=signals,
        loss=loss,
        # Halves the memory of a thousand runs; the features mean nothing beyond three digits.
        features=extract_run(steps, signals, settings, planned).astype(np.float32),
        detected=_detected(steps, loss, planned),
        label=label,
        recipe=str(entry.get("recipe") or _recipe(entry)),
        kind=str(entry.get("kind") or ""),
        twin=entry.get("twin"),
        split=str(entry.get("split") or "fit"),
    )


def _architecture(entry: Mapping[str, Any]) -> str:
    model = (entry.get("config") or {}).get("model") or {}
    return str(model.get("architecture", "unknown"))


def _recipe(entry: Mapping[str, Any]) -> str:
    """Of a corpus whose index does not name it."""
    precision = (entry.get("config") or {}).get("precision") or {}
    if precision.get("backend", "unknown") != "emulated":
        return str(precision.get("backend", "unknown"))
    scaling = str(precision.get("scaling", "unknown"))
    names = {"current": "fp8_current", "delayed": f"fp8_delayed{precision.get('history', '')}"}
    return names.get(scaling, scaling)


def _family(entry: Mapping[str, Any], label: RunLabel) -> str:
    truth = entry.get("truth")
    if truth:
        return str(truth.get("kind", "fault"))
    return "natural" if label.diverges else "healthy"


def _fault_start(entry: Mapping[str, Any]) -> int | None:
    truth = entry.get("truth")
    start = truth.get("start") if truth else None
    return None if start is None else int(start)


def _detected(steps: npt.NDArray[np.int64], loss: FloatArray, planned: Sequence[int]) -> BoolArray:
    detector = LossDetector()
    ahead = sorted(planned, reverse=True)
    flags = []
    for step, value in zip(steps.tolist(), loss.tolist(), strict=True):
        while ahead and ahead[-1] <= step:
            ahead.pop()
            detector.rebaseline()
        flags.append(detector.update(step, value).detected)
    return np.array(flags, dtype=np.bool_)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRows:
    """Rows of several runs, thinned where nothing happens.

    Attributes:
        features: (n, len(FEATURES)).
        times: (n, 2) steps to the onset and steps observed.
        weights: (n,) rows that each stands for.
        groups, runs: (n,).
    """

    features: FloatArray
    times: FloatArray
    weights: FloatArray
    groups: npt.NDArray[Any]
    runs: npt.NDArray[Any]


def training_rows(
    runs: Sequence[CorpusRun], *, near: int = 101, most: int = 20_000
) -> TrainingRows:
    """Choose rows: neighbours say nearly the same, above all far from an onset.

    Args:
        runs: The runs.
        near: Rows up to so many steps before an onset are thinned less.
        most: About so many rows are kept in all: two fifths near an onset, the rest far from one.
    """
    every_near, every_far = _thinning(runs, near, most)
    features, times, weights, groups, names = [], [], [], [], []
    for run in runs:
        time, observed = run.times()
        judged = np.flatnonzero(run.judged)
        close = judged[time[judged] <= near]
        far = judged[time[judged] > near]
        # The ten steps before an onset are few and the only ones of the first interval.
        last, close = close[time[close] <= 11], close[time[close] > 11]
        for rows, every in ((last, 1), (close, every_near), (far, every_far)):
            chosen = rows[::-every]
            features.append(run.features[chosen])
            times.append(np.stack([time[chosen], observed[chosen]], axis=1))
            weights.append(np.full(len(chosen), float(every)))
            groups.append(np.full(len(chosen), run.group, dtype=object))
            names.append(np.full(len(chosen), run.name, dtype=object))
    return TrainingRows(
        features=np.concatenate(features).astype(np.float64),
        times=np.concatenate(times),
        weights=np.concatenate(weights),
        groups=np.concatenate(groups).astype(str),
        runs=np.concatenate(names).astype(str),
    )


def _thinning(runs: Sequence[CorpusRun], near: int, most: int) -> tuple[int, int]:
    """Every how many rows near an onset, and far from one, a row is kept."""
    close = far = 0
    for run in runs:
        time = run.times()[0][run.judged]
        close += int(np.count_nonzero(time <= near))
        far += int(np.count_nonzero(time > near))
    return 1 + int(close // (0.4 * most)), max(4, 1 + int(far // (0.6 * most)))
