"""Tensor statistics of a stack of models: the same definitions as for one, per model.

Measures the three operands of every linear layer; names no cause and writes no record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foreshock.monitor.formats import FORMATS
from foreshock.monitor.record import (
    FIELD_REDUCTIONS,
    StatisticColumns,
    TensorIdentity,
    TensorSums,
)
from foreshock.monitor.statistics import tensor_sums
from foreshock.trainer.config import PrecisionConfig
from foreshock.trainer.model import Decoder
from foreshock.trainer.precision import Fp8Linear, GemmLinear

__all__ = ["StackStatistics"]

_ROLES = ("input", "weight", "grad_output")
_FIELDS = tuple(FIELD_REDUCTIONS)


class StackStatistics:
    """Hooks on the linear layers of a stack that sum up their operands at chosen steps.

    Args:
        model: The stack.
        precision: Recipe of each model.

    Raises:
        ValueError: Scales cover rows or blocks, which only a single run measures.

    Attributes:
        identities: Layers in order, each with its input, weight and output gradient.
    """

    def __init__(self, model: Decoder, precision: Sequence[PrecisionConfig]) -> None:
        layers = model.linears()
        for name, layer in layers.items():
            covered = layer.operand("input").granularity
            if covered != "tensor":
                raise ValueError(f"{name} has scales per {covered}: such runs train one by one")
        self.identities = tuple(
            TensorIdentity(layer=name, role=role, format=layer.operand(role).format)
            for name, layer in layers.items()
            for role in _ROLES
        )
        self._casts = np.array([p.backend != "bf16" for p in precision])
        self._rows: dict[int, dict[str, Tensor]] = {}
        self._on = False
        for index, layer in enumerate(layers.values()):
            self._attach(layer, index * len(_ROLES))

    @contextmanager
    def measuring(self, on: bool) -> Iterator[None]:
        """Measure the forward and the backward pass inside the block, if `on`."""
        self._on, self._rows = on, {}
        yield
        self._on = False

    def take(self) -> StatisticColumns:
        """The statistics of the last measured pass, each of shape (E, rows)."""
        shape = (len(self._casts), len(self.identities))
        fields = torch.stack(
            [torch.stack([self._rows[row][f] for row in range(shape[1])], -1) for f in _FIELDS]
        )
        values = fields.cpu().numpy()
        columns: dict[str, np.ma.MaskedArray[Any, Any]] = {}
        for rows in self._rows_by_width():
            channels = torch.stack([self._rows[row]["channel_sum2"] for row in rows], 1)
            sums = self._sums(values[:, :, rows], rows, channels.cpu().numpy())
            for name, part in sums.statistics().items():
                whole = columns.setdefault(name, np.ma.MaskedArray(np.zeros(shape), mask=True))
                whole[:, rows] = part
        return columns

    def _rows_by_width(self) -> list[list[int]]:
        by_width: dict[int, list[int]] = {}
        for row in range(len(self.identities)):
            by_width.setdefault(self._rows[row]["channel_sum2"].shape[-1], []).append(row)
        return list(by_width.values())

    def _sums(self, values: Any, rows: list[int], channels: Any) -> TensorSums:
        scaled = np.array([FORMATS[self.identities[row].format].scaled for row in rows])
        return TensorSums(
            **dict(zip(_FIELDS, values, strict=True)),
            amax_rank=np.zeros(values.shape[1:]),
            quantized=self._casts[:, None] & scaled,
            channel_sum2=channels,
        )

    def _attach(self, layer: GemmLinear, row: int) -> None:
        def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._on:
                return
            self._measure(layer, "input", row, args[0])
            self._measure(layer, "weight", row + 1, layer.gemm_weight())
            output.register_hook(backward)  # type: ignore[no-untyped-call]

        def backward(gradient: Tensor) -> None:
            self._measure(layer, "grad_output", row + 2, gradient)

        layer.register_forward_hook(forward)

    def _measure(self, layer: GemmLinear, role: str, row: int, x: Tensor) -> None:
        cast = layer.operand(role)
        scale = cast.scale
        if scale is None and isinstance(layer, Fp8Linear):
            # Some models or all decide by this tensor, and it has not been cast yet.
            scale = layer.scaling_of(role).peek(x)
        self._rows[row] = tensor_sums(x.detach(), format=cast.format, scale=scale, lead=1)
