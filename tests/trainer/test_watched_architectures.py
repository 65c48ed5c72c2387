"""Every architecture watched: each GEMM on record under its name, and not a bit of loss changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from foreshock.monitor.record import StepRecord, table_to_records
from foreshock.monitor.sinks import StepRecordSink
from foreshock.trainer.config import Architecture, ModelConfig, RunConfig
from foreshock.trainer.loop import train
from foreshock.trainer.model import Decoder
from foreshock.trainer.precision import Fp8Linear
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched

NAMES: tuple[Architecture, ...] = get_args(Architecture)
ROLES = ("input", "weight", "grad_output")


def run_of(architecture: Architecture) -> RunConfig:
    model = ModelConfig(architecture=architecture, width=32, layers=2, heads=4, kv_heads=2)
    return replace(debug_cpu(), model=model, steps=3, tensor_every=1)


class Kept(list[StepRecord]):
    """A sink that keeps the records."""

    def __call__(self, batch: pa.RecordBatch) -> None:
        self.extend(table_to_records(pa.Table.from_batches([batch])))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORESHOCK_URL", raising=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("architecture", NAMES)
def test_every_gemm_is_on_record_and_no_loss_changes(
    architecture: Architecture, tmp_path: Path
) -> None:
    config, records = run_of(architecture), Kept()
    bare = train(config)
    watch = watched(
        config, spool=tmp_path, sinks=[StepRecordSink(records.append)], activations=True
    )
    seen = train(config, watch=watch)
    assert [(s.loss, s.grad_norm) for s in seen.steps] == [
        (s.loss, s.grad_norm) for s in bare.steps
    ]
    gemms = {
        (name, role) for name in Decoder(config.model, config.precision).linears() for role in ROLES
    }
    taps = {(f"blocks.{n}.residual", "residual") for n in (0, 1)}
    taps |= {(f"blocks.{n}.attention.{role}", role) for n in (0, 1) for role in ("query", "key")}
    assert len(records) == 3
    for record in records:
        rows = {(t.identity.layer, t.identity.role): t for t in record.tensors}
        assert gemms | taps <= set(rows)
        residual = rows["blocks.1.residual", "residual"]
        assert residual.identity.format == "fp32"
        assert residual.kurtosis_sequence_mean is not None


@pytest.mark.usefixtures("alone")
def test_taps_measure_what_passes_through_them(tmp_path: Path) -> None:
    config, records = run_of("fog_max"), Kept()
    watch = watched(
        config, spool=tmp_path, sinks=[StepRecordSink(records.append)], activations=True
    )
    train(config, watch=watch)
    rows = {(t.identity.layer, t.identity.role): t for t in records[0].tensors}
    # Normed heads have a root mean square of 1; a layer's residual is the next one's input.
    assert rows["blocks.0.attention.query", "query"].rms == pytest.approx(1.0, abs=1e-3)
    tokens = config.data.batch_size * config.data.sequence_length
    assert rows["blocks.0.attention.query", "query"].numel == tokens * 32
    assert rows["blocks.0.attention.key", "key"].numel == tokens * 16
    following = rows["blocks.1.attention.qkv", "input"]
    residual = rows["blocks.0.residual", "residual"]
    assert residual.rms == following.rms
    assert residual.kurtosis == following.kurtosis


@pytest.mark.usefixtures("alone")
def test_closed_taps_are_not_on_record(tmp_path: Path) -> None:
    config, records = run_of("llama3"), Kept()
    train(config, watch=watched(config, spool=tmp_path, sinks=[StepRecordSink(records.append)]))
    assert {t.identity.role for t in records[0].tensors} <= set(ROLES)


@pytest.mark.usefixtures("alone")
def test_an_idle_expert_is_on_record_as_zeros(tmp_path: Path) -> None:
    config, records = run_of("fog_moe"), Kept()

    def attach(model, optimizer, first_step):  # type: ignore[no-untyped-def]
        factory = watched(config, spool=tmp_path, sinks=[StepRecordSink(records.append)])
        router = model.blocks[0].mlp.router
        router.requires_grad_(False)
        with torch.no_grad():
            # Equal logits: the same two are taken, always.
            router.zero_()
        return factory(model, optimizer, first_step)

    train(config, watch=attach)
    rows = {(t.identity.layer, t.identity.role): t for t in records[-1].tensors}
    inputs = [rows[f"blocks.0.mlp.experts.{e}.up", "input"] for e in range(4)]
    idle = [row for row in inputs if row.amax == 0]
    assert len(idle) == 2
    assert all(row.kurtosis is None for row in idle)
    assert records[-1].scalars["loss"] < 6


@pytest.mark.usefixtures("alone")
def test_a_smoothed_layer_is_measured_as_its_gemm_is_fed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast: list[tuple[str, float]] = []
    plain = Fp8Linear.cast_operand

    def noted(self: Fp8Linear, role: str, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.in_features == run.model.gated_ffn_width and role != "grad_output":
            cast.append((role, float(x.detach().abs().max())))
        return plain(self, role, x)

    monkeypatch.setattr(Fp8Linear, "cast_operand", noted)
    run, records = run_of("llama3_smooth_swiglu"), Kept()
    train(run, watch=watched(run, spool=tmp_path, sinks=[StepRecordSink(records.append)]))
    shown = [
        (tensor.identity.role, tensor.amax)
        for record in records
        for tensor in record.tensors
        if tensor.identity.layer.endswith(".down") and tensor.identity.role != "grad_output"
    ]
    assert len(cast) == len(shown) == 3 * 2 * 2
    for (role, amax), (shown_role, shown_amax) in zip(cast, shown, strict=True):
        assert role == shown_role
        assert amax == pytest.approx(shown_amax, rel=1e-6)
    # The input is smoothed to one, which the weight's columns pay for: the parameter has less.
    assert all(amax == pytest.approx(1, rel=1e-2) for role, amax in cast if role == "input")
