"""The loop's GradScaler: by what the loss, and so every gradient, is multiplied in a step."""

from __future__ import annotations

import torch

from foreshock.monitor.scalars import Norms, Value, one_value

__all__ = ["LossScale"]


class LossScale:
    """Reads a GradScaler and changes nothing of it; no value is waited for.

    Args:
        scaler: None, or one that is not enabled, scales nothing.

    Attributes:
        value: The scale of the step in progress; None without one.

    Raises:
        TypeError: It is something else.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(
                f"scaler is a {type(scaler).__name__}; watch needs a torch.amp.GradScaler"
            )
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.value: Value | None = None

    def start_step(self) -> None:
        """The first forward pass of a step begins: the scale is that of the whole step."""
        if self._scaler is not None:
            # `get_scale` would wait for the device. Before the first loss there is no tensor yet.
            scale = self._scaler._scale
            self.value = self._scaler._init_scale if scale is None else one_value("scale", scale)

    def without(self, norms: Norms) -> Norms:
        """Norms of the gradients as they are without the scale."""
        if self.value is None:
            return norms
        return Norms(norms.names, tuple(vector / self.value for vector in norms.vectors))

    @staticmethod
    def overflow(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
        """Whether a fused optimizer leaves everything as it is: 1 or 0, or None where nobody says.

        Such a one is called by the scaler in any case, and told on the device.
        """
        found = getattr(optimizer, "found_inf", None)
        return found if isinstance(found, torch.Tensor) else None
