"""Which linear layer a recipe asks for, and what a recipe needs around a model's blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.precision.block_linear import BlockLinear
from foreshock.trainer.precision.linear import Bf16Linear, Fp8Linear, GemmLinear
from foreshock.trainer.precision.native_linear import NativeBlockLinear, NativeLinear
from foreshock.trainer.precision.support import check_alone, require_transformer_engine

__all__ = ["around_forward", "gemm_linear"]


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
        ValueError: The stack's recipes differ in what they may not, or the backend is not for
            stacks, or not there.
    """
    if all(p.backend == "bf16" for p in precision):
        return Bf16Linear(in_features, out_features, lead=lead)
    for name, make in (("native", _native), ("transformer_engine", _transformer_engine)):
        if any(p.backend == name for p in precision):
            check_alone(precision)
            return make(in_features, out_features, precision)
    if any(p.backend == "emulated" and p.scaling not in ("delayed", "current") for p in precision):
        return BlockLinear(in_features, out_features, precision=precision, lead=lead)
    return Fp8Linear(in_features, out_features, precision=precision, lead=lead)


def _native(
    in_features: int, out_features: int, precision: Sequence[PrecisionConfig]
) -> GemmLinear:
    if precision[0].scaling in ("delayed", "current"):
        return NativeLinear(in_features, out_features, precision=precision)
    return NativeBlockLinear(in_features, out_features, precision=precision)


def _transformer_engine(
    in_features: int, out_features: int, precision: Sequence[PrecisionConfig]
) -> GemmLinear:
    require_transformer_engine()
    from foreshock.trainer.precision.transformer_engine import TeLinear

    layer = TeLinear(in_features, out_features, precision=precision[0])
    assert isinstance(layer, GemmLinear)
    return layer


def around_forward(
    precision: Sequence[PrecisionConfig],
) -> Callable[[], AbstractContextManager[object]]:
    """Makes the context in which a model's blocks run."""
    if precision[0].backend != "transformer_engine":
        return nullcontext
    from foreshock.trainer.precision.transformer_engine import autocast_of

    return autocast_of(precision[0])
