"""What a backend needs, and errors that say what is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from foreshock.trainer.config import PrecisionConfig

__all__ = ["check_alone", "require_transformer_engine"]


def check_alone(precision: Sequence[PrecisionConfig]) -> None:
    """Raise a ValueError if this is a stack: its backends are bf16 and emulated."""
    if len(precision) > 1:
        names = sorted({p.backend for p in precision})
        raise ValueError(
            f"a stack trains with backend bf16 or emulated, not {', '.join(names)}: train such "
            "runs alone"
        )


def require_transformer_engine() -> None:
    """Raise a ValueError that says what is missing for it, if anything is."""
    if not torch.cuda.is_available():
        raise ValueError(
            "precision.backend transformer_engine needs a CUDA device, and torch sees none; "
            "allowed here: bf16, emulated, native"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            "precision.backend transformer_engine needs Transformer Engine: "
            "pip install 'foreshock[te]', or take native"
        )
