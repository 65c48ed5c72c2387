"""Faults of a stack whose steps run without the host: what they do at each step, as numbers.

The host works the numbers out for many steps at once; the device spreads them over layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foreshock.trainer.faults import BadBatch, Fault, OutlierRamp, ScaleFault
from foreshock.trainer.precision import Fp8Linear, GemmLinear, LayerFaults
from foreshock.trainer.precision.linear import ROLES
from foreshock.trainer.precision.scaling import Scaling
from foreshock.trainer.stacked_scales import StackedScales

__all__ = ["FAULT_ROWS", "StackedFaults"]

FAULT_ROWS: Final = ("loss_gain", "scale_factor", "scale_inverse", "channel_factor", "history")
"""What a fault comes to at a step, per model: NaN and 1 where nothing is broken."""


class StackedFaults(LayerFaults):
    """The faults of a stack's runs, bound to its layers.

    Args:
        layers: Linear layers by qualified name.
        faults: One per model.
        scales: Those of the layers; None without any.

    Raises:
        ValueError: A fault names layers that are not there, or scales of a bf16 run.
    """

    def __init__(
        self,
        layers: Mapping[str, GemmLinear],
        faults: Sequence[Fault | None],
        scales: StackedScales,
    ) -> None:
        super().__init__(layers, faults)
        self._scales = scales
        self._device = next(iter(layers.values())).weight.device
        self._broken = [self._scaling(name, role) for name, role in self._scale_faults]
        self._broken_rows = self._tensor(scales.rows_of(self._broken))
        masks = [self._mask(hitting) for hitting in self._scale_faults.values()]
        self._broken_models = torch.stack(masks) if masks else None
        self._channels = {name: self._channels_of(name) for name in self._ramps}
        self._short = self._shortened()

    def numbers(self, steps: range) -> npt.NDArray[np.float64]:
        """What the faults come to: (steps, len(FAULT_ROWS), E)."""
        table = np.empty((len(steps), len(FAULT_ROWS), len(self.faults)))
        table[:] = np.array([1.0, math.nan, 1.0, 1.0, math.inf])[:, None]
        for model, fault in enumerate(self.faults):
            for index, step in enumerate(steps):
                row = table[index, :, model]
                if isinstance(fault, BadBatch):
                    row[0] = fault.loss_gain(step)
                elif isinstance(fault, ScaleFault):
                    factor = fault.scale_factor(step)
                    row[1] = math.nan if factor is None else factor
                    row[2] = factor if factor is not None and fault.stale_inverse else 1.0
                elif isinstance(fault, OutlierRamp):
                    row[3] = fault.channel_factor(step)
                    row[4] = math.inf if step < fault.start else fault.history
        return table

    def bind(self, numbers: Tensor) -> None:
        """Let the faults act in the forward pass to come.

        Args:
            numbers: One step of `numbers`, float32 (len(FAULT_ROWS), E), on the device.
        """
        if self._broken_models is not None:
            whole = torch.full_like(self._broken_models, math.nan, dtype=torch.float32)
            factors = torch.where(self._broken_models, numbers[1], whole)
            hit = ~factors.isnan()
            inverse = torch.where(hit, numbers[2], 1.0)
            for row, scaling in enumerate(self._broken):
                scaling.hold(factors[row], hit[row], inverse[row])
            held = torch.zeros_like(self._scales.scale, dtype=torch.bool)
            self._scales.hold(held.index_copy_(0, self._broken_rows, hit))
        for name, (models, channels) in self._channels.items():
            layer = self._layers[name]
            factor = torch.where(models, numbers[3], 1.0)
            gain = torch.ones(len(self.faults), layer.in_features, device=self._device)
            layer.set_input_gain(gain.scatter_(1, channels[:, None], factor[:, None]))
        if self._short is not None:
            allowed = numbers[4].clamp(max=2.0**30).long()
            lengths = self._scales.lengths
            limited = torch.minimum(lengths, allowed)
            self._scales.limit_history(torch.where(self._short, limited, lengths))

    def _scaling(self, name: str, role: str) -> Scaling:
        layer = self._layers[name]
        assert isinstance(layer, Fp8Linear)
        return layer.scaling_of(role)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _mask(self, hitting: Sequence[tuple[int, Fault]]) -> Tensor:
        mask = torch.zeros(len(self.faults), dtype=torch.bool)
        mask[[index for index, _ in hitting]] = True
        return mask.to(self._device)

    def _channels_of(self, name: str) -> tuple[Tensor, Tensor]:
        """Which models have an outlier in this layer, and in which feature."""
        channels = [0] * len(self.faults)
        for model, ramp in self._ramps[name]:
            channels[model] = ramp.channel
        return self._mask(self._ramps[name]), self._tensor(channels)

    def _shortened(self) -> Tensor | None:
        """Which histories outlier ramps cut short, bool (R, E)."""
        found = [
            (name, role)
            for name in self._ramps
            if isinstance(self._layers[name], Fp8Linear)
            for role in ROLES
        ]
        if not found:
            return None
        short = torch.zeros_like(self._scales.scale, dtype=torch.bool)
        for name, role in found:
            [row] = self._scales.rows_of([self._scaling(name, role)])
            short[row] = self._mask(self._ramps[name])
        return short
