"""Named, reproducible ways to break a run.

Only what a fault is stands here. The loop and the optimizer ask it; nothing in a record says that
there was one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BadBatch", "Fault", "LearningRateRamp", "OutlierRamp", "ScaleFault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateRamp:
    """From `start` on, the learning rate grows by `factor` a step, to at most `limit` times."""

    start: int
    factor: float = 1.03
    limit: float = 1e4

    def multiplier(self, step: int) -> float:
        """What the schedule's learning rate is multiplied by at `step`."""
        if step < self.start:
            return 1.0
        return float(min(self.limit, self.factor ** (step - self.start + 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleFault:
    """From `start` on, scales no longer follow the amax.

    Attributes:
        growth: Each step multiplies the scale by it; 1 freezes the scale, above 1 it saturates
            more and more, below 1 it flushes more and more to zero.
        roles: Operands hit: of input, weight, grad_output.
        layers: Substring of the qualified layer names hit; empty hits all.
    """

    start: int
    growth: float = 1.0
    roles: tuple[str, ...] = ("input", "weight", "grad_output")
    layers: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierRamp:
    """From `start` on, one channel of one layer's input grows, under an amax history cut short.

    Attributes:
        growth: The channel's factor grows by it a step.
        limit: Largest factor.
        layer: Qualified name of the linear layer whose input is hit.
        channel: Feature index.
        history: Amax history from `start` on; 1 with jumping outliers means stale scales.
        period: The outlier is present in one step of `period`, so that a short history forgets it.
    """

    start: int
    layer: str
    channel: int = 0
    growth: float = 1.05
    limit: float = 1e4
    history: int = 1
    period: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BadBatch:
    """For `duration` steps from `start`, the batches are broken.

    Attributes:
        kind: noise (uniform random bytes), constant (one byte repeated) or shuffled targets.
        gain: The loss of these steps is multiplied by it (a data bug that mis-weights a loss).
    """

    start: int
    duration: int = 8
    kind: str = "noise"
    gain: float = 1.0


Fault = LearningRateRamp | ScaleFault | OutlierRamp | BadBatch
