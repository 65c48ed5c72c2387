"""Transformer Engine's statistics and ours of the same operands, side by side.

    python -m benchmarks.te_parity [--recipe delayed|current] [--attention]

Needs a GPU and Transformer Engine. Its numbers come through a logger (its file rounds to four
decimals), ours through the exact path, so both speak of the tensor that entered the cast. A third
column gives the difference to the same formula in float64 where the two differ. With --attention:
what FP8 attention holds itself against our rows; debug mode does not reach attention.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from nvdlfw_inspect.logging import BaseLogger

from foreshock.monitor import te_exact, watch
from foreshock.monitor.formats import format_named
from foreshock.monitor.record import StepRecord, TensorStatistics
from foreshock.monitor.sinks import StepRecordSink

WIDTH, TOKENS = 1024, 1024


def signed_zeros() -> torch.Tensor:
    """Normal values, a stretch of a row -0.0."""
    x = torch.randn(TOKENS, WIDTH)
    x[0, 100:200] = -0.0
    return x


def subnormals() -> torch.Tensor:
    """Values around the smallest that FP8 can hold at a scale of one, and below."""
    return torch.randn(TOKENS, WIDTH) * 2.0 ** -torch.randint(0, 14, (TOKENS, WIDTH)).float()


def huge_range() -> torch.Tensor:
    """A background of 1e-10, one row of 1000, three of 50 (the tensor of TE's own tests)."""
    x = torch.full((TOKENS, WIDTH), 1e-10)
    x[0] = 1000.0
    x[1:4] = 50.0
    return x


CASES: dict[str, Callable[[], torch.Tensor]] = {
    "normal with -0.0": signed_zeros,
    "subnormals": subnormals,
    "1e-10 and 1000": huge_range,
}


class Kept(BaseLogger):  # type: ignore[misc]
    """Every statistic that Transformer Engine logs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    def log_scalar(self, name: str, value: Any, iteration: int, **_: object) -> None:
        """Keep the number."""
        self.values[name] = float(value)


@dataclass(frozen=True, slots=True)
class Line:
    """One statistic of one tensor."""

    case: str
    tensor: str
    statistic: str
    ours: float | None
    theirs: float
    exact: float


def recipe_named(name: str, *, attention: bool = False) -> Any:
    """A recipe of Transformer Engine."""
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling, Format

    if name == "delayed":
        return DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16, fp8_dpa=attention)
    return Float8CurrentScaling(fp8_format=Format.HYBRID)


def compare(recipe: Any, dtype: torch.dtype) -> Iterator[Line]:
    """Input and gradient of te.Linear made of each case; statistics of all three operands."""
    import transformer_engine.pytorch as te

    for case, make in CASES.items():
        torch.manual_seed(0)
        layer = te.Linear(WIDTH, WIDTH, bias=False, params_dtype=dtype, device="cuda")
        model = torch.nn.Sequential(layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        seen: dict[str, tuple[torch.Tensor, float]] = {}
        records: list[StepRecord] = []
        kept.values.clear()
        with _Inspected(seen), watch(
            model, optimizer, run="parity", spool="/tmp/te-parity", tensor_every=1,
            sinks=(StepRecordSink(records.append),),
        ) as w:  # fmt: skip
            x = make().to("cuda", dtype).requires_grad_()
            gradient = make().to("cuda", dtype)
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                y = model(x)
            y.backward(gradient)
            optimizer.step()
            w.flush()
        rows = {t.identity.role: t for t in records[0].tensors}
        for tensor, role in (("activation", "input"), ("gradient", "grad_output"), ("weight",) * 2):
            yield from _lines(case, tensor, role, rows[role], layer.name, *seen[tensor])


class _Inspected:
    """Keeps what the debug feature is given, with the scale of the cast."""

    def __init__(self, seen: dict[str, tuple[torch.Tensor, float]]) -> None:
        self.seen = seen

    def __enter__(self) -> None:
        inspect = self.inspect = te_exact.inspect

        def keep(layer: str, tensor: str, x: torch.Tensor, quantizer: Any) -> None:
            self.seen[tensor] = x.detach().clone(), float(quantizer.scale)
            inspect(layer, tensor, x, quantizer)

        te_exact.inspect = keep

    def __exit__(self, *_: object) -> None:
        te_exact.inspect = self.inspect


def _lines(
    case: str,
    tensor: str,
    role: str,
    row: TensorStatistics,
    layer: str,
    x: torch.Tensor,
    scale: float,
) -> Iterator[Line]:
    right = _exact(x, scale, "e5m2" if role == "grad_output" else "e4m3")
    ours = _ours(row)
    for name, value in right.items():
        theirs = kept.values.get(f"{layer}_{tensor}_{name}")
        if theirs is not None:
            yield Line(case, tensor, name, ours.get(name), theirs, value)


def _ours(row: TensorStatistics) -> dict[str, float]:
    """Our statistics in the words of Transformer Engine."""
    found: dict[str, float | None] = {
        "cur_amax": row.amax,
        "underflows%": _times(row.underflow_ratio, 100),
        "overflows%": _times(row.overflow_ratio, 100),
        "l2_norm": _times(row.rms, math.sqrt(row.numel)),
        "scale_inv_min": _inverse(row.scale_log2_max),
        "scale_inv_max": _inverse(row.scale_log2),
    }
    if row.amax and row.min_nonzero:
        found["dynamic_range"] = math.log2(row.amax / row.min_nonzero)
    if row.rms is not None and row.sqnr_db is not None:
        found["mse"] = row.rms**2 / 10 ** (row.sqnr_db / 10)
    return {name: value for name, value in found.items() if value is not None}


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _inverse(log2: float | None) -> float | None:
    return None if log2 is None else 2.0**-log2


def _exact(x: torch.Tensor, scale: float, format: str) -> dict[str, float]:
    """Transformer Engine's formulas in float64."""
    wide, m = x.double(), format_named(format).largest
    torch_type = torch.float8_e5m2 if format == "e5m2" else torch.float8_e4m3fn
    # The library multiplies in float32 before it casts.
    q = (x.float() * scale).clamp(-m, m).to(torch_type).double()
    magnitude = wide.abs()
    nonzero = magnitude[magnitude > 0]
    return {
        "cur_amax": float(magnitude.max()),
        "dynamic_range": math.log2(float(magnitude.max()) / float(nonzero.min())),
        "underflows%": 100 * float((wide != 0).sum() - (q != 0).sum()) / x.numel(),
        "overflows%": 100 * float((magnitude > m / scale).sum()) / x.numel(),
        "scale_inv_min": 1 / scale,
        "scale_inv_max": 1 / scale,
        "mse": float((q / scale - wide).square().mean()),
        "l2_norm": float(wide.square().sum().sqrt()),
        "l1_norm": float(magnitude.sum()),
        "mean": float(wide.mean()),
        "std": float(wide.std()),
        "min": float(wide.min()),
        "max": float(wide.max()),
    }


def difference(a: float | None, b: float) -> str:
    """Relative difference of two numbers."""
    if a is None:
        return "not ours"
    if a == b:
        return "0"
    return f"{abs(a - b) / max(abs(b), 1e-300):.1e}"


def table(lines: list[Line]) -> None:
    """Print them as Markdown."""
    print("| tensor | operand | statistic | ours | Transformer Engine | relative difference | "
          "ours to float64 | TE to float64 |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for line in lines:
        ours = "" if line.ours is None else f"{line.ours:.7g}"
        print(
            f"| {line.case} | {line.tensor} | {line.statistic} | {ours} | {line.theirs:.7g} | "
            f"{difference(line.ours, line.theirs)} | {difference(line.ours, line.exact)} | "
            f"{difference(line.theirs, line.exact)} |"
        )


def attention(recipe: Any) -> None:
    """Scales and largest magnitudes of FP8 attention, as its quantizers hold them and as ours."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)

    class Attention(torch.nn.Module):
        """Attention and a parameter to train."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = te.DotProductAttention(
                8, 128, attention_dropout=0.0, attn_mask_type="causal", qkv_format="bshd"
            )
            self.gain = torch.nn.Parameter(torch.ones(1, device="cuda"))

        def forward(self, *qkv: torch.Tensor) -> torch.Tensor:
            """Mean square of the output."""
            return self.attention(*qkv).float().square().mean() * self.gain.sum()  # type: ignore[no-any-return]

    model = Attention()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    records: list[StepRecord] = []
    q, k, v = (
        torch.randn(2, 512, 8, 128, device="cuda", dtype=torch.bfloat16).mul_(s).requires_grad_()
        for s in (1.0, 2.0, 4.0)
    )
    with watch(
        model, optimizer, run="parity", spool="/tmp/te-parity", tensor_every=1,
        sinks=(StepRecordSink(records.append),),
    ) as w:  # fmt: skip
        scale = None
        for _ in range(3):
            state = model.attention.fp8_meta.get("scaling_fwd")
            scale = None if state is None else state.scale.tolist()
            with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
                loss = model(q, k, v)
            loss.backward()
            optimizer.step()
        w.flush()
    rows = {t.identity.role: t for t in records[-1].tensors}
    newest = model.attention.fp8_meta["scaling_fwd"].amax_history[-1].tolist()
    assert scale is not None
    shared = max(rows[role].amax or 0.0 for role in ("query", "key", "value"))
    print("| FP8 attention | ours | Transformer Engine | relative difference |")
    print("|---|---|---|---|")
    pairs = [
        ("amax of query, key and value", shared, newest[2]),
        ("scale of query, key and value", 2.0 ** (rows["query"].scale_log2 or 0.0), scale[2]),
        ("amax of probabilities", rows["attention_probs"].amax or 0.0, newest[8]),
        ("scale of probabilities", 2.0 ** (rows["attention_probs"].scale_log2 or 0.0), scale[8]),
    ]
    for name, ours, theirs in pairs:
        print(f"| {name} | {ours:.7g} | {theirs:.7g} | {difference(ours, theirs)} |")
    for role in ("query", "key", "value"):
        row = rows[role]
        print(f"\n{role}: {row.numel} elements, underflow {row.underflow_ratio}, "
              f"overflow {row.overflow_ratio}, sqnr {row.sqnr_db} dB")  # fmt: skip


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", choices=("delayed", "current"), default="delayed")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--attention", action="store_true")
    options = parser.parse_args()
    if options.attention:
        attention(recipe_named("delayed", attention=True))
        return
    from foreshock.monitor.transformer_engine import te_debug

    common: dict[str, object] = {
        "enabled": True,
        "tensors": ["activation", "gradient", "weight"],
        "freq": 1,
    }
    cast = ["underflows%", "scale_inv_min", "scale_inv_max", "mse"]
    if options.recipe == "delayed":
        cast.append("overflows%")
    values = ["cur_amax", "dynamic_range", "l2_norm", "l1_norm", "mean", "std", "min", "max"]
    te_debug(
        freq=1,
        features={
            "LogFp8TensorStats": common | {"stats": cast},
            "LogTensorStats": common | {"stats": values},
        },
        statistics_logger=kept,
    )
    print(f"{options.recipe} scaling, {options.dtype} operands of {TOKENS}x{WIDTH}\n")
    table(list(compare(recipe_named(options.recipe), getattr(torch, options.dtype))))


kept = Kept()

if __name__ == "__main__":
    main()
