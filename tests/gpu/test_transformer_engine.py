"""Transformer Engine's layers: the same training, no wait, and the numbers that it holds itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from foreshock.monitor.collector import Collector
from foreshock.monitor.record import StepRecord
from foreshock.monitor.sampling import Cadence
from foreshock.monitor.session import Watch
from foreshock.monitor.settings import WatchSettings
from foreshock.monitor.sinks import StepRecordSink
from foreshock.monitor.statistics import SUM_FIELDS
from foreshock.monitor.table import extremes_only

# Attention's backward pass adds in any order unless told otherwise.
os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
te = pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine")
from transformer_engine.common.recipe import (  # noqa: E402
    DelayedScaling,
    Float8CurrentScaling,
    Format,
)
from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # noqa: E402

pytestmark = pytest.mark.gpu

WIDTH, BATCH, TOKENS = 256, 2, 128
OPTIONS = {"params_dtype": torch.bfloat16, "device": "cuda"}
RECIPES: dict[str, Callable[[], Any]] = {
    "delayed": lambda: DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16),
    "current": lambda: Float8CurrentScaling(fp8_format=Format.HYBRID),
}


def transformer() -> torch.nn.Module:
    return te.TransformerLayer(  # type: ignore[no-any-return]
        WIDTH,
        4 * WIDTH,
        4,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attn_input_format="bshd",
        **OPTIONS,
    )


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "linear": lambda: te.Linear(WIDTH, 2 * WIDTH, **OPTIONS),
    "layernorm_linear": lambda: te.LayerNormLinear(WIDTH, 2 * WIDTH, **OPTIONS),
    "layernorm_mlp": lambda: te.LayerNormMLP(WIDTH, 4 * WIDTH, **OPTIONS),
    "transformer": transformer,
}


class Run:
    """A model of two layers of a kind in training, watched or not."""

    def __init__(self, kind: str, recipe: Any, *, watched: bool, every: int = 1) -> None:
        FP8GlobalStateManager.reset()
        torch.manual_seed(0)
        count = 1 if kind in ("linear", "layernorm_linear") else 2
        self.model = torch.nn.Sequential(*(LAYERS[kind]() for _ in range(count)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.recipe = recipe
        self.records: list[StepRecord] = []
        self.losses: list[torch.Tensor] = []
        self.data = torch.randn(BATCH, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
        settings = WatchSettings(
            run="te",
            cadence=Cadence(every),
            sinks=(StepRecordSink(self.records.append),),
            spool=None,
        )
        self.watch = Watch(self.model, self.optimizer, settings) if watched else None

    def steps(self, count: int) -> None:
        for _ in range(count):
            x = self.data.detach().requires_grad_()
            with te.fp8_autocast(enabled=True, fp8_recipe=self.recipe):
                loss = self.model(x).float().square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.detach())

    def close(self) -> list[float]:
        if self.watch is not None:
            assert self.watch.flush()
            assert self.watch.errors == 0
            self.watch.close()
        return [float(loss) for loss in self.losses]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_training_is_the_same(kind: str, recipe: str) -> None:
    losses = []
    for watched in (False, True):
        run = Run(kind, RECIPES[recipe](), watched=watched)
        run.steps(5)
        losses.append(run.close())
    assert losses[0] == losses[1]
    assert len(run.records) == 5
    roles = {(t.identity.layer, t.identity.role) for t in run.records[-1].tensors}
    gemms = {"linear": 1, "layernorm_linear": 1, "layernorm_mlp": 4, "transformer": 8}[kind]
    assert len(roles) == 3 * gemms
    formats = {(t.identity.role, t.identity.format) for t in run.records[-1].tensors}
    assert formats == {("input", "e4m3"), ("weight", "e4m3"), ("grad_output", "e5m2")}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("every", [1, 2])
def test_nothing_waits_for_the_device(recipe: str, every: int) -> None:
    run = Run("transformer", RECIPES[recipe](), watched=True, every=every)
    run.steps(3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.steps(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    run.close()
    assert len(run.records) == 7


def rows_of_history(taken: Any) -> list[tuple[Any, Any]]:
    """Entries and rows of tensors of which only scales and largest magnitudes are known."""
    if not taken.history:
        return []
    kept = torch.cat(taken.history).double().cpu().numpy().reshape(-1, 2)
    return [*zip(taken.history_entries, extremes_only(kept, taken.history_entries), strict=True)]


class Spy:
    """What a watch's collector took, and the codes that it was given."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        assert run.watch is not None
        self.rows: dict[tuple[str, str, str | None], dict[str, float]] = {}
        self.codes: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor, str]] = {}
        collector = run.watch._collector
        take, observe_codes = collector.take, collector.observe_codes

        def taken() -> Any:
            found = take()
            pairs = [*zip(found.entries, found.sums, strict=True), *rows_of_history(found)]
            if found.device is not None:
                pairs += [*zip(found.device_entries, found.device, strict=True)]
            for entry, row in pairs:
                values = dict(zip(SUM_FIELDS, row.tolist(), strict=False))
                if values["observations"] > 0:
                    key = (entry.identity.layer, entry.identity.role, entry.source)
                    self.rows[key] = values
            return found

        def given(layer: str, role: str, codes: torch.Tensor, **rest: Any) -> None:
            kept = codes.clone(), rest["scale_inv"].clone(), rest["format"]
            self.codes[layer, role] = kept
            observe_codes(layer, role, codes, **rest)

        monkeypatch.setattr(Collector, "take", lambda _: taken())
        monkeypatch.setattr(Collector, "observe_codes", lambda _, *a, **k: given(*a, **k))


