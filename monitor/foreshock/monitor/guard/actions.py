"""What a guard can do, as plain data: what is decided is sent to all processes and recorded."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "Action",
    "Advise",
    "Forget",
    "LimitRate",
    "MarkGood",
    "Rescale",
    "RollBack",
    "TakeSnapshot",
    "UseBf16",
    "UseFp8",
    "quiet",
]


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """Keep the training's state as it is now; `step` is the first that is not yet taken."""

    step: int

    def __str__(self) -> str:
        return f"snapshot before step {self.step}"


@dataclass(frozen=True, slots=True)
class MarkGood:
    """The snapshot before this step is known-good."""

    step: int

    def __str__(self) -> str:
        return f"the snapshot before step {self.step} is known-good"


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the snapshots before these steps."""

    steps: tuple[int, ...]

    def __str__(self) -> str:
        return f"drop the snapshots before steps {', '.join(map(str, self.steps))}"


@dataclass(frozen=True, slots=True)
class LimitRate:
    """The learning rate is at most `ceiling` from now on; None lifts the limit.

    Attributes:
        ceiling: Absolute, not a factor.
        told: False for the many small steps of a return.
    """

    ceiling: float | None
    told: bool = True

    def __str__(self) -> str:
        if self.ceiling is None:
            return "the learning rate is the schedule's again"
        return f"learning rate at most {self.ceiling:.3g}"


@dataclass(frozen=True, slots=True)
class Rescale:
    """Give the scales of layers (glob patterns of qualified names) a margin and a longer history.

    Attributes:
        margin: In powers of two.
        history: Amax history in steps.
    """

    layers: tuple[str, ...]
    margin: int
    history: int

    def __str__(self) -> str:
        return f"margin {self.margin}, amax history {self.history} for {_named(self.layers)}"


@dataclass(frozen=True, slots=True)
class UseBf16:
    """Compute layers (glob patterns of qualified names) in bfloat16."""

    layers: tuple[str, ...]

    def __str__(self) -> str:
        return f"bfloat16 for {_named(self.layers)}"


@dataclass(frozen=True, slots=True)
class UseFp8:
    """Compute them in FP8 again."""

    layers: tuple[str, ...]

    def __str__(self) -> str:
        return f"FP8 again for {_named(self.layers)}"


@dataclass(frozen=True, slots=True)
class RollBack:
    """Go back to a snapshot.

    Attributes:
        to: First step to take again.
        skip: Steps of data to leave out from there on; 0 trains on the same data again.
    """

    to: int
    skip: int = 0

    def __str__(self) -> str:
        skipped = f", skipping the data of {self.skip} steps" if self.skip else ""
        return f"roll back to before step {self.to}{skipped}"


@dataclass(frozen=True, slots=True)
class Advise:
    """Nothing is done, and this is why."""

    text: str

    def __str__(self) -> str:
        return self.text


Action = (
    TakeSnapshot | MarkGood | Forget | LimitRate | Rescale | UseBf16 | UseFp8 | RollBack | Advise
)


def quiet(action: Action) -> bool:
    """Whether an action is housekeeping that no record needs to tell."""
    return isinstance(action, TakeSnapshot | Forget | MarkGood) or (
        isinstance(action, LimitRate) and not action.told
    )


def _named(layers: tuple[str, ...]) -> str:
    return "all layers" if layers == ("*",) else ", ".join(layers)
