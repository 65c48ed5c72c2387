"""What a backend needs, and errors that say what is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from foreshock.trainer.config import PrecisionConfig

__all__ = ["check_alone", "require_block_products", "require_transformer_engine"]


def check_alone(precision: Sequence[PrecisionConfig]) -> None:
    """Raise a ValueError if this is a stack: its backends are bf16 and emulated."""
    if len(precision) > 1:
        names = sorted({p.backend for p in precision})
        raise ValueError(
            f"a stack trains with backend bf16 or emulated, not {', '.join(names)}: train such "
            "runs alone"
        )


def require_block_products(*sizes: int) -> None:
    """Raise a ValueError unless a device of this process multiplies blocks of 128.

    Args:
        sizes: Of the layer: blocks must fill them.
    """
    able = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    if not able or cuda < (12, 9):
        raise ValueError(
            "scaling block128 on the native backend needs a device of compute capability 9.0 "
            "(Hopper) and a torch for CUDA 12.9 or newer; allowed here: delayed, current, rowwise, "
            "or the emulated backend"
        )
    if any(size % 128 for size in sizes):
        raise ValueError(
            f"scaling block128 on the native backend needs sizes that are multiples of 128, not "
            f"{' x '.join(map(str, sizes))}; take rowwise, or the emulated backend"
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
