"""The optimizer's tensors: gradients as it gets them, moments, master weights, what it gathers.

An optimizer that casts them (`ObservableStates`) shows them itself, before the cast and with its
scales; of any other they are read as they lie, when the user asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import nn

from foreshock.monitor.collector import Collector
from foreshock.monitor.containment import Containment
from foreshock.monitor.operands import DTYPE_FORMATS, ObservableStates, Operand

__all__ = ["OptimizerTensors"]

_ROLES: Final = ("exp_avg", "exp_avg_sq", "master_weight")


class OptimizerTensors:
    """Measures what optimizers keep, at steps in which the collector measures.

    The names of states that are read are those by which torch's and Apex's Adam keep them; an
    optimizer without them gives no rows.

    Args:
        optimizers: Of the training.
        names: Trained parameters by name.
        collector: Takes the tensors.
        guard: Around what an optimizer calls.
        read: Whether to read states of optimizers that do not show them.
    """

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        names: Mapping[nn.Parameter, str],
        collector: Collector,
        guard: Containment,
        *,
        read: bool,
    ) -> None:
        self._names, self._collector, self._guard = names, collector, guard
        self._showing = [o for o in optimizers if isinstance(o, ObservableStates)]
        shown = {id(o) for o in self._showing}
        self._read = [o for o in optimizers if id(o) not in shown] if read else []
        for optimizer in self._showing:
            optimizer.observe_with(self._shown)

    def detach(self) -> None:
        """Look at nothing more."""
        for optimizer in self._showing:
            optimizer.observe_with(None)
        self._read = []

    def gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradients that one optimizer is about to use, clipped if the loop clips."""
        if not (self._collector.measuring and any(optimizer is one for one in self._read)):
            return
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            gradient = parameter.grad
            if gradient is not None and not gradient.is_sparse:
                self._observe(parameter, "grad_weight", gradient, None)

    def moments(self) -> None:
        """Measure the state of each parameter."""
        for parameter in self._names if self._read and self._collector.measuring else ():
            states = [optimizer.state.get(parameter) for optimizer in self._read]
            state: Mapping[str, object] = next(filter(None, states), {})
            for role in _ROLES:
                value = state.get(role)
                if isinstance(value, torch.Tensor) and value.ndim and value.is_floating_point():
                    self._observe(parameter, role, value, None)

    def _shown(
        self,
        parameter: nn.Parameter,
        role: str,
        x: torch.Tensor,
        operand: Operand,
        mu: torch.Tensor | None,
    ) -> None:
        if self._collector.measuring:
            with self._guard:
                self._observe(parameter, role, x, operand, mu)

    def _observe(
        self,
        parameter: nn.Parameter,
        role: str,
        x: torch.Tensor,
        operand: Operand | None,
        mu: torch.Tensor | None = None,
    ) -> None:
        name = self._names.get(parameter)
        if name is None:
            return
        cast = operand or Operand(DTYPE_FORMATS.get(x.dtype, "fp32"), None)
        self._collector.observe(name.removesuffix(".weight"), role, x, cast, mu=mu)
