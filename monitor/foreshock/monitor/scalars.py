"""Scalars of every step, on the device: loss, gradient norm, parameter norm, update ratio.

Reads parameters and gradients and writes nothing. Reads no value on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch
from torch import nn

from foreshock.monitor.collector import Collector
from foreshock.monitor.guard import Guard
from foreshock.monitor.operands import DTYPE_FORMATS, Operand
from foreshock.monitor.placement import local_of

__all__ = [
    "SAMPLED_ELEMENTS",
    "GradientNorms",
    "OptimizerTensors",
    "Parameters",
    "Value",
    "find_loss",
    "learning_rate",
    "mean",
    "one_value",
]

Value = torch.Tensor | float

SAMPLED_ELEMENTS: Final = 4096
"""At most this many elements of each parameter stand for it in `update_ratio`."""


def find_loss(output: object) -> torch.Tensor | None:
    """The loss in what a model returned.

    A 0-dim floating tensor, `.loss`, `["loss"]`, or the first 0-dim floating tensor in a tuple.
    """
    if isinstance(output, Mapping):
        candidates: Sequence[object] = (output.get("loss"),)
    elif isinstance(output, tuple | list):
        candidates = (getattr(output, "loss", None), *output)
    else:
        candidates = (output, getattr(output, "loss", None))
    losses = (
        candidate
        for candidate in candidates
        if isinstance(candidate, torch.Tensor)
        and candidate.ndim == 0
        and candidate.is_floating_point()
    )
    return next(losses, None)


def learning_rate(optimizer: torch.optim.Optimizer) -> Value | None:
    """The largest over the parameter groups; a tensor is not waited for."""
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    if not rates:
        return None
    if isinstance(rates[0], torch.Tensor):
        return one_value("learning_rate", rates[0])
    return max(float(rate) for rate in rates)


def mean(values: Sequence[torch.Tensor | float]) -> torch.Tensor | float:
    """Mean of 0-dim tensors, or of numbers.

    Numbers stay on the host; a mixture goes to the first tensor's device.
    """
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if not tensors:
        return sum(float(value) for value in values) / len(values)
    like = tensors[0]
    parts = [
        torch.as_tensor(value, dtype=torch.float64).to(like.device, non_blocking=True)
        for value in values
    ]
    return torch.stack(parts).mean()


def one_value(name: str, value: torch.Tensor | float) -> Value:
    """A value to log; a tensor on a device is copied and not waited for.

    Raises:
        ValueError: It is a tensor of more or fewer than one element.
    """
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(
            f"log({name}=...) got a tensor of shape {tuple(value.shape)}, not one value"
        )
    if value.device.type == "cpu":
        return float(value.detach())
    return value.detach().reshape(()).to(torch.float64, copy=True)


class GradientNorms:
    """L2 norms of gradients as backward leaves them, before anything clips them.

    A hook on each parameter notes that a gradient has come; when the backward pass is over, all of
    them are measured together. The last pass of the step holds the whole gradient. Of a sharded
    parameter it is the local shard's norm.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], guard: Guard) -> None:
        self._norms: dict[str, torch.Tensor] = {}
        self._captured: dict[str, torch.Tensor] = {}
        self._came: dict[nn.Parameter, None] = {}
        self._guard = guard
        self._names = names
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for parameter in names
            if parameter.requires_grad
        ]

    def norms(self) -> dict[str, torch.Tensor]:
        """Of the step so far, in the order of the last backward pass.

        A captured graph measures at every replay and tells nobody: its numbers are looked up.
        """
        if self._norms:
            return self._norms
        return {name: norm.clone() for name, norm in self._captured.items()}

    def start_step(self) -> None:
        """Forget the step that ended."""
        self._norms = {}
        self._came = {}

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _accumulated(self, parameter: torch.Tensor) -> None:
        with self._guard:
            assert isinstance(parameter, nn.Parameter)
            if not self._came:
                _at_end_of_backward(self._backward_ends)
            self._came[parameter] = None

    def _backward_ends(self) -> None:
        # Data-parallel wrappers finish their reductions in such a callback too; once more to the
        # end of the queue puts this one behind theirs.
        _at_end_of_backward(self._measure)

    def _measure(self) -> None:
        with self._guard, torch.no_grad():
            came, self._came = self._came, {}
            gradients = {
                self._names[parameter]: _values(parameter.grad)
                for parameter in came
                if parameter.grad is not None
            }
            norms = dict(zip(gradients, _norms(list(gradients.values())), strict=True))
            if _capturing(norms):
                self._captured = norms
            else:
                # Taken out first, so that the order is that of the last backward pass.
                for name in norms:
                    self._norms.pop(name, None)
                self._norms |= norms


