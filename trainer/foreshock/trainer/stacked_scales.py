"""All scales of a stack of models in one place, advanced together once per step.

What `Scaling` does tensor by tensor in a dozen small operations, done for all tensors in the same
dozen: on a device the number of operations is what they cost. State stays where it is in memory, so
that a CUDA graph may hold its addresses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foreshock.trainer.precision.scaling import Scaling, scale_of

__all__ = ["StackedScales"]


class StackedScales:
    """Takes over the scale states of a model.

    Args:
        model: A stack, lead = (E,); each of its `Scaling` casts one tensor a step. Their buffers
            become views of this object's.

    Attributes:
        scalings: Those taken over, in the order of the rows below.
        scale: Next scales, float32 (R, E).
        history: Amax values, newest first, float32 (R, E, longest history).
        valid: Which of them count, bool (R, E, longest history).
        lengths: How many of them that is, int64 (R, E).
    """

    def __init__(self, model: nn.Module) -> None:
        self.scalings = tuple(m for m in model.modules() if isinstance(m, Scaling))
        if not self.scalings:
            return
        self.scale = torch.stack([s.scale for s in self.scalings])
        self.history = torch.stack([s.history for s in self.scalings])
        self.valid = torch.stack([s.valid for s in self.scalings])
        self.lengths = self.valid.sum(-1)
        self._gain = torch.stack([s.gain for s in self.scalings])
        self._current = torch.stack([s.current for s in self.scalings])
        self._any_delayed = not bool(self._current.all())
        self._hit: Tensor | None = None
        for row, scaling in enumerate(self.scalings):
            scaling.scale, scaling.history = self.scale[row], self.history[row]
            scaling.defer()

    def rows_of(self, scalings: Sequence[Scaling]) -> list[int]:
        """Rows of some of them."""
        rows = {id(scaling): row for row, scaling in enumerate(self.scalings)}
        return [rows[id(scaling)] for scaling in scalings]

    def hold(self, hit: Tensor | None) -> None:
        """Which scales a fault keeps where they are in this step, bool (R, E); None for none."""
        self._hit = hit

    def limit_history(self, lengths: Tensor) -> None:
        """How many of the newest amax values count from now on, int64 (R, E)."""
        positions = torch.arange(self.history.shape[-1], device=self.history.device)
        torch.lt(positions, lengths.unsqueeze(-1), out=self.valid)

    @torch.no_grad()
    def advance(self) -> None:
        """Let every state see the amax of its cast; once after each backward pass."""
        if not self.scalings:
            return
        used = torch.stack([scaling.used for scaling in self.scalings])
        following = used
        if self._any_delayed:
            amax = torch.stack([_seen(scaling) for scaling in self.scalings])
            shifted = torch.cat((amax.unsqueeze(-1), self.history[..., :-1]), -1)
            self.history.copy_(shifted.masked_fill_(~self.valid, 0.0))
            following = scale_of(self.history.amax(-1), self._gain, self.scale)
            following = torch.where(self._current, used, following)
        if self._hit is not None:
            following = torch.where(self._hit, self.scale, following)
        self.scale.copy_(following)

    def used(self, scalings: Sequence[Scaling]) -> Tensor:
        """Scales of the latest casts, float32 (len(scalings), E)."""
        return torch.stack([scaling.used for scaling in scalings])


def _seen(scaling: Scaling) -> Tensor:
    if scaling.seen is None:
        raise ValueError("a scale was not used in this step: the model leaves a layer out")
    return scaling.seen
