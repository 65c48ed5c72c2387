"""Hooks on the linear layers of a model: their GEMM operands become sums on the device.

Knows no records and no host values: what it collects stays on the device until the session packs
it. A hook never returns anything, so it cannot change a value of the training.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from foreshock.monitor.batching import BatchedSums
from foreshock.monitor.guard import Guard
from foreshock.monitor.operands import Operand, QuantizedGemm
from foreshock.monitor.record import TensorIdentity

__all__ = ["GemmHooks", "Observation", "find_gemms", "is_watched"]

_DTYPE_FORMATS: Final = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}


def find_gemms(
    model: nn.Module, *, include: str | None = None, exclude: str | None = None
) -> dict[str, nn.Module]:
    """The linear layers of a model by qualified name, in order of definition.

    Args:
        model: Searched with all its submodules; a shared module counts under its first name.
        include: Regular expression; only names in which it is found. None takes all.
        exclude: Regular expression; names in which it is found are left out.

    Raises:
        ValueError: No layer is left, or an expression is not one.
    """
    try:
        wanted = re.compile("" if include is None else include)
        unwanted = None if exclude is None else re.compile(exclude)
    except re.error as error:
        raise ValueError(f"include or exclude is no regular expression: {error}") from None
    gemms = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if _is_gemm(module)
    }
    if not gemms:
        raise ValueError(
            "no linear layer found: watch knows nn.Linear in bf16, fp16 or fp32 and modules with "
            "operand(role) and weight (foreshock.monitor.operands.QuantizedGemm)"
        )
    chosen = {
        name: module
        for name, module in gemms.items()
        if wanted.search(name) and not (unwanted and unwanted.search(name))
    }
    if not chosen:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} leave none of {len(gemms)} linear "
            f"layers, the first of which is {next(iter(gemms))!r}"
        )
    return chosen


def _is_gemm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    if isinstance(module, QuantizedGemm):
        return True
    return isinstance(module, nn.Linear) and weight.dtype in _DTYPE_FORMATS


def is_watched(model: nn.Module) -> bool:
    """Whether a watcher hangs on the model or on a part of it."""
    return any(
        isinstance(hook, _Hook)
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _inert(*_: object) -> None:
    """What a hook becomes in a copy of the model."""


class _Hook:
    """A hook that does not travel: copying or pickling the model leaves `_inert` in its place."""

    __slots__ = ("function", "guard")

    def __init__(self, guard: Guard, function: Callable[..., None]) -> None:
        self.guard = guard
        self.function = function

    def __call__(self, *args: Any) -> None:
        # While torch.compile traces, the hook is traced as doing nothing.
        if torch.compiler.is_compiling():
            return
        with self.guard:
            self.function(*args)

    def __deepcopy__(self, memo: dict[int, object]) -> Callable[..., None]:
        return _inert

    def __reduce__(self) -> str | tuple[Any, ...]:
        return (_get_inert, ())


def _get_inert() -> Callable[..., None]:
    return _inert


@dataclass(frozen=True, slots=True)
class Observation:
    """One tensor that passed by.

    Attributes:
        identity: Its row in the record.
        micro_batch: 0-based micro-batch within the step.
        sums: `packed_sums` of it, or its plain sum, 0-dim, at a step without tensor statistics.
        channels: Its channel sums, at a step with tensor statistics.
    """

    identity: TensorIdentity
    micro_batch: int
    sums: torch.Tensor
    channels: torch.Tensor | None = None


class GemmHooks:
    """The hooks of one model, and what they saw during the current step.

    Args:
        model: Its forward delimits micro-batches.
        gemms: Layers by name.
        guard: Around every hook.
        on_forward: Called when a training forward pass of the model begins.
        on_output: Called with what a training forward pass returned, and its micro-batch.
        probe: Sum every operand at steps without statistics, so that the first non-finite value
            has a layer.

    Attributes:
        measuring: Whether operands are measured in full.
        skipped: Tensors that were none of ours (subclasses, non-floating ones).
    """

    def __init__(
        self,
        model: nn.Module,
        gemms: Mapping[str, nn.Module],
        *,
        guard: Guard,
        on_forward: Callable[[], None],
        on_output: Callable[[object, int], None],
        probe: bool,
    ) -> None:
        self.measuring = False
        self.skipped = 0
        self._on_forward, self._on_output, self._probe = on_forward, on_output, probe
        self._guard = guard
        self._begun = False
        self._micro_batch = -1
        self._calls: dict[str, int] = {}
        self._weighed: set[str] = set()
        self._identities: dict[tuple[str, str, int], TensorIdentity] = {}
        self._sums = BatchedSums()
        self._probes: list[torch.Tensor] = []
        self._seen: list[tuple[TensorIdentity, int]] = []
        self._handles = [
            model.register_forward_pre_hook(_Hook(guard, self._model_begins)),
            model.register_forward_hook(_Hook(guard, self._model_returns)),
        ]
        for name, module in gemms.items():
            # Asked once: a protocol check costs more than the rest of a hook.
            tells = module if isinstance(module, QuantizedGemm) else None
            hook = _Hook(guard, partial(self._gemm_ran, name, tells))
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def take(self) -> list[Observation]:
        """What passed by during the step, in the order in which it did."""
        seen, self._seen = self._seen, []
        probes, self._probes = self._probes, []
        if self.measuring:
            sums = self._sums.take()
            return [Observation(*s, *pair) for s, pair in zip(seen, sums, strict=True)]
        return [Observation(*s, probe) for s, probe in zip(seen, probes, strict=True)]

    def start_step(self, *, measuring: bool) -> None:
        """Begin the next step, after `take`."""
        self.measuring = measuring
        self._begun = False
        self._micro_batch = -1
        self._calls = {}
        self._weighed = set()

    def detach(self) -> None:
        """Remove the hooks; output gradients of graphs still alive are no longer measured."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.measuring = self._probe = False

    def _model_begins(self, module: nn.Module, args: object) -> None:
        if _counts(module):
            self._begin()
            self._micro_batch += 1
            self._calls = {}

    def _model_returns(self, module: nn.Module, args: object, output: object) -> None:
        if _counts(module):
            self._on_output(output, max(self._micro_batch, 0))

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._on_forward()

    def _gemm_ran(
        self,
        name: str,
        tells: QuantizedGemm | None,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        if not _counts(module):
            return
        self._begin()
        if not (self.measuring or self._probe):
            return
        call_index = self._calls.get(name, 0)
        self._calls[name] = call_index + 1
        call = _Call(name, tells, call_index, max(self._micro_batch, 0))
        result = next(_tensors(output), None)
        compute = None if result is None else result.dtype
        operand = next(_tensors((*args, *kwargs.values())), None)
        if operand is not None:
            self._observe(call, "input", operand, compute)
        weight = module.weight
        if self.measuring and name not in self._weighed and isinstance(weight, torch.Tensor):
            self._weighed.add(name)
            self._observe(replace(call, index=0), "weight", weight, compute)
        if result is not None and result.requires_grad:
            hook = _Hook(self._guard, partial(self._gradient_came, call))
            result.register_hook(hook)  # type: ignore[no-untyped-call]

    def _gradient_came(self, call: _Call, gradient: torch.Tensor) -> None:
        if self.measuring or self._probe:
            self._observe(call, "grad_output", gradient, gradient.dtype)

    def _observe(
        self, call: _Call, role: str, tensor: torch.Tensor, compute: torch.dtype | None
    ) -> None:
        if type(tensor) not in _PLAIN:
            self.skipped += 1
            return
        key = (call.layer, role, call.index)
        identity = self._identities.get(key)
        # Asking a layer for its scale may cost it work, and only measuring needs it.
        if self.measuring or identity is None:
            operand = _operand(call.tells, role, compute or tensor.dtype)
            identity = TensorIdentity(
                call.layer, role, operand.format, call.index, granularity=operand.granularity
            )
            self._identities[key] = identity
        if self.measuring:
            self._sums.add(tensor, operand)
        else:
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            self._probes.append(tensor.detach().sum(dtype=wide))
        self._seen.append((identity, call.micro_batch))


# Subclasses (DTensor, quantised tensors) hold only a part of the tensor, or codes.
_PLAIN: Final = (torch.Tensor, nn.Parameter)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of one layer."""

    layer: str
    tells: QuantizedGemm | None
    index: int
    micro_batch: int


def _counts(module: nn.Module) -> bool:
    """Whether this call is training: neither evaluation nor the recomputation of a checkpoint."""
    return (
        module.training
        and torch.is_grad_enabled()
        # Inside a backward pass a forward runs only to recompute what was not kept.
        and torch._C._current_graph_task_id() == -1
    )


def _operand(tells: QuantizedGemm | None, role: str, compute: torch.dtype) -> Operand:
    """How the operand is cast; a plain layer's GEMM runs in the type of its output (autocast)."""
    if tells is not None:
        return tells.operand(role)
    return Operand(_DTYPE_FORMATS.get(compute, "fp32"), None)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """The floating tensors among a layer's arguments or outputs, in order."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
