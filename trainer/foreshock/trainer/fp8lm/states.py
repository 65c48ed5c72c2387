"""How one tensor of the optimizer's state is kept: as it is, scaled, in blocks, or range-expanded.

A codec turns a float32 tensor into named parts and back; parts are plain tensors, so that a
checkpoint holds nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foreshock.trainer.fp8lm.expansion import Expanded, expand
from foreshock.trainer.fp8lm.scaled import (
    DTYPES,
    BlockScaled,
    amax_of,
    cast,
    encode,
    encode_blocks,
    power_of_two_scale,
)
from foreshock.trainer.states_config import StateFormat

__all__ = ["StateCodec", "stochastic_fp16"]

Parts = dict[str, Tensor]
"""`codes`, and what else it takes to read them: scale, exponent, centre."""


@dataclass(frozen=True, slots=True)
class StateCodec:
    """One way to keep a tensor.

    Attributes:
        format: Of the codes; bf16 and fp32 have no scale.
        block: Elements per scale; 0 = one for the tensor.
        expansion: COAT's range expansion, for E4M3 in blocks.
    """

    format: StateFormat
    block: int = 0
    expansion: bool = False

    @property
    def scaled(self) -> bool:
        """Whether there is any scale."""
        return self.format in ("e4m3", "e5m2", "fp16")

    def encode(
        self, x: Tensor, previous: Tensor | None = None, noise: torch.Generator | None = None
    ) -> Parts:
        """The parts of a float32 tensor.

        Args:
            x: Any shape.
            previous: Scale to keep where x has no amax to go by; of one-scale formats.
            noise: Round fp16 and bf16 up or down by chance; None rounds to the nearest.
        """
        if not self.scaled:
            if noise is not None and self.format == "bf16":
                return {"codes": _stochastic(x, 16, noise).to(torch.bfloat16)}
            return {"codes": x.to(DTYPES[self.format], copy=True)}
        if self.expansion:
            found = expand(x, self.block)
            return {
                "codes": found.codes.view(x.shape),
                "scale": found.scale,
                "exponent": found.exponent,
                "centre": found.centre,
            }
        if self.block:
            blocks = encode_blocks(x, self.format, self.block)
            return {"codes": blocks.codes.view(x.shape), "scale": blocks.scale_inv.reciprocal()}
        if noise is not None and self.format == "fp16":
            kept = torch.ones((), device=x.device) if previous is None else previous
            scale = power_of_two_scale(amax_of(x), "fp16", kept)
            return {"codes": stochastic_fp16(x * scale, noise), "scale": scale}
        one = encode(x, self.format, previous)
        return {"codes": one.codes, "scale": one.scale}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """float32, in the codes' shape."""
        codes = parts["codes"]
        if not self.scaled:
            return codes.float()
        scale = parts["scale"]
        if self.expansion:
            of_block = (parts["exponent"], parts["centre"], scale)
            return Expanded(codes.reshape(-1), *of_block, self.block, codes.shape).values()
        if self.block:
            flat = codes.reshape(-1)
            inverse = scale.reciprocal()
            return BlockScaled(flat, inverse, self.block, codes.shape, self.format).values()
        return codes.float() * scale.reciprocal()


def stochastic_fp16(x: Tensor, noise: torch.Generator) -> Tensor:
    """fp16, up or down with the probabilities that make the mean right; saturates at 65504.

    Numbers below fp16's normal ones are rounded to the nearest.
    """
    return cast(_stochastic(x, 13, noise), "fp16")


def _stochastic(x: Tensor, bits: int, noise: torch.Generator) -> Tensor:
    """float32 with its last bits cleared after a random number below 2^bits was added to them."""
    mask = (1 << bits) - 1
    drawn = torch.randint(0, mask + 1, x.shape, dtype=torch.int32, device=x.device, generator=noise)
    raised = (x.float().contiguous().view(torch.int32) + drawn) & ~mask
    return torch.where(torch.isfinite(x), raised.view(torch.float32), x)
