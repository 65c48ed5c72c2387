"""Programs that need a process of their own, because Transformer Engine keeps state per process.

    python -m tests.gpu.te_programs exact|logger|joined|attention

Debug mode must be on before the first layer is built, and FP8 attention wants a process in which no
attention has run in another precision. Each prints one line of JSON, which a test reads.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from foreshock.monitor.record import StepRecord
from foreshock.monitor.sampling import Cadence
from foreshock.monitor.session import Watch
from foreshock.monitor.settings import WatchSettings
from foreshock.monitor.sinks import StepRecordSink
from foreshock.monitor.statistics import SUM_FIELDS, packed_sums

WIDTH, TOKENS, STEPS = 256, 256, 4


def watched(model: torch.nn.Module, **settings: Any) -> tuple[Watch, Any, list[StepRecord]]:
    """A watch with the records it makes, and the optimizer."""
    records: list[StepRecord] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    sink = StepRecordSink(records.append)
    chosen = WatchSettings(run="te", cadence=Cadence(1, 1), sinks=(sink,), spool=None, **settings)
    return Watch(model, optimizer, chosen), optimizer, records


def steps(te: Any, model: torch.nn.Module, optimizer: Any, recipe: Any, count: int) -> list[float]:
    """Train on fixed data; the losses."""
    torch.manual_seed(1)
    losses = []
    for _ in range(count):
        x = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def blocks(te: Any) -> torch.nn.Module:
    """One layer of each kind with a GEMM."""
    torch.manual_seed(0)
    options = {"params_dtype": torch.bfloat16, "device": "cuda", "bias": False}
    return torch.nn.Sequential(
        te.Linear(WIDTH, WIDTH, **options),
        te.LayerNormLinear(WIDTH, WIDTH, **options),
        te.LayerNormMLP(WIDTH, 4 * WIDTH, **options),
    )


def delayed() -> Any:
    from transformer_engine.common.recipe import DelayedScaling, Format

    return DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16)


def _keep_inspected() -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """What the debug feature is given first of each tensor, and the scale of its cast."""
    from foreshock.monitor import te_exact

    seen: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = {}
    inspect = te_exact.inspect

    def keep(layer: str, tensor: str, x: torch.Tensor, quantizer: Any) -> None:
        if (layer, tensor) not in seen:
            seen[layer, tensor] = x.detach().clone(), quantizer.scale.detach().clone()
        inspect(layer, tensor, x, quantizer)

    te_exact.inspect = keep
    return seen


class ExactRows:
    """The first exact row of each tensor, and how many rows of which source a step had."""

    def __init__(self, watch: Watch) -> None:
        self.first: dict[tuple[str, str], list[float]] = {}
        self.sources: list[list[str | None]] = []
        self._take = watch._collector.take
        watch._collector.take = self.taken  # type: ignore[method-assign]

    def taken(self) -> Any:
        found = self._take()
        entries = [*found.entries, *found.device_entries]
        rows = [*found.sums, *([] if found.device is None else found.device)]
        used = [
            (entry, row.tolist())
            for entry, row in zip(entries, rows, strict=True)
            if float(row[SUM_FIELDS.index("observations")]) > 0
        ]
        history = [entry.source for entry in found.history_entries]
        self.sources.append([entry.source for entry, _ in used] + history)
        for entry, row in used:
            if entry.source == "exact":
                self.first.setdefault((entry.identity.layer, entry.identity.role), row)
        return found


def exact() -> dict[str, Any]:
    """The exact path against `packed_sums` of what the feature was given."""
    from foreshock.monitor.transformer_engine import te_debug

    te_debug(freq=2)
    import transformer_engine.pytorch as te

    seen = _keep_inspected()
    model = blocks(te)
    watch, optimizer, records = watched(model)
    rows = ExactRows(watch)
    losses = steps(te, model, optimizer, delayed(), STEPS)
    watch.flush()
    errors = watch.errors
    watch.close()
    return {
        "errors": errors,
        "losses": losses,
        "measured": sorted(f"{layer} {role}" for layer, role in rows.first),
        "exact_by_step": [step.count("exact") for step in rows.sources],
        "others_by_step": [len(step) - step.count("exact") for step in rows.sources],
        "worst": _worst(model, seen, rows.first),
        "steps": [record.step for record in records],
    }


def _worst(
    model: torch.nn.Module,
    seen: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]],
    first: dict[tuple[str, str], list[float]],
) -> dict[str, float]:
    """Largest relative difference by field."""
    roles = {"activation": "input", "weight": "weight", "gradient": "grad_output"}
    names = {str(module.name): name for name, module in model.named_children()}
    worst: dict[str, float] = {}
    for (layer, tensor), (x, scale) in seen.items():
        own = next(name for name in names if layer.startswith(name))
        ours = first[names[own] + layer[len(own) :], roles[tensor]]
        format = "e5m2" if tensor == "gradient" else "e4m3"
        reference = packed_sums(x, format=format, scale=scale.reshape(()))[0].tolist()
        for field, value, right in zip(SUM_FIELDS, ours, reference, strict=False):
            if value != right:
                difference = abs(value - right) / max(abs(right), 1e-30)
                worst[field] = max(worst.get(field, 0.0), difference)
    return worst


FP8_STATS = ("underflows%", "scale_inv_min", "scale_inv_max", "mse", "overflows%")
PLAIN_STATS = ("cur_amax", "std", "l2_norm", "dynamic_range", "min", "max", "mean", "l1_norm")
TENSORS = ("activation", "gradient", "weight")


def log_features(freq: int = 1) -> dict[str, dict[str, object]]:
    """Transformer Engine's own statistics, all that have one value per tensor."""
    common: dict[str, object] = {"enabled": True, "tensors": list(TENSORS), "freq": freq}
    return {
        "LogFp8TensorStats": common | {"stats": list(FP8_STATS)},
        "LogTensorStats": common | {"stats": list(PLAIN_STATS)},
    }


