"""A mixture of experts in FOG's block: each token goes through its k best of E feed-forwards.

No token is dropped and no expert has a capacity. Everything runs in this process: spreading
experts over devices is not done here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.trainer.blocks.mlp import XieluMlp
from foreshock.trainer.blocks.parts import Parts
from foreshock.trainer.config import ModelConfig

__all__ = ["Experts", "balance_loss"]


def balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """Load-balancing loss, 1 when all experts are used alike (Fedus et al., 2101.03961, eq. 4).

    Args:
        probabilities: The router's, shape (tokens, E).
        chosen: The experts of each token, shape (tokens, k).

    Returns:
        E times the sum over experts of (share of choices) x (mean probability), 0-dim.
    """
    experts = probabilities.shape[-1]
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    shares = counts.to(probabilities.dtype) / chosen.numel()
    return experts * (shares * probabilities.mean(0)).sum()


class Experts(nn.Module):
    """Sum over the k chosen experts e of w_e MLP_e(x), w the softmax of their k router logits.

    The router is not a GEMM of the recipe: it stays in the precision of the residual stream.

    Args:
        parts: Makes the experts' layers.
        config: Sizes, number of experts and how many a token takes.

    Attributes:
        router: Shape (E, D).
        balance: `balance_loss` of the latest forward pass.

    Raises:
        ValueError: For a stack: its models would send different numbers of tokens to an expert.
    """

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__()
        if parts.lead:
            raise ValueError(
                "fog_moe cannot be stacked: models send different numbers of tokens to an expert; "
                "train it by itself, or stack one of the architectures without experts"
            )
        self.taken = config.experts_per_token
        self.router = nn.Parameter(torch.zeros(config.num_experts, config.width))
        self.experts = nn.ModuleList(XieluMlp(parts, config) for _ in range(config.num_experts))
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, T, D), kept."""
        rows = x.reshape(-1, x.shape[-1])
        logits = functional.linear(rows, self.router)
        best, chosen = logits.topk(self.taken)
        weights = best.softmax(-1)
        self.balance = balance_loss(logits.softmax(-1), chosen)
        mixed = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            result = _through(expert, rows[token]) * weights[token, place, None]
            mixed = mixed.index_add(0, token, result)
        return mixed.view(x.shape)

    def extra_repr(self) -> str:
        """Routing, for the audit that `print(model)` is."""
        return f"each token takes {self.taken} of {len(self.experts)}"


def _through(expert: nn.Module, rows: Tensor) -> Tensor:
    """The expert's result for rows (n, D).

    An expert without tokens gets one row of zeros and its result is not used: GEMMs and scales
    never see an empty tensor, and its gradients are zeros, which every optimizer and every
    reduction over processes can take.
    """
    given = rows if len(rows) else rows.new_zeros(1, rows.shape[-1])
    result: Tensor = expert(given[None])[0]
    return result[: len(rows)]
