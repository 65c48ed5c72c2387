"""How often, and how much of, tensors are measured so that watching stays inside a share of time.

Pure: costs in, plans out. The same costs give the same plan in every process.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Final

from foreshock.monitor.sampling import Cadence, Sampling

__all__ = ["Budget", "Plan", "PlanBook", "first_plan"]

_WINDOW: Final = 32
_FIRST_DECISION: Final = 4
_SLOWEST_CADENCE: Final = 100
_LONGEST_STRIDE: Final = 16
_FEWEST_TENSORS: Final = 0.1
# Aim below the bound: costs scatter, and a plan that is just inside would be changed all the time.
_AIM: Final = 0.8


@dataclass(frozen=True, slots=True)
class Plan:
    """When tensors are measured, and how much of them."""

    cadence: Cadence = field(default_factory=Cadence)
    sampling: Sampling = field(default_factory=Sampling)

    def __str__(self) -> str:
        """For an event."""
        text = f"every {self.cadence.tensor_every} steps"
        if self.sampling.row_stride > 1:
            text += f", one row in {self.sampling.row_stride}"
        if self.sampling.tensors < 1:
            text += f", {self.sampling.tensors:.0%} of the tensors"
        return text


def first_plan(cadence: Cadence, budget: float | None) -> Plan:
    """The plan to begin with.

    With a budget not every step is measured at first: what a step costs that is not measured must
    have been seen before anything is planned.
    """
    if budget is not None and cadence.tensor_every == 1:
        cadence = replace(cadence, tensor_every=2)
    return Plan(cadence)


class PlanBook:
    """Plans by the step from which they hold; written by the worker, read by the training."""

    def __init__(self, first: Plan) -> None:
        self._plans: tuple[tuple[int, Plan], ...] = ((0, first),)

    def at(self, step: int) -> Plan:
        """The plan in force at a step."""
        return next((p for start, p in reversed(self._plans) if start <= step), self._plans[0][1])

    def add(self, step: int, plan: Plan) -> None:
        """A plan from a step on; older ones are kept while a step may still ask for them."""
        # One assignment: the reader is another thread.
        self._plans = (*self._plans[-8:], (step, plan))


class Budget:
    """Finds a plan that keeps the cost within a share of the step time.

    Cost model: every step pays a fixed part (scalars), a measured one also a part proportional to
    what is read. The cadence is slowed first, up to every 100th step, then rows are sampled, then
    tensors.

    Args:
        share: Largest allowed cost as a share of the step time without it.
        plan: The plan to begin with; as `first_plan`, at which not every step is measured.

    Attributes:
        plan: The plan in force.
        expected: Cost share that it was chosen for.

    Raises:
        ValueError: share is not between 0 and 1.
    """

    def __init__(self, share: float, plan: Plan) -> None:
        if not 0 < share < 1:
            raise ValueError(f"budget is {share}; allowed: above 0 and below 1, e.g. 0.01 for 1 %")
        self.share = share
        self.plan = plan
        self.expected = 0.0
        self._fixed: deque[float] = deque(maxlen=_WINDOW)
        self._measured: deque[float] = deque(maxlen=_WINDOW)
        self._seconds: deque[float] = deque(maxlen=_WINDOW)

    def take(self, *, step_seconds: float, overhead_ratio: float, measured: bool) -> Plan | None:
        """One step's cost; a new plan when the old one does not fit any more.

        Args:
            step_seconds: Time of the step, the monitor's part included.
            overhead_ratio: The monitor's part over the rest.
            measured: Whether tensors were measured.
        """
        bare = step_seconds / (1 + overhead_ratio)
        self._seconds.append(bare)
        (self._measured if measured else self._fixed).append(step_seconds - bare)
        if len(self._measured) < _FIRST_DECISION or not self._fixed:
            return None
        plan = self._fit()
        if plan == self.plan or not self._worth(plan):
            return None
        self.expected = self._cost_of(plan)
        self.plan = plan
        self._measured.clear()
        return plan

    def _cost_of(self, plan: Plan) -> float:
        """Cost share of a plan, from the costs so far."""
        seconds, fixed, full = self._costs()
        part = plan.sampling.tensors / plan.sampling.row_stride
        return (fixed + full * part / plan.cadence.tensor_every) / seconds

    def _costs(self) -> tuple[float, float, float]:
        seconds = max(statistics.median(self._seconds), 1e-9)
        measured = statistics.median(self._measured)
        fixed = statistics.median(self._fixed)
        part = self.plan.sampling.tensors / self.plan.sampling.row_stride
        return seconds, min(fixed, measured), max(measured - fixed, 0.0) / part

    def _fit(self) -> Plan:
        seconds, fixed, full = self._costs()
        room = max(_AIM * self.share * seconds - fixed, 1e-12)
        # Reads per step that there is room for, at most one full read per step.
        wanted = max(full / room, 1.0)
        every = min(-(-wanted // 1), _SLOWEST_CADENCE)
        stride = min(max(-(-(wanted / every) // 1), 1), _LONGEST_STRIDE)
        tensors = min(max(every * stride / wanted, _FEWEST_TENSORS), 1.0)
        return Plan(
            replace(self.plan.cadence, tensor_every=int(every)),
            Sampling(round(tensors, 2), int(stride)),
        )

    def _worth(self, plan: Plan) -> bool:
        if self._cost_of(self.plan) > self.share:
            return True
        # Measuring more often is worth a change only if it is a good deal more often.
        old, new = self.plan, plan
        rate = new.sampling.tensors / new.sampling.row_stride / new.cadence.tensor_every
        had = old.sampling.tensors / old.sampling.row_stride / old.cadence.tensor_every
        return rate > 1.5 * had
