"""Transformer Engine's debug statistics as records, and rows of its scale histories."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from nvdlfw_inspect.logging import MetricLogger

from foreshock.monitor.entry import Entry
from foreshock.monitor.record import (
    FIELD_REDUCTIONS,
    StepRecord,
    TensorIdentity,
    TensorSums,
    table_to_records,
)
from foreshock.monitor.table import extremes_only
from foreshock.monitor.te_records import TEStatistic, parse_te_name, te_record
from foreshock.monitor.transformer_engine import TEStatsLogger, te_debug

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("Layer_1_activation_mse", TEStatistic("Layer_1", "activation", "mse", "", True)),
        ("a.weight_b_weight_std", TEStatistic("a.weight_b", "weight", "std", "", True)),
        (
            "x_gradient_fp8_current_scaling_underflows%",
            TEStatistic("x", "gradient", "underflows%", "fp8_current_scaling_", True),
        ),
        ("x_weight_weight_l2_norm", TEStatistic("x_weight", "weight", "l2_norm", "", True)),
        (
            "x_activation_mxfp8_mse_columnwise",
            TEStatistic("x", "activation", "mxfp8_mse_columnwise"),
        ),
        ("x_dgrad_max", TEStatistic("x", "dgrad", "max", "", True)),
        ("something else", TEStatistic("", "", "something else")),
    ],
)
def test_names_are_read_from_the_right(name: str, parsed: TEStatistic) -> None:
    assert parse_te_name(name) == parsed


def test_statistics_with_a_place_become_rows_and_others_scalars() -> None:
    values = {
        "l.0_activation_underflows%": 25.0,
        "l.0_activation_overflows%": 1.0,
        "l.0_activation_scale_inv_min": 0.25,
        "l.0_activation_scale_inv_max": 0.5,
        "l.0_activation_cur_amax": 7.0,
        "l.0_activation_dynamic_range": 3.0,
        "l.0_activation_mse": 1e-9,
        "l.0_gradient_scale_inv_min": 2.0,
        "l.0_gradient_mxfp8_underflows%": 50.0,
        "l.0_dgrad_max": 3.0,
    }
    record = te_record(values.items(), step=3, time=NOW, names={"l.0": "layers.0"})
    rows = {(t.identity.role, t.identity.format): t for t in record.tensors}
    x = rows["input", "e4m3"]
    assert x.identity.layer == "layers.0"
    assert (x.underflow_ratio, x.overflow_ratio, x.amax) == (0.25, 0.01, 7.0)
    assert (x.scale_log2, x.scale_log2_max) == (1.0, 2.0)
    assert x.min_nonzero == pytest.approx(7.0 / 8)
    assert x.headroom_log2 == pytest.approx(math.log2(448 / (7 * 2)))
    gradient = rows["grad_output", "e5m2"]
    assert gradient.scale_log2 == -1.0
    assert gradient.headroom_log2 is None
    what_if = rows["grad_output", "mxfp8_e4m3"]
    assert what_if.identity.what_if
    assert what_if.underflow_ratio == 0.5
    assert record.scalars == {"te/l.0_activation_mse": 1e-9, "te/l.0_dgrad_max": 3.0}


def test_what_is_not_finite_arrives_as_it_is() -> None:
    values = {"x_weight_cur_amax": math.nan, "x_weight_scale_inv_max": math.inf}
    (row,) = te_record(values.items(), step=0, time=NOW).tensors
    assert row.amax is not None
    assert math.isnan(row.amax)
    assert row.scale_log2 == -math.inf
    assert row.headroom_log2 is None


class _Kept:
    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.closed = False

    def __call__(self, record: pa.RecordBatch) -> None:
        self.records += table_to_records(pa.Table.from_batches([record]))

    def close(self) -> None:
        self.closed = True


def test_logger_makes_one_record_of_each_iteration() -> None:
    kept = _Kept()
    with TEStatsLogger(sinks=(kept,)) as logger:
        MetricLogger.add_logger(logger)
        try:
            for iteration in (0, 10):
                MetricLogger.log_scalar("x_activation_cur_amax", torch.tensor(4.0), iteration)
                MetricLogger.log_scalar("x_activation_l2_norm", 2.5 + iteration, iteration)
                MetricLogger.log_scalar("x_gradient_underflows%", torch.tensor([5.0]), iteration)
        finally:
            MetricLogger.enabled_loggers.remove(logger)
        assert logger.flush()
    assert kept.closed
    assert [record.step for record in kept.records] == [0, 10]
    assert kept.records[1].scalars == {"te/x_activation_l2_norm": 12.5}
    first, second = kept.records[0].tensors
    assert first.amax == 4.0
    assert second.underflow_ratio == pytest.approx(0.05)
    assert sum(guard.errors for guard in logger.guards) == 0


def test_wrong_use_of_debug_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="freq is -1"):
        te_debug(freq=-1)
    with pytest.raises(ValueError, match="nothing would be switched on"):
        te_debug(freq=0, log_dir=tmp_path)
    with pytest.raises(RuntimeError, match="is not installed"):
        te_debug(log_dir=tmp_path)


def test_history_rows_say_extremes_and_nothing_else() -> None:
    kept = np.array([[2.0, 8.0], [0.0, 1.0], [896.0, 1.0]])
    formats = ("e4m3", "e5m2", "e4m3")
    entries = [Entry(TensorIdentity("layer", "input", format), None) for format in formats]
    rows = extremes_only(kept, entries)
    columns = {name: rows[:, i] for i, name in enumerate(FIELD_REDUCTIONS)}
    sums = TensorSums(
        **columns, amax_rank=columns["amax"] * 0, quantized=columns["amax"] > -math.inf
    )
    found = sums.statistics()
    assert found["amax"].tolist() == [2.0, 0.0, 896.0]
    assert found["scale_log2"].tolist() == [3.0, 0.0, 0.0]
    assert found["headroom_log2"].tolist() == [math.log2(28), None, -1.0]
    assert found["observations"].tolist() == [1, 1, 1]
    for name in ("rms", "kurtosis", "underflow_ratio", "zero_ratio", "sqnr_db", "min_nonzero"):
        assert found[name].tolist() == [None] * 3, name
