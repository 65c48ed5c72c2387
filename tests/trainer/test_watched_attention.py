"""Operands of FP8 attention are on record with the cast that they went through."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from foreshock.monitor.record import TensorStatistics, table_to_records
from foreshock.trainer.config import ExecutionConfig, PrecisionConfig, RunConfig
from foreshock.trainer.loop import train
from foreshock.trainer.precision.attention import Fp8Attention
from foreshock.trainer.recipes import debug_cpu
from foreshock.trainer.watched import watched

DELAYED = replace(
    debug_cpu(seed=4), steps=6, tensor_every=1, precision=PrecisionConfig(attention="fp8")
)
ROLES = {"query", "key", "value", "attention_probs"}


def _operands(config: RunConfig, spool: Path) -> list[dict[tuple[str, str], TensorStatistics]]:
    """Statistics of attention's operands by step."""
    steps: list[dict[tuple[str, str], TensorStatistics]] = []

    def keep(batch: pa.RecordBatch) -> None:
        for record in table_to_records(pa.Table.from_batches([batch])):
            found = {
                (t.identity.layer, t.identity.role): t
                for t in record.tensors
                if t.identity.role in ROLES
            }
            steps.append(found)

    train(config, watch=watched(config, spool=spool, sinks=[keep]))
    return steps


def test_every_operand_of_the_products_is_on_record_as_it_was_cast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cast: dict[str, list[tuple[float, float]]] = {role: [] for role in ROLES}
    plain = Fp8Attention.cast_operand

    def noted(self: Fp8Attention, role: str, x: torch.Tensor) -> torch.Tensor:
        result = plain(self, role, x)
        if role in ROLES:
            scaling = self.scaling[role]
            cast[role].append((float(x.abs().max()), float(scaling.used)))  # type: ignore[arg-type]
        return result

    monkeypatch.setattr(Fp8Attention, "cast_operand", noted)
    steps = _operands(DELAYED, tmp_path)
    assert len(steps) == 6
    for number, found in enumerate(steps):
        assert {role for _, role in found} == ROLES
        for block in range(2):
            for role in ROLES:
                layer = next(
                    at for at, r in found if r == role and at.startswith(f"blocks.{block}.")
                )
                statistics = found[layer, role]
                amax, scale = cast[role][2 * number + block]
                assert statistics.identity.format == "e4m3"
                assert statistics.amax == pytest.approx(amax)
                assert statistics.scale_log2 == pytest.approx(math.log2(scale))


def test_recomputation_and_evaluation_show_nothing_twice(tmp_path: Path) -> None:
    straight = _operands(DELAYED, tmp_path / "a")
    again = replace(DELAYED, execution=ExecutionConfig(recompute=True))
    assert _operands(again, tmp_path / "b") == straight


def test_the_losses_and_the_checkpoint_are_those_of_an_unwatched_run(tmp_path: Path) -> None:
    seen = train(DELAYED, watch=watched(DELAYED, spool=tmp_path))
    assert [s.loss for s in seen.steps] == [s.loss for s in train(DELAYED).steps]
    recipe = [DELAYED.precision]
    names = Fp8Attention(scale=1.0, precision=recipe, lead=()).state_dict()
    assert not [name for name in names if name.startswith("operands")]