def logger(*, join: bool) -> dict[str, Any]:
    """Every statistic that Transformer Engine logs, as records."""
    from foreshock.monitor.transformer_engine import TEStatsLogger, te_debug

    records: list[StepRecord] = []
    raw: list[str] = []
    kept = TEStatsLogger(sinks=() if join else (StepRecordSink(records.append),))
    log = kept.log_scalar

    def note(name: str, value: Any, iteration: int, **rest: object) -> None:
        raw.append(name)
        log(name, value, iteration, **rest)

    kept.log_scalar = note  # type: ignore[method-assign]
    te_debug(freq=0, features=log_features(), statistics_logger=kept)
    import transformer_engine.pytorch as te

    model = blocks(te)
    watch, optimizer, watch_records = watched(model)
    if join:
        kept.join(watch)
    steps(te, model, optimizer, delayed(), 3)
    watch.flush()
    watch.close()
    kept.close()
    chosen = watch_records if join else records
    record = chosen[1]
    return {
        "raw": len(raw) // 3,
        "scalars": sum(name.startswith("te/") for name in record.scalars),
        "rows": len(record.tensors),
        "with_underflow": sum(t.underflow_ratio is not None for t in record.tensors),
        "with_headroom": sum(t.headroom_log2 is not None for t in record.tensors),
        "names": sorted(name for name in record.scalars if name.startswith("te/"))[:4],
        "errors": [guard.errors for guard in kept.guards],
        "steps": [r.step for r in chosen],
    }


def attention() -> dict[str, Any]:
    """FP8 attention: its scales and largest magnitudes against the quantizers'."""
    import transformer_engine.pytorch as te
    import transformer_engine_torch as tex
    from transformer_engine.common.recipe import DelayedScaling, Format

    from foreshock.monitor.layers import transformer_engine as ours

    positions = [
        int(tex.FP8FwdTensors.GEMM1_OUTPUT) == ours._QKV,
        int(tex.FP8FwdTensors.GEMM3_OUTPUT) == ours._PROBABILITIES,
    ]
    recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, fp8_dpa=True)
    torch.manual_seed(0)
    layer = te.TransformerLayer(
        256,
        512,
        2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        self_attn_mask_type="causal",
        attn_input_format="bshd",
    ).cuda()
    watch, optimizer, records = watched(layer)
    attention = layer.self_attention.core_attention
    scales: list[Any] = []
    for _ in range(3):
        x = torch.randn(2, 128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        state = attention.fp8_meta.get("scaling_fwd")
        scales.append(None if state is None else state.scale.tolist())
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            loss = layer(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.flush()
    errors = watch.errors
    watch.close()
    state = attention.fp8_meta["scaling_fwd"]
    newest = state.amax_history[-1].tolist()
    rows = {
        t.identity.role: [t.numel, t.amax, t.scale_log2, t.headroom_log2]
        for t in records[-1].tensors
        if t.identity.layer.endswith("core_attention")
    }
    return {
        "errors": errors,
        "positions": positions,
        "rows": rows,
        "scale_in_force": scales[-1],
        "amax": newest,
    }


PROGRAMS = {
    "exact": exact,
    "logger": lambda: logger(join=False),
    "joined": lambda: logger(join=True),
    "attention": attention,
}

if __name__ == "__main__":
    print("RESULT " + json.dumps(PROGRAMS[sys.argv[1]]()))