# Layer, role: direction and position of the quantizer.
PLACES = {
    ("layernorm_qkv", "input"): ("fwd", 0),
    ("layernorm_qkv", "weight"): ("fwd", 1),
    ("layernorm_qkv", "grad_output"): ("bwd", 0),
    ("proj", "input"): ("fwd", 0),
    ("proj", "weight"): ("fwd", 1),
    ("proj", "grad_output"): ("bwd", 0),
    ("layernorm_mlp.fc1", "input"): ("fwd", 0),
    ("layernorm_mlp.fc1", "weight"): ("fwd", 1),
    ("layernorm_mlp.fc1", "grad_output"): ("bwd", 0),
    ("layernorm_mlp.fc2", "input"): ("fwd", 3),
    ("layernorm_mlp.fc2", "weight"): ("fwd", 4),
    ("layernorm_mlp.fc2", "grad_output"): ("bwd", 2),
}


def _module(model: torch.nn.Module, layer: str) -> torch.nn.Module:
    return model.get_submodule(layer.removesuffix(".fc1").removesuffix(".fc2"))


def _expected(run: Run, before: dict[str, Any]) -> dict[tuple[str, str], tuple[float, float]]:
    """Largest magnitude and scale in force by layer and role, as Transformer Engine has them."""
    expected = {}
    for layer, module in run.model.named_modules():
        for (end, role), (direction, at) in PLACES.items():
            own = end.removesuffix(".fc1").removesuffix(".fc2")
            if not layer.endswith(own):
                continue
            key = (layer + end[len(own) :], role)
            if f"{layer} {direction}" in before:
                state = module.fp8_meta[f"scaling_{direction}"]
                amax, scale = state.amax_history[-1, at], before[f"{layer} {direction}"][at]
            else:
                quantizer = module.quantizers[f"scaling_{direction}"][at]
                amax, scale = quantizer.amax, quantizer.scale
            expected[key] = (float(amax), float(scale))
    return expected


