"""Signals folded on the device are those that numpy folds from records."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from foreshock.api.cli.device_signals import fold_on_device, signals_of
from foreshock.api.cli.sweep import Job, sweep_windows, write_index
from foreshock.api.signals import SIGNALS, TENSOR_SIGNALS, summarise
from foreshock.monitor.record import TensorIdentity
from foreshock.trainer.config import PrecisionConfig, RunConfig
from foreshock.trainer.corpus_plan import corpus_plan
from foreshock.trainer.faults import LearningRateRamp, ScaleFault
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.stacked import train_stack
from foreshock.trainer.stacked_device import train_windows
from foreshock.trainer.stacked_sums import STATISTICS


def test_fold_knows_nan_infinity_and_no_row_at_all() -> None:
    identities = [
        TensorIdentity(layer=f"l{i}", role=role, format="e4m3")
        for i in range(3)
        for role in ("input", "weight", "grad_output")
    ]
    random = np.random.default_rng(0)
    values = np.exp(random.normal(size=(4, len(STATISTICS), 9)) * 20)
    values[:, 0] = random.integers(0, 2, size=(4, 9))
    values[random.uniform(size=values.shape) < 0.3] = np.nan
    values[1, 1:] = np.nan
    values[2, 7, :4] = np.inf
    got = fold_on_device(identities)(torch.from_numpy(values)).numpy()
    named = {name: values[:, index] for index, name in enumerate(STATISTICS)}
    expected = summarise(identities, named, {})[:, len(SIGNALS) - len(TENSOR_SIGNALS) :]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def stack() -> list[RunConfig]:
    plain = replace(debug_cpu(), steps=10)
    return [
        plain,
        replace(plain, seed=1, fault=ScaleFault(start=3, growth=1.5, stale_inverse=True)),
        replace(plain, seed=2, precision=PrecisionConfig(scaling="current")),
        replace(plain, seed=3, fault=LearningRateRamp(start=2, factor=1e30, limit=1e35)),
    ]


def test_signals_of_windows_are_those_of_steps() -> None:
    configs = stack()
    steps = train_stack(configs)
    expected = np.array([summarise(s.identities, s.statistics, s.scalars) for s in steps])
    windows = train_windows(
        configs, fold=fold_on_device, folded=len(TENSOR_SIGNALS), device="cpu", window=4
    )
    got = np.concatenate([signals_of(window)[0] for window in windows])
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    assert not np.isfinite(expected[-1, 3, 0])
    # Signals are logarithms: sums in another order, kept in float32.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_shard_of_the_second_plan_says_what_the_plan_knows(tmp_path: Path) -> None:
    [planned] = corpus_plan(0, 1, models_per_stack=6, scale=0.05)
    job = Job.planned(planned, tmp_path)
    job.path.parent.mkdir()
    counted: list[int] = []
    sweep_windows(job, time.monotonic() + 600, "cpu", counted.append)
    table = pq.read_table(job.path)
    steps = planned[0].config.steps
    assert table.num_rows == sum(counted) == 6 * steps
    # Losses as they came and the signal agree at every step, not only in the last window.
    raw, loss = table["raw_loss"].to_numpy(), table["loss"].to_numpy()
    np.testing.assert_array_equal(raw[np.isfinite(raw)], loss[np.isfinite(raw)])
    assert write_index(tmp_path) == 6
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    for line, run in zip(lines, planned, strict=True):
        assert line["run"] == run.config.name
        assert (line["recipe"], line["kind"], line["twin"]) == (run.recipe, run.kind, run.twin)
        assert line["planned_events"] == [{"step": s, "kind": k} for s, k in run.events]
        assert (line["truth"] is None) == (run.config.fault is None)


def test_a_stack_that_fails_leaves_no_shard_and_no_exception(tmp_path: Path) -> None:
    [planned] = corpus_plan(0, 1, models_per_stack=4, scale=0.05)
    unlike = replace(planned[0], config=replace(planned[0].config, steps=7))
    job = Job.planned([unlike, *planned[1:]], tmp_path)
    job.path.parent.mkdir()
    sweep_windows(job, time.monotonic() + 600, "cpu")
    assert not job.path.exists()
