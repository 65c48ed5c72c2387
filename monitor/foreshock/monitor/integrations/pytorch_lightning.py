"""Lightning under its older name: `Trainer(callbacks=[ForeshockCallback(run="...")])`."""

from __future__ import annotations

from foreshock.monitor.integrations.lightning_hooks import LightningHooks

try:
    from pytorch_lightning.callbacks import Callback
except ModuleNotFoundError as error:
    raise ImportError(
        "foreshock.monitor.integrations.pytorch_lightning needs pytorch_lightning: "
        "pip install pytorch_lightning"
    ) from error

__all__ = ["ForeshockCallback"]


class ForeshockCallback(LightningHooks, Callback):  # type: ignore[misc]
    """Watches a fit; see `LightningHooks` for its arguments."""
