"""Made-up runs with a known truth, as signals and as a corpus folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from foreshock.api.signals import SIGNALS

FloatArray = npt.NDArray[np.float64]

CADENCE = 4


def column(name: str) -> int:
    return SIGNALS.index(name)


def healthy_signals(count: int, rng: np.random.Generator) -> FloatArray:
    """(count, len(SIGNALS)): a learning curve, noise everywhere, tensors at every fourth record."""
    step = np.arange(count)
    signals = rng.normal(rng.normal(0, 3, len(SIGNALS)), 0.1, (count, len(SIGNALS)))
    signals[:, column("loss")] = 2 + 3.5 * np.exp(-step / 50) + 0.06 * rng.standard_normal(count)
    signals[:, column("update_ratio")] += np.log2(np.minimum(step + 1, 50) / 50)
    signals[:, [column(n) for n in ("loss_nonfinite", "grad_norm_nonfinite")]] = 0
    signals[:, column("nonfinite_tensors")] = 0
    signals[step % CADENCE != 0, len(SIGNALS) - (len(SIGNALS) - 6) :] = np.nan
    return signals


def break_run(signals: FloatArray, start: int, rng: np.random.Generator, kind: str) -> int:
    """Precursors from `start`, and a loss that climbs from the returned step on."""
    count = len(signals)
    onset = start + int(rng.integers(40, 90))
    ramp = np.clip(np.arange(count) - start, 0, None) / 40
    if kind == "LearningRateRamp":
        signals[:, column("update_ratio")] += ramp
    signals[:, column("input.headroom_log2.min")] -= 0.5 * ramp
    signals[:, column("grad_output.kurtosis.max")] += 0.7 * ramp
    climb = np.clip(np.arange(count) - onset, 0, None) / 25
    signals[:, column("loss")] += np.minimum(climb, 5)
    return onset


def write_corpus(
    folder: Path, *, groups: int = 8, runs_per_group: int = 6, count: int = 420, seed: int = 0
) -> Path:
    """A folder as `foreshock sweep` writes it: half of the runs fail."""
    rng = np.random.default_rng(seed)
    (folder / "shards").mkdir(parents=True)
    lines = []
    for group in range(groups):
        tables = []
        for index in range(runs_per_group):
            name = f"run-{group}-{index}"
            signals = healthy_signals(count, rng)
            truth = None
            if index % 2:
                kind = "LearningRateRamp" if index % 4 == 1 else "ScaleFault"
                start = int(rng.integers(130, count - 140))
                break_run(signals, start, rng, kind)
                truth = {"kind": kind, "start": start}
            tables.append(_table(name, signals))
            lines.append(
                {
                    "run": name,
                    "fingerprint": f"{group:032x}{index:032x}",
                    "group": f"group-{group}",
                    "config": {"model": {"architecture": ("llama3", "fog_max")[group % 2]}},
                    "truth": truth,
                }
            )
        pq.write_table(pa.concat_tables(tables), folder / "shards" / f"{group}.parquet")
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _table(name: str, signals: FloatArray) -> pa.Table:
    columns = {
        "run": pa.array([name] * len(signals)).dictionary_encode(),
        "step": pa.array(np.arange(len(signals), dtype=np.int32)),
        "raw_loss": pa.array(signals[:, column("loss")].astype(np.float32)),
    }
    for index, signal in enumerate(SIGNALS):
        columns[signal] = pa.array(signals[:, index].astype(np.float32))
    return pa.table(columns)
