"""AdamW for a stack of models, each with its own settings.

All parameters are views of one flat buffer, one row per model, so that an update is a dozen
operations whatever the number of models. Schedules are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from foreshock.trainer.config import OptimizerConfig

__all__ = ["StackedAdamW"]


class StackedAdamW:
    """torch's AdamW and gradient clipping, with per-model tensors for every setting.

    Args:
        model: Its parameters have a leading axis of models, E long; they become views of the flat
            buffer.
        configs: One per model.
    """

    def __init__(self, model: nn.Module, configs: Sequence[OptimizerConfig]) -> None:
        # What decays comes first, so that weight decay is one operation on a slice.
        parameters = sorted(model.parameters(), key=lambda p: p.dim() < 3)
        models = len(configs)
        self._parameters = parameters
        self._flat = torch.cat([p.detach().reshape(models, -1) for p in parameters], 1)
        self._decayed = sum(p.numel() for p in parameters if p.dim() >= 3) // models
        self._exp_avg = torch.zeros_like(self._flat)
        self._exp_avg_sq = torch.zeros_like(self._flat)
        self._steps = 0
        offset = 0
        for parameter in parameters:
            size = parameter.numel() // models
            view = self._flat[:, offset : offset + size].view(parameter.shape)
            parameter.data = view
            offset += size

        def column(value: Callable[[OptimizerConfig], float]) -> Tensor:
            values = [value(config) for config in configs]
            return torch.tensor(values, dtype=torch.float64, device=self._flat.device)[:, None]

        self._beta1, self._beta2 = column(lambda c: c.beta1), column(lambda c: c.beta2)
        self._eps = column(lambda c: c.eps).float()
        self._decay = column(lambda c: c.weight_decay)
        self._clip = column(lambda c: float("inf") if c.clip is None else c.clip)

    @torch.no_grad()
    def step(self, learning_rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clip, update, and forget the gradients.

        Args:
            learning_rates: One per model, shape (E,).

        Returns:
            Gradient norm before clipping, parameter norm after the step, and update ratio
            (norm of the change / norm before), each of shape (E,).
        """
        gradient = self._take_gradient()
        grad_norm = _norm(gradient)
        gradient.mul_(self._clip_factor(grad_norm))
        before = _norm(self._flat)
        update = self._update(gradient, learning_rates.double().to(gradient.device)[:, None])
        self._flat.add_(update)
        return grad_norm[:, 0], _norm(self._flat)[:, 0], (_norm(update) / before)[:, 0]

    def bias_corrections(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """1 - beta^t of both moments, float64 (steps, E), for t (steps, E) steps taken."""
        beta1, beta2 = self._beta1.cpu()[:, 0], self._beta2.cpu()[:, 0]
        return 1 - beta1**steps, 1 - beta2**steps

    @torch.no_grad()
    def step_on_device(
        self, rates: Tensor, first: Tensor, second: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `step`, with all that depends on the step on the device: fit for a CUDA graph.

        Args:
            rates: Learning rates, float64 (E,).
            first: `bias_corrections` of the first moment, float64 (E,).
            second: Those of the second.
            kept: What the moments are multiplied by before the step: 0 forgets them; float32 (E,).
        """
        gradient = self._take_gradient()
        grad_norm = _norm(gradient)
        gradient.mul_(self._clip_factor(grad_norm))
        before = _norm(self._flat)
        self._exp_avg.mul_(kept[:, None])
        self._exp_avg_sq.mul_(kept[:, None])
        update = self._change(gradient, rates[:, None], first[:, None], second[:, None])
        self._flat.add_(update)
        return grad_norm[:, 0], _norm(self._flat)[:, 0], (_norm(update) / before)[:, 0]

    def _take_gradient(self) -> Tensor:
        """(E, parameters of one model)."""
        rows = self._flat.shape[0]
        parts = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            parts.append(parameter.grad.reshape(rows, -1))
            parameter.grad = None
        return torch.cat(parts, 1)

    def _clip_factor(self, norm: Tensor) -> Tensor:
        """Clip / (norm + 1e-6), at most 1, as torch has it; 1 where there is no clipping."""
        factor = (self._clip / (norm + 1e-6)).clamp(max=1.0)
        return factor.masked_fill(self._clip.isinf(), 1.0).float()

    def _update(self, gradient: Tensor, rate: Tensor) -> Tensor:
        """What is added to the parameters; decoupled weight decay included."""
        self._steps += 1
        first = 1 - self._beta1**self._steps
        second = 1 - self._beta2**self._steps
        return self._change(gradient, rate, first, second)

    def _change(self, gradient: Tensor, rate: Tensor, first: Tensor, second: Tensor) -> Tensor:
        self._exp_avg.lerp_(gradient, (1 - self._beta1).float().expand_as(gradient))
        weighted = gradient.square_().mul_((1 - self._beta2).float())
        self._exp_avg_sq.mul_(self._beta2.float()).add_(weighted)
        denominator = torch.sqrt(self._exp_avg_sq, out=gradient)
        denominator.mul_(second.rsqrt().float()).add_(self._eps)
        update = (self._exp_avg / denominator).mul_((-rate / first).float())
        decayed = slice(0, self._decayed)
        update[:, decayed].addcmul_(self._flat[:, decayed], (-rate * self._decay).float())
        return update


def _norm(rows: Tensor) -> Tensor:
    """L2 norm of each row, (E, 1)."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norm
