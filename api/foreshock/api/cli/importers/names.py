"""What other loggers call our scalars; and which of their columns is the step, which the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

from foreshock.api.cli.importers.points import ImportProblem

__all__ = ["Names", "parse_map"]

_STEP_NAMES: Final = (
    "step",
    "global_step",
    "train/global_step",
    "trainer/global_step",
    "_step",
    "iteration",
    "iter",
)
"""In order of preference: W&B's own `_step` counts log calls, so a trainer's counter goes first."""

_RUN_NAMES: Final = ("run", "run_id", "run_name")
_ALIASES: Final = {
    "loss": "loss",
    "train_loss": "loss",
    "training_loss": "loss",
    "lm_loss": "loss",
    "loss_metrics/global_avg_loss": "loss",
    "grad_norm": "grad_norm",
    "gradient_norm": "grad_norm",
    "global_grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "lr": "learning_rate",
    "lr-adamw": "learning_rate",
    "loss_scale": "loss_scale",
    "num_tokens": "tokens",
    "tokens": "tokens",
    "consumed_tokens": "tokens",
    "params_norm": "param_norm",
    "param_norm": "param_norm",
}
_HELD_OUT: Final = re.compile(r"(^|[/_.-])(eval|val|valid|validation|test|dev)([/_.-]|$)")
_TRAIN: Final = re.compile(r"^(train|training|trainer|optim|optimizer|metrics)[/.]")
_PLACES: Final = ("step", "run")


class Names:
    """Translates names of one log.

    Args:
        chosen: Our name to the log's, as given by the user; goes before all else.
    """

    def __init__(self, chosen: Mapping[str, str]) -> None:
        self._chosen = dict(chosen)
        self._of = {theirs: ours for ours, theirs in chosen.items() if ours not in _PLACES}

    def step(self, present: Iterable[str]) -> str | None:
        """The log's name of the step, or None."""
        return self._chosen.get("step") or _first(_STEP_NAMES, present)

    def run(self, present: Iterable[str]) -> str | None:
        """The log's name of what tells runs apart, or None."""
        return self._chosen.get("run") or _first(_RUN_NAMES, present)

    def of(self, theirs: str) -> str:
        """Our name; the log's own for what we have no name for."""
        if theirs in self._of:
            return self._of[theirs]
        plain = theirs.strip().lower().replace(" ", "_")
        if _HELD_OUT.search(plain):
            return theirs
        ours = _ALIASES.get(plain) or _ALIASES.get(_TRAIN.sub("", plain)) or theirs
        # A name that the user took for something else is nobody else's.
        return theirs if ours in self._chosen else ours

    def of_all(self, theirs: Iterable[str]) -> dict[str, str]:
        """Names of a whole log; of two that mean the same, the first keeps our name."""
        found: dict[str, str] = {}
        for name in theirs:
            ours = self.of(name)
            found[name] = name if ours in found.values() else ours
        return found

    def check(self, present: Iterable[str]) -> None:
        """Refuse a name the user gave that the log does not have.

        Raises:
            ImportProblem: Says which, and what there is.
        """
        known = list(present)
        for ours, theirs in self._chosen.items():
            if theirs not in known:
                shown = ", ".join(known[:12])
                raise ImportProblem(f"--map {ours}={theirs}: no such name; the log has {shown}")


def _first(wanted: Iterable[str], present: Iterable[str]) -> str | None:
    lower = {name.lower(): name for name in reversed(list(present))}
    return next((lower[name] for name in wanted if name in lower), None)


def parse_map(items: Iterable[str]) -> dict[str, str]:
    """`loss=Train/Loss` items as a mapping.

    Raises:
        ImportProblem: An item has no `=` or a name stands twice.
    """
    chosen: dict[str, str] = {}
    for item in items:
        ours, equals, theirs = item.partition("=")
        if not (equals and ours and theirs):
            raise ImportProblem(f"--map {item}: write it as NAME=THEIRS, such as loss=Train/Loss")
        if ours in chosen:
            raise ImportProblem(f"--map {ours} stands twice")
        if theirs in chosen.values():
            raise ImportProblem(f"--map: {theirs} is given two names")
        chosen[ours] = theirs
    return chosen
