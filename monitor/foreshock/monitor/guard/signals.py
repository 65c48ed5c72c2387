"""What a guard reads off a record by itself, without a forecaster: scales that no longer fit."""

from __future__ import annotations

from typing import Final

from foreshock.monitor.guard.policy import GuardPolicy
from foreshock.monitor.record import StepRecord, TensorStatistics

__all__ = ["FAR_BELOW", "measured_layers", "misfit_layers"]

_OPERANDS: Final = ("input", "weight", "grad_output")
_UNSCALED: Final = ("bf16", "fp16", "fp32")
FAR_BELOW: Final = 6.0
"""Headroom, in powers of two, from which on a scale counts as far too small."""
_FLUSHED: Final = 0.5


def misfit_layers(policy: GuardPolicy, record: StepRecord) -> tuple[str, ...] | None:
    """Layers with a GEMM operand whose scale does not fit its tensor at this step.

    The scale says so (amax `scale_misfit` powers of two beyond the format's range, or far below it
    with most of the tensor flushed to zero) and the layer's own statistics confirm it (what the
    cast leaves stands less than `scale_sqnr` dB over its error).

    Returns:
        Qualified names, each once; None where the record holds no operand that was cast.
    """
    cast = [t for t in record.tensors if _is_cast(t)]
    if not cast:
        return None
    return tuple(dict.fromkeys(t.identity.layer for t in cast if _misfits(policy, t)))


def measured_layers(record: StepRecord) -> int:
    """Number of layers with an operand that was cast."""
    return len({t.identity.layer for t in record.tensors if _is_cast(t)})


def _is_cast(tensor: TensorStatistics) -> bool:
    identity = tensor.identity
    return (
        identity.role in _OPERANDS
        and not identity.what_if
        and identity.format not in _UNSCALED
        and tensor.headroom_log2 is not None
    )


def _misfits(policy: GuardPolicy, tensor: TensorStatistics) -> bool:
    headroom, sqnr = tensor.headroom_log2, tensor.sqnr_db
    assert headroom is not None
    beyond = headroom < -policy.scale_misfit and (tensor.overflow_ratio or 0.0) > 0
    below = headroom > FAR_BELOW and (tensor.underflow_ratio or 0.0) > _FLUSHED
    return (beyond or below) and sqnr is not None and sqnr < policy.scale_sqnr
