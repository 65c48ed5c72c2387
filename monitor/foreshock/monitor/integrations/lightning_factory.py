"""What Lightning finds by itself where foreshock is installed: entry points, one per name.

They give a callback only where FORESHOCK_RUN names a run; installing changes nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foreshock.monitor.integrations.lightning_hooks import LightningHooks

__all__ = ["lightning_callbacks", "pytorch_lightning_callbacks"]


def lightning_callbacks() -> list[LightningHooks]:
    """For `lightning.pytorch.Trainer`."""
    if not os.environ.get("FORESHOCK_RUN"):
        return []
    from foreshock.monitor.integrations.lightning import ForeshockCallback

    return [ForeshockCallback(attached_by_itself=True)]


def pytorch_lightning_callbacks() -> list[LightningHooks]:
    """For `pytorch_lightning.Trainer`."""
    if not os.environ.get("FORESHOCK_RUN"):
        return []
    from foreshock.monitor.integrations.pytorch_lightning import ForeshockCallback

    return [ForeshockCallback(attached_by_itself=True)]
