"""Feed-forward layers, with a gate and without; Smooth-SwiGLU in its two forms.

None of them has a bias or a norm, and none knows where in a block it stands.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from foreshock.trainer.blocks.fused import XIELU_BETA, xielu
from foreshock.trainer.blocks.parts import Parts
from foreshock.trainer.config import ModelConfig

__all__ = ["XIELU", "ChannelSmoothSwiGLU", "GeluMlp", "SwiGLU", "TokenSmoothSwiGLU", "XieluMlp"]

_INITIAL_ALPHA = 0.8


class XIELU(nn.Module):
    """xIELU: a_p x^2 + x/2 above zero, a_n (expm1(x) - x) + x/2 below.

    a_p = softplus(p) and a_n = 1/2 + softplus(n), both 0.8 at first; p and n are learnable, one
    of each per layer (shape (*lead, 1)).
    """

    def __init__(self, lead: tuple[int, ...]) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((*lead, 1), math.log(math.expm1(_INITIAL_ALPHA))))
        self.n = nn.Parameter(
            torch.full((*lead, 1), math.log(math.expm1(_INITIAL_ALPHA - XIELU_BETA)))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, features), kept."""
        a_p = functional.softplus(self.p)[..., None, None]
        a_n = XIELU_BETA + functional.softplus(self.n)[..., None, None]
        if x.is_cuda and x.dtype == torch.bfloat16 and self.p.numel() == 1:
            y: Tensor = _on_device(x, a_p, a_n)
            return y
        return xielu(x, a_p, a_n)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _on_device(x: Tensor, a_p: Tensor, a_n: Tensor) -> Tensor:
    # Imported where it runs: Triton wants a device, or its interpreter.
    from foreshock.trainer.blocks.xielu_kernels import xielu_on_device

    y: Tensor = xielu_on_device(x, a_p, a_n)
    return y


class _PlainMlp(nn.Module):
    """W_down f(W_up x), 3/2 as wide as a gated one, so that both have as many weights."""

    def __init__(self, parts: Parts, config: ModelConfig, activation: nn.Module) -> None:
        super().__init__()
        self.up = parts.linear(config.width, config.plain_ffn_width)
        self.activation = activation
        self.down = parts.linear(config.plain_ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        y: Tensor = self.down(self.activation(self.up(x)))
        return y


class XieluMlp(_PlainMlp):
    """W_down xIELU(W_up x): FOG-max."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__(parts, config, XIELU(parts.lead))


class GeluMlp(_PlainMlp):
    """W_down GeLU(W_up x): FOG-opt, FOG-flash, OP."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__(parts, config, nn.GELU())


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, parts: Parts, config: ModelConfig) -> None:
        super().__init__()
        self.gate = parts.linear(config.width, config.gated_ffn_width)
        self.up = parts.linear(config.width, config.gated_ffn_width)
        self.down = parts.linear(config.gated_ffn_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


class ChannelSmoothSwiGLU(SwiGLU):
    """SwiGLU whose hidden channels are brought to one size before they are cast (as published).

    Fishman et al. (arXiv 2409.12517): channel i of the last GEMM's input is s_i^-1 Q(s_i h_i), with
    s_i from the channel's largest magnitude. A GEMM cannot divide its input after the cast, so the
    columns of W_down take s_i^-1, as the paper does for inference. Without casts it is SwiGLU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        hidden = functional.silu(self.gate(x)) * self.up(x)
        largest = hidden.detach().abs().amax((-3, -2))
        return self.down.smoothed(hidden, _nonzero(largest).reciprocal())


class TokenSmoothSwiGLU(SwiGLU):
    """SwiGLU scaled per token, as in FOG's released code (Megatron-LM, core/transformer/mlp.py).

    The branch without silu is divided by the token's largest gate s, and the result of the last
    GEMM multiplied by it; no gradient goes through s. Without casts it is SwiGLU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shape (*lead, B, T, D), kept."""
        gate = self.gate(x)
        largest = _nonzero(gate.detach().abs().amax(-1, keepdim=True))
        y: Tensor = self.down(functional.silu(gate) * (self.up(x) / largest)) * largest
        return y


def _nonzero(sizes: Tensor) -> Tensor:
    """Sizes to divide by: 1 where all is zero, so that zero stays zero."""
    return sizes.masked_fill(sizes == 0, 1.0)
