"""Which linear layer a recipe asks for."""

from __future__ import annotations

from collections.abc import Sequence

from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.block_linear import BlockLinear
from foreshock.trainer.precision.linear import Bf16Linear, Fp8Linear, GemmLinear

__all__ = ["gemm_linear"]


def gemm_linear(
    in_features: int,
    out_features: int,
    *,
    precision: Sequence[PrecisionConfig],
    lead: tuple[int, ...] = (),
) -> GemmLinear:
    """Make the linear layer that the recipes ask for.

    Args:
        in_features: Columns of one model's matrix.
        out_features: Its rows.
        precision: The recipe, or one per model of a stack; recipes of a stack may differ in all
            but the FP8 formats; with scales per row or block they are all the same.
        lead: () for one model, (E,) for a stack.

    Raises:
        ValueError: The stack's recipes differ in what they may not.
    """
    if all(p.backend == "bf16" for p in precision):
        return Bf16Linear(in_features, out_features, lead=lead)
    if any(p.backend == "emulated" and p.scaling not in ("delayed", "current") for p in precision):
        return BlockLinear(in_features, out_features, precision=precision, lead=lead)
    return Fp8Linear(in_features, out_features, precision=precision, lead=lead)
