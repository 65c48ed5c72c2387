"""What low-precision layers and optimizers tell the monitor about the tensors that they cast.

A layer that casts its operands implements `QuantizedGemm`; plain `nn.Linear` needs nothing. An
optimizer that casts its states implements `ObservableStates`, and a parameter kept as codes
`KeptAsCodes`. The monitor reads what they used and never changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

import torch

__all__ = [
    "DTYPE_FORMATS",
    "OPERAND_ROLES",
    "CastTap",
    "ChangedWeight",
    "KeptAsCodes",
    "ObservableStates",
    "Observer",
    "Operand",
    "Part",
    "QuantizedGemm",
    "Tap",
    "held_by",
]

DTYPE_FORMATS: Final = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
"""Formats of tensors that nothing casts."""

OPERAND_ROLES = ("input", "weight", "grad_output")
"""The operands of a linear layer's three GEMMs."""


@dataclass(frozen=True, slots=True)
class Part:
    """What this process's piece of a tensor stands for.

    Attributes:
        counted: Whether its sums enter the merge; a replica that another process counts does not.
        offset: Position of its first feature among all features.
        features: All features, or None where the piece has them all.
        sharded: Whether other processes hold other pieces of it.
    """

    counted: bool = True
    offset: int = 0
    features: int | None = None
    sharded: bool = False


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
        part: What a plain tensor stands for where processes hold parts of it (tensor parallel);
            None: it is whole. A DTensor says it by itself, and compiled graphs do not hear it.
    """

    format: str
    scale: torch.Tensor | None
    granularity: str = "tensor"
    agreed: bool = False
    part: Part | None = None


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
class ChangedWeight(Protocol):
    """A `QuantizedGemm` that may multiply by another matrix than its parameter `weight`.

    Such as one whose columns take the inverse of what smooths the input. Asked after a forward
    pass, while what changed the weight still holds.
    """

    def gemm_weight(self) -> torch.Tensor:
        """What the cast of the operand `weight` was given, outputs x inputs."""
        ...


@runtime_checkable
class Tap(Protocol):
    """A module that hands its tensor on unchanged, a place to measure what no GEMM takes.

    Attributes:
        tapped_role: What the tensor is, one of `record.ROLES`, e.g. residual, query or key; None
            while it is not to be measured.
    """

    tapped_role: str | None


@runtime_checkable
class CastTap(Tap, Protocol):
    """A tap whose tensor is cast for a product that is no linear layer's, such as attention's."""

    def tapped_operand(self) -> Operand:
        """The cast of the latest tensor."""
        ...


Observer = Callable[[torch.nn.Parameter, str, torch.Tensor, Operand, torch.Tensor | None], object]
"""Takes (parameter, role, tensor, its cast, mu): exp_avg, exp_avg_sq, master_weight, grad_reduced
or weight_gathered as it is before the cast, and for grad_reduced the factor mu, 0-dim or None."""


@runtime_checkable
class ObservableStates(Protocol):
    """An optimizer whose tensors have few bits."""

    def observe_with(self, observer: Observer | None) -> None:
        """Show it every such tensor of a step, while the step runs; None: nobody looks."""
        ...


@runtime_checkable
class KeptAsCodes(Protocol):
    """A tensor subclass that holds codes and stands for other numbers."""

    def plain(self) -> torch.Tensor:
        """The plain tensor that it stands for."""
        ...


def held_by(parameter: torch.nn.Parameter, processes: int) -> None:
    """Say that a plain parameter is one of several pieces, held by so many processes each.

    For parameters that were cut by hand (tensor parallel); called before `watch`. Without it each
    process's parameter is taken for a copy of the same numbers. A DTensor says it by itself.
    """
    parameter.held_by_processes = processes  # type: ignore[attr-defined]
