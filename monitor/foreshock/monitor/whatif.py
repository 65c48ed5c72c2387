"""What another number format would have done to a tensor, under current scaling.

Pure functions over tensors: which formats a user can ask for, and one row of sums for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Final

import torch

from foreshock.monitor.blocks import block_sums, independent_sums

__all__ = ["WHAT_IF_FORMATS", "known_formats", "what_if_of", "what_if_rows"]

WHAT_IF_FORMATS: Final = MappingProxyType(
    {
        "e4m3": ("e4m3", "tensor"),
        "e5m2": ("e5m2", "tensor"),
        "mxfp8": ("mxfp8_e4m3", "block"),
        "block128": ("block128_e4m3", "block"),
        "nvfp4": ("nvfp4", "block"),
    }
)
"""The user's word to the format and the granularity in records."""

WhatIfRow = tuple[str, str, torch.Tensor, torch.Tensor | None]
"""Format, granularity, sums, and counts of block-scale exponents (None: one scale per tensor)."""


def known_formats(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        ValueError: One is unknown; the message lists the known ones.
        TypeError: It is a single string.
    """
    if isinstance(names, str):
        raise TypeError(f"what_if is a list of formats, such as [{names!r}]")
    for name in names:
        if name not in WHAT_IF_FORMATS:
            known = ", ".join(WHAT_IF_FORMATS)
            raise ValueError(f"unknown what_if format {name!r}; known formats: {known}")
    return tuple(dict.fromkeys(names))


def what_if_of(formats: Sequence[str]) -> Callable[[torch.Tensor, str], list[WhatIfRow]] | None:
    """`what_if_rows` in these formats; None for none."""
    return partial(what_if_rows, formats=known_formats(formats)) if formats else None


def what_if_rows(
    x: torch.Tensor, role: str, formats: Sequence[str], *, independent: torch.Tensor | None = None
) -> list[WhatIfRow]:
    """Sums of x under each format's cast.

    The rows hold all fields. That a record shows only those that depend on the format is for
    `TensorSums.statistics(what_if=True)` to see to.

    Args:
        x: A floating tensor.
        role: Its role; weights have square blocks in block128.
        formats: Keys of `WHAT_IF_FORMATS`.
        independent: The first row of `packed_sums(x, ...)`, where it is known; else one more pass.

    Raises:
        ValueError: As `known_formats`, or x is not floating.
    """
    wanted = [WHAT_IF_FORMATS[name] for name in known_formats(formats)]
    if not wanted:
        return []
    if independent is None:
        independent = independent_sums(x)
    rows: list[WhatIfRow] = []
    for format, granularity in wanted:
        row, scales = block_sums(
            x,
            format=format,
            granularity=granularity,
            weight=role == "weight",
            independent=independent,
        )
        rows.append((format, granularity, row, None if granularity == "tensor" else scales))
    return rows
