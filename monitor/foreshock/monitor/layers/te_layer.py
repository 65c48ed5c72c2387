"""One watched layer of Transformer Engine, and one counted call of it.

What is common to all kinds of layers: how quantizers cast, whose rows there are, and how a tensor
gets into one. Imports nothing of Transformer Engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from foreshock.monitor import te_exact
from foreshock.monitor.entry import Entry
from foreshock.monitor.layers.adapter import HookContext
from foreshock.monitor.layers.te_history import History
from foreshock.monitor.layers.te_operands import Cast, Codes
from foreshock.monitor.operands import DTYPE_FORMATS, Operand
from foreshock.monitor.record import TensorIdentity

__all__ = ["Call", "Layer"]

# One of each, so that one like the last is known at sight.
_PLAIN: Final = defaultdict(
    lambda: Operand("fp32", None),
    {dtype: Operand(format, None) for dtype, format in DTYPE_FORMATS.items()},
)


class Layer(ABC):
    """One watched layer."""

    def __init__(self, name: str, context: HookContext, history: History) -> None:
        self.name = name
        self.context = context
        self.collector = context.collector
        self.history = history
        self.repeats = False
        self._casts: dict[tuple[str, int], Cast] = {}
        self._entries: dict[tuple[str, str, str, int], Entry] = {}

    def cast(self, module: nn.Module, direction: str, position: int) -> Cast | None:
        """How the quantizer at a position casts; None if there is none."""
        known = getattr(module, "quantizers", {}).get(direction) or ()
        if position >= len(known):
            return None
        found = self._casts.get((direction, position))
        if found is None or found.quantizer is not known[position] or not found.current:
            found = Cast.of(module, known[position])
            self._casts[direction, position] = found
        return found

    def entry(self, layer: str, role: str, cast: Cast, index: int) -> Entry:
        """Whose scale and largest magnitude those of a quantizer are."""
        format = cast.after.format
        key = layer, role, format, index
        found = self._entries.get(key)
        if found is None:
            granularity = cast.after.granularity
            identity = TensorIdentity(layer, role, format, index, granularity=granularity)
            found = self._entries[key] = Entry(identity, None, source="history")
        return found

    def ran(
        self,
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        """After a call."""
        if not self.context.counts(module):
            return
        self.context.begins()
        if not self.collector.wants or te_exact.took_over(module):
            return
        index = self.context.next_call(self.name)
        self.repeats = self.repeats or index > 0
        self.look(Call(self, module, index), args, kwargs, output)

    @abstractmethod
    def look(
        self, call: Call, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        """Measure what a counted call left."""


@dataclass(frozen=True, slots=True)
class Call:
    """One counted call of a layer."""

    layer: Layer
    module: nn.Module
    index: int

    @property
    def fp8(self) -> bool:
        """Whether it ran in FP8; a layer knows since its forward pass."""
        return bool(getattr(self.module, "fp8", False))

    def cast(self, direction: str, position: int) -> Cast | None:
        """How the quantizer at a position casts, or None."""
        return self.layer.cast(self.module, direction, position)

    def values(
        self, layer: str, role: str, x: torch.Tensor, cast: Cast | None, *, before: bool = False
    ) -> None:
        """Measure a tensor, after its cast unless told otherwise."""
        if cast is None or not self.fp8:
            operand = _PLAIN[getattr(self.module, "activation_dtype", x.dtype)]
        else:
            operand = cast.before if before else cast.after
        self.layer.collector.observe(layer, role, x, operand, call_index=self.index)

    def codes(self, layer: str, role: str, codes: Codes, cast: Cast | None) -> None:
        """Measure the codes of a tensor."""
        if cast is not None:
            self.layer.collector.observe_codes(
                layer,
                role,
                codes.data,
                format=cast.after.format,
                scale_inv=codes.scale_inv,
                call_index=self.index,
            )

    def kept(self, rows: Sequence[tuple[str, str, Cast | None]]) -> None:
        """Keep largest magnitudes and scales in force, of tensors by layer and role."""
        if not self.layer.collector.measuring or self.layer.collector.recording:
            return
        entries: list[Entry] = []
        values: list[torch.Tensor] = []
        for layer, role, cast in rows:
            if cast is not None and cast.kept is not None:
                entries.append(self.layer.entry(layer, role, cast, self.index))
                values += cast.kept
        if entries:
            self.layer.history.add(entries, values, lasting=self.lasting)

    @property
    def lasting(self) -> bool:
        """Whether this call's scales and largest magnitudes stay as they are for now.

        A layer that is called again goes on with its largest magnitudes.
        """
        return self.layer.collector.lasting and not self.layer.repeats

    def weighs(self, layer: str) -> bool:
        """Whether the layer's weight is still to be measured in this step."""
        return self.layer.collector.weighs(layer)
