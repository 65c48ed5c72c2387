"""Statistics of a stack's operands, computed and kept on its device.

The same definitions as `foreshock.monitor.record.TensorSums`, for the statistics that forecasts
look at; one kernel and a half per tensor where there is Triton, torch's operations elsewhere.
Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import TensorIdentity
from foreshock.monitor.statistics import tensor_sums
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.model import Decoder
from foreshock.trainer.precision import Fp8Linear, GemmLinear
from foreshock.trainer.precision.fast_stack import stack_kernels_for
from foreshock.trainer.precision.scaling import Scaling

__all__ = ["STATISTICS", "DeviceStatistics"]

STATISTICS: Final = (
    "nonfinite_count",
    "kurtosis",
    "channel_kurtosis",
    "headroom_log2",
    "underflow_ratio",
    "subnormal_ratio",
    "overflow_ratio",
    "sqnr_db",
    "rms",
    "amax",
)
"""What `DeviceStatistics.take` gives, in order."""

_ROLES: Final = ("input", "weight", "grad_output")
_SUMS: Final = 11


@dataclass(frozen=True, slots=True)
class _Row:
    """One operand of one layer: its format and its scale, None without one per tensor."""

    format: str
    scaling: Scaling | None


class DeviceStatistics:
    """Hooks on the linear layers of a stack that keep its operands until they are summed up.

    Args:
        model: The stack, on its device.
        precision: Recipe of each model.

    Attributes:
        identities: Layers in order, each with its input, weight and output gradient. Operands with
            a scale per row or block are measured as they are before the cast; what concerns the
            cast is left out.
    """

    def __init__(self, model: Decoder, precision: Sequence[PrecisionConfig]) -> None:
        layers = model.linears()
        self.identities = tuple(
            TensorIdentity(layer=name, role=role, format=layer.operand(role).format)
            for name, layer in layers.items()
            for role in _ROLES
        )
        self._rows = [_row(layer, role) for layer in layers.values() for role in _ROLES]
        device = next(iter(layers.values())).weight.device
        self._models = len(precision)
        casts = torch.tensor([p.backend != "bf16" for p in precision], device=device)
        scaled = torch.tensor([row.scaling is not None for row in self._rows], device=device)
        self._quantized = scaled[:, None] & casts
        largest = [FORMATS[row.format].largest for row in self._rows]
        self._largest = torch.tensor(largest, dtype=torch.float64, device=device)[:, None]
        # Found at the first step; copied to the device there, and never within a CUDA graph.
        self._sizes: tuple[Tensor, Tensor] | None = None
        self._kept: dict[int, Tensor] = {}
        self._on = False
        for index, layer in enumerate(layers.values()):
            self._attach(layer, index * len(_ROLES))

    def start(self, on: bool) -> None:
        """Keep the operands of the forward and backward pass to come, if `on`."""
        self._on = on
        self._kept.clear()

    @torch.no_grad()
    def take(self) -> Tensor:
        """Statistics of the pass, float64 (E, len(STATISTICS), rows), NaN = not measured."""
        rows = len(self._rows)
        device = self._largest.device
        sums = torch.empty(rows, _SUMS, self._models, dtype=torch.float64, device=device)
        scales = []
        if self._sizes is None:
            self._sizes = self._measure_sizes()
        for index, row in enumerate(self._rows):
            x = self._kept[index]
            scale = None if row.scaling is None else row.scaling.used.contiguous()
            _sum_up(x, sums[index], row.format, scale)
            scales.append(torch.ones(self._models, device=device) if scale is None else scale)
        self._on = False
        self._kept.clear()
        table = self._statistics(sums.unbind(1), *self._sizes, torch.stack(scales))
        return table.permute(2, 0, 1)

    def _measure_sizes(self) -> tuple[Tensor, Tensor]:
        """Elements and features of each operand of one model, float64 (rows, 1)."""
        kept = [self._kept[row] for row in range(len(self._rows))]
        sizes = [float(x.numel() // self._models) for x in kept]
        widths = [float(x.shape[-1]) for x in kept]
        both = torch.tensor([sizes, widths], dtype=torch.float64).to(self._largest.device)
        return both[0, :, None], both[1, :, None]

    def _statistics(
        self, sums: Sequence[Tensor], size: Tensor, width: Tensor, scale: Tensor
    ) -> Tensor:
        """(len(STATISTICS), rows, E) of sums (rows, E) each."""
        bad, nonzero, two, four, amax, kept, normal, over, error, channels, channels2 = sums
        numel = size - bad
        some = numel > 0
        power = some & (two > 0)
        cast = some & self._quantized
        values: Mapping[str, tuple[Tensor, Tensor]] = {
            "nonfinite_count": (bad, torch.ones_like(some)),
            "kurtosis": (numel * four / two.square(), power),
            "channel_kurtosis": (width * channels2 / channels.square(), some & (channels > 0)),
            "headroom_log2": (
                (self._largest / (amax * scale.double())).log2(),
                self._quantized & (amax > 0),
            ),
            "underflow_ratio": ((nonzero - kept) / numel, cast),
            "subnormal_ratio": ((nonzero - normal) / numel, cast),
            "overflow_ratio": (over / numel, cast),
            "sqnr_db": (10 * (two / error).log10(), cast & power),
            "rms": ((two / numel).sqrt(), some),
            "amax": (amax, some),
        }
        return torch.stack([values[n][0].masked_fill(~values[n][1], torch.nan) for n in STATISTICS])

    def _attach(self, layer: GemmLinear, row: int) -> None:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._on:
                return
            self._kept[row] = args[0].detach()
            self._kept[row + 1] = layer.gemm_weight().detach()
            output.register_hook(backward)  # type: ignore[no-untyped-call]

        def backward(gradient: Tensor) -> None:
            self._kept[row + 2] = gradient.detach()

        layer.register_forward_hook(forward)


def _row(layer: GemmLinear, role: str) -> _Row:
    operand = layer.operand(role)
    scaling = layer.scaling_of(role) if isinstance(layer, Fp8Linear) else None
    return _Row(operand.format, scaling)


def _sum_up(x: Tensor, out: Tensor, format: str, scale: Tensor | None) -> None:
    """Write the sums of x (E, ...) to out (sums, E), rows as `stack_kernels.SUMS`."""
    x = x if x[0].is_contiguous() else x.contiguous()
    if kernels := stack_kernels_for(x, 1):
        kernels.sums_per_model(x, out, format=format, scale=scale)
        return
    sums = tensor_sums(x, format="bf16" if scale is None else format, scale=scale, lead=1)
    nonzero = sums["numel"] - sums["zeros"]
    channels = sums["channel_sum2"]
    rows = (
        sums["nonfinite"],
        nonzero,
        sums["sum2"],
        sums["sum4"],
        sums["amax"].clamp(min=0.0),
        nonzero - sums["flushed"],
        nonzero - sums["subnormal"],
        sums["overflow"],
        sums["error2"],
        channels.sum(-1),
        channels.square().sum(-1),
    )
    out.copy_(torch.stack(rows))
