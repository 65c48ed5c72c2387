"""Formats that a run does not use, histograms and blocks, through a watch of a real run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from foreshock.monitor import Watch
from foreshock.monitor.blocks import block_sums, histogram
from foreshock.monitor.operands import Operand
from foreshock.monitor.record import StepRecord, TensorStatistics
from tests.monitor.models import Recorder, tiny, train

Start = Callable[..., Watch]


def rows_of(record: StepRecord, layer: str, role: str) -> dict[str, TensorStatistics]:
    return {
        t.identity.format: t
        for t in record.tensors
        if (t.identity.layer, t.identity.role) == (layer, role)
    }


def test_what_if_rows_stand_beside_the_run_and_change_nothing(
    start: Start, recorder: Recorder
) -> None:
    model, optimizer = tiny()
    bare = train(model, optimizer)
    model, optimizer = tiny()
    formats = ["e4m3", "e5m2", "mxfp8", "block128", "nvfp4"]
    with start(model, optimizer, what_if=formats) as watch:
        weight = model.gate.weight.detach().clone()
        assert train(model, optimizer) == bare
        assert watch.errors == 0
    found = rows_of(recorder.records[0], "gate", "weight")
    assert list(found) == [
        "fp32", "block128_e4m3", "e4m3", "e5m2", "mxfp8_e4m3", "nvfp4",
    ]  # fmt: skip
    assert found["fp32"].kurtosis is not None
    assert found["fp32"].underflow_ratio is None
    for name, row in found.items():
        if name == "fp32":
            continue
        assert row.identity.what_if
        assert row.kurtosis is None, "what no format changes stands on the first row only"
        assert row.underflow_ratio is not None
        assert row.sqnr_db is not None
        assert row.numel == weight.numel()
    blocks = block_sums(weight, format="mxfp8_e4m3", granularity="block", weight=True)[0]
    assert found["mxfp8_e4m3"].underflow_ratio == pytest.approx(
        float(blocks[10]) / weight.numel(), abs=1e-6
    )
    assert found["mxfp8_e4m3"].scale_log2_p50 is not None
    assert found["e4m3"].scale_log2_p50 is None


@pytest.mark.parametrize("wrong", [["fp4"], "e4m3", ["e4m3", 3]])
def test_unknown_formats_are_refused(start: Start, wrong: Any) -> None:
    model, optimizer = tiny()
    with pytest.raises((ValueError, TypeError), match="what_if"):
        start(model, optimizer, what_if=wrong)
    start(model, optimizer).close()


def test_histograms_add_up_over_micro_batches(start: Start, recorder: Recorder) -> None:
    model, optimizer = tiny()
    with start(model, optimizer, histogram=True):
        weight = model.gate.weight.detach().clone()
        train(model, optimizer, steps=1, micro_batches=3)
    found = rows_of(recorder.records[0], "gate", "weight")["fp32"]
    assert found.exponents is not None
    assert list(found.exponents) == histogram(weight).long().tolist()
    inputs = rows_of(recorder.records[0], "gate", "input")["fp32"]
    assert inputs.exponents is not None
    assert sum(inputs.exponents) == inputs.numel - round((inputs.zero_ratio or 0) * inputs.numel)


class RowScaled(nn.Linear):
    """Casts its operands with one scale per row."""

    def operand(self, role: str) -> Operand:
        return Operand("e4m3", None, "row")


def test_rows_with_a_scale_each(start: Start, recorder: Recorder) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(RowScaled(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(6, 8) * torch.logspace(0, 5, 6)[:, None]
    with start(model, optimizer):
        model(x).square().mean().backward()
        optimizer.step()
    found = rows_of(recorder.records[0], "0", "input")["e4m3"]
    assert found.identity.granularity == "row"
    scales = torch.log2(448 / x.abs().amax(1))
    assert found.scale_log2 == pytest.approx(float(scales.min()), abs=1e-3)
    assert found.scale_log2_max == pytest.approx(float(scales.max()), abs=1e-3)
    assert found.kurtosis is not None
    assert found.top_channel is not None
    assert found.scale_log2_p50 is not None
