"""When a step is taken: hooks on the optimizers. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["OptimizerHooks"]


class OptimizerHooks:
    """Tells when each optimizer is about to step, and when the last of them has.

    Args:
        optimizers: The last one's step ends the training's.
        before: Called before each optimizer's step, with whether it is another try at a step that
            raised, or a step within a step.
        after: Called after the last optimizer's step.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        before: Callable[[torch.optim.Optimizer, bool], None],
        after: Callable[[], None],
    ) -> None:
        self._before, self._after = before, after
        # By identity: whose step has begun and not ended.
        self._stepping: set[int] = set()
        self._handles = [o.register_step_pre_hook(self._begins) for o in optimizers]
        self._handles.append(optimizers[-1].register_step_post_hook(self._ends))

    def __bool__(self) -> bool:
        """Whether they are still there."""
        return bool(self._handles)

    def detach(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begins(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        again = id(optimizer) in self._stepping
        self._stepping.add(id(optimizer))
        self._before(optimizer, again)

    def _ends(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        # A `step` that calls its base class's is told of twice, and is one.
        if id(optimizer) in self._stepping:
            self._stepping.clear()
            self._after()
