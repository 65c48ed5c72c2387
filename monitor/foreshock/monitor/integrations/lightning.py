"""Lightning: `Trainer(callbacks=[ForeshockCallback(run="...")])`."""

from __future__ import annotations

from foreshock.monitor.integrations.lightning_hooks import LightningHooks

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError as error:
    raise ImportError(
        "foreshock.monitor.integrations.lightning needs lightning: pip install lightning"
    ) from error

__all__ = ["ForeshockCallback"]


class ForeshockCallback(LightningHooks, Callback):  # type: ignore[misc]
    """Watches a fit; see `LightningHooks` for its arguments."""
