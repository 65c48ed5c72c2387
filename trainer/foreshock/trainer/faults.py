"""Named, reproducible ways to break a run.

Only what a fault is, and what it does at a step, stands here. The schedule, the data and the FP8
linears ask it; nothing in a record says that there was one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["BadBatch", "Fault", "LearningRateRamp", "OutlierRamp", "ScaleFault"]


def _check_growth(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}; allowed: a finite number above 0")


def _grown(growth: float, steps: int, limit: float) -> float:
    """growth^steps, held at `limit`, without overflowing a float on the way."""
    if growth > 1 and steps * math.log(growth) > math.log(limit):
        return limit
    return float(growth**steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateRamp:
    """From `start` on, the learning rate grows by `factor` a step, to at most `limit` times.

    Attributes:
        until: From this step on it is again what the schedule says; 0 for never.
    """

    start: int
    factor: float = 1.03
    limit: float = 1e4
    # As `config.later`: no part of a fingerprint while at its default.
    until: int = field(default=0, metadata={"later": True})

    def __post_init__(self) -> None:
        _check_growth("factor", self.factor)
        _check_growth("limit", self.limit)

    def multiplier(self, step: int) -> float:
        """What the schedule's learning rate is multiplied by at `step`."""
        if step < self.start or 0 < self.until <= step:
            return 1.0
        return _grown(self.factor, step - self.start + 1, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleFault:
    """From `start` on, scales no longer follow the amax.

    Attributes:
        growth: Each step multiplies the scale by it; 1 freezes the scale, above 1 it saturates
            more and more, below 1 it flushes more and more to zero.
        roles: Operands hit: of input, weight, grad_output.
        layers: Substring of the qualified layer names hit; empty hits all.
        stale_inverse: The GEMM's result is still divided by the scale of before the fault, as when
            a buffer update is lost: operands come out `growth` times too large each step, up to
            the amax of before. False keeps scale and inverse in step.
    """

    start: int
    growth: float = 1.0
    roles: tuple[str, ...] = ("input", "weight", "grad_output")
    layers: str = ""
    stale_inverse: bool = False

    def __post_init__(self) -> None:
        _check_growth("growth", self.growth)
        unknown = set(self.roles) - {"input", "weight", "grad_output"}
        if unknown or not self.roles:
            raise ValueError(f"roles is {self.roles}; allowed: some of input, weight, grad_output")

    def hits(self, layer: str, role: str) -> bool:
        """Whether this operand of this layer (qualified name) is one of those hit."""
        return self.layers in layer and role in self.roles

    def scale_factor(self, step: int) -> float | None:
        """What the scale of before `start` is multiplied by; None while the scale is whole.

        It stays within 2^-60 to 2^60, so that the scale itself remains a finite float32.
        """
        if step < self.start:
            return None
        return max(2.0**-60, _grown(self.growth, step - self.start + 1, 2.0**60))


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierRamp:
    """From `start` on, one channel of layer inputs grows, under an amax history cut short.

    The weights' column is divided by what the channel is multiplied by: in exact arithmetic
    nothing changes, so all harm is done by the scales.

    Attributes:
        growth: The channel's factor grows by it a step.
        limit: Largest factor.
        layer: Substring of the qualified names of the layers hit; empty hits all.
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

    def __post_init__(self) -> None:
        _check_growth("growth", self.growth)
        _check_growth("limit", self.limit)
        if self.period < 1 or self.history < 1 or self.channel < 0:
            raise ValueError("period and history must be 1 or more, channel 0 or more")

    def hits(self, layer: str) -> bool:
        """Whether the input of this layer (qualified name) is one of those hit."""
        return self.layer in layer

    def history_at(self, step: int, configured: int) -> int:
        """Length of the amax history of the layer at `step`."""
        return configured if step < self.start else min(configured, self.history)

    def channel_factor(self, step: int) -> float:
        """What the channel is multiplied by at `step`; 1 when the outlier is absent."""
        since = step - self.start
        if since < 0 or since % self.period:
            return 1.0
        return _grown(self.growth, since + 1, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadBatch:
    """For `duration` steps from `start`, the batches are broken.

    Attributes:
        kind: noise (uniform random bytes), constant (one byte repeated) or shuffled (the bytes of
            each sequence in random order, so that no target follows from what stands before it).
        gain: The loss of these steps is multiplied by it (a data bug that mis-weights a loss).
    """

    start: int
    duration: int = 8
    kind: Literal["noise", "constant", "shuffled"] = "noise"
    gain: float = 1.0

    def __post_init__(self) -> None:
        _check_growth("gain", self.gain)
        if self.kind not in ("noise", "constant", "shuffled"):
            raise ValueError(f"kind is {self.kind!r}; allowed: noise, constant, shuffled")
        if self.duration < 1:
            raise ValueError(f"duration is {self.duration}; allowed: 1 or more")

    def active(self, step: int) -> bool:
        """Whether the batch of `step` is broken."""
        return self.start <= step < self.start + self.duration

    def loss_gain(self, step: int) -> float:
        """What the loss is multiplied by at `step`, before the gradient is taken."""
        return self.gain if self.active(step) else 1.0


Fault = LearningRateRamp | ScaleFault | OutlierRamp | BadBatch
