"""What a low-precision linear layer tells the monitor about its GEMM operands.

A layer that casts its operands implements `QuantizedGemm`; plain `nn.Linear` needs nothing. The
monitor reads what a layer used and never changes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import torch

__all__ = ["DTYPE_FORMATS", "OPERAND_ROLES", "Operand", "QuantizedGemm", "Tap"]

DTYPE_FORMATS: Final = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
"""Formats of tensors that nothing casts."""

OPERAND_ROLES = ("input", "weight", "grad_output")
"""The operands of a linear layer's three GEMMs."""


@dataclass(frozen=True, slots=True)
class Operand:
    """How one GEMM operand is cast in the current call.

    Attributes:
        format: A name in `foreshock.monitor.formats.FORMATS`.
        scale: 0-dim float32 on the device, the scale in force; None = current scaling, that is
            M / amax of the tensor itself.
        granularity: What one scale covers.
        agreed: Whether data-parallel processes must hold the same scale, as delayed scaling with a
            reduced amax makes them; a rank that differs is then named.
    """

    format: str
    scale: torch.Tensor | None
    granularity: str = "tensor"
    agreed: bool = False


@runtime_checkable
class QuantizedGemm(Protocol):
    """A module that casts its GEMM operands.

    After a forward pass `operand` must still return the scale which that pass used, also when the
    layer has already computed the next one from this step's amax.
    """

    def operand(self, role: str) -> Operand:
        """The cast of the operand `role`: input, weight or grad_output."""
        ...


@runtime_checkable
class Tap(Protocol):
    """A module that hands its tensor on unchanged, a place to measure what no GEMM takes.

    Attributes:
        tapped_role: What the tensor is, one of `record.ROLES`, e.g. residual, query or key; None
            while it is not to be measured.
    """

    tapped_role: str | None
