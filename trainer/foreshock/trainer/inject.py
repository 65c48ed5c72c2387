"""Sets the faults of one model, or of a stack of models, on its linear layers, step by step.

Only what acts inside a layer: the schedule reads a learning-rate ramp, the data a bad batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from foreshock.trainer.config import RunConfig
from foreshock.trainer.faults import OutlierRamp, ScaleFault
from foreshock.trainer.precision import Fp8Linear, GemmLinear

__all__ = ["Injector"]

_WHOLE = float("nan")


class Injector:
    """Knows which layers the faults of `configs` hit; call `begin_step` before each forward.

    Args:
        model: Holds the `GemmLinear` layers; their qualified names are what faults name.
        configs: The run, or those of a stack in its order.
        lead: () for one model, (E,) for a stack.

    Raises:
        ValueError: A fault names a layer or channel that the model lacks, or a run in bfloat16
            has a fault of FP8 scales.
    """

    def __init__(
        self, model: nn.Module, configs: Sequence[RunConfig], lead: tuple[int, ...] = ()
    ) -> None:
        self._lead = lead
        self._configs = tuple(configs)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, GemmLinear)}
        for config in self._configs:
            _check(config, layers)
        self._scaled = [
            (name, role, layer)
            for name, layer in layers.items()
            if isinstance(layer, Fp8Linear)
            for role in ("input", "weight", "grad_output")
            if any(_scale_fault(c, name, role) for c in self._configs)
        ]
        self._outlying = [
            (name, layer)
            for name, layer in layers.items()
            if any(_outlier(c, name) for c in self._configs)
        ]
        self._lengths: dict[str, list[int]] = {}

    def begin_step(self, step: int) -> None:
        """Put every fault into the state of `step`; the same call after a resume does the same."""
        for name, role, layer in self._scaled:
            factors = [
                None if fault is None else fault.scale_factor(step)
                for fault in (_scale_fault(c, name, role) for c in self._configs)
            ]
            if any(factor is not None for factor in factors):
                values = torch.tensor([_WHOLE if f is None else f for f in factors])
                layer.scaling_of(role).break_scale(values.view(self._lead))
        for name, linear in self._outlying:
            self._grow_outlier(name, linear, step)

    def _grow_outlier(self, name: str, layer: GemmLinear, step: int) -> None:
        gain = torch.ones(len(self._configs), layer.in_features)
        lengths = []
        for index, config in enumerate(self._configs):
            fault = _outlier(config, name)
            length = 1 if config.precision.scaling == "current" else config.precision.history
            if fault is not None:
                gain[index, fault.channel] = fault.channel_factor(step)
                length = fault.history_at(step, length)
            lengths.append(length)
        present = bool((gain != 1).any())
        layer.set_input_gain(gain.view(*self._lead, layer.in_features) if present else None)
        if isinstance(layer, Fp8Linear) and lengths != self._lengths.get(name):
            layer.scaling_of("input").limit_history(torch.tensor(lengths).view(self._lead))
            self._lengths[name] = lengths


def _scale_fault(config: RunConfig, name: str, role: str) -> ScaleFault | None:
    fault = config.fault
    return fault if isinstance(fault, ScaleFault) and fault.hits(name, role) else None


def _outlier(config: RunConfig, name: str) -> OutlierRamp | None:
    fault = config.fault
    return fault if isinstance(fault, OutlierRamp) and fault.layer == name else None


def _check(config: RunConfig, layers: dict[str, GemmLinear]) -> None:
    fault = config.fault
    names = ", ".join(layers)
    if isinstance(fault, ScaleFault):
        if config.precision.backend == "bf16":
            raise ValueError(f"{config.name}: bfloat16 has no scales that a fault could break")
        if not any(fault.layers in name for name in layers):
            raise ValueError(f"no layer's name holds {fault.layers!r}; there are {names}")
    if isinstance(fault, OutlierRamp):
        if fault.layer not in layers:
            raise ValueError(f"no layer {fault.layer!r}; there are {names}")
        if fault.channel >= layers[fault.layer].in_features:
            raise ValueError(
                f"{fault.layer} has {layers[fault.layer].in_features} input channels, "
                f"the fault names channel {fault.channel}"
            )
