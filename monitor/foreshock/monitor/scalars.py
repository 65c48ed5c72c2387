"""Scalars of every step, on the device: loss, gradient norm, parameter norm, update ratio.

Reads parameters and gradients and writes nothing. Reads no value on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import nn

from foreshock.monitor.guard import Guard

__all__ = ["SAMPLED_ELEMENTS", "GradientNorms", "Parameters", "find_loss", "mean"]

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


class GradientNorms:
    """L2 norms of gradients as backward leaves them, before anything clips them.

    A hook on each parameter fires whenever a micro-batch has been added to its gradient; the last
    one of the step holds the whole gradient.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], guard: Guard) -> None:
        self.norms: dict[str, torch.Tensor] = {}
        self._guard = guard
        self._names = names
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for parameter in names
            if parameter.requires_grad
        ]

    def start_step(self) -> None:
        """Forget the step that ended."""
        self.norms = {}

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _accumulated(self, parameter: torch.Tensor) -> None:
        with self._guard:
            gradient = parameter.grad
            if gradient is None:
                return
            if gradient.is_sparse:
                gradient = gradient.coalesce().values()
            assert isinstance(parameter, nn.Parameter)
            name = self._names[parameter]
            # Taken out first, so that the order is that of the last backward pass.
            self.norms.pop(name, None)
            self.norms[name] = _norm(gradient.detach())


class Parameters:
    """Norms of the parameters, and how far one optimizer step moves them.

    The update ratio ||after - before|| / ||before|| is estimated from a fixed strided sample of
    each parameter, whole for those of at most `SAMPLED_ELEMENTS` elements, in which every sampled
    element stands for as many as the stride; memory is bounded by two samples.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._parameters = [parameter for parameter in names if parameter.numel()]
        self._names = tuple(names[parameter] for parameter in self._parameters)
        self._before: torch.Tensor | None = None
        self._samples: list[torch.Tensor] = []
        self._weights: torch.Tensor | None = None

    def before_step(self) -> None:
        """Take the sample that the step is about to change."""
        self._samples = [_sample_of(parameter) for parameter in self._parameters]
        self._before = self._sample()

    def after_step(self) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The update ratio (None without a sample from before) and each parameter's norm."""
        before, self._before = self._before, None
        with torch.no_grad():
            norms = _norms([parameter.detach() for parameter in self._parameters])
            ratio = None if before is None else self._ratio(before, self._sample())
        return ratio, dict(zip(self._names, norms, strict=True))

    def _ratio(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        if self._weights is None or self._weights.device != before.device:
            parts = [
                torch.full(sample.shape, float(_stride(parameter)), device=before.device)
                for sample, parameter in zip(self._samples, self._parameters, strict=True)
            ]
            self._weights = torch.cat(parts)
        change = after - before
        moved = torch.dot(self._weights, change.square_())
        size = torch.dot(self._weights, before.square_())
        return (moved.double() / size.double()).sqrt()

    def _sample(self) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat(self._samples).float()


def _stride(parameter: nn.Parameter) -> int:
    return -(-parameter.numel() // SAMPLED_ELEMENTS)


def _sample_of(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.detach().reshape(-1)[:: _stride(parameter)]


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """One call for all of them; it takes one type at a time."""
    wide = [torch.float64 if x.dtype == torch.float64 else torch.float32 for x in tensors]
    if len({x.dtype for x in tensors}) > 1:
        return [_norm(x) for x in tensors]
    return list(torch._foreach_norm(tensors, 2, dtype=wide[0]))


def _norm(x: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm: torch.Tensor = torch.linalg.vector_norm(x, dtype=wide)
    return norm
