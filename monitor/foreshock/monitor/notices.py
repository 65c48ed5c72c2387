"""What a watch says about what it can and cannot measure, each thing once.

Pure but for the log; knows no hooks and no tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Final

from foreshock.monitor.record import Event

__all__ = ["MOST_MICRO_BATCHES", "MOST_SKIPS", "Notices"]

_LOGGER = logging.getLogger("foreshock.monitor")

_WHICH_STEPS: Final = (
    "is it the one that steps? Otherwise close this watch and call watch with that one"
)

MOST_MICRO_BATCHES: Final = 1024
"""What is kept of a step is bounded by so many forward passes."""

MOST_SKIPS: Final = 32
"""More of them in a row than a GradScaler needs to find its scale are no skipped steps."""


class Notices:
    """Events of the kinds `not_measured`, `step_skipped` and `layers_added`.

    Args:
        rank: This process's global rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._told: set[tuple[str, str]] = set()
        self._said: set[str] = set()

    def skipped(self, tensors: Collection[tuple[str, str]]) -> list[Event]:
        """Tensors of which nothing can be said, as layer and role."""
        new = set(tensors) - self._told
        self._told |= new
        if not new:
            return []
        names = ", ".join(f"{role} of {layer}" for layer, role in sorted(new))
        return [self._event(f"no dense floating tensor that may be read: {names}")]

    def nothing_ran(self) -> list[Event]:
        """Gradients came and no layer was seen."""
        return self._once(
            "gradients came, but no watched layer ran in training mode; a model that is trained "
            "in evaluation mode is not measured: call model.train()"
        )

    def no_step(self) -> list[Event]:
        """Forward passes come and the optimizer never steps."""
        return self._once(
            f"{MOST_MICRO_BATCHES} forward passes without a step of the watched optimizer; "
            f"{_WHICH_STEPS}. What came since its last step is left out"
        )

    def uncovered(self, share: float, names: Sequence[str]) -> list[Event]:
        """Trained matrices that no watched layer uses.

        Args:
            share: Of the elements that are in watched layers.
            names: Of the others.
        """
        if not names:
            return []
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        return self._once(
            f"{share:.0%} of the elements of trained matrices are in layers that can be watched; "
            f"not {', '.join(names[:5])}{more}"
        )

    def skipped_step(self) -> list[Event]:
        """Gradients came and were thrown away, as after an overflow under a GradScaler."""
        detail = "its gradients were thrown away without a step of the optimizer"
        return [Event("step_skipped", rank=self._rank, detail=detail)]

    def all_skipped(self) -> list[Event]:
        """That goes on and on."""
        return self._once(
            f"{MOST_SKIPS} times in a row gradients were thrown away without a step of the "
            f"watched optimizer; {_WHICH_STEPS}"
        )

    def layers_added(self, names: Sequence[str]) -> list[Event]:
        """Layers that came after the watch."""
        if not names:
            return []
        return [Event("layers_added", rank=self._rank, detail=", ".join(names)[:500])]

    def _once(self, text: str) -> list[Event]:
        if text in self._said:
            return []
        self._said.add(text)
        _LOGGER.warning("not measured: %s", text)
        return [self._event(text)]

    def _event(self, text: str) -> Event:
        return Event("not_measured", rank=self._rank, detail=text[:500])
