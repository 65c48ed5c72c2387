"""The record as Python objects: what a test writes by hand and a script reads.

Knows no Arrow and no tensors. None means not measured; NaN and infinities are measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

__all__ = [
    "EVENT_KINDS",
    "INTEGER_STATISTICS",
    "ROLES",
    "SCHEMA_VERSION",
    "SOURCES",
    "STATISTICS",
    "Event",
    "RecordError",
    "StepRecord",
    "TensorIdentity",
    "TensorStatistics",
]

SCHEMA_VERSION: Final = 1

ROLES: Final = (
    "input",
    "weight",
    "grad_output",
    "output",
    "grad_weight",
    "residual",
    "query",
    "key",
    "value",
    "attention_probs",
    "exp_avg",
    "exp_avg_sq",
    "master_weight",
    "grad_reduced",
    "weight_gathered",
)
"""What a tensor is in the step; the first three are the operands of a linear layer's GEMMs."""

EVENT_KINDS: Final = (
    "nonfinite",
    "checkpoint",
    "rollback",
    "lr_change",
    "data_switch",
    "restart",
    "end",
    "dropped",
    "monitor_error",
)
"""The kinds the service acts on; other kinds are stored and shown."""

SOURCES: Final = ("values", "codes", "history", "exact")
"""What a row's statistics were taken of: the high-precision tensor (null means it too), its FP8
codes, a history of amax alone, or Transformer Engine's own exact path."""

INTEGER_STATISTICS: Final = ("amax_rank", "top_channel", "nonfinite_count")

STATISTICS: Final = (
    "amax",
    "amax_rank",
    "rms",
    "kurtosis",
    "kurtosis_sequence_mean",
    "channel_kurtosis",
    "top_channel",
    "top_channel_share",
    "underflow_ratio",
    "subnormal_ratio",
    "overflow_ratio",
    "headroom_log2",
    "sqnr_db",
    "scale_log2",
    "scale_log2_max",
    "mu",
    "zero_ratio",
    "nonfinite_count",
    "min_nonzero",
    "scale_log2_p01",
    "scale_log2_p50",
    "scale_log2_p99",
)
"""Names of the statistics in column order; formulas in `foreshock.monitor.record.sums`."""


class RecordError(ValueError):
    """A record breaks the contract.

    Attributes:
        index: Position of the record in its batch, or None when the batch as a whole is at fault.
        reason: What is wrong and what would be right.
    """

    def __init__(self, reason: str, index: int | None = None) -> None:
        self.index = index
        self.reason = reason
        super().__init__(reason if index is None else f"record {index}: {reason}")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened at one step, planned or not.

    Attributes:
        kind: One of `EVENT_KINDS`, or the user's own word.
        micro_batch: 0-based micro-batch within the step, if known.
        layer: Qualified module name, if the event belongs to one.
        role: Tensor role, if the event belongs to one.
        rank: Global rank that saw it.
        detail: One line for a person.
    """

    kind: str
    micro_batch: int | None = None
    layer: str | None = None
    role: str | None = None
    rank: int | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class TensorIdentity:
    """Which tensor, and in which format, a row of statistics speaks of.

    Attributes:
        layer: Qualified module name.
        role: One of `ROLES`.
        format: A name in `foreshock.monitor.formats.FORMATS`.
        call_index: 0-based count of the module's calls within one forward pass.
        expert: Expert number, None outside mixtures of experts.
        granularity: What one scale covers: tensor, row or block.
        what_if: True for a format the run does not use.
    """

    layer: str
    role: str
    format: str
    call_index: int = 0
    expert: int | None = None
    granularity: str = "tensor"
    what_if: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorStatistics:
    """Statistics of one tensor at one step, merged over micro-batches and ranks.

    Every ratio is a share of the finite elements, in [0, 1]. Definitions: `TensorSums.statistics`.
    `source` is one of `SOURCES`; `exponents` has 256 counts by the biased float32 exponent of
    abs(x), of the finite non-zero elements.
    """

    identity: TensorIdentity
    numel: int
    observations: int = 1
    amax: float | None = None
    amax_rank: int | None = None
    rms: float | None = None
    kurtosis: float | None = None
    kurtosis_sequence_mean: float | None = None
    channel_kurtosis: float | None = None
    top_channel: int | None = None
    top_channel_share: float | None = None
    underflow_ratio: float | None = None
    subnormal_ratio: float | None = None
    overflow_ratio: float | None = None
    headroom_log2: float | None = None
    sqnr_db: float | None = None
    scale_log2: float | None = None
    scale_log2_max: float | None = None
    mu: float | None = None
    zero_ratio: float | None = None
    nonfinite_count: int | None = None
    min_nonzero: float | None = None
    scale_log2_p01: float | None = None
    scale_log2_p50: float | None = None
    scale_log2_p99: float | None = None
    source: str | None = None
    exponents: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """Everything logged about one optimizer step.

    Attributes:
        step: 0-based optimizer step.
        time: When the step ended; timezone-aware.
        scalars: loss, grad_norm (before clipping), learning_rate, tokens (cumulative), ...
        tensors: One entry per tensor and format; empty on steps off the cadence.
        events: What happened at this step.

    Raises:
        RecordError: step is negative, or time has no timezone.
    """

    step: int
    time: datetime
    scalars: Mapping[str, float] = field(default_factory=dict)
    tensors: tuple[TensorStatistics, ...] = ()
    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        if self.step < 0:
            raise RecordError(f"step is {self.step}; steps count from 0")
        if self.time.tzinfo is None:
            raise RecordError("time has no timezone; use datetime.now(timezone.utc)")