def _at_end_of_backward(function: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _capturing(norms: Mapping[str, torch.Tensor]) -> bool:
    on_cuda = any(norm.is_cuda for norm in norms.values())
    return on_cuda and torch.cuda.is_current_stream_capturing()


def _values(x: torch.Tensor) -> torch.Tensor:
    """The numbers that this process holds of a gradient or a parameter."""
    held = local_of(x.detach())
    return held.coalesce().values() if held.is_sparse else held


class Parameters:
    """Norms of the parameters, and how far one optimizer step moves them.

    The update ratio ||after - before|| / ||before|| is estimated from a fixed strided sample of
    each parameter, whole for those of at most `SAMPLED_ELEMENTS` elements, in which every sampled
    element stands for as many as the stride; memory is bounded by two samples.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._parameters = [p for p in names if local_of(p.detach()).numel()]
        self._names = tuple(names[parameter] for parameter in self._parameters)
        self._before: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None

    def before_step(self) -> None:
        """Take the sample that the step is about to change."""
        self._before = self._sample()

    def norms(self) -> dict[str, torch.Tensor]:
        """Each parameter's norm; of a sharded one, the local shard's."""
        with torch.no_grad():
            norms = _norms([_values(parameter) for parameter in self._parameters])
        return dict(zip(self._names, norms, strict=True))

    def update_ratio(self) -> torch.Tensor | None:
        """How far the step moved; None without a sample from before it."""
        before, self._before = self._before, None
        if before is None:
            return None
        with torch.no_grad():
            after = self._sample()
            return None if after is None else self._ratio(before, after)

    def _ratio(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        if self._weights is None or self._weights.device != before.device:
            parts = [
                torch.full(_sample_of(p).shape, float(_stride(_values(p))), device=before.device)
                for p in self._parameters
            ]
            self._weights = torch.cat(parts)
        change = after - before
        moved = torch.dot(self._weights, change.square_())
        size = torch.dot(self._weights, before.square_())
        return (moved.double() / size.double()).sqrt()

    def _sample(self) -> torch.Tensor | None:
        with torch.no_grad():
            samples = [_sample_of(parameter) for parameter in self._parameters]
            return torch.cat(samples).float() if samples else None


class OptimizerTensors:
    """Weight gradients as the optimizer gets them, and its moments after the step.

    The roles are grad_weight, exp_avg, exp_avg_sq and master_weight, under the names by which
    torch's and Apex's Adam keep them; an optimizer without them gives no rows.
    """

    _ROLES: Final = ("exp_avg", "exp_avg_sq", "master_weight")

    def __init__(self, optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
        self._optimizer = optimizer
        self._names = names

    def gradients(self, collector: Collector) -> None:
        """Measure the gradients, clipped if the loop clips."""
        for parameter, name in self._names.items():
            if parameter.grad is not None and not parameter.grad.is_sparse:
                _observe(collector, name, "grad_weight", parameter.grad)

    def moments(self, collector: Collector) -> None:
        """Measure the state of each parameter."""
        for parameter, name in self._names.items():
            state = self._optimizer.state.get(parameter) or {}
            for role in self._ROLES:
                value = state.get(role)
                if isinstance(value, torch.Tensor) and value.ndim and value.is_floating_point():
                    _observe(collector, name, role, value)


def _observe(collector: Collector, name: str, role: str, x: torch.Tensor) -> None:
    layer = name.removesuffix(".weight")
    collector.observe(layer, role, x, Operand(DTYPE_FORMATS.get(x.dtype, "fp32"), None))


def _stride(values: torch.Tensor) -> int:
    return -(-values.numel() // SAMPLED_ELEMENTS)


def _sample_of(parameter: nn.Parameter) -> torch.Tensor:
    values = _values(parameter)
    return values.reshape(-1)[:: _stride(values)]


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """One call for all of them; it takes one type at a time."""
    if not tensors:
        return []
    if len({(x.dtype, x.device) for x in tensors}) > 1 or any(not x.numel() for x in tensors):
        return [_norm(x) for x in tensors]
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return list(torch._foreach_norm(tensors, 2, dtype=wide))


def _norm(x: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm
