"""What a guard may do, when, and how often.

The ladder, from what costs nothing to what costs steps: keep snapshots and mark those that stayed
well as known-good; take one more when the risk rises; on a forecast lower the learning rate or give
layers more margin, then bfloat16; once the loss itself rises, roll back to a known-good snapshot.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

__all__ = ["GuardPolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardPolicy:
    """When to act and how far.

    Durations count optimizer steps that were taken, so that steps taken twice count twice.

    Attributes:
        advise: Say what would be done and do nothing.
        snapshot_every: Steps between two snapshots while the risk is low.
        keep_snapshots: How many are held at most; the older, the further apart.
        good_after: A snapshot is known-good once the risk stayed low for so many steps after it.
        good_loss_rise: A snapshot whose loss (median of 16 steps) stands more than so many nats,
            and its noise, over the best so far is not known-good: a slow drift had begun.
        act_on_forecast: Act on a firing forecast, before the loss has risen; False only takes a
            snapshot then.
        rate_factor: The learning rate is lowered to this share of what it was at the known-good
            snapshot, once for each time that trouble comes back. Where the rate itself rose since
            then it is first set to what it was there.
        rate_rise: The rate counts as risen from this ratio on.
        rate_surge: From so many times its usual value on (that of a plateau) a rising rate is set
            back to it even while the risk is low; 0 never does. A restart of the schedule that is
            meant needs 0, or a policy of its own.
        update_most: The weights change at most by this share of their norm per step (mean of 24
            steps, and of the last 8); above it the rate is held and the run goes back to a snapshot
            from before. 0 never does.
        update_first: The rate is then held at what makes a first step of Adam, in which every
            element moves by the rate, this long.
        update_rise: From so many times the length in the run's good times on, where no rate of an
            earlier plateau explains it, steps are shortened by the rate; 0 never does.
        scale_records: Layers go to bfloat16 whose scales have not fitted for so many measured
            records in a row; 0 never does.
        scale_misfit: An amax of so many powers of two beyond the format's range does not fit.
        scale_sqnr: Nor does it unless the cast leaves less than so many dB.
        rate_hold: Steps for which it stays at what it was before a rise.
        rate_rest: Steps for which it stays at a share of what it was.
        rate_return: Growth per step of the limit afterwards, until it limits nothing. If trouble
            comes back meanwhile or soon after, the limit stays.
        margin: Powers of two that scales of suspected layers are lowered by, before bfloat16.
        history: Their amax history from then on, in steps.
        bf16_hold: Steps for which layers stay in bfloat16; doubled each time they go back to it.
        bf16_share: If more than this share of the layers is suspected, all go to bfloat16.
        roll_back: Allow rolling back.
        skip_extra: Steps of data skipped beyond the stretch that went bad.
        cooldown: Steps between two milder interventions.
        incident: Trouble within so many steps after a rollback is the same trouble come back: the
            next one goes to an older snapshot and adds every remedy.
        most_wasted: Steps that rollbacks may throw away in all; a snapshot further back than what
            is left of them is not gone back to.
        most_rollbacks: Of a run; afterwards the guard advises only.
        most_interventions: Of a run, rollbacks and others together, snapshots not counted.
    """

    advise: bool = False
    snapshot_every: int = 20
    keep_snapshots: int = 6
    good_after: int = 20
    good_loss_rise: float = 0.1
    act_on_forecast: bool = True
    rate_factor: float = 0.5
    rate_rise: float = 1.1
    rate_surge: float = 4.0
    update_most: float = 0.03
    update_first: float = 0.05
    update_rise: float = 2.5
    scale_records: int = 2
    scale_misfit: float = 1.0
    scale_sqnr: float = 12.0
    rate_hold: int = 1000
    rate_rest: int = 200
    rate_return: float = 1.02
    margin: int = 1
    history: int = 64
    bf16_hold: int = 1000
    bf16_share: float = 0.3
    roll_back: bool = True
    skip_extra: int = 16
    cooldown: int = 20
    incident: int = 150
    most_wasted: int = 1000
    most_rollbacks: int = 8
    most_interventions: int = 24

    def __post_init__(self) -> None:
        for name in (
            "snapshot_every",
            "keep_snapshots",
            "good_after",
            "rate_hold",
            "rate_rest",
            "history",
        ):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("margin", "skip_extra", "cooldown", "incident", "most_rollbacks"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("update_most", "update_rise", "scale_records", "scale_misfit", "most_wasted"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("update_first", self.update_first, self.update_first > 0, "above 0")
        for name in ("bf16_hold", "most_interventions"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        _check("good_loss_rise", self.good_loss_rise, self.good_loss_rise > 0, "above 0")
        _check("rate_factor", self.rate_factor, 0 < self.rate_factor < 1, "above 0 and below 1")
        _check("rate_rise", self.rate_rise, self.rate_rise > 1, "above 1")
        _check("rate_surge", self.rate_surge, self.rate_surge >= 0, "0 or more")
        _check("rate_return", self.rate_return, self.rate_return > 1, "above 1")
        _check("bf16_share", self.bf16_share, 0 <= self.bf16_share <= 1, "0 to 1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Make a policy of plain data, such as a YAML file holds; what is left out is the default.

        Raises:
            ValueError: A name is unknown, or a value has the wrong type or is not allowed.
        """
        known = {f.name: type(f.default) for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
                raise ValueError(f"a guard policy has no {name!r}{hint}")
            wanted = known[name]
            fits = isinstance(value, int | float) if wanted is float else type(value) is wanted
            if not fits or (wanted is float and isinstance(value, bool)):
                raise ValueError(f"{name} is {value!r}; allowed: a value of type {wanted.__name__}")
        return cls(**values)


def _check(name: str, value: object, fits: bool, allowed: str) -> None:
    if not fits:
        raise ValueError(f"{name} is {value}; allowed: {allowed}")
