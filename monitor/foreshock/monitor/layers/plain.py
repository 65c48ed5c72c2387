"""nn.Linear, and layers that tell how they cast their GEMM operands.

Runs eagerly and inside compiled graphs: there each tensor goes through one operation with an
effect, and everything that Python counts is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from foreshock.monitor import ops
from foreshock.monitor.collector import operand_code
from foreshock.monitor.layers.adapter import HookContext, tensors_in
from foreshock.monitor.operands import (
    DTYPE_FORMATS,
    OPERAND_ROLES,
    ChangedWeight,
    Operand,
    QuantizedGemm,
)
from foreshock.monitor.placement import local_of

__all__ = ["GemmAdapter", "OperandOf", "watch_gemm"]


def _remakes_weight(module: nn.Module) -> bool:
    """Whether reading the weight computes it (torch.nn.utils.parametrize).

    That may change the training: spectral_norm iterates at each reading, others draw numbers.
    """
    return "parametrizations" in module._modules and is_parametrized(module, "weight")


class OperandOf:
    """How a layer casts the operand of a role; a plain layer casts nothing."""

    def __call__(self, role: str, compute: torch.dtype) -> Operand:
        """The cast of an operand, in a GEMM that runs in the type `compute`."""
        return Operand(DTYPE_FORMATS.get(compute, "fp32"), None)

    def of(self, role: str, x: torch.Tensor, compute: torch.dtype) -> Operand:
        """The cast of this very tensor, where its scale does not follow from its amax alone."""
        return self(role, compute)

    def weight(self, module: nn.Module) -> object:
        """The weight, outputs x inputs."""
        return module.weight


class _Told(OperandOf):
    """Asks the layer."""

    def __init__(self, layer: QuantizedGemm) -> None:
        self._layer = layer

    def __call__(self, role: str, compute: torch.dtype) -> Operand:
        return self._layer.operand(role)


class _ToldWeight(_Told):
    """Asks the layer for its weight too."""

    def weight(self, module: nn.Module) -> object:
        assert isinstance(module, ChangedWeight)
        with torch.no_grad():
            return module.gemm_weight()


class GemmAdapter:
    """Watches nn.Linear and `QuantizedGemm`s."""

    def claims(self, module: nn.Module) -> bool:
        """Whether it is one, with a weight of a floating type."""
        if _remakes_weight(module):
            return isinstance(module, nn.Linear)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            return False
        if isinstance(module, QuantizedGemm):
            return True
        return isinstance(module, nn.Linear) and weight.dtype in DTYPE_FORMATS

    def attach(
        self, name: str, module: nn.Module, context: HookContext
    ) -> Sequence[RemovableHandle]:
        """Hooks for input, weight and output gradient."""
        # Asked once: a protocol check costs more than the rest of a hook.
        if not isinstance(module, QuantizedGemm):
            return watch_gemm(name, module, context, OperandOf())
        told = (_ToldWeight if isinstance(module, ChangedWeight) else _Told)(module)
        return watch_gemm(name, module, context, told)


def watch_gemm(
    name: str, module: nn.Module, context: HookContext, operand_of: OperandOf
) -> Sequence[RemovableHandle]:
    """Measure input, weight and output gradient of a module with one GEMM.

    The hook goes first, so that it sees what the module itself made: a tensor-parallel or sharding
    wrapper converts afterwards.
    """
    held = None if _remakes_weight(module) else operand_of.weight(module)
    weight = local_of(held) if isinstance(held, torch.Tensor) else None
    outputs, inputs = weight.shape if weight is not None and weight.ndim == 2 else (0, 0)
    features = {"input": inputs, "weight": inputs, "grad_output": outputs}
    keys = {role: context.collector.key(name, role, features[role]) for role in OPERAND_ROLES}
    gemm = _Gemm(name, context, operand_of, keys)
    hook = context.layer_hook(gemm.ran, gemm.traced)
    return [module.register_forward_hook(hook, prepend=True, with_kwargs=True)]


class _Gemm:
    """One watched layer."""

    def __init__(
        self, name: str, context: HookContext, operand_of: OperandOf, keys: dict[str, int]
    ) -> None:
        self._name = name
        self._context = context
        self._collector = context.collector
        self._operand_of = operand_of
        self._keys = keys
        self._handle = context.collector.handle

    def ran(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """After an eager call."""
        if not self._context.counts(module):
            return
        self._context.begins()
        collector = self._collector
        if not collector.wants:
            return
        call = _Call(self, self._context.next_call(self._name))
        result = next(tensors_in(output), None)
        compute = None if result is None else result.dtype
        operand = next(tensors_in((*args, *kwargs.values())), None)
        if operand is not None:
            call.observe("input", operand, compute or operand.dtype)
        if _remakes_weight(module):
            collector.skipped.add((self._name, "weight"))
        elif collector.weighs(self._name):
            weight = self._operand_of.weight(module)
            if isinstance(weight, torch.Tensor):
                self.observe("weight", weight, compute or weight.dtype, 0)
        if result is not None and result.requires_grad:
            result.register_hook(self._context.hook(call.gradient_came))  # type: ignore[no-untyped-call]

    def traced(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """While torch.compile traces: what stays is one operation per tensor."""
        if not (module.training and torch.is_grad_enabled()):
            return
        result = next(tensors_in(output), None)
        compute = torch.float32 if result is None else result.dtype
        operand = next(tensors_in((*args, *kwargs.values())), None)
        if operand is not None:
            self._hand_over("input", operand, compute)
        if _remakes_weight(module):
            self._collector.skipped.add((self._name, "weight"))
        elif isinstance(weight := self._operand_of.weight(module), torch.Tensor):
            self._hand_over("weight", weight, compute)
        if result is not None and result.requires_grad:
            result.register_hook(self._hand_gradient_over)  # type: ignore[no-untyped-call]

    def _hand_gradient_over(self, gradient: torch.Tensor) -> None:
        self._hand_over("grad_output", gradient, gradient.dtype)

    def _hand_over(self, role: str, x: torch.Tensor, compute: torch.dtype) -> None:
        operand = self._operand_of.of(role, local_of(x), compute)
        code = operand_code(operand.format, operand.granularity)
        ops.observe(local_of(x), operand.scale, self._handle, self._keys[role], code)

    def observe(self, role: str, x: torch.Tensor, compute: torch.dtype, index: int) -> None:
        """Measure an operand of an eager call."""
        operand = self._operand_of.of(role, local_of(x), compute)
        self._collector.observe(self._name, role, x, operand, call_index=index)


@dataclass(frozen=True, slots=True)
class _Call:
    """One eager call of a layer."""

    gemm: _Gemm
    index: int

    def observe(self, role: str, x: torch.Tensor, compute: torch.dtype) -> None:
        self.gemm.observe(role, x, compute, self.index)

    def gradient_came(self, gradient: torch.Tensor) -> None:
        self.observe("grad_output", gradient, gradient.dtype)
