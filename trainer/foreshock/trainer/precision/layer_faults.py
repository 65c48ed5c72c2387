"""Lets the faults of runs act on their linear layers, step by step.

Only faults of scales and of layer inputs act here; schedule and data ask for the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from foreshock.trainer.faults import Fault, OutlierRamp, ScaleFault
from foreshock.trainer.precision.linear import ROLES, Fp8Linear, GemmLinear

__all__ = ["LayerFaults"]


class LayerFaults:
    """The faults of one run, or of each run of a stack, bound to the layers of the model.

    Args:
        layers: Linear layers by qualified name.
        faults: One entry per model.

    Raises:
        ValueError: A fault names layers that are not there, or scales of a bf16 run.
    """

    def __init__(self, layers: Mapping[str, GemmLinear], faults: Sequence[Fault | None]) -> None:
        self.faults = tuple(faults)
        self.layers = self._layers = dict(layers)
        scale_faults = [(i, f) for i, f in enumerate(faults) if isinstance(f, ScaleFault)]
        ramps = [(i, f) for i, f in enumerate(faults) if isinstance(f, OutlierRamp)]
        for _, scale_fault in scale_faults:
            self._check_named(scale_fault.layers, [n for n in layers if scale_fault.layers in n])
        for _, ramp in ramps:
            self._check_named(ramp.layer, [n for n in layers if ramp.hits(n)])
        self._scale_faults = {
            (name, role): hitting
            for name in layers
            for role in ROLES
            if (hitting := [(i, f) for i, f in scale_faults if f.hits(name, role)])
        }
        self._ramps = {
            name: named for name in layers if (named := [(i, f) for i, f in ramps if f.hits(name)])
        }
        for (name, _), hitting in self._scale_faults.items():
            self._check_scaled(name, [i for i, _ in hitting])
        for name, at in self._ramps.items():
            self._check_channels(name, [f for _, f in at])

    def begin_step(self, step: int) -> None:
        """Set the layers' faults for this step."""
        for (name, role), hitting in self._scale_faults.items():
            factors = torch.full((len(self.faults),), math.nan)
            inverse = torch.ones(len(self.faults))
            for index, fault in hitting:
                factor = fault.scale_factor(step)
                factors[index] = math.nan if factor is None else factor
                if factor is not None and fault.stale_inverse:
                    inverse[index] = factor
            layer = self._layers[name]
            assert isinstance(layer, Fp8Linear)
            broken = not bool(factors.isnan().all())
            layer.scaling_of(role).break_scale(
                factors.view(layer.lead) if broken else None, inverse.view(layer.lead)
            )
        for name, ramps in self._ramps.items():
            self._ramp(self._layers[name], ramps, step)

    def _ramp(self, layer: GemmLinear, ramps: list[tuple[int, OutlierRamp]], step: int) -> None:
        gain = torch.ones(len(self.faults), layer.in_features)
        for index, ramp in ramps:
            gain[index, ramp.channel] = ramp.channel_factor(step)
        present = bool((gain != 1).any())
        layer.set_input_gain(gain.view(*layer.lead, -1) if present else None)
        if not isinstance(layer, Fp8Linear):
            return
        for role in ROLES:
            scaling = layer.scaling_of(role)
            lengths = list(scaling.configured_history)
            for index, ramp in ramps:
                lengths[index] = ramp.history_at(step, lengths[index])
            scaling.limit_history(torch.tensor(lengths).view(layer.lead))

    def _check_named(self, wanted: str, found: list[str]) -> None:
        if not found:
            names = ", ".join(self._layers)
            raise ValueError(f"the fault's layer {wanted!r} is not there; layers: {names}")

    def _check_scaled(self, name: str, models: list[int]) -> None:
        layer = self._layers[name]
        granularity = layer.operand("input").granularity
        if granularity != "tensor":
            raise ValueError(
                f"a ScaleFault needs one scale per tensor (scaling delayed or current); {name} has "
                f"one per {granularity}, each made from its own elements"
            )
        unscaled = layer.bf16_models if isinstance(layer, Fp8Linear) else None
        none_scaled = not isinstance(layer, Fp8Linear)
        if none_scaled or (unscaled is not None and bool(unscaled.reshape(-1)[models].any())):
            raise ValueError(f"a ScaleFault needs the emulated backend; {name} runs in bf16")

    def _check_channels(self, name: str, ramps: list[OutlierRamp]) -> None:
        width = self._layers[name].in_features
        for ramp in ramps:
            if ramp.channel >= width:
                raise ValueError(f"channel {ramp.channel} of {name}: it has {width} features")
