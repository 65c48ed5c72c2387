"""Weight gradients in FP8 from the moment that backward makes them.

A hook takes each matrix's gradient as it comes, adds it to the codes of earlier micro-batches and
lets go of it: no more than one gradient in full precision is alive. Nothing is communicated here,
however many micro-batches there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor, nn

from foreshock.trainer.fp8lm.scaled import Scaled, encode

__all__ = ["Accumulation", "GradientStore", "add_to_fp8"]

Accumulation = Literal["e4m3", "bf16", "fp32"]

_WIDE: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_to_fp8(held: Scaled, x: Tensor) -> Scaled:
    """Decode, add in float32, cast under the sum's own scale.

    One rounding per addition: relative errors of n additions grow as sqrt(n) 2^-4 / sqrt(3) and
    faster where summands are much smaller than the sum.
    """
    return encode(held.values().add_(x.detach()), held.format, held.scale)


class GradientStore:
    """Accumulated gradients of some parameters.

    Args:
        parameters: Their `.grad` stays None.
        accumulate: e4m3, bf16 or fp32.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], accumulate: Accumulation) -> None:
        self.parameters = tuple(parameters)
        self._accumulate = accumulate
        self._held: dict[int, Tensor | Scaled] = {}
        self._index = {id(p): index for index, p in enumerate(self.parameters)}
        self._handles = [
            p.register_post_accumulate_grad_hook(self._came)  # type: ignore[no-untyped-call]
            for p in self.parameters
        ]
        self.version = 0

    def local(self) -> list[Tensor | Scaled | None]:
        """This process's sums, in the parameters' order; None for what no backward reached."""
        return [self._held.get(index) for index in range(len(self.parameters))]

    def clear(self) -> None:
        """Forget all."""
        self._held = {}
        self.version += 1

    def div_(self, divisor: Tensor | float) -> None:
        """Divide all of them, as to take a loss scale back: FP8 through its scale alone."""
        for gradient in self._held.values():
            gradient.div_(divisor)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @property
    def bytes(self) -> int:
        """Memory of what is held."""
        return sum(
            g.bytes if isinstance(g, Scaled) else g.numel() * g.element_size()
            for g in self._held.values()
        )

    @torch.no_grad()
    def _came(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        index = self._index[id(parameter)]
        self._held[index] = self._added(self._held.get(index), gradient)
        self.version += 1

    def _added(self, held: Tensor | Scaled | None, gradient: Tensor) -> Tensor | Scaled:
        if self._accumulate != "e4m3":
            wide = gradient.to(_WIDE[self._accumulate])
            return wide if held is None else held + wide  # type: ignore[operator]
        if isinstance(held, Scaled):
            return add_to_fp8(held, gradient)
        return encode(gradient, "e4m3")