def _scales(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{layer} {direction}": module.fp8_meta[f"scaling_{direction}"].scale.clone()
        for layer, module in model.named_modules()
        for direction in ("fwd", "bwd")
        if hasattr(getattr(module, "fp8_meta", {}).get(f"scaling_{direction}"), "amax_history")
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_scale_and_amax_are_those_of_transformer_engine(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("transformer", RECIPES[recipe](), watched=True)
    spy = Spy(run, monkeypatch)
    run.steps(3)
    before = _scales(run.model)
    spy.rows.clear()
    run.steps(1)
    expected = _expected(run, before)
    assert len(expected) == 2 * len(PLACES)
    seen = 0
    for (layer, role), (amax, scale) in expected.items():
        largest = 57344.0 if role == "grad_output" else 448.0
        for source in (None, "history"):
            row = spy.rows.get((layer, role, source))
            if row is None:
                continue
            seen += 1
            assert row["amax"] == pytest.approx(amax, rel=1e-6), (layer, role, source)
            assert row["scale_log2"] == pytest.approx(math.log2(scale), abs=1e-6), (layer, role)
            headroom = math.log2(largest / (amax * scale))
            assert row["headroom_log2"] == pytest.approx(headroom, abs=1e-5), (layer, role)
    assert seen == len(expected)
    run.close()


def test_gradient_inside_the_layer_that_updates_all_scales(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run("layernorm_mlp", RECIPES["delayed"](), watched=True)
    spy = Spy(run, monkeypatch)
    run.steps(3)
    before = _scales(run.model)
    spy.rows.clear()
    run.steps(1)
    layers: dict[str, Any] = dict(run.model.named_children())
    for layer, module in layers.items():
        row = spy.rows[f"{layer}.fc1", "grad_output", "history"]
        assert row["amax"] == float(module.fp8_meta["scaling_bwd"].amax_history[-1, 0])
        assert row["scale_log2"] == pytest.approx(math.log2(float(before[f"{layer} bwd"][0])))
    run.close()


@pytest.mark.parametrize("recipe", RECIPES)
def test_codes_are_measured_as_what_they_stand_for(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("transformer", RECIPES[recipe](), watched=True)
    spy = Spy(run, monkeypatch)
    run.steps(2)
    ends = ("layernorm_qkv", "layernorm_mlp.fc1", "layernorm_mlp.fc2")
    assert len(spy.codes) == 2 * len(ends)
    for (layer, role), (codes, scale_inv, format) in spy.codes.items():
        assert layer.endswith(ends)
        assert role == "input"
        assert format == "e4m3"
        features = 4 * WIDTH if layer.endswith("fc2") else WIDTH
        assert codes.numel() == BATCH * TOKENS * features
        scaled = codes.view(torch.float8_e4m3fn).double().abs()
        x = scaled * scale_inv.double()
        row = spy.rows[layer, role, "codes"]
        assert row["numel"] == x.numel()
        assert row["zeros"] == float((x == 0).sum())
        assert row["subnormal"] == float(((scaled > 0) & (scaled < 2.0**-6)).sum())
        assert row["sum2"] == pytest.approx(float(x.square().sum()), rel=1e-6)
        assert row["sum4"] == pytest.approx(float(x.pow(4).sum()), rel=1e-6)
        assert row["amax"] == pytest.approx(float(x.max()), rel=1e-6)
        assert row["min_nonzero"] == pytest.approx(float(x[x > 0].min()), rel=1e-6)
    # What a normalisation gives has a mean square of one.
    first = spy.rows["0.self_attention.layernorm_qkv", "input", "codes"]
    assert first["sum2"] / first["numel"] == pytest.approx(1.0, rel=0.02)
    run.close()


def test_without_fp8_everything_is_values() -> None:
    torch.manual_seed(0)
    records: list[StepRecord] = []
    model = torch.nn.Sequential(LAYERS["layernorm_mlp"]())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sink = StepRecordSink(records.append)
    settings = WatchSettings(run="te", cadence=Cadence(1), sinks=(sink,), spool=None)
    with Watch(model, optimizer, settings) as watch:
        x = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
        model(x).float().square().mean().backward()
        optimizer.step()
        assert watch.flush()
        assert watch.errors == 0
    rows = {(t.identity.layer, t.identity.role): t for t in records[0].tensors}
    assert {t.identity.format for t in rows.values()} == {"bf16"}
    assert rows["0.fc1", "input"].rms == pytest.approx(1.0, rel=0.02)
    assert rows["0.fc2", "input"].numel == 4 * WIDTH * TOKENS
    assert ("0.fc2", "grad_output") in rows


def test_grouped_linear_is_measured_by_expert() -> None:
    torch.manual_seed(0)
    records: list[StepRecord] = []

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = te.GroupedLinear(2, WIDTH, WIDTH, **OPTIONS)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.grouped(x, [64, 192]).float().square().mean()  # type: ignore[no-any-return]

    model = Experts()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sink = StepRecordSink(records.append)
    settings = WatchSettings(run="te", cadence=Cadence(1), sinks=(sink,), spool=None)
    with Watch(model, optimizer, settings) as watch:
        x = torch.randn(256, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with te.fp8_autocast(enabled=True, fp8_recipe=RECIPES["delayed"]()):
            loss = model(x)
        loss.backward()
        optimizer.step()
        assert watch.flush()
        assert watch.errors == 0
    rows = {(t.identity.layer, t.identity.role): t.numel for t in records[0].tensors}
    assert rows["grouped.gemm_0", "input"] == 64 * WIDTH
    assert rows["grouped.gemm_1", "grad_output"] == 192 * WIDTH
    assert rows["grouped.gemm_1", "weight"] == WIDTH * WIDTH


def _program(name: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.te_programs", name],
        capture_output=True,
        text=True,
        check=False,
        # FP8 attention has no deterministic backward pass.
        env=os.environ | {"PYTEST_VERSION": "-", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def test_exact_path_measures_the_operands_of_the_gemms() -> None:
    result = _program("exact")
    assert result["errors"] == 0
    assert len(result["measured"]) == 12
    # Every second step is exact, and then nothing is measured twice.
    assert [n > 0 for n in result["exact_by_step"]] == [True, False, True, False]
    for field in ("numel", "zeros", "nonfinite", "flushed", "subnormal", "overflow", "amax"):
        assert result["worst"].get(field, 0.0) == 0.0, field
    assert max(result["worst"].values(), default=0.0) < 1e-5
    assert result["steps"] == [0, 1, 2, 3]


def test_every_statistic_of_transformer_engine_arrives() -> None:
    result = _program("logger")
    # Four GEMMs, three tensors each; five statistics of the cast and eight of the tensor.
    assert result["raw"] == 4 * 3 * 13
    assert result["rows"] == 4 * 3
    assert result["with_underflow"] == 4 * 3
    assert result["with_headroom"] == 4 * 3
    # mse, std, l2_norm, min, max, mean and l1_norm have no place in a row.
    assert result["scalars"] == 4 * 3 * 7
    assert result["errors"] == [0, 0]
    assert result["steps"] == [0, 1, 2]


def test_statistics_of_transformer_engine_join_a_watch() -> None:
    result = _program("joined")
    assert result["scalars"] == 4 * 3 * 13
    assert result["errors"] == [0, 0]


def test_attention_in_fp8() -> None:
    result = _program("attention")
    assert result["errors"] == 0
    assert result["positions"] == [True, True]
    rows = result["rows"]
    assert set(rows) == {"query", "key", "value", "attention_probs"}
    shared = max(rows[role][1] for role in ("query", "key", "value"))
    assert shared == pytest.approx(result["amax"][2], rel=1e-6)
    scale = math.log2(result["scale_in_force"][2])
    for role in ("query", "key", "value"):
        assert rows[role][0] == 2 * 128 * 256
        assert rows[role][2] == pytest.approx(scale, abs=1e-6)
    assert rows["attention_probs"][1] == pytest.approx(result["amax"][8], rel=1e-6)
    assert rows["attention_probs"][2] == pytest.approx(
        math.log2(result["scale_in_force"][8]), abs=1e-6
    )
