"""The scale of one GEMM operand: delayed (from an amax history) or current.

One object serves one tensor or a stack of models, one scale each. It casts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foreshock.monitor.formats import FORMATS
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.fast_stack import stack_kernels_for

__all__ = ["Scaling", "scale_of", "tensor_amax"]


def tensor_amax(x: Tensor, lead: int) -> Tensor:
    """Largest magnitude over all but the first `lead` axes, float32; NaN if there is a NaN."""
    if kernels := stack_kernels_for(x, lead):
        fast: Tensor = kernels.amax_per_model(x)
        return fast
    flat = x.reshape(*x.shape[:lead], -1)
    # Two reductions without an intermediate beat abs() and one.
    return torch.maximum(flat.amax(-1), -flat.amin(-1)).float()


class Scaling(nn.Module):
    """Scale state of one operand. All of it is in buffers, so that a checkpoint resumes exactly.

    Delayed scaling follows Transformer Engine: scale = M / max(history) / 2^margin, renewed after
    each use; a history whose maximum is zero or not finite keeps the previous scale. Current
    scaling is M / amax of the tensor itself, 1 where amax is zero or not finite, without margin.

    Args:
        configs: One config per model of the stack, or a single one when lead is ().
        lead: () for one model, (E,) for a stack.
        fp8_format: e4m3 or e5m2.

    Attributes:
        configured_history: Length of the amax history of each model.
        configured_margin: Margin of each model.
        scale: Next scale of delayed scaling, last one of current scaling; shape lead, float32.
            While a fault holds a scale, the one of before the fault.
        used: The scale of the latest cast, shape lead.
        history: Latest amax values, newest first, shape (*lead, longest history).
        valid: Which entries of history count, shape (*lead, longest history).
        agree: From the amax of this process's part of a tensor to that of the whole; None where it
            is whole. Every process has to cast alike then.
    """

    scale: Tensor
    used: Tensor
    history: Tensor
    valid: Tensor
    current: Tensor
    gain: Tensor

    def __init__(
        self, configs: Sequence[PrecisionConfig], *, lead: tuple[int, ...], fp8_format: str
    ) -> None:
        super().__init__()
        self.fp8_format = fp8_format
        current = [c.scaling == "current" for c in configs]
        lengths = [1 if c.scaling == "current" else c.history for c in configs]
        self.configured_history = tuple(lengths)
        self._any_current, self._all_current = any(current), all(current)
        self.register_buffer("scale", torch.ones(lead))
        self.register_buffer("used", torch.ones(lead))
        self.register_buffer("history", torch.zeros(*lead, max(lengths)))
        self.register_buffer("valid", torch.empty(*lead, max(lengths), dtype=torch.bool))
        self.register_buffer("current", torch.tensor(current).view(lead), persistent=False)
        # M / 2^margin, the numerator of a delayed scale.
        self.configured_margin = self._first_margin = tuple(c.margin for c in configs)
        margins = torch.tensor([float(2.0**-m) for m in self.configured_margin]).view(lead)
        self._largest = FORMATS[fp8_format].largest
        self.register_buffer("gain", self._largest * margins, persistent=False)
        self.limit_history(torch.tensor(lengths).view(lead))
        self._is_current = torch.tensor(current).view(lead)
        self._fault_factor: Tensor | None = None
        self._fault_hit: Tensor | None = None
        self._fault_inverse: Tensor | None = None
        self._known_ahead = not self._any_current
        self._deferred = False
        self.agree: Callable[[Tensor], Tensor] | None = None
        self.seen: Tensor | None = None

    def limit_history(self, lengths: Tensor) -> None:
        """Let only the newest entries of the amax history count.

        Args:
            lengths: Number of entries, int64 of shape lead, at most the history's length.
        """
        positions = torch.arange(self.history.shape[-1], device=self.history.device)
        self.valid = positions < lengths.to(self.history.device).unsqueeze(-1)

    def set_margin(self, margin: int) -> None:
        """Divide delayed scales by 2^margin from the next cast on; current scales have none.

        Checkpoints keep a margin and a history that were set.
        """
        factor = torch.tensor([2.0 ** (m - margin) for m in self.configured_margin])
        self.configured_margin = (margin,) * len(self.configured_margin)
        factor = factor.view(self.scale.shape).to(self.scale.device)
        self.gain = self.gain * factor
        if not self._any_current:
            self.scale = self.scale * factor
        elif not self._all_current:
            self.scale = torch.where(self.current, self.scale, self.scale * factor)

    def set_history(self, length: int) -> None:
        """Let scales follow the largest amax of the last `length` casts, from the next cast on.

        What is already forgotten stays so: a longer history fills as casts come.

        Raises:
            ValueError: The length is below 1.
        """
        if length < 1:
            raise ValueError(f"history is {length}; allowed: 1 or more")
        if self._all_current:
            return
        held = min(length, self.history.shape[-1])
        kept = torch.where(self.valid, self.history, 0.0)[..., :held]
        self.history = torch.nn.functional.pad(kept, (0, length - held))
        self.configured_history = (length,) * len(self.configured_history)
        lengths = torch.full(self.scale.shape, length, device=self.scale.device)
        self.limit_history(lengths)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.configured_margin != self._first_margin:
            destination[prefix + "margin"] = torch.tensor(self.configured_margin)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        # What was set while training is part of the state: a margin, and a history's length.
        margin = state_dict.pop(prefix + "margin", None)
        wanted = self._first_margin if margin is None else tuple(int(m) for m in margin)
        factors = [2.0 ** (a - b) for a, b in zip(self.configured_margin, wanted, strict=True)]
        gain = torch.tensor(factors).view(self.gain.shape).to(self.gain.device)
        self.gain, self.configured_margin = self.gain * gain, wanted
        history = state_dict.get(prefix + "history")
        if history is not None and history.shape[-1] != self.history.shape[-1]:
            self.set_history(history.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def break_scale(self, factor: Tensor | None, inverse: Tensor | None = None) -> None:
        """Let scales no longer follow the amax (a fault), until called again.

        Args:
            factor: float32 of shape lead: what the scale of before the fault is multiplied by, NaN
                for models that are whole; None mends all.
            inverse: float32 of shape lead: by how much the inverse scale is wrong; None = right.
        """
        hit = torch.zeros((), dtype=torch.bool) if factor is None else ~factor.isnan()
        # Decided here, so that `in_force` never waits for a device.
        self._known_ahead = bool((~self._is_current | hit.cpu()).all())
        self._fault_factor = None if factor is None else factor.to(self.scale.device)
        self._fault_hit = None if factor is None else hit.to(self.scale.device)
        wrong = factor is not None and inverse is not None and bool((inverse != 1).any())
        self._fault_inverse = (
            inverse.to(self.scale.device) if wrong and inverse is not None else None
        )

    def defer(self) -> None:
        """Leave it to `StackedScales` to advance the state: `step` only notes the amax in `seen`.

        A fault is then held in place by `hold`, since nothing may be decided on the host.
        """
        self._deferred, self._known_ahead = True, False

    def hold(self, factor: Tensor, hit: Tensor, inverse: Tensor) -> None:
        """As `break_scale`, without a look at any value, for a deferred scale.

        Args:
            factor: float32 of shape lead: what the scale of before the fault is multiplied by.
            hit: bool of shape lead: the models whose scale is broken.
            inverse: float32 of shape lead: by how much the inverse scale is wrong; 1 = right.
        """
        self._fault_factor, self._fault_hit, self._fault_inverse = factor, hit, inverse

    def in_force(self) -> Tensor | None:
        """The scale that the next cast will use, shape lead; None if its tensor decides."""
        return self._broken(self.scale) if self._known_ahead else None

    def inverse(self, scale: Tensor) -> Tensor:
        """What the GEMM's result is multiplied by to undo `scale`: 1 / scale, faults aside."""
        exact = scale.reciprocal()
        return exact if self._fault_inverse is None else exact * self._fault_inverse

    def step(self, x: Tensor, *, update: bool) -> Tensor:
        """The scale for x; afterwards the state has seen x.

        Args:
            x: Tensor about to be cast, shape (*lead, ...).
            update: False leaves the state as it is (evaluation).

        Returns:
            Scale in force for x, float32 of shape lead.
        """
        amax = self.agreed(tensor_amax(x, self.scale.dim()))
        scale = self.scale_for(amax)
        self.saw(amax, scale, update=update)
        return scale

    def agreed(self, amax: Tensor) -> Tensor:
        """The amax that counts: see `agree`."""
        return amax if self.agree is None else self.agree(amax)

    def saw(self, amax: Tensor, scale: Tensor, *, update: bool) -> None:
        """Take note of a cast that has been done.

        Args:
            amax: Largest magnitude of the tensor, float32 of shape lead.
            scale: What `in_force` or `scale_for` gave for it.
            update: As in `step`.
        """
        self.used = scale
        if self._deferred:
            self.seen = amax
        elif update:
            self._advance(amax, scale)

    def peek(self, x: Tensor) -> Tensor:
        """The scale that `step` would give for x, without a trace."""
        return self.scale_for(tensor_amax(x, self.scale.dim()))

    def scale_for(self, amax: Tensor) -> Tensor:
        """The scale of a tensor with this amax."""
        scale = self.scale
        if self._any_current:
            own = scale_of(amax, torch.full_like(self.gain, self._largest), torch.ones_like(amax))
            scale = own if self._all_current else torch.where(self.current, own, scale)
        return self._broken(scale)

    def _broken(self, scale: Tensor) -> Tensor:
        if self._fault_hit is None or self._fault_factor is None:
            return scale
        return torch.where(self._fault_hit, self.scale * self._fault_factor, scale)

    def _advance(self, amax: Tensor, scale: Tensor) -> None:
        following = scale
        if self._one_kernel_will_do(amax):
            self.history, self.scale = self._advanced(amax)
            return
        if not self._all_current:
            shifted = torch.cat((amax.unsqueeze(-1), self.history[..., :-1]), -1)
            self.history = shifted.masked_fill(~self.valid, 0.0)
            following = scale_of(self.history.amax(-1), self.gain, self.scale)
            if self._any_current:
                following = torch.where(self.current, scale, following)
        if self._fault_hit is not None:
            following = torch.where(self._fault_hit, self.scale, following)
        self.scale = following

    def _one_kernel_will_do(self, amax: Tensor) -> bool:
        """A dozen tiny kernels per cast would take longer than the GEMMs of a small model."""
        plain = not self._any_current and self._fault_hit is None
        return plain and amax.is_cuda and self.scale.dim() == 0

    def _advanced(self, amax: Tensor) -> tuple[Tensor, Tensor]:
        from foreshock.trainer.precision.native_kernels import advance_on_device

        return advance_on_device(self.history, self.valid, amax, self.gain, self.scale)

    def adopt(self, history: Tensor, otherwise: Tensor) -> None:
        """Take an amax history that several processes agree on, and the delayed scale it gives.

        Args:
            history: Shape of `history`.
            otherwise: The scale where the history is zero or not finite, shape lead.
        """
        if self._all_current or self._fault_hit is not None:
            return
        self.history = history.masked_fill(~self.valid, 0.0)
        following = scale_of(self.history.amax(-1), self.gain, otherwise)
        self.scale = torch.where(self.current, self.scale, following)

    def extra_repr(self) -> str:
        """Format and recipe, for the audit that `print(model)` is."""
        recipe = "current" if self._all_current else f"delayed, history={self.history.shape[-1]}"
        mixed = " (mixed with current)" if self._any_current and not self._all_current else ""
        return f"{self.fp8_format}, {recipe}{mixed}"


def scale_of(amax: Tensor, numerator: Tensor, otherwise: Tensor) -> Tensor:
    """The quotient numerator / amax; `otherwise` where amax is zero or not finite."""
    usable = (amax > 0) & amax.isfinite()
    largest = torch.finfo(torch.float32).max
    return torch.where(usable, (numerator / amax).clamp(max=largest), otherwise)
