"""bfloat16 parameters: AdamW that keeps a float32 master of each.

The usual mixed precision, without FP8-LM's formats: 2 bytes of weight, 2 of gradient, 12 of master
and moments. Nothing here reduces gradients over processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from foreshock.trainer.fp8lm.adamw import Hyper, updated
from foreshock.trainer.model import Decoder

__all__ = ["MasterAdamW", "keep_in_bfloat16"]


def keep_in_bfloat16(model: Decoder) -> None:
    """Round the matrices of the GEMMs, the embedding and the head to bfloat16, in place.

    Gains, routers and what else is small stay float32. Before the model is wrapped or watched.
    """
    layers = (layer.weight for layer in model.linears().values())
    for parameter in (model.embedding, model.head, *layers):
        if parameter is not None:
            parameter.data = parameter.data.to(torch.bfloat16)


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) in float32, whose bfloat16 parameters are copies of masters.

    A master begins as the parameter's own value at the first step; float32 parameters have none.

    Args:
        params: As any torch optimizer's.
        lr: Learning rate; as torch's AdamW, like the next three.
        betas: Of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        Hyper(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            hyper = Hyper.of(group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, hyper)
        return loss

    def _update(self, parameter: nn.Parameter, gradient: torch.Tensor, hyper: Hyper) -> None:
        state = self.state[parameter]
        narrow = parameter.dtype != torch.float32
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            if narrow:
                state["master_weight"] = parameter.detach().float()
        state["step"] += 1
        weight = state["master_weight"] if narrow else parameter
        moments = state["exp_avg"], state["exp_avg_sq"]
        new, *moved = updated(weight, gradient.float(), *moments, state["step"], hyper)
        weight.copy_(new)
        for held, value in zip(moments, moved, strict=True):
            held.copy_(value)
        if narrow:
            parameter.copy_(weight)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly: torch's own would round every state to its parameter's type.

        Raises:
            ValueError: Parameter groups differ.
        """
        groups = state_dict["param_groups"]
        super().load_state_dict({"state": {}, "param_groups": groups})
        ids = [i for group in groups for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for saved, parameter in zip(ids, own, strict=True):
            values = state_dict["state"].get(saved, {})
            held = {k: v.to(parameter.device, copy=True) for k, v in values.items()}
            self.state[parameter] = held
