"""`foreshock.api.signals.summarise` on the device of a stack, in torch.

Only `foreshock sweep` needs it, and only the command line may know both halves: the signals are the
service's, the tensors the trainer's. The numpy version is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from foreshock.api.signals import (
    FLOORS,
    FOLD_STATISTICS,
    FOLDS,
    LIMIT,
    SIGNAL_ROLES,
    SIGNALS,
    TENSOR_SIGNALS,
    summarise,
)
from foreshock.monitor.record import TensorIdentity
from foreshock.trainer.stacked_device import SCALARS, StackWindow
from foreshock.trainer.stacked_sums import STATISTICS

__all__ = ["fold_on_device", "signals_of"]

FloatArray = npt.NDArray[np.float32]


def fold_on_device(identities: Sequence[TensorIdentity]) -> Callable[[Tensor], Tensor]:
    """What makes `TENSOR_SIGNALS` of a stack's statistics, without a word to the host.

    Args:
        identities: One per row of the statistics.

    Returns:
        Of (E, len(STATISTICS), rows), NaN = not measured, float64 (E, len(TENSOR_SIGNALS)).
    """
    rows = [[i for i, t in enumerate(identities) if t.role == role] for role in SIGNAL_ROLES]
    wanted = [STATISTICS.index(name) for name in FOLD_STATISTICS]
    counted = STATISTICS.index("nonfinite_count")

    def fold(statistics: Tensor) -> Tensor:
        bad = (statistics[:, counted] > 0).double().mean(-1, keepdim=True)
        parts = [bad]
        for of_role in rows:
            begin, step = of_role[0], of_role[1] - of_role[0] if len(of_role) > 1 else 1
            chosen = statistics[:, :, begin : of_role[-1] + 1 : step]
            scaled = torch.stack(
                [
                    _scaled(chosen[:, place], floor)
                    for place, floor in zip(wanted, FLOORS, strict=True)
                ],
                1,
            )
            parts.append(_folded(scaled))
        return torch.cat(parts, -1)

    return fold


def _scaled(values: Tensor, floor: float | None) -> Tensor:
    if floor is not None:
        values = (values.clamp(min=0.0) + floor).log2()
    return values.clamp(-LIMIT, LIMIT)


def _folded(values: Tensor) -> Tensor:
    """(E, statistics, rows) into (E, signals of one role): NaN sorts last."""
    ordered = values.sort(-1).values
    last = ((~ordered.isnan()).sum(-1, keepdim=True) - 1).clamp(min=0)

    def at(index: Tensor) -> Tensor:
        return ordered.gather(-1, index)[..., 0]

    found = {
        "min": ordered[..., 0],
        "max": at(last),
        "median": (at(last // 2) + at((last + 1) // 2)) / 2,
    }
    return torch.stack([found[how][:, i] for i, folds in enumerate(FOLDS) for how in folds], -1)


def signals_of(
    window: StackWindow,
) -> tuple[FloatArray, FloatArray]:
    """Signals (steps, E, len(SIGNALS)) and losses as they came (steps, E) of a window."""
    named = {name: window.scalars[:, index] for index, name in enumerate(SCALARS)}
    scalars = summarise(None, None, named)[..., : len(SIGNALS) - len(TENSOR_SIGNALS)]
    signals = np.concatenate((scalars.astype(np.float32), window.folded), -1)
    return signals, named["loss"]
