"""What a guard sees, remembers and concludes, as plain data.

Durations count observations (`GuardState.clock`), since step numbers go back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final, Self

from foreshock.monitor.guard.actions import Action
from foreshock.monitor.record import Risk, Suspect

__all__ = ["LEVEL_STEPS", "UPDATE_STEPS", "Decision", "GuardState", "Mark", "Seen"]

LEVEL_STEPS: Final = 16
"""Steps whose median is the level of the loss."""
UPDATE_STEPS: Final = 24
"""Steps whose mean length counts as lasting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One step, as the guard knows it.

    Attributes:
        step: Of the record that was scored.
        next_step: First step that the loop has not yet taken.
        risk: What the scorer said.
        loss: Of that step, None where not measured.
        rate: Learning rate that the schedule asks for; None if unknown.
        suspect: Likeliest cause; None without a diagnosis.
        update: Update ratio of that step, norm of the change over norm of the weights.
        used: Learning rate that it was made with; None if not recorded.
        misfits: Layers whose scales do not fit; None where the step measured no operand.
        layers: Number of layers with operands that were cast.
    """

    step: int
    next_step: int
    risk: Risk
    loss: float | None = None
    rate: float | None = None
    suspect: Suspect | None = None
    update: float | None = None
    used: float | None = None
    misfits: tuple[str, ...] | None = None
    layers: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """A snapshot that is held.

    Attributes:
        step: First step after it.
        at: Clock when it was taken.
        rate: Learning rate asked for then.
        level: Loss then, median of some steps; inf where unknown.
        allowed: Highest level that is no drift: the lowest until then, and some noise.
        good: Known-good.
        update: Mean length of the steps before it (update ratio), NaN where unknown or limited.
    """

    step: int
    at: int
    rate: float | None
    level: float
    allowed: float = math.inf
    good: bool = False
    update: float = math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardState:
    """All that a guard remembers.

    Attributes:
        clock: Observations so far.
        calm: Observations in a row without alarm.
        losses: The latest ones.
        best: Lowest level of the loss.
        marks: Snapshots held, oldest first.
        usual: Learning rate that two snapshots in a row agreed on last; None in a first warm-up.
        highest: Highest rate of any plateau.
        updates: Lengths of the latest steps, since the rate was last limited.
        per_rate: Length over learning rate of the first step that was seen: of Adam's first step
            every element has the length of the rate.
        misfits: Layers whose scales do not fit, and for how many records in a row.
        wasted: Steps thrown away by rollbacks.
        ceiling: Limit of the learning rate in force.
        ceiling_base: The limit before it began to return.
        ceiling_until: Clock at which it begins to.
        released: Clock at which it was lifted.
        in_bf16: Patterns of layers that the guard moved to bfloat16.
        bf16_until: Clock at which they go back.
        bf16_times: How often they were moved.
        rescaled: Whether scales have their margin.
        acted: Clock of the latest intervention.
        rolled: Clock of the latest rollback.
        target: Step that it went to.
        attempts: Rollbacks within the present incident.
        rollbacks: In all.
        interventions: In all.
        exhausted: Whether it was said that the limits are reached.
    """

    clock: int = 0
    calm: int = 0
    losses: tuple[float, ...] = ()
    best: float = math.inf
    marks: tuple[Mark, ...] = ()
    usual: float | None = None
    highest: float | None = None
    updates: tuple[float, ...] = ()
    per_rate: float | None = None
    misfits: tuple[tuple[str, int], ...] = ()
    wasted: int = 0
    ceiling: float | None = None
    ceiling_base: float | None = None
    ceiling_until: float = 0
    released: int | None = None
    in_bf16: tuple[str, ...] = ()
    bf16_until: float = 0
    bf16_times: int = 0
    rescaled: bool = False
    acted: int | None = None
    rolled: int | None = None
    target: int | None = None
    attempts: int = 0
    rollbacks: int = 0
    interventions: int = 0
    exhausted: bool = False

    @classmethod
    def begun(cls, step: int) -> Self:
        """With the snapshot from before the first step, which is as good as the run began."""
        return cls(marks=(Mark(step, 0, None, math.inf, good=True),))

    def since(self, clock: int | None) -> float:
        """Observations since then; infinite if it never was."""
        return math.inf if clock is None else self.clock - clock

    @property
    def level(self) -> float:
        """Median of the latest losses; inf before there are enough."""
        return median(self.losses) if len(self.losses) == LEVEL_STEPS else math.inf

    @property
    def noise(self) -> float:
        """Sigma of the latest losses, of their differences so that no trend counts."""
        if len(self.losses) < LEVEL_STEPS:
            return 0.0
        jumps = [abs(b - a) for a, b in pairwise(self.losses)]
        return 1.4826 * median(jumps) / math.sqrt(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, in order, and why.

    Attributes:
        state: To go on with.
        actions: Often none.
        why: One sentence; empty without actions that need one.
    """

    state: GuardState
    actions: tuple[Action, ...] = ()
    why: str = ""
